"""Long-short attention: one softmax over near tokens and a few rows that stand for the far ones.

    not causal  P = softmax over all tokens of x W_p, m columns per head;  k~ = norm_s(P^T k), v~ = norm_s(P^T v)
                k, v = norm_l(x W_k), norm_l(x W_v);  a block of w queries also reads its own tokens and max(w / 2, 1)
                on each side
    causal      near: the last w tokens, itself among them, logit (q + u) . k + (q + r) . R rho_distance
                far: each chunk of `chunk` tokens gives `rank` rows P^T k, P = softmax over the chunk of x W_p; a query
                reads those of earlier chunks, logit q . k~ + q . (R_c rho_id), id counting rows back from its own chunk
    o = softmax over both of logits, times (v~, v);   q = x W_q / sqrt(D);   y = o W_o

rho_i = [sin(i f), cos(i f)] over the width C, f_j = 10000^(-2 j / C). Norms are LayerNorms over the width, shared by k
and v.

Paper: Zhu et al. 2021, Transformer-LS (arXiv 2107.02192), as in CAB (2210.07661). As there, the causal form has
`memory` zero tokens before the sequence and zero keys in the window before it, which are not masked: they are the bias
of the norm, and take weight. CAB pads lengths to whole chunks and windows; here any length will do.

State (causal): the last w - 1 keys and values, those of the unfinished chunk with its logits, and the rows of finished
chunks, so it grows by 2 rank C numbers a chunk. Cost: O(N (w + m) D) per head; causal O(N (w + rank N / chunk) D).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from foveate.mixers.base import Mixer, MixerState, start_position
from foveate.mixers.linear.projected import ProjectedMixer
from foveate.mixers.sparse.bands import band_places, bands, unband
from foveate.registry import register

PAPER = "Long-Short Transformer: Efficient Transformers for Language and Vision"
NO_CROSS = {
    "causal-cross": "near and far are places in one sequence, and a context has places of its own",
    "noncausal-cross": "near and far are places in one sequence, and a context has places of its own",
}


@register(
    "long-short",
    kind="mixer",
    paper=PAPER,
    arxiv="2107.02192",
    year=2021,
    applies_to="from scratch",
    small={"landmarks": 3, "window": 5},
    claim=(
        "Two seeds, 400 steps, softmax second: masked text 2.535 and 2.661 (perplexity per byte), super-resolution "
        "11.01 and 10.78 dB: ahead of softmax in noncausal-self, as in the leaderboard; less time than materialised "
        "softmax from 1378 tokens on (benchmarks/results/claims/cab.json)."
    ),
)
class LongShortMixer(ProjectedMixer):
    """Attention to a window and to rows that stand for all tokens.

    landmarks: m.    window: w, queries of a block.
    """

    patterns = frozenset({"noncausal-self"})
    lacking: ClassVar[Mapping[str, str]] = {
        "causal-self": "its landmarks are weighted means of all tokens; 'long-short-causal' compresses chunks instead",
        **NO_CROSS,
    }
    causal = False
    packs = False

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        landmarks: int = 16,
        window: int = 15,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(landmarks >= 1, f"landmarks={landmarks}, allowed: >= 1")
        self.require(window >= 1, f"window={window}, allowed: >= 1")
        self.landmarks, self.window = landmarks, window
        self.compress = nn.Linear(dim, heads * landmarks)
        self.near_norm, self.far_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def mix(
        self, x: Tensor, state: MixerState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        q = self.split(self.q_proj(x)) * self.head_dim**-0.5
        k, v = (self.split(self.near_norm(each)) for each in (self.k_proj(x), self.v_proj(x)))
        share = self.split(self.compress(x)).softmax(2).transpose(-1, -2).to(k.dtype)
        far_k, far_v = (self.split(self.far_norm((share @ each).transpose(1, 2).flatten(2))) for each in (k, v))
        return self.output(self._attend(q, k, v, far_k, far_v)), state

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor) -> Tensor:
        N, w, side = q.shape[2], self.window, max(self.window // 2, 1)
        blocks = bands(q, w, 0, 0)
        _, places = band_places(N, w, side, side, q.device)
        near = blocks @ bands(k, w, side, side).transpose(-1, -2)
        near = near.masked_fill((places < 0)[:, None], -torch.inf)
        far = blocks @ far_k.unsqueeze(2).transpose(-1, -2)
        weights = torch.cat((far, near), -1).softmax(-1).to(v.dtype)
        far, near = weights.split([far.shape[-1], near.shape[-1]], -1)
        return unband(far @ far_v.unsqueeze(2) + near @ bands(v, w, side, side), N)


@dataclass(frozen=True, kw_only=True)
class LongShortState(MixerState):
    """near: keys and values of the last w - 1 tokens, [B, w - 1, C] each, zeros before the first.
    begun: keys, values and logits of the unfinished chunk, [B, c, C], [B, c, C], [B, c, H rank].
    far: keys and values of finished chunks, [B, rank chunks, C] each.
    """

    near: tuple[Tensor, ...]
    begun: tuple[Tensor, ...]
    far: tuple[Tensor, ...]


@register(
    "long-short-causal",
    kind="mixer",
    paper=PAPER,
    arxiv="2107.02192",
    year=2021,
    applies_to="from scratch",
    small={"chunk": 4, "window": 5, "rank": 2, "memory": 8},
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, 2400 steps at one rate: accuracy 0.583 "
        "with 70 kB of state; softmax 1.000 with 132 kB, linear attention 0.658 with 17 kB "
        "(benchmarks/results/mqar.json). Causal text behind a short convolution, two seeds: perplexity per byte 3.68, "
        "softmax without positions 4.29 (benchmarks/results/claims/cab.json)."
    ),
)
class LongShortCausalMixer(Mixer):
    """Attention to the last tokens and to compressed chunks before.

    chunk: tokens of a chunk.    rank: rows that stand for it.    window: w, tokens read as they are, the query's own
    counted.    memory: zero tokens before the sequence, a multiple of chunk.
    """

    lacking: ClassVar[Mapping[str, str]] = {
        "noncausal-self": "it reads chunks before the query's own; 'long-short' reads both sides",
        **NO_CROSS,
    }
    constant_state = False
    packs = False

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        chunk: int = 32,
        rank: int = 1,
        window: int = 128,
        memory: int = 1024,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.require(dim % 2 == 0, f"dim={dim}, allowed: even")
        for name, value in (("chunk", chunk), ("rank", rank), ("window", window)):
            self.require(value >= 1, f"{name}={value}, allowed: >= 1")
        self.require(memory >= 0 and memory % chunk == 0, f"memory={memory}, allowed: multiples of chunk = {chunk}")
        self.chunk, self.rank, self.window, self.memory = chunk, rank, window, memory
        self.head_dim = dim // heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.compress = nn.Linear(dim, heads * rank)
        self.near_norm, self.far_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.near_distance = nn.Linear(dim, dim, bias=False)
        self.far_distance = nn.Linear(dim, dim)
        self.content_bias = nn.Parameter(torch.empty(heads, self.head_dim))
        self.distance_bias = nn.Parameter(torch.empty(heads, self.head_dim))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        own = {"content_bias": self.content_bias, "distance_bias": self.distance_bias}
        return {name: torch.zeros_like(each) for name, each in own.items()}

    def start(self, batch: int, like: Tensor) -> LongShortState:
        near, none = like.new_zeros(batch, self.window - 1, self.dim), like.new_zeros(batch, 0, self.dim)
        logits = like.new_zeros(batch, 0, self.heads * self.rank)
        return LongShortState(
            owner=self.owner,
            position=start_position(batch, like),
            near=(near, near),
            begun=(none, none, logits),
            far=(none, none),
        )

    def state_bytes(self, batch: int, length: int) -> int:
        start = self.start(batch, self.meta())
        finished, begun = divmod(length, self.chunk)
        numbers = finished * 2 * self.rank * self.dim + begun * (2 * self.dim + self.heads * self.rank)
        return start.bytes() + batch * numbers * start.near[0].element_size()

    def mix(
        self, x: Tensor, state: LongShortState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LongShortState]:
        q = self._split(self.q_proj(x)) * self.head_dim**-0.5
        k, v = self.k_proj(x), self.v_proj(x)
        near = tuple(torch.cat((old.to(new.dtype), new), 1) for old, new in zip(state.near, (k, v)))
        begun = tuple(torch.cat((old.to(new.dtype), new), 1) for old, new in zip(state.begun, (k, v, self.compress(x))))
        # How many rows of finished chunks each query sees.
        place = torch.arange(x.shape[1], device=x.device) + state.begun[0].shape[1]
        visible = state.far[0].shape[1] + place // self.chunk * self.rank
        far, begun = self._finish(state, begun)
        o = self._attend(q, near, far, visible)
        # Clones, so that the rest of the prompt is freed.
        last = tuple(each[:, x.shape[1] :].clone() for each in near)
        return self.o_proj(o.transpose(1, 2).flatten(2)), replace(state, near=last, begun=begun, far=far)

    def _finish(
        self, state: LongShortState, begun: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Rows of all finished chunks, and what is left of the unfinished one."""
        whole = begun[0].shape[1] // self.chunk * self.chunk
        k, v, logits = (self._split(each[:, :whole]).unflatten(2, (-1, self.chunk)) for each in begun)
        share = logits.softmax(3).transpose(-1, -2).to(k.dtype)
        rows = (self.far_norm((share @ each).flatten(2, 3).transpose(1, 2).flatten(2)) for each in (k, v))
        far = tuple(torch.cat((old.to(new.dtype), new), 1) for old, new in zip(state.far, rows))
        return far, tuple(each[:, whole:].clone() for each in begun)

    def _attend(self, q: Tensor, near: tuple[Tensor, ...], far: tuple[Tensor, ...], visible: Tensor) -> Tensor:
        N = q.shape[2]
        size = min(N, self.window)
        near_k, near_v = (self._split(self.near_norm(each)) for each in near)
        far_k, far_v = (self._split(self._with_memory(each)) for each in far)
        blocks, after = -(-N // size), self.window - 1
        key, value = (bands(each, size, 0, after)[:, :, :blocks] for each in (near_k, near_v))
        logits = torch.cat(
            (bands(self._far_logits(q, far_k, visible), size, 0, 0), self._near_logits(q, key, size)), -1
        )
        weights = logits.softmax(-1).to(value.dtype)
        of_far, of_near = weights.split([far_k.shape[2], size + after], -1)
        return unband(of_far @ far_v.unsqueeze(2) + of_near @ value, N)

    def _near_logits(self, q: Tensor, key: Tensor, size: int) -> Tensor:
        """[B, H, R, size, size + w - 1] for keys in bands."""
        table = self._split(self.near_distance(self._waves(self.window, q))[None])
        content = bands(q + self.content_bias[:, None].to(q.dtype), size, 0, 0) @ key.transpose(-1, -2)
        distance = bands(q + self.distance_bias[:, None].to(q.dtype), size, 0, 0) @ table.unsqueeze(2).transpose(-1, -2)
        offset = torch.arange(size + self.window - 1, device=q.device)
        back = torch.arange(size, device=q.device)[:, None] + self.window - 1 - offset
        inside = (back >= 0) & (back < self.window)
        index = back.clamp(0, self.window - 1).expand(*distance.shape[:3], -1, -1)
        return (content + distance.gather(-1, index)).masked_fill(~inside, -torch.inf)

    def _far_logits(self, q: Tensor, far_k: Tensor, visible: Tensor) -> Tensor:
        """[B, H, N, rows]; -inf for chunks that the query does not come after."""
        rows = far_k.shape[2]
        if rows == 0:
            return q.new_zeros(*q.shape[:3], 0)
        table = self._split(self.far_distance(self._waves(rows, q))[None])
        # Rows of the memory stand before those of the sequence.
        seen = visible[:, None] + self.memory // self.chunk * self.rank
        back = seen - 1 - torch.arange(rows, device=q.device)
        index = back.clamp(min=0).expand(*q.shape[:2], -1, -1)
        logits = q @ far_k.transpose(-1, -2) + (q @ table.transpose(-1, -2)).gather(-1, index)
        return logits.masked_fill(back < 0, -torch.inf)

    def _with_memory(self, rows: Tensor) -> Tensor:
        """Behind the rows of the zero tokens, which the norm makes its bias."""
        empty = self.far_norm.bias.to(rows.dtype).expand(rows.shape[0], self.memory // self.chunk * self.rank, -1)
        return torch.cat((empty, rows), 1)

    def _waves(self, count: int, like: Tensor) -> Tensor:
        """rho_0 .. rho_{count - 1}, [count, C], in the parameters' dtype."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        rates = 10000.0 ** (-torch.arange(0, self.dim, 2, dtype=dtype, device=like.device) / self.dim)
        angle = torch.arange(count, dtype=dtype, device=like.device)[:, None] * rates
        return torch.cat((angle.sin(), angle.cos()), -1).to(self.near_distance.weight.dtype)

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, H D] -> [B, H, N, D]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
