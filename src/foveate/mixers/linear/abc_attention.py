"""ABC: attention with a bounded memory, slots that every token writes to and every query reads.

    k~_r = sum_n softmax over n of (k_n . c_r) k_n;   v~_r = sum_n softmax over n of (v_n . c'_r) v_n,  r = 1 .. R
    o_i = sum_r softmax over r of (q_i . k~_r / sqrt(D)) v~_r;   y = o W_o

Paper: Peng et al. 2022 (arXiv 2110.02488), as the MLP form in CAB (2210.07661): c and c' [D, R] are learned and shared
by heads, and their logits are not scaled. Causal: a slot is the softmax over the tokens so far. (CAB's released causal
path keeps only the current token's part; this one keeps the running sums.)

State: for each slot the largest logit, the sum of exponentials and the weighted sum, [B, H R], [B, H R] and
[B, H R, D], float32, for keys and for values. Cost: O(N R D) per head in time; the causal form holds the slots of all
tokens at once, N R D numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from foveate.attention import attend
from foveate.attention.scans import prefix_softmax
from foveate.mixers.base import PATTERNS, MixerState, exact, start_position
from foveate.mixers.linear.projected import ProjectedMixer
from foveate.registry import register


@dataclass(frozen=True, kw_only=True)
class SlotState(MixerState):
    """keys, values: (largest logit, sum of exponentials, weighted sum), see `prefix_softmax`."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@register(
    "abc",
    kind="mixer",
    paper="ABC: Attention with Bounded-memory Control",
    arxiv="2110.02488",
    year=2022,
    applies_to="from scratch",
    small={"slots": 5},
    claim=(
        "Two seeds, 400 steps, softmax second: masked text 2.681 and 2.661, causal text behind a short convolution "
        "4.32 and 4.29 (perplexity per byte), pairs of sequences 0.427 and 1.000, a walk told by another sequence "
        "0.131 and 1.000: behind softmax in every pattern (benchmarks/results/claims/cab.json). Multi-query recall, "
        "64 pairs: 0.252 (benchmarks/results/mqar.json)."
    ),
)
class ABCMixer(ProjectedMixer):
    """Attention with a bounded memory.

    slots: R.    causal: a token reads no later one.
    """

    patterns = PATTERNS
    lacking: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        slots: int = 16,
        causal: bool = True,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(slots >= 1, f"slots={slots}, allowed: >= 1")
        self.slots, self.causal, self.packs = slots, causal, causal
        self.key_slots = nn.Parameter(torch.empty(self.head_dim, slots))
        self.value_slots = nn.Parameter(torch.empty(self.head_dim, slots))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        own = {"key_slots": self.key_slots, "value_slots": self.value_slots}
        return {name: nn.init.xavier_uniform_(torch.empty_like(each)) for name, each in own.items()}

    def start(self, batch: int, like: Tensor) -> MixerState:
        if not self.causal:
            return super().start(batch, like)
        sums = torch.zeros(batch, self.heads * self.slots, dtype=exact(like), device=like.device)
        weighted = sums.new_zeros(*sums.shape, self.head_dim)
        empty = (torch.full_like(sums, -torch.inf), sums, weighted)
        return SlotState(owner=self.owner, position=start_position(batch, like), keys=empty, values=empty)

    def mix(
        self, x: Tensor, state: MixerState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        if not self.causal:
            return self.cross(x, x, None), state
        assert isinstance(state, SlotState)
        q, k, v = self.project(x, x)
        k_slots, keys = self._prefix(k, self.key_slots, state.keys, cu_seqlens)
        v_slots, values = self._prefix(v, self.value_slots, state.values, cu_seqlens)
        weights = (self.head_dim**-0.5 * q.unsqueeze(-2) @ k_slots.transpose(-1, -2)).softmax(-1)
        o = (weights.to(v_slots.dtype) @ v_slots).squeeze(-2)
        return self.output(o), replace(state, keys=keys, values=values)

    def _prefix(
        self, rows: Tensor, slots: Tensor, before: tuple[Tensor, ...], cu_seqlens: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The slots after every token, [B, H, N, R, D], of rows [B, H, N, D]."""
        logits = (rows @ slots).transpose(1, 2).flatten(2)
        repeated = rows.transpose(1, 2).repeat_interleave(self.slots, 2)
        filled, after = prefix_softmax(logits, repeated, initial_state=before, cu_seqlens=cu_seqlens)
        return filled.unflatten(2, (self.heads, self.slots)).transpose(1, 2), after

    def cross(self, x: Tensor, context: Tensor, context_padding: Tensor | None) -> Tensor:
        q, k, v = self.project(x, context)
        hidden = None if context_padding is None else ~context_padding[:, None, :, None]
        k, v = (_filled(rows, slots, hidden) for rows, slots in ((k, self.key_slots), (v, self.value_slots)))
        return self.output(attend(q, k, v, causal=False))


def _filled(rows: Tensor, slots: Tensor, hidden: Tensor | None) -> Tensor:
    """Slots [B, H, R, D] of all rows [B, H, N, D]; those hidden [B, 1, N, 1] are left out."""
    if hidden is not None:
        rows = rows.masked_fill(hidden, 0)
    logits = rows @ slots
    if hidden is not None:
        # Finite, so that slots of a context without tokens are zeros.
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    return logits.softmax(-2).transpose(-1, -2).to(rows.dtype) @ rows
