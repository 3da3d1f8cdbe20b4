"""MoA: every head keeps the first tokens and a span of recent ones that grows with the input.  (arXiv 2406.14909)

Some heads need a fixed window, others one that grows with the text. Each KV head has a rule (alpha, beta) from a
profile: its span is alpha + beta N. The rules come from a calibration that estimates, from gradients, what masking
every block costs, and picks the cheapest rules under a memory budget; spans.py has its parts.

    N        the prompt's tokens + `new_tokens`, fixed when the prompt ends
    size     c = int(alpha + beta N), at most N, at least `minimum`, then rounded up to a multiple of `multiple`
    prompt   query i reads key j <= i when i - j < c - sinks or j < sinks
    decode   the new token first takes the place of the oldest recent one, then attends: a full head sees c keys, the
             first `sinks` and the last c - sinks, itself included. Keys keep their rotary positions.

Profile "moa": tables alpha, beta [layers, Hkv], float64. Storage is packed per head. A later piece of text reads what
is held, causally, and is then cut to c again; the pieces of a chunked prompt are dense, and cut at its end, because N
is not known before.

Differs from the authors' code: prompts are masked to the token (theirs: blocks of 64; `Rules.layouts` has them), GQA
keeps one rule per KV head (theirs repeats the keys), padded batches and prompts below 64 tokens work.
Cost of a decode step O(c D) per head, one slot overwritten in place. Alone: it drops before it reads. OptionError
unless minimum > sinks, ProfileError without tables of the model's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.attention import Window, attend
from foveate.methods.cache import Change, DropRagged, KeepRagged
from foveate.methods.calibrated import Calibrated, check_table, table_profile
from foveate.methods.profile import ModelIdentity, Profile
from foveate.methods.ring import Ring
from foveate.methods.step import Phase, Reading, Step
from foveate.options import option
from foveate.registry import register


@dataclass
class Spans:
    """size: [B, Hkv] int64 on the host, keys each head may hold. rings: per KV head, once some head was cut."""

    size: Tensor
    rings: list[Ring]


@register(
    "moa",
    kind="keep",
    paper="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
    arxiv="2406.14909",
    year=2024,
    applies_to="pretrained, calibrated",
    exact={"minimum": 10**6},
    small={"sinks": 4, "minimum": 12, "multiple": 4, "new_tokens": 12},
    calibration="moa",
    claim=(
        "Bundled model, 1.5k tokens, 4 seeds: spans calibrated at 768 tokens stored 192 and 412 keys and gave "
        "perplexity 30.1 and 26.3 and no needle; one window for all heads with 384 and 768 keys 27.9 and "
        "24.5, needles 0.00 and 0.25 (dense 24.8 and 1.00): not reproduced here "
        "(benchmarks/results/claims/moa.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class MoA(Calibrated):
    """Each KV head keeps the first tokens and a span of recent ones that a calibrated rule makes of the length."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"prefill", "extend", "decode"})
    evicts: ClassVar[bool] = True
    ragged: ClassVar[bool] = True
    alone: ClassVar[bool] = True
    calibration: ClassVar[str] = "moa"

    sinks: int = option(64, "first tokens that always stay, part of a head's size", at_least=0)
    minimum: int = option(128, "keys that a head holds at least", at_least=1)
    multiple: int = option(64, "sizes are rounded up to a multiple of this", at_least=1)
    new_tokens: int = option(512, "tokens expected to be generated; spans grow with prompt and these", at_least=0)

    def check(self) -> None:
        if self.minimum <= self.sinks:
            raise self.refuse("minimum", f"> sinks={self.sinks}, which are part of it")

    @staticmethod
    def example_profile(model: ModelIdentity) -> Profile:
        """A made-up profile: the first KV head of a layer has a fixed window, the last keeps everything."""
        beta = torch.linspace(0, 1, model.kv_heads, dtype=torch.float64).expand(model.layers, -1)
        return table_profile("moa", model, alpha=torch.zeros_like(beta), beta=beta.contiguous())

    def check_profile(self, profile: Profile) -> None:
        for name in ("alpha", "beta"):
            check_table(profile, name, (profile.model.layers, profile.model.kv_heads))

    def sizes(self, step: Step) -> Tensor:
        """Keys that each head may hold: int64 [B, Hkv] on the host; the step holds the whole prompt."""
        prompt = torch.as_tensor(step.real_tokens()).cpu().expand(step.q.shape[0])
        alpha, beta = (self.table(name)[step.layer].double().cpu() for name in ("alpha", "beta"))
        return cache_sizes(alpha, beta, prompt[:, None] + self.new_tokens, minimum=self.minimum, multiple=self.multiple)

    # --- reading

    def attend(self, step: Step) -> Tensor:
        if step.phase == "prefill" and not step.run.chunked:
            return self._attend_prompt(step)
        if step.phase == "decode" and isinstance(step.state, Spans):
            change = self._slide(step) if step.cache.ragged else self._cut(step)
            if change is not None:
                step.cache.apply(change)
        return step.attend()

    def _attend_prompt(self, step: Step) -> Tensor:
        """Heads with the same size, and rows with the same sizes, together."""
        size = self.sizes(step)
        if int(size.min()) >= step.cache.stored:
            return step.attend()
        out = torch.empty(*step.q.shape[:3], step.v.shape[-1], dtype=step.q.dtype, device=step.q.device)
        same = bool((size == size[:1]).all())
        for rows in [slice(None)] if same else [slice(b, b + 1) for b in range(size.shape[0])]:
            for c in size[rows][0].unique().tolist():
                heads = (size[rows][0] == c).nonzero()[:, 0].to(step.q.device)
                out = self._attend_heads(step, out, rows, heads, c)
        self._record(step, size)
        return out

    def _attend_heads(self, step: Step, out: Tensor, rows: slice, heads: Tensor, c: int) -> Tensor:
        G = step.group
        own = (heads[:, None] * G + torch.arange(G, device=heads.device)).flatten()
        at = step.positions
        if at.q is not None or at.k is not None:
            q_at, k_at = (
                None if each is None else each[rows if each.shape[0] > 1 else slice(None)] for each in (at.q, at.k)
            )
            at = type(at)(q_at, k_at, at.holes, at.ordered)
        out[rows, own] = attend(
            step.q[rows].index_select(1, own),
            step.k[rows].index_select(1, heads),
            step.v[rows].index_select(1, heads),
            Window(left=c - self.sinks - 1, sinks=self.sinks),
            scale=step.scale,
            positions=at,
            window=step.window,
            sink=None if step.sink is None else step.sink[own],
            softcap=step.softcap,
        )
        return out

    def _record(self, step: Step, size: Tensor) -> None:
        if step.run.record:
            M, N = step.m, step.cache.stored
            dense = M * (N - M) + M * (M + 1) / 2
            shares = [Window(left=c - self.sinks - 1, sinks=self.sinks).density(M, N) for c in size.flatten().tolist()]
            step.run.readings.append(Reading(step.layer, step.phase, dense * sum(shares) / len(shares), dense))

    # --- keeping

    def keep(self, step: Step) -> Change | None:
        if step.phase == "decode" or step.run.chunked:
            return None
        if step.phase == "prefill":
            step.state = Spans(self.sizes(step), [])
        return self._cut(step) if isinstance(step.state, Spans) else None

    def prompt_ends(self, step: Step) -> Change | None:
        step.state = Spans(self.sizes(step), [])
        return self._cut(step)

    def _cut(self, step: Step) -> Change | None:
        """Every head keeps its first tokens and its last ones; also makes the rings anew."""
        cache, size = step.cache, step.state.size
        B, H = cache.shape
        if not cache.ragged and cache.stored <= int(size.min()):
            return None
        newest = step.query_positions().amax(1).tolist()
        mask = torch.zeros(B, H, cache.stored, dtype=torch.bool, device=step.q.device)
        kept: list[list[Tensor]] = [[] for _ in range(H)]
        for b in range(B):
            for h in range(H):
                held = self._held(step, b, h)
                stays = (held >= 0) & ((held < self.sinks) | (held > newest[b] - (int(size[b, h]) - self.sinks)))
                mask[b, h, : held.shape[0]] = stays
                kept[h].append(held[stays])
        rows = [(size[:, h] - self.sinks).tolist() for h in range(H)]
        step.state.rings = [Ring.of(kept[h], self.sinks, rows[h]) for h in range(H)]
        return KeepRagged(mask)

    @staticmethod
    def _held(step: Step, b: int, h: int) -> Tensor:
        packed, held = step.cache.packed, step.cache.positions
        if packed is not None:
            return packed.segment("positions", b * step.cache.shape[1] + h)
        if held is None:
            return torch.arange(step.cache.stored, device=step.q.device)
        return held[b, min(h, held.shape[1] - 1)]

    def _slide(self, step: Step) -> Change | None:
        """The oldest recent token of each head that holds one too many."""
        packed, spans = step.cache.packed, step.state
        assert packed is not None
        B, H = step.cache.shape
        gone = [
            (b * H + h, spans.rings[h].turn(b))
            for b in range(B)
            for h in range(H)
            if packed.length[b * H + h] > int(spans.size[b, h])
        ]
        return DropRagged(tuple(gone)) if gone else None


def cache_sizes(alpha: Tensor, beta: Tensor, length: int | Tensor, *, minimum: int, multiple: int) -> Tensor:
    """Keys per head, int64 like alpha + beta length: int(alpha + beta length), at most length, at least minimum, then
    rounded up to a multiple (so it may exceed the length). alpha, beta: float64; length: prompt and new tokens."""
    span = (alpha + beta * length).trunc().long()
    capped = torch.minimum(span, torch.as_tensor(length)).clamp_min(minimum)
    return -(-capped // multiple) * multiple
