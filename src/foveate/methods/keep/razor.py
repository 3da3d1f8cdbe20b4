"""RazorAttention: echo and induction heads keep everything, others one token for all they drop.  (arXiv 2407.15891)

Few heads can fetch information from anywhere. They are known by what they do on repeated random tokens
(`foveate calibrate razor`): echo heads attend to earlier copies of the current token, induction heads to what followed
them. All other KV heads keep sinks, the last L tokens and one compensation token, the mean of what was dropped,
weighted by how many it stands for, so that neither the softmax denominator nor the average content is lost.

    retrieval heads   top `induction` share of the KV heads by induction score, and top `echo` share by echo score; a KV
                      head's score is the maximum over its query heads (`reduce`)
    elsewhere, after a prompt of N tokens: L = max(least, ceil(N / compression)), sinks, N_d = N - sinks - L
    compensation      k^ = mean of the N_d dropped keys (as rotated), v^ likewise; its score is q k^ scale + log N_d
    later             tokens that leave the last L are folded in: k^ += (k - k^) / (N_d + 1), N_d += 1; L stays

The prompt itself is attended to exactly. Means are kept in float32. N_d = 1 is exact (the token stands for itself).
Per compressed head and layer: sinks + L + 1 keys and two float32 vectors; decoding costs O(N) for retrieval heads only.

No official code exists. What the paper leaves open: the reduction over a GQA group (maximum here), and rounding (share
x heads, to the nearest, at least one where the share is not 0). A KV head without scores (NaN: a sliding window of its
own) is left as it is. The variant for ALiBi models needs no probe; `alibi_reach` gives its distance per head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from foveate.attention.statistics import by_group
from foveate.errors import OptionError
from foveate.methods.budgets import TwoClass, top_share
from foveate.methods.cache import Change, DropRagged, KeepRagged
from foveate.methods.calibrated import Calibrated, check_table, table_profile
from foveate.methods.profile import ModelIdentity, Profile
from foveate.methods.ring import Ring
from foveate.methods.step import Step
from foveate.options import option
from foveate.registry import register


@dataclass
class RazorState:
    """What the compressed heads of one layer have dropped.

    last: int64 [B] on the host, L. dropped: int64 [B] on the host, how many tokens the compensation token stands for
    (1 or 0: nothing was dropped). mean_k: float32 [B, C, D], mean_v: [B, C, Dv], means over them, C compressed heads.
    """

    last: Tensor
    dropped: Tensor
    mean_k: Tensor
    mean_v: Tensor
    ring: Ring


@register(
    "razor",
    kind="keep",
    paper="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
    arxiv="2407.15891",
    year=2024,
    applies_to="pretrained, calibrated",
    exact={"induction": 1.0},
    small={"induction": 0.34, "least": 8, "compression": 8.0},
    calibration="razor",
    claim=(
        "Bundled model, 1k tokens, a third of the keys, 4 seeds: with probed heads a passkey costs 0.69 nats "
        "per token, with random heads 2.52 to 2.58 (dense 0.22); found whole 0.25 in both (dense 1.00). The "
        "compensation token does not help: perplexity with every head compressed 24.4, without it 22.7 (dense "
        "14.4) (benchmarks/results/claims/razor.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class Razor(Calibrated):
    """Echo and induction heads keep all keys; others keep sinks, a window and one weighted mean of what they drop."""

    evicts: ClassVar[bool] = True
    ragged: ClassVar[bool] = True
    calibration: ClassVar[str] = "razor"

    induction: float = option(
        0.14, "share of the KV heads that are kept whole by induction score", at_least=0, at_most=1
    )
    echo: float = option(0.01, "share of the KV heads that are kept whole by echo score", at_least=0, at_most=1)
    least: int = option(4000, "fewest last tokens that a compressed head keeps", at_least=1)
    compression: float = option(
        5.0, "a compressed head keeps at least the last 1/compression of the prompt", at_least=1
    )
    sinks: int = option(4, "first tokens that compressed heads keep", at_least=0)
    reduce: str = option("max", "how the query heads of a group are reduced", one_of=("max", "mean"))
    compensate: bool = option(True, "keep the mean of what was dropped as one weighted token")

    @staticmethod
    def example_profile(model: ModelIdentity) -> Profile:
        """A made-up profile: scores rise from the first head of the first layer to the last."""
        scores = torch.linspace(0, 1, model.layers * model.heads).view(model.layers, model.heads)
        return table_profile("razor", model, induction=scores, echo=scores)

    def check_profile(self, profile: Profile) -> None:
        for name in ("induction", "echo"):
            check_table(profile, name, (profile.model.layers, profile.model.heads))

    @cached_property
    def full_heads(self) -> Tensor:
        """Bool [layers, Hkv]: the retrieval heads."""
        model = self.found.model
        full = torch.zeros(model.layers, model.kv_heads, dtype=torch.bool)
        for name, share in (("induction", self.induction), ("echo", self.echo)):
            scores = by_group(self.table(name).float(), model.kv_heads, self.reduce)
            full |= top_share(scores, share) | scores.isnan()
        return full

    @cached_property
    def classes(self) -> TwoClass:
        """What the heads keep of a prompt: the retrieval heads all, the others `fixed` rows and the last L tokens."""
        return TwoClass(self.full_heads, self.compressed)

    def compressed(self, tokens: int) -> int:
        """Rows that a compressed head keeps of a prompt of more tokens than that."""
        return self.fixed + int(self.last(torch.tensor(tokens)))

    def last(self, tokens: Tensor) -> Tensor:
        """L for prompts of these lengths, int64."""
        return torch.ceil(tokens / self.compression).long().clamp_min(self.least)

    @property
    def fixed(self) -> int:
        """Rows before the last tokens: the sinks, and the compensation token at the first dropped position."""
        return self.sinks + int(self.compensate)

    def keep(self, step: Step) -> Change | None:
        full = self.full_heads[step.layer]
        if bool(full.all()) or step.run.chunked:
            return None
        if step.cache.packed is None:
            return self._compress(step, full)
        return self._slide(step, full) if step.phase == "decode" else self._fold(step, full)

    def prompt_ends(self, step: Step) -> Change | None:
        full = self.full_heads[step.layer]
        return None if bool(full.all()) else self._compress(step, full)

    def buffers(self, step: Step) -> Tensor:
        """L of each sequence: int64 [B] on the host. It is set by the prompt and stays."""
        if isinstance(step.state, Tensor):
            return step.state
        tokens = torch.as_tensor(step.real_tokens()).cpu().expand(step.cache.shape[0])
        return self.last(tokens)

    def _compress(self, step: Step, full: Tensor) -> Change | None:
        """From a uniform cache: means of what goes into the slot of the first dropped token, the rest packed."""
        cache, last = step.cache, self.buffers(step)
        step.state = last
        if cache.stored <= self.fixed + int(last.min()):
            return None
        B = cache.shape[0]
        device = step.q.device
        held = torch.arange(cache.stored, device=device).expand(B, -1)
        held = held if cache.positions is None else cache.positions[:, 0].long()
        cutoff = step.query_positions().amax(1) - last.to(device)
        gone = (held >= self.sinks) & (held <= cutoff[:, None])
        stays = (held >= 0) & ~gone
        dropped = gone.sum(1)
        some = (~full).nonzero()[:, 0]
        weight = (gone / dropped.clamp_min(1)[:, None]).float()
        mean_k, mean_v = (
            torch.einsum("bn,bhnd->bhd", weight, each[:, some].float()) for each in (cache.keys, cache.values)
        )
        if self.compensate:
            slot = gone & (held == self.sinks)
            self._write(step, slot, some, mean_k, mean_v, dropped)
            stays = stays | slot
        mask = stays[:, None] | full.to(device)[None, :, None]
        ring = Ring.of([held[b, stays[b]] for b in range(B)], self.fixed, last.tolist())
        step.state = RazorState(last, dropped.cpu(), mean_k, mean_v, ring)
        return KeepRagged(mask)

    @staticmethod
    def _write(step: Step, slot: Tensor, heads: Tensor, mean_k: Tensor, mean_v: Tensor, dropped: Tensor) -> None:
        """Put the means into the slots where `slot` bool [B, N] is True, with the log of how many they stand for."""
        cache = step.cache
        B, H = cache.shape
        N = cache.stored
        keys, values = cache.keys.clone(), cache.values.clone()
        weights = torch.zeros(B, H, N, device=keys.device)
        for b, n in slot.nonzero().tolist():
            keys[b, heads, n] = mean_k[b].to(keys.dtype)
            values[b, heads, n] = mean_v[b].to(values.dtype)
            weights[b, heads, n] = dropped[b].float().log()
        held = cache.positions
        if held is None:
            held = torch.arange(N, device=keys.device)[None, None]
        cache.replace(keys, values, held.expand(B, H, N), weights)

    def _slide(self, step: Step, full: Tensor) -> Change | None:
        """A decode step: the oldest of the last tokens is folded in and goes."""
        packed, state = step.cache.packed, step.state
        assert packed is not None
        assert isinstance(state, RazorState)
        H = step.cache.shape[1]
        heads = self.classes.others[step.layer]
        gone: list[tuple[int, int]] = []
        turned: list[int] = []
        for b in range(step.cache.shape[0]):
            if packed.length[b * H + heads[0]] > self.fixed + int(state.last[b]):
                row = state.ring.turn(b)
                gone += [(b * H + h, row) for h in heads]
                turned.append(b)
        if not gone:
            return None
        if self.compensate:
            rows = torch.tensor([packed.start[segment] + row for segment, row in gone], device=step.q.device)
            leaving = {
                name: packed.fields[name][rows].float().view(len(turned), len(heads), 1, -1)
                for name in ("keys", "values")
            }
            for at, b in enumerate(turned):
                self._fold_in(step, state, b, heads, leaving["keys"][at], leaving["values"][at])
        return DropRagged(tuple(gone))

    def _fold(self, step: Step, full: Tensor) -> Change | None:
        """Several tokens after the prompt: all that left the last L are folded in at once."""
        packed, state = step.cache.packed, step.state
        assert packed is not None
        assert isinstance(state, RazorState)
        B, H = step.cache.shape
        latest = step.query_positions().amax(1)
        heads = self.classes.others[step.layer]
        mask = torch.ones(B, H, step.cache.stored, dtype=torch.bool, device=step.q.device)
        kept = []
        for b in range(B):
            held = packed.segment("positions", b * H + heads[0])
            gone = (held >= self.fixed) & (held <= latest[b] - int(state.last[b]))
            mask[b, heads, : held.shape[0]] = ~gone
            kept.append(held[~gone])
            if self.compensate and bool(gone.any()):
                leaving = [
                    torch.stack([packed.segment(name, b * H + h)[gone] for h in heads]).float()
                    for name in ("keys", "values")
                ]
                self._fold_in(step, state, b, heads, *leaving)
        state.ring = Ring.of(kept, self.fixed, state.last.tolist())
        return KeepRagged(mask)

    def _fold_in(self, step: Step, state: RazorState, b: int, heads: list[int], keys: Tensor, values: Tensor) -> None:
        """Take keys and values [C, n, D], float32, into the means of sequence b and its compensation tokens."""
        packed = step.cache.packed
        assert packed is not None
        H = step.cache.shape[1]
        # The row after the sinks: the compensation token, or still the token itself.
        rows = torch.tensor([packed.start[b * H + h] + self.sinks for h in heads], device=keys.device)
        count, more = int(state.dropped[b]), keys.shape[1]
        for name, mean, new in (("keys", state.mean_k, keys), ("values", state.mean_v, values)):
            field = packed.fields[name]
            if count == 0:
                mean[b] = field[rows].float()
            mean[b] += (new - mean[b][:, None]).sum(1) / (max(count, 1) + more)
            field[rows] = mean[b].to(field.dtype)
        state.dropped[b] = max(count, 1) + more
        packed.fields["log_weight"][rows] = math.log(max(count, 1) + more)


def alibi_reach(
    wq: Tensor, wk: Tensor, slope: float, *, weight: Tensor, bias: Tensor, scale: float, epsilon: float = 1e-3
) -> float:
    """The distance from which an ALiBi head attends with weight at most `epsilon`, by the paper's bound on its scores.

        L = (2 scale |W_Q^T W_K|_2 (|weight|^2 + |bias|^2) - log epsilon) / slope

    Heads with a small L are local, and need L tokens; heads with a large L are retrieval heads.

    Args:
        wq, wk: [D, C], the head's projections as nn.Linear holds them.
        slope: > 0, what one token of distance takes off the scores.
        weight, bias: [C], of the layer norm before the projections.
        scale: of the scores, usually D ** -0.5.
    """
    if slope <= 0 or not 0 < epsilon < 1:
        raise OptionError(f"alibi_reach: slope={slope}, epsilon={epsilon}, allowed: slope > 0, 0 < epsilon < 1")
    norm = torch.linalg.matrix_norm(wq.double().T @ wk.double(), ord=2)
    size = weight.double().square().sum() + bias.double().square().sum()
    return float((2 * scale * norm * size - math.log(epsilon)) / slope)
