"""The calibration of MoA: one elastic span per KV head, from what masking attention costs to first order.

Each sample is a synthetic prompt with passkeys, of `length` tokens. The model runs once; the loss is its cross-entropy
on the questions and answers. From the gradient of the loss at every layer's attention output follows the influence of
masking every attention entry (methods.keep.spans.influence); |influence| is summed over blocks and averaged over
samples. A rule (alpha, beta) costs the influence of the blocks that it masks at `length`, and stores as many blocks as
its widest row has. The rules with the least total influence within `bound` of the dense cache win, exactly.

Of a KV head's query heads the greatest influence of each block counts. Layers with a sliding window of their own
get the rule of a dense head, which is never read.

Differs from the authors' code: one length instead of three, an exact search for it without their limit of two rules
per layer (theirs: a mixed-integer program over several lengths), no choice among Pareto-optimal plans on a validation
text, and synthetic prompts (theirs: summaries and answers that the dense model wrote). The authors' settings are
lengths 2048, 4096 and 8192, block 64, bound 0.5.

Cost per sample: a forward and a backward, and O(Hq N^2) memory for one layer at a time; O(layers Hq N) is kept between.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.hf.apply import apply
from foveate.hf.calibrations.base import Calibration, Found, Work, calibration, frozen
from foveate.hf.calibrations.passkeys import ORDINALS, PasskeyPrompts
from foveate.methods.base import Method
from foveate.methods.keep.spans import Rules, allocate, block_influence, candidate_rules, influence, masked_loss
from foveate.methods.step import Phase, Step
from foveate.options import option


@dataclass
class Heard:
    """What one layer had: q [1, Hq, N, D], k, v [1, Hkv, N, D], o [1, Hq, N, Dv] in the graph of the loss."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    scale: float


@dataclass(frozen=True, kw_only=True)
class Listen(Method):
    """Dense attention that keeps what it read and gave, for gradients."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"prefill"})

    heard: dict[int, Heard] = field(default_factory=dict)

    def attend(self, step: Step) -> Tensor:
        o = step.attend()
        if not o.requires_grad:
            # The weights are frozen, so the first output is where the graph begins.
            o.requires_grad_()
        self.heard[step.layer] = Heard(step.q.detach(), step.k.detach(), step.v.detach(), o, step.scale)
        return o


@calibration("moa")
@dataclass(frozen=True, kw_only=True)
class MoACalibration(Calibration):
    """Settings of the profile and of the search."""

    length: int = option(768, "tokens per sample, a multiple of block", at_least=1)
    target: int | None = option(None, "longest length that spans must fit; default: twice length", at_least=1)
    block: int = option(64, "tokens per block", at_least=1)
    samples: int = option(8, "prompts", at_least=1)
    bound: float = option(0.5, "share of the dense cache that all heads may store", above=0, at_most=1)
    alphas: int = option(17, "values of alpha tried, from one block below 0 to length", at_least=2)
    betas: int = option(9, "values of beta tried, from 0 to 1", at_least=2)
    passkeys: int = option(4, "passkeys per prompt", at_least=1, at_most=len(ORDINALS))
    words: int = option(8, "words per passkey", at_least=1)
    seed: int = option(0, "seed of the prompts", at_least=0)
    text: str | None = option(None, "a UTF-8 file of filler prose; default: the English prose of Python's manual")

    def check(self) -> None:
        if self.length % self.block or self.length == self.block:
            raise self.refuse("length", f"a multiple of block={self.block}, at least two of them")
        if self.target is not None and self.target < self.length:
            raise self.refuse("target", f">= length={self.length}")

    def run(self, model: Any, tokenizer: Any, work: Work) -> Found:
        prompts = PasskeyPrompts(tokenizer, (self.length,), self.passkeys, self.words, self.text)
        listen, total = Listen(), dict[int, Tensor]()
        with frozen(model), apply(model, listen):
            for number in work.track(range(self.samples), "moa", self.samples):
                ids, asked = prompts.sample(f"moa {self.seed} {number}")
                loss = self._loss(model, ids.to(model.device), asked.to(model.device))
                outputs = [each.o for each in listen.heard.values()]
                for (layer, heard), grad in zip(listen.heard.items(), torch.autograd.grad(loss, outputs)):
                    made = influence(heard.q, heard.k, heard.v, grad, scale=heard.scale)
                    blocks = block_influence(made, self.block)[0].double().cpu() / self.samples
                    total[layer] = total.get(layer, torch.zeros_like(blocks)) + blocks
                work.note(f"loss {loss.item():.3f}")
                listen.heard.clear()
        heads = work.identity.kv_heads
        tables = torch.stack([total[layer].unflatten(0, (heads, -1)).amax(1) for layer in sorted(total)])
        return self._search(tables, sorted(total), work.identity.layers)

    def _loss(self, model: Any, ids: Tensor, asked: Tensor) -> Tensor:
        """Cross-entropy of the questions and answers in the last `length` tokens; the first token stays the first."""
        ids = torch.cat((ids[:, :1], ids[:, ids.shape[1] - self.length + 1 :]), 1)
        asked = asked[:, asked.shape[1] - self.length + 1 :]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits[asked].float(), ids[:, 1:][asked])

    def _search(self, tables: Tensor, layers: list[int], count: int) -> Found:
        """tables: [heard layers, Hkv, n, n]."""
        rules = self.rules()
        layouts = rules.layouts(self.length, self.block)
        sizes = layouts.sum(-1).amax(-1)
        loss = masked_loss(tables, layouts).flatten(0, 1)
        budget = int(self.bound * loss.shape[0] * (self.length // self.block))
        chosen = allocate(loss, sizes, budget)
        alpha = torch.zeros(count, tables.shape[1], dtype=torch.float64)
        beta = torch.ones_like(alpha)
        alpha[layers], beta[layers] = (each[chosen].view(tables.shape[:2]) for each in (rules.alpha, rules.beta))
        facts = {
            "stored_share": float(sizes[chosen].sum()) / (loss.shape[0] * layouts.shape[-1]),
            "masked_influence": float(loss.gather(1, chosen[:, None]).sum()),
            "whole_influence": float(tables.sum()),
        }
        return Found({"alpha": alpha, "beta": beta}, facts)

    def rules(self) -> Rules:
        """The candidates."""
        alphas = torch.linspace(-self.block, self.length, self.alphas, dtype=torch.float64)
        betas = torch.linspace(0, 1, self.betas, dtype=torch.float64)
        target = 2 * self.length if self.target is None else self.target
        return candidate_rules(alphas, betas, profiled=self.length, target=target, least=2 * self.block)
