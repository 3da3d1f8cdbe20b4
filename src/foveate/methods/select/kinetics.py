"""Kinetics: what decoding costs once memory traffic counts, and block top-k attention that pays for it.  (2506.05333)

Generating means reading the KV cache over and over, which grows with the square of the length while arithmetic on
parameters does not. `KineticsCost` adds both up (eFLOPs); `Kinetics` is the sparse attention that shifts the balance.

Costs are in units of 1e12, as (compute, memory): P parameters, H query heads, Hk KV heads, d = head_dim x layers,
I the hardware's operations per element read, L_in and L_out tokens of prompt and generation, n trials.

    dense   compute = n (2 P L_out + 2 (2 L_in + L_out) L_out H d)    memory = I 2 (2 L_in + n L_out) L_out Hk d
    top-k   compute = n (2 P L_out + 4 T H d)    memory = n I 4 T Hk d    T = b L_out - max(0, b - L_in)^2 / 2
    block   as top-k with b = local + blocks x block, and for the search
            compute += n floor((2 L_in + L_out) / block) L_out H d
            memory  += I floor((2 L_in + n L_out) / block) L_out Hk d

The prompt's cache is shared by the trials of the dense model only; parameter traffic is neglected (large batches).
The released top-k cost adds the square where block top-k subtracts it; subtracting is right.

Decode rules, per KV head, N keys, scores z = q . k / sqrt(D) averaged over the G query heads of the group:

    block     where N > (4 + local + blocks block) rounded up to a multiple of block: from token `sinks` on there are
              floor((N - local - sinks) / block) blocks; read the sinks, the `blocks` of highest mean z, and the rest
    strided   where N > sinks + local and a block fits between: overlapping blocks, `stride` apart; the 2 blocks best,
              of whose tokens the first blocks x block count; read the sinks, these, and the last `local`
    token     where N > sinks + budget + local, budget = blocks x block: the `budget` highest z of [sinks, N - local)
    random    the same number drawn evenly; `correct` adds log(number between) - log(budget) to their scores
    local     sinks and the last `local` alone
    oracle    budget keys drawn, with repetition, by the true weights of each query head; their values are averaged

"block" keeps one mean key per block (float32 sums, 2 / block of the keys' bytes in bfloat16), so a step costs
O(N / block D) and the keys it reads; the other rules score all keys, and are for studies. Prompts and the first
`dense_layers` layers are dense. Draws depend on seed, layer and length, and on the batch. Ties go to the earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate import options
from foveate.attention import attend
from foveate.attention.plan import Dense, Plan, Tokens
from foveate.attention.scoring import query_scores, slots_of, top_mask
from foveate.attention.statistics import by_group
from foveate.errors import OptionError
from foveate.methods.base import Method
from foveate.methods.select.pages import Pages, best_pages, spread
from foveate.methods.select.scores import last_weights
from foveate.methods.step import Phase, Step
from foveate.options import option
from foveate.registry import register

PAPER = "Kinetics: Rethinking Test-Time Scaling Laws"
RULES = ("block", "strided", "token", "random", "local", "oracle")
Lengths = float | Sequence[float] | Tensor


@register(
    "kinetics",
    kind="select",
    paper=PAPER,
    arxiv="2506.05333",
    year=2025,
    applies_to="pretrained",
    exact={"blocks": 10**6},
    small={"blocks": 3, "block": 4, "local": 6, "dense_layers": 0},
    claim=(
        "Bundled model, 2k tokens, 2 windows of 64 steps: reading 0.10, 0.16 and 0.28 of the keys, block "
        "top-k has a KL divergence from dense of 0.192, 0.070 and 0.025, the last tokens alone 0.472, 0.377 "
        "and 0.052, single tokens 0.021, 0.007 and 0.002 (benchmarks/results/claims/kinetics.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class Kinetics(Method):
    """Reads the first tokens, the last ones, and the blocks whose mean keys suit the query group best."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"decode"})

    rule: str = option("block", "how the tokens between the first and the last are chosen", one_of=RULES)
    blocks: int = option(64, "blocks read; times block: the other rules' budget in tokens", at_least=1)
    block: int = option(16, "tokens per block", at_least=1)
    stride: int = option(8, "distance of overlapping blocks under rule 'strided'", at_least=1)
    sinks: int = option(4, "first tokens, always read", at_least=0)
    local: int = option(64, "last tokens, always read", at_least=1)
    dense_layers: int = option(1, "first layers that read everything", at_least=0)
    correct: bool = option(False, "raise the scores of random tokens to stand for those not drawn")
    seed: int = option(0, "of rules 'random' and 'oracle'", at_least=0)

    def check(self) -> None:
        if self.correct and self.rule != "random":
            raise self.refuse("correct", f"False under rule={self.rule!r}; it needs rule='random'")

    @property
    def budget(self) -> int:
        return self.blocks * self.block

    def attend(self, step: Step) -> Tensor:
        if step.phase != "decode" or step.layer < self.dense_layers:
            return step.attend()
        if self.rule == "oracle":
            return self._sampled(step)
        if self.rule == "random" and self.correct:
            return self._corrected(step)
        return step.attend(self.plan(step))

    def plan(self, step: Step) -> Plan:
        if step.phase != "decode" or step.layer < self.dense_layers:
            return Dense()
        if self.rule == "block":
            return self._block_plan(step)
        keep = self._keep(step)
        return Dense() if bool(keep.all()) else Tokens(slots_of(keep))

    # --- by mean keys

    def _block_plan(self, step: Step) -> Plan:
        if step.state is None:
            step.state = Pages("mean", self.block, self.sinks)
        pages: Pages = step.state
        pages.update(step.cache)
        if pages.most <= self.whole:
            return Dense()
        scores = by_group(pages.mean_scores(step.q[:, :, -1]), step.kv_heads)
        tokens = pages.tokens
        if isinstance(tokens, Tensor):
            tokens = spread(tokens, step.kv_heads)
            order = torch.arange(scores.shape[-1], device=scores.device)
            own = (self._middle(tokens) // self.block)[..., None]
            best = top_mask(scores.masked_fill(order >= own, -torch.inf), self.blocks)
            return Tokens(pages.slot_of(slots_of(self._with_blocks(best, tokens, pages.most))))
        middle = int(self._middle(torch.tensor(tokens)))
        chosen = best_pages(scores[..., : middle // self.block], self.blocks)
        inner = torch.arange(self.block, device=chosen.device)
        blocks = (self.sinks + chosen[..., None] * self.block + inner).flatten(2)
        ends = (torch.arange(self.sinks), torch.arange(self.sinks + middle, tokens))
        first, rest = (each.to(blocks.device).expand(*blocks.shape[:2], -1) for each in ends)
        return Tokens(torch.cat((first, blocks, rest), -1))

    @property
    def whole(self) -> int:
        """Tokens up to which rule "block" reads everything."""
        fixed = self.sinks + self.local + self.budget
        return -(-fixed // self.block) * self.block

    def _middle(self, tokens: Tensor) -> Tensor:
        """Tokens in blocks."""
        return ((tokens - self.local - self.sinks).clamp_min(0) // self.block) * self.block

    # --- by all scores

    def _keep(self, step: Step) -> Tensor:
        """Bool [B, Hkv, N]: the slots that are read."""
        if self.rule == "random":
            logits = torch.rand(*step.cache.shape, step.cache.stored, generator=self._draws(step)).to(step.q.device)
        else:
            logits = by_group(query_scores(step.q[:, :, -1], step.k), step.kv_heads)
        held = step.cache.positions
        if held is None or not step.cache.holes:
            return self.choose(logits, torch.full((1, 1), step.cache.stored, device=logits.device))
        order = (held < 0).byte().argsort(dim=-1, stable=True).expand_as(logits)
        by_rank = self.choose(logits.gather(2, order), (held >= 0).sum(-1))
        return torch.zeros_like(by_rank).scatter(2, order, by_rank)

    def choose(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Which tokens are read: group means of scores [B, Hkv, N] of a row's `tokens` [B or 1, Hkv or 1] first ones,
        the rest to be ignored -> bool [B, Hkv, N]. Rules block, strided, token, random and local."""
        n = logits.shape[-1]
        rank, tokens = torch.arange(n, device=logits.device), tokens[..., None]
        if self.rule == "block":
            if n <= self.whole:
                return (rank < tokens).expand_as(logits)
            means = F.pad(logits[..., self.sinks :], (0, -(n - self.sinks) % self.block))
            means = means.unflatten(-1, (-1, self.block)).mean(-1)
            own = self._middle(tokens) // self.block
            means = means.masked_fill(torch.arange(means.shape[-1], device=means.device) >= own, -torch.inf)
            return self._with_blocks(top_mask(means, self.blocks), tokens[..., 0], n)
        real = rank < tokens
        between = (rank >= self.sinks) & (rank < tokens - self.local)
        if self.rule == "strided":
            picked = self._strided(logits, tokens)
            active = tokens - self.local - self.sinks >= self.block
        elif self.rule == "local":
            picked, active = torch.zeros_like(logits, dtype=torch.bool), tokens > self.sinks + self.local
        else:
            picked = top_mask(logits.masked_fill(~between, -torch.inf), self.budget)
            active = tokens > self.sinks + self.budget + self.local
        return torch.where(active, (real & ~between) | picked, real)

    def _with_blocks(self, best: Tensor, tokens: Tensor, n: int) -> Tensor:
        """Sinks, the `best` blocks (bool [B, Hkv, blocks]) and the rest of a row's tokens: bool [B, Hkv, n]."""
        rank, tokens = torch.arange(n, device=best.device), tokens[..., None]
        real = rank < tokens
        inside = (rank >= self.sinks) & (rank < self.sinks + self._middle(tokens))
        picked = F.pad(best.repeat_interleave(self.block, -1), (self.sinks, self.block))[..., :n] & inside
        return torch.where(tokens > self.whole, (real & ~inside) | picked, real)

    def _strided(self, logits: Tensor, tokens: Tensor) -> Tensor:
        if logits.shape[-1] < self.sinks + self.block:
            return torch.zeros_like(logits, dtype=torch.bool)
        windows = logits[..., self.sinks :].unfold(-1, self.block, self.stride)
        ends = self.sinks + torch.arange(windows.shape[-2], device=logits.device) * self.stride + self.block
        means = windows.mean(-1).masked_fill(ends > tokens - self.local, -torch.inf)
        best = top_mask(means, 2 * self.blocks)
        starts = (ends - self.block).expand_as(best)
        covered = torch.zeros(*logits.shape[:-1], logits.shape[-1] + 1, dtype=torch.int64, device=logits.device)
        covered.scatter_add_(-1, starts, best.long())
        covered.scatter_add_(-1, starts + self.block, -best.long())
        union = covered.cumsum(-1)[..., :-1] > 0
        return union & (union.cumsum(-1) <= self.budget)

    # --- by drawing

    def _draws(self, step: Step) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self.seed, step.layer, step.cache.seen)) % 2**63)

    def _corrected(self, step: Step) -> Tensor:
        """Random keys, each with the weight of those it stands for."""
        keep, held = self._keep(step), step.positions.keys(step.cache.stored, step.q.device)
        tokens = torch.as_tensor(step.real_tokens(), device=keep.device).view(-1, 1, 1)
        rank = torch.where(held >= 0, (held >= 0).cumsum(-1) - 1, -1)
        between = tokens - self.local - self.sinks
        stands_for = (between.clamp_min(1) / self.budget).log().clamp_min(0)
        drawn = keep & (rank >= self.sinks) & (rank < tokens - self.local)
        weight = torch.where(drawn, stands_for, 0.0)
        if step.cache.log_weight is not None:
            weight = weight + step.cache.log_weight
        plan = Tokens(slots_of(keep))
        step.record(plan)
        return attend(
            step.q,
            step.k,
            step.v,
            plan,
            scale=step.scale,
            positions=step.positions,
            window=step.window,
            log_weight=weight,
            sink=step.sink,
            softcap=step.softcap,
        )

    def _sampled(self, step: Step) -> Tensor:
        """The mean of values drawn by the query heads' own weights."""
        weights = last_weights(step)
        picks = torch.multinomial(weights.cpu().flatten(0, 1), self.budget, True, generator=self._draws(step))
        picks = picks.view(*weights.shape[:2], self.budget).to(weights.device)
        step.record(Tokens(picks))
        values = step.v.repeat_interleave(step.group, 1)
        return values.gather(2, picks[..., None].expand(-1, -1, -1, values.shape[-1])).mean(2, keepdim=True)


@register(
    "kinetics-cost",
    kind="model",
    paper=PAPER,
    arxiv="2506.05333",
    year=2025,
    applies_to="any decoder",
    claim=(
        "Counted in eFLOPs, attention outweighs the parameters from 64 tokens on for 0.6B to 8B models (384 "
        "for 32B), counted in FLOPs from 12k to 72k tokens; block top-k costs 0.15 to 0.23 of dense at 8k "
        "tokens (benchmarks/results/claims/kinetics.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class KineticsCost:
    """What generating costs a model in eFLOPs: arithmetic, and memory traffic at the hardware's exchange rate.

    Costs are float64 [..., 2], (compute, memory) in units of 1e12; lengths may be numbers or tensors of them.
    """

    params: float = option(..., "active parameters", above=0)
    heads: int = option(..., "query heads", at_least=1)
    kv_heads: int = option(..., "key-value heads", at_least=1)
    width: int = option(..., "head size times layers", at_least=1)
    intensity: float = option(562.5, "operations the hardware does while it reads one element", above=0)

    def __post_init__(self) -> None:
        options.check_fields(self)
        if self.heads % self.kv_heads:
            raise OptionError(f"KineticsCost: heads={self.heads}, allowed: a multiple of kv_heads={self.kv_heads}")

    def dense(self, prompt: float, generated: Lengths, trials: int = 1) -> Tensor:
        """Every generated token reads the whole cache."""
        out = _lengths(prompt, generated, trials)
        attention = 2 * (2 * prompt + out) * out * self.heads * self.width
        memory = self.intensity * 2 * (2 * prompt + trials * out) * out * self.kv_heads * self.width
        return _cost(trials * (2 * self.params * out + attention), memory)

    def topk(self, prompt: float, generated: Lengths, trials: int = 1, *, budget: int) -> Tensor:
        """At most `budget` keys are read per token, found at no cost."""
        out = _lengths(prompt, generated, trials)
        read = budget * out - (budget - torch.as_tensor(prompt, dtype=torch.float64)).clamp_min(0) ** 2 / 2
        compute = trials * (2 * self.params * out + 4 * read * self.heads * self.width)
        return _cost(compute, trials * self.intensity * 4 * read * self.kv_heads * self.width)

    def block_topk(
        self, prompt: float, generated: Lengths, trials: int = 1, *, local: int, block: int, blocks: int
    ) -> Tensor:
        """`blocks` blocks and the last `local` keys are read per token, found by one score per block."""
        out = _lengths(prompt, generated, trials)
        compute = trials * torch.floor((2 * prompt + out) / block) * out * self.heads * self.width
        memory = self.intensity * torch.floor((2 * prompt + trials * out) / block) * out * self.kv_heads * self.width
        return self.topk(prompt, generated, trials, budget=local + blocks * block) + _cost(compute, memory)

    @classmethod
    def of(cls, config: Any, params: float, intensity: float = 562.5) -> KineticsCost:
        """From a transformers configuration and the number of active parameters."""
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            params=params,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            width=size * config.num_hidden_layers,
            intensity=intensity,
        )


def _lengths(prompt: float, generated: Lengths, trials: int) -> Tensor:
    out = torch.as_tensor(generated, dtype=torch.float64)
    if prompt < 0 or trials < 1 or bool((out < 0).any()):
        raise OptionError(f"prompt={prompt}, generated={generated}, trials={trials}, allowed: >= 0, >= 0 and >= 1")
    return out


def _cost(compute: Tensor, memory: Tensor) -> Tensor:
    return torch.stack((compute, memory), -1) * 1e-12


def coverage(correct: int, samples: int, trials: int) -> float:
    """Chance that one of `trials` answers drawn from `samples`, `correct` of them right, is right: pass@n."""
    if not (0 <= correct <= samples and 1 <= trials <= samples):
        raise OptionError(
            f"correct={correct}, samples={samples}, trials={trials}, allowed: 0 <= correct <= samples and "
            "1 <= trials <= samples"
        )
    return 1.0 - math.comb(samples - correct, trials) / math.comb(samples, trials)


def frontier(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Indices of the runs that no cheaper or equally cheap run reaches in score, by rising cost."""
    if len(costs) != len(scores):
        raise OptionError(f"{len(costs)} costs and {len(scores)} scores, allowed: as many")
    best, kept = -math.inf, []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if scores[index] > best:
            best = scores[index]
            kept.append(index)
    return kept
