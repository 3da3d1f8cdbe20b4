"""Titans with memory as a context (MAC): attention over a segment that begins with what the memory knows of it.

    segments s of `segment` tokens;  h_i = M_W(q(s_i)), W the weights at the end of the segment before
    y_i = attention of s_i over P, h_1 .. h_i and s_1 .. s_i           P: learned vectors, the same for all data
    m_i = M_{W_i}(q(y_i)) after (k(y_i), v(y_i)) was written           o_i = RMSNorm(y_i) * sigmoid(RMSNorm(m_i))

Attention decides what the memory keeps, and the memory carries it over segments. M is the memory of `titans-memory`
without its output gate.

Paper: Behrouz et al. 2024 (arXiv 2501.00663), section 4.1. Where it differs: the paper puts causal attention over
[P; h; s], where s_i sees h_j of later j, which are functions of s_j, and reads the final memory with the weights at the
segment's end; both leak future tokens to a language model, so here s_i sees h up to h_i and m_i is read with the
weights after y_i. h_i and s_i share the rotary position i of their segment, P stands at 0. The gated product's norm and
non-linearity, which the paper leaves open, are as above. Queries of h have a short convolution of their own over x.

State: the memory's (see `titans-memory`), a copy of its weights, and rotated keys and values of the running segment,
[B, H, 2 segment, D] each. Cost: per head O(N (|W| + C D)) for the memory and O(N segment D) for attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from foveate.attention import Positions, Rope, attend
from foveate.attention.chunks import read_offsets
from foveate.attention.delta import Weights
from foveate.attention.weight_states import choose
from foveate.mixers.base import Mixer, MixerState, start_position
from foveate.mixers.memory.titans import NeuralMemoryState, make_memory
from foveate.mixers.memory.titans_window import PAPER, MemoryGate, check_attention
from foveate.mixers.parts import ShortConvolution
from foveate.registry import register


@dataclass(frozen=True, kw_only=True)
class TitansMACState(MixerState):
    """memory: see `NeuralMemoryState`.    context: the memory's weights at the end of the last segment.

    convolution: the last inputs of h's queries, [B, W - 1, C].    keys, values: [B, H, 2 S, D], of the segment's h in
    the first S slots and of its tokens in the others.    filled: [B] int64, tokens of the running segment so far.
    """

    memory: NeuralMemoryState
    context: Weights
    convolution: Tensor
    keys: Tensor
    values: Tensor
    filled: Tensor


@register(
    "titans-mac",
    kind="mixer",
    paper=PAPER,
    arxiv="2501.00663",
    year=2024,
    applies_to="from scratch",
    small={"chunk": 4, "expansion": 1.5, "persistent": 3, "segment": 6},
    claim=(
        "Trained on 128 tokens with 8 pairs at the start, asked after 0, 128, 384, 896 and 1920 tokens of noise: "
        "0.230, 0.097, 0.082, 0.041 and 0.010 in segments of 32 tokens: at this size it did not learn to keep pairs "
        "over segments; softmax 1.000 to 0.067, gated-deltanet 0.997 to 0.963 "
        "(benchmarks/results/claims/titans.json). Multi-query recall, 64 pairs in 256 tokens: 1.000 with 790 kB of "
        "state; softmax 1.000 with 132 kB, linear attention 0.658 with 17 kB (benchmarks/results/mqar.json)."
    ),
)
class TitansMACMixer(Mixer):
    """Attention in segments, each after what a neural memory of the earlier segments recalls (memory as a context).

    segment: tokens of a segment.    persistent: learned tokens before every segment.    rope_base: theta of the rotary
    positions.    depth, expansion, activation, form, kernel, chunk, max_rate, momentum: of the memory, as in
    titans-memory.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        segment: int = 256,
        persistent: int = 4,
        rope_base: float = 10000.0,
        depth: int = 2,
        expansion: float = 4.0,
        activation: str = "silu",
        form: str = "residual",
        kernel: int = 4,
        chunk: int = 64,
        max_rate: float = 0.1,
        momentum: bool = True,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        check_attention(self, persistent, rope_base)
        self.require(segment >= 1, f"segment={segment}, allowed: >= 1")
        self.segment, self.rope = segment, Rope(dim // heads, rope_base)
        self.memory = make_memory(
            self,
            dim // heads,
            depth=depth,
            expansion=expansion,
            activation=activation,
            form=form,
            kernel=kernel,
            chunk=chunk,
            max_rate=max_rate,
            momentum=momentum,
        )
        self.context_conv = ShortConvolution(dim, kernel)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.gate = MemoryGate(dim)
        self.persistent = nn.Parameter(torch.empty(persistent, dim))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        return {"persistent": 0.02 * torch.randn_like(self.persistent)}

    def start(self, batch: int, like: Tensor) -> TitansMACState:
        memory, position = self.memory.start(batch, like), start_position(batch, like)
        empty = like.new_zeros(batch, self.heads, 2 * self.segment, self.dim // self.heads)
        return TitansMACState(
            owner=self.owner,
            position=position,
            memory=memory,
            context=memory.memory.weights,
            convolution=self.context_conv.start(batch, like),
            keys=empty,
            values=empty,
            filled=torch.zeros_like(position),
        )

    def mix(
        self, x: Tensor, state: TitansMACState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, TitansMACState]:
        B, N, _ = x.shape
        if cu_seqlens is None and N == 1:
            y, state = self._piece(x.flatten(0, 1), [1] * B, state)
            return y.view_as(x), state
        bounds = tuple(range(0, B * N + 1, N)) if cu_seqlens is None else read_offsets(cu_seqlens, B, N)
        pieces = [self._cut(a, b, filled) for (a, b), filled in zip(pairwise(bounds), state.filled.tolist())]
        y, state = self._in_order(x.flatten(0, 1), pieces, state)
        return y.view_as(x), state

    def _cut(self, begin: int, end: int, filled: int) -> list[tuple[int, int]]:
        """A sequence's tokens begin .. end, cut where segments end."""
        if begin == end:
            return []
        first = begin + self.segment - filled
        return list(pairwise([begin, *range(first, end, self.segment), end]))

    def _in_order(
        self, x: Tensor, pieces: list[list[tuple[int, int]]], state: TitansMACState
    ) -> tuple[Tensor, TitansMACState]:
        """x [T, C]: the first piece of every sequence, then the second of every one that has one, and so on."""
        order = sorted(range(len(pieces)), key=lambda n: -len(pieces[n]))
        state = state.reorder(torch.tensor(order))
        finished: list[TitansMACState] = []
        outputs: dict[int, Tensor] = {}
        for step in range(len(pieces[order[0]])):
            spans = [pieces[n][step] for n in order if len(pieces[n]) > step]
            if len(spans) < state.batch:
                state, done = state.split([len(spans), state.batch - len(spans)])
                finished.insert(0, done)
            lengths = [b - a for a, b in spans]
            y, state = self._piece(torch.cat([x[a:b] for a, b in spans]), lengths, state)
            outputs.update(zip((a for a, _ in spans), y.split(lengths)))
        state = TitansMACState.merge([state, *finished]).reorder(torch.tensor(order).argsort())
        return torch.cat([outputs[a] for a in sorted(outputs)]), state

    def _piece(self, x: Tensor, lengths: list[int], state: TitansMACState) -> tuple[Tensor, TitansMACState]:
        """Tokens x [T, C] of one segment of each sequence, one after the other, `lengths` of each."""
        n, longest = len(lengths), max(lengths)
        even = min(lengths) == longest
        x = x.unflatten(0, (n, longest)) if even else x[None]
        cu_seqlens = None if even else torch.tensor(list(accumulate(lengths, initial=0)))
        real = torch.arange(longest, device=x.device) < torch.tensor(lengths, device=x.device)[:, None]
        queries, convolution = self.context_conv(self.memory.q_proj(x), state.convolution, cu_seqlens)
        rows = queries if even else _padded(queries[0], real)
        recalled = self.memory.recall(rows, state.context)
        tokens = x if even else _padded(x[0], real)
        y, keys, values = self._attend(tokens, recalled.to(x.dtype), real, state)
        y = self.o_proj(y if even else y[real][None])
        m, memory = self.memory(y, state.memory, cu_seqlens)
        filled = state.filled + real.sum(1)
        done = filled == self.segment
        after = replace(
            state,
            memory=memory,
            context=tuple(choose(done, a, b) for a, b in zip(memory.memory.weights, state.context)),
            convolution=convolution,
            keys=keys,
            values=values,
            filled=filled.masked_fill(done, 0),
        )
        return self.gate(y, m).flatten(0, 1), after

    def _attend(self, x: Tensor, h: Tensor, real: Tensor, state: TitansMACState) -> tuple[Tensor, Tensor, Tensor]:
        """x, h [n, L, C], real [n, L] -> o [n, L, C], and the segment's keys and values with those of x and h."""
        S, P = self.segment, self.persistent.shape[0]
        at = state.filled[:, None] + torch.arange(x.shape[1], device=x.device)
        q = self.rope.rotate(self._heads(self.q_proj(x)), at)
        keys, values = [], []
        for part, source in enumerate((h, x)):
            slots = slice(part * S, (part + 1) * S)
            k = self.rope.rotate(self._heads(self.k_proj(source)), at)
            keys.append(_placed(k, state.keys[:, :, slots], at, real))
            values.append(_placed(self._heads(self.v_proj(source)), state.values[:, :, slots], at, real))
        held_k, held_v = torch.cat(keys, 2), torch.cat(values, 2)
        first = self.persistent[None].to(x.dtype)
        pk, pv = (self._heads(proj(first)).expand(x.shape[0], -1, -1, -1) for proj in (self.k_proj, self.v_proj))
        slot = torch.arange(S, device=x.device)
        slot = torch.where(slot < (state.filled + real.sum(1))[:, None], slot, -1)
        places = torch.cat((slot.new_zeros(x.shape[0], P), slot, slot), 1)
        positions = Positions(at.masked_fill(~real, -1), places[:, None], holes=True, ordered=False)
        o = attend(q, torch.cat((pk, held_k), 2), torch.cat((pv, held_v), 2), positions=positions)
        return o.transpose(1, 2).flatten(2), held_k, held_v

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _padded(x: Tensor, real: Tensor) -> Tensor:
    """Tokens [T, C] one after the other -> [n, L, C], zeros where `real` [n, L] does not hold."""
    rows = x.new_zeros(*real.shape, x.shape[-1])
    rows[real] = x
    return rows


def _placed(new: Tensor, held: Tensor, at: Tensor, real: Tensor) -> Tensor:
    """held [n, H, S, D] with the real ones of new [n, H, L, D] in the slots `at` [n, L]."""
    source = torch.arange(held.shape[2], device=at.device) - at[:, :1]
    inside = (source >= 0) & (source < real.sum(1, keepdim=True))
    index = source.clamp(0, new.shape[2] - 1)[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
    return torch.where(inside[:, None, :, None], new.gather(2, index), held.to(new.dtype))
