"""DuoAttention: retrieval heads keep everything, streaming heads keep sinks and the last tokens.  (arXiv 2410.10819)

Only some KV heads need the distant context. A gate per KV head, alpha in [0, 1], is trained once per model to mix
full attention with sink-and-window attention while the final hidden states stay as they were and the gates become
small (`foveate calibrate duo`). Heads whose gate stays high change the output when truncated: they are retrieval
heads. Here the gates are only thresholded, globally, so that the share `sparsity` of all KV heads streams.

    training    o = (1 - a) o_stream + a o_full.detach(),  a = clamp(alpha, 0, 1),  o_full from an unmodified pass
                stream mask: j <= i and (i - j < window or j < sinks)
    deployment  a head is full iff alpha >= quantile(alpha over layers and KV heads, sparsity)
                first chunk: full attention in all heads, then streaming heads keep positions < sinks and the last
                `window`; later chunks: a streaming head reads what it kept and the chunk, causally, then is truncated
                again (so it sees between window and window + chunk tokens back); a decode step reads
                sinks + window + 1 keys and evicts one, in place. Keys keep their true rotary positions.

Storage is packed per head: (N f + (sinks + window) (1 - f)) keys per layer, f the full heads' share. Decoding costs
O(N) for full heads only.

`variant="kvpress"` (NVIDIA/kvpress): the round(heads x sparsity) lowest gates stream; their prompt keys in
[sinks, N - window) go once, at the end of the prompt; the window does not slide afterwards.

Differs from the authors' code: ties between gates go to the lower layer and head (theirs: random noise of 1e-6);
sinks are the first real tokens of a padded row; sinks and window are exact to the token (their kernel rounds to
blocks of 128 while training); heads are packed instead of reordered. A NaN gate is a head that was never gated (its
layer has a sliding window of its own): it does not count, and is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from foveate.attention.plan import Window
from foveate.attention.softmax import attend
from foveate.errors import ShapeError
from foveate.methods.budgets import TwoClass, lowest_stream, sparsify_heads
from foveate.methods.cache import Change, DropRagged, KeepRagged
from foveate.methods.calibrated import Calibrated, check_table, table_profile
from foveate.methods.profile import ModelIdentity, Profile
from foveate.methods.ring import Ring
from foveate.methods.step import Step
from foveate.options import option
from foveate.registry import register


@register(
    "duo",
    kind="keep",
    paper="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    arxiv="2410.10819",
    year=2024,
    applies_to="pretrained, calibrated",
    exact={"sparsity": 0.0},
    small={"sinks": 4, "window": 12},
    calibration="duo",
    claim=(
        "Bundled model, half of the heads stream, question known, 20 seeds, 2k and 4k tokens: passkey 0.70 "
        "and 0.60, single needle 0.95 and 1.00, all as dense, with 0.59 and 0.55 of the bytes "
        "(benchmarks/results/needles_0.5_aware_duo.json). At 1k tokens, 16 sinks, window 64, 6 seeds: gates "
        "find 0.83 of passkeys and 1.00 of needles (dense 1.00 and 1.00); two random halves 0.00 to 0.50, the "
        "lowest gates 0.00 (benchmarks/results/claims/duo.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class Duo(Calibrated):
    """Retrieval heads keep all keys; streaming heads keep a sliding window; calibrated gates tell them apart."""

    evicts: ClassVar[bool] = True
    ragged: ClassVar[bool] = True
    calibration: ClassVar[str] = "duo"

    sinks: int = option(64, "first tokens that streaming heads keep", at_least=0)
    window: int = option(256, "last tokens that streaming heads keep, the newest included", at_least=1)
    sparsity: float = option(0.5, "share of all KV heads that stream", at_least=0, at_most=1)
    variant: str = option(
        "original",
        "truncate after every chunk and slide, or once at the end of the prompt",
        one_of=("original", "kvpress"),
    )

    @staticmethod
    def example_profile(model: ModelIdentity) -> Profile:
        """A made-up profile: gates rise from the first head of the first layer to the last."""
        count = model.layers * model.kv_heads
        gates = torch.linspace(0, 1, count, dtype=torch.float64).view(model.layers, model.kv_heads)
        return table_profile("duo", model, alpha=gates)

    def check_profile(self, profile: Profile) -> None:
        check_table(profile, "alpha", (profile.model.layers, profile.model.kv_heads))

    @cached_property
    def full_heads(self) -> Tensor:
        """Bool [layers, Hkv]: the retrieval heads."""
        gates = self.table("alpha").double().clamp(0.0, 1.0)
        return (
            lowest_stream(gates, self.sparsity) if self.variant == "kvpress" else sparsify_heads(gates, self.sparsity)
        )

    @cached_property
    def classes(self) -> TwoClass:
        """What the heads keep: the retrieval heads all, the streaming heads sinks and window."""
        return TwoClass(self.full_heads, self.sinks + self.window)

    @property
    def streaming_heads(self) -> list[list[int]]:
        """The KV heads of each layer that stream."""
        return self.classes.others

    def keep(self, step: Step) -> Change | None:
        if not self.streaming_heads[step.layer]:
            return None
        full = self.full_heads[step.layer]
        if self.variant == "kvpress":
            ends = step.phase == "prefill" and not step.run.chunked
            return self._truncate(step, full) if ends else None
        if step.phase == "decode" and step.cache.ragged:
            return self._slide(step)
        return self._truncate(step, full)

    def prompt_ends(self, step: Step) -> Change | None:
        full = self.full_heads[step.layer]
        return self._truncate(step, full) if self.variant == "kvpress" and not bool(full.all()) else None

    def _truncate(self, step: Step, full: Tensor) -> Change | None:
        """Streaming heads keep their sinks and last tokens; also makes the ring anew."""
        cache = step.cache
        if cache.stored <= self.sinks + self.window and not cache.ragged:
            return None
        cutoff = step.query_positions().amax(1) - self.window
        B, H = cache.shape
        if cache.packed is None:
            held = torch.arange(cache.stored, device=step.q.device).expand(B, 1, -1)
            held = held if cache.positions is None else cache.positions[:, :1]
            stays = (held < self.sinks) | (held > cutoff[:, None, None])
            mask = stays | full.to(stays.device)[None, :, None]
            step.state = Ring.of(
                [held[b, 0, (stays & (held >= 0))[b, 0]] for b in range(B)], self.sinks, [self.window] * B
            )
            return KeepRagged(mask)
        mask = torch.ones(B, H, cache.stored, dtype=torch.bool, device=step.q.device)
        kept = []
        for b in range(B):
            for h in self.streaming_heads[step.layer]:
                held = cache.packed.segment("positions", b * H + h)
                stays = (held < self.sinks) | (held > cutoff[b])
                mask[b, h, : held.shape[0]] = stays
            kept.append(held[stays])
        step.state = Ring.of(kept, self.sinks, [self.window] * B)
        return KeepRagged(mask)

    def _slide(self, step: Step) -> Change | None:
        """Evict the oldest token of each streaming head that holds one too many."""
        packed, ring = step.cache.packed, step.state
        assert packed is not None
        assert isinstance(ring, Ring)
        B, H = step.cache.shape
        streaming = self.streaming_heads[step.layer]
        gone: list[tuple[int, int]] = []
        for b in range(B):
            if packed.length[b * H + streaming[0]] <= self.sinks + self.window:
                continue
            row = ring.turn(b)
            gone += [(b * H + h, row) for h in streaming]
        return DropRagged(tuple(gone)) if gone else None


def gated_mix(full: Tensor, stream: Tensor, alpha: Tensor) -> Tensor:
    """(1 - a) stream + a full, a = clamp(alpha, 0, 1): the training forward of one layer.

    Args:
        full: [B, Hq, M, D], attention of the unmodified pass; no gradient flows into it.
        stream: [B, Hq, M, D], sink-and-window attention of the gated pass.
        alpha: [Hkv], one gate for the query heads of a group; its gradient is zero outside [0, 1].
    """
    if stream.shape != full.shape or stream.shape[1] % alpha.shape[0]:
        raise ShapeError(
            f"full {list(full.shape)}, stream {list(stream.shape)} and alpha {list(alpha.shape)} do not fit "
            "[B, Hq, M, D], [B, Hq, M, D], [Hkv]"
        )
    gate = alpha.clamp(0.0, 1.0).repeat_interleave(stream.shape[1] // alpha.shape[0])[None, :, None, None]
    return ((1 - gate) * stream + gate * full.detach()).to(stream.dtype)


def streaming_plan(sinks: int, window: int) -> Window:
    """What a streaming head reads: j <= i and (i - j < window or j < sinks)."""
    return Window(left=window - 1, sinks=sinks)


def streaming_attention(
    q: Tensor, k: Tensor, v: Tensor, *, sinks: int, window: int, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Sink-and-window attention of a self-contained q [B, Hq, N, D] over k, v [B, Hkv, N, D]: o [B, Hq, N, D]."""
    o: Tensor = attend(q, k, v, streaming_plan(sinks, window), scale=scale, backend=backend)
    return o


__all__ = [
    "Duo",
    "gated_mix",
    "streaming_attention",
    "streaming_plan",
]
