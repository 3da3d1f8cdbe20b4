"""Lookups: softmax attention that only a few tokens ask for, chosen by their own content (Zoology's sparse hybrid).

    y_i = x_i + sel_i W_o attention(x)_i        for tokens that are selected;  y_i = x_i for the others

    selection   "sigmoid": sel = sigmoid(w . x_i), and a loss penalty * relu(mean sel - k / L)
                "two-way": sel = second of softmax((W x_i + b) / t), t learned
                "softmax": sel = softmax over positions of w . x_i + b
    training    every token is selected;  evaluation  "threshold": sel > 1/2;  "top-k": the k largest of the L tokens

Paper: Arora et al. 2023 (arXiv 2312.04927), one head, projections with bias, no positions; k = `lookups` or sqrt(L),
rounded up outside training. "top-k" and "softmax" are the paper's, and look at the whole sequence: they are not
causal, and refuse to continue from a state; "threshold" is the causal form. The paper's programmatic selection (a token
seen before) is no layer: see `foveate.lm.recall`.

State: keys and values of all tokens, as in `softmax`. Cost: O(L D) for each selected token.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention import Positions, attend
from foveate.attention.chunks import read_offsets
from foveate.errors import StateError
from foveate.mixers.base import Mixer, exact, start_position
from foveate.mixers.softmax.rotary import SoftmaxState, slot_positions, without_holes
from foveate.registry import register

SELECTIONS = ("sigmoid", "two-way", "softmax")


@register(
    "lookups",
    kind="mixer",
    paper="Zoology: Measuring and Improving Recall in Efficient Language Models",
    arxiv="2312.04927",
    year=2023,
    applies_to="from scratch",
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, 2400 steps at one rate: accuracy 0.997 "
        "with 132 kB of state; softmax 1.000 with 132 kB, linear attention 0.658 with 17 kB "
        "(benchmarks/results/mqar.json)."
    ),
)
class LookupsMixer(Mixer):
    """Softmax attention for the few tokens that select it.

    selection: how a token asks, "sigmoid", "two-way" or "softmax".    evaluation: who may read outside training,
    "threshold" or "top-k".    lookups: k (default: sqrt(L)).    penalty: weight of the loss of "sigmoid".
    """

    constant_state = False

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 1,
        selection: str = "sigmoid",
        evaluation: str = "threshold",
        lookups: int | None = None,
        penalty: float = 1e-3,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.require(selection in SELECTIONS, f"selection={selection!r}, allowed: {SELECTIONS}")
        self.require(evaluation in ("threshold", "top-k"), f"evaluation={evaluation!r}, allowed: 'threshold', 'top-k'")
        self.require(
            selection != "softmax" or evaluation == "top-k",
            "selection='softmax' with evaluation='threshold', allowed: evaluation='top-k' (its values sum to 1)",
        )
        self.require(lookups is None or lookups >= 1, f"lookups={lookups}, allowed: >= 1")
        self.require(penalty >= 0, f"penalty={penalty}, allowed: >= 0")
        self.selection, self.evaluation, self.lookups, self.penalty = selection, evaluation, lookups, penalty
        self.head_dim = dim // heads
        self.qkv_proj = nn.Linear(dim, 3 * dim)
        self.o_proj = nn.Linear(dim, dim)
        self.select = nn.Linear(dim, 2 if selection == "two-way" else 1, bias=selection != "sigmoid")
        self.temperature = nn.Parameter(torch.empty(1)) if selection == "two-way" else None
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        if self.temperature is None:
            return {}
        return {"temperature": torch.full_like(self.temperature, 0.3 * math.sqrt(self.dim))}

    def start(self, batch: int, like: Tensor) -> SoftmaxState:
        empty = like.new_zeros(batch, self.heads, 0, self.head_dim)
        position = start_position(batch, like)
        return SoftmaxState(
            owner=self.owner, position=position, keys=empty, values=empty, length=torch.zeros_like(position)
        )

    def state_bytes(self, batch: int, length: int) -> int:
        start = self.start(batch, self.meta())
        return start.bytes() + 2 * batch * length * self.dim * start.keys.element_size()

    def mix(
        self, x: Tensor, state: SoftmaxState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, SoftmaxState]:
        if cu_seqlens is None:
            y, state, selected = self._sequence(x, state)
            lengths = [x.shape[1]]
        else:
            y, state, selected, lengths = self._packed(x, state, read_offsets(cu_seqlens, *x.shape[:2]))
        return y, replace(state, auxiliary_loss=self._loss(selected, lengths))

    def _packed(
        self, x: Tensor, state: SoftmaxState, offsets: tuple[int, ...]
    ) -> tuple[Tensor, SoftmaxState, Tensor, list[int]]:
        rows = [without_holes(row) if state.ragged else row for row in state.split([1] * state.batch)]
        outputs, chosen, lengths = [], [], []
        for n, (begin, end) in enumerate(pairwise(offsets)):
            if end > begin:
                y, rows[n], selected = self._sequence(x[:, begin:end], rows[n])
                outputs.append(y)
                chosen.append(selected)
                lengths.append(end - begin)
        return torch.cat(outputs, 1), SoftmaxState.merge(rows), torch.cat(chosen, 1), lengths

    def _sequence(self, x: Tensor, state: SoftmaxState) -> tuple[Tensor, SoftmaxState, Tensor]:
        """y [B, N, C], the state after, sel [B, N]."""
        past, N = state.keys.shape[2], x.shape[1]
        whole = self.selection == "softmax" or (self.evaluation == "top-k" and not self.training)
        if past and whole:
            raise StateError(
                f"{self.owner}: a state with selection={self.selection!r}, evaluation={self.evaluation!r}, which look "
                "at the whole sequence; allowed: selection 'sigmoid' or 'two-way' with evaluation='threshold'"
            )
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        if past:
            k, v = (torch.cat((old.to(new.dtype), new), 2) for old, new in ((state.keys, k), (state.values, v)))
        selected = self._selected(x)
        places = slot_positions(state.length, N, past) if state.ragged else Positions()
        if self.training:
            o = self.o_proj(attend(q, k, v, positions=places).transpose(1, 2).flatten(2))
            y = x + selected[..., None].to(o.dtype) * o
        else:
            y = self._read(x, q, k, v, selected, places)
        return y, replace(state, keys=k, values=v, length=state.length + N), selected

    def _selected(self, x: Tensor) -> Tensor:
        score = self.select(x)
        score = score.to(exact(score))
        if self.temperature is not None:
            return (score / self.temperature.to(score.dtype)).softmax(-1)[..., 1]
        return score[..., 0].sigmoid() if self.selection == "sigmoid" else score[..., 0].softmax(-1)

    def _read(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, places: Positions) -> Tensor:
        """Attention of the selected rows alone; the others pass through."""
        N, slots = x.shape[1], k.shape[2]
        index, present = self._readers(selected)
        if index.shape[1] == 0:
            return x
        rows = q.gather(2, index[:, None, :, None].expand(-1, self.heads, -1, self.head_dim))
        at = places.queries(N, slots, x.device).expand(x.shape[0], -1).gather(1, index)
        asked = Positions(at, places.k, holes=places.holes)
        o = self.o_proj(attend(rows, k, v, positions=asked).transpose(1, 2).flatten(2))
        weight = (selected.gather(1, index) * present)[..., None].to(o.dtype)
        return x.to(o.dtype).scatter_add(1, index[..., None].expand(-1, -1, self.dim), weight * o)

    def _readers(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [B, K] of the rows that read, and which of them are there."""
        if self.evaluation == "top-k":
            index = selected.topk(self._count(selected.shape[1]), -1).indices.sort(-1).values
            return index, torch.ones_like(index, dtype=torch.bool)
        asks = selected > 0.5
        count = int(asks.sum(-1).max())
        # A stable sort puts the rows that ask first, in their order.
        index = (~asks).to(torch.uint8).argsort(dim=-1, stable=True)[:, :count]
        return index, asks.gather(1, index)

    def _count(self, length: int) -> int:
        return min(length, math.ceil(math.sqrt(length)) if self.lookups is None else self.lookups)

    def _loss(self, selected: Tensor, lengths: list[int]) -> Tensor | None:
        if self.selection != "sigmoid":
            return None
        wanted = sum(
            self.lookups if self.lookups is not None else math.sqrt(n) if self.training else math.ceil(math.sqrt(n))
            for n in lengths
        )
        return self.penalty * F.relu(selected.mean() - wanted / sum(lengths))
