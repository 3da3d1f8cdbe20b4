"""HCAM, hierarchical chunk attention: summaries of past chunks are searched, and the best chunks attended to in detail.

    memory: the past in chunks of C steps; contents = what the layer was given, summary = their mean; no gradient enters
    l = (x W_q) . (summary W_k) / sqrt(S), -1e6 where a chunk is hidden;  the k best chunks;  w = softmax over those k
    P = [sin(p f), cos(p f)], p = C - 1 .. 0 over a chunk's steps, f_i = 10000^(-2i/D)
    o_r = multi-head attention of x alone over contents_r + P, with scale 1 / sqrt(S / heads), for each chosen chunk r
    y = sum_r w_r o_r

Paper: Lampinen et al. 2021 (arXiv 2105.14039). Cost per query M S + k C S instead of M C S, and steps of other chunks
cannot dilute the attention inside one. The agent's block of the paper, x + HCAM(norm x) and then local attention and an
MLP, is a HybridLM with layers "hcam" and "softmax:window=..." by turns.

A step reads the chunks that were complete before it; its own unfinished chunk is left to local attention. A query that
sees no complete chunk gets 0 (in `MemoryRead` alone, as in the authors' code, the mean over arbitrary chunks). Weights
start as the authors', from a truncated normal of variance 2 / inputs. With k = 1 the search has no gradient: train with
k >= 2. `detach=False`, which is not in the paper, lets gradients into the stored steps.

State: summaries [B, M, D], contents [B, M, C, D] and the unfinished chunk [B, < C, D]. Cost: O(M S + k C S) per query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.shapes import match
from foveate.errors import OptionError
from foveate.mixers.base import Initialised, Mixer, MixerState, exact, start_position
from foveate.mixers.memory.tiles import over_tiles
from foveate.registry import register

HIDDEN = -1e6
# Standard deviation of a standard normal cut at +-2.
CUT_NORMAL = 0.87962566103423978


class FanInLinear(Initialised, nn.Linear):
    """A Linear layer that starts with weights of variance 2 / inputs, normal cut at two deviations, and bias 0."""

    def initial_values(self) -> dict[str, Tensor]:
        weight = nn.init.trunc_normal_(torch.empty_like(self.weight), a=-2.0, b=2.0)
        values = {"weight": weight * (math.sqrt(2 / self.in_features) / CUT_NORMAL)}
        return values if self.bias is None else {**values, "bias": torch.zeros_like(self.bias)}


def backward_positions(steps: int, dim: int, like: Tensor) -> Tensor:
    """P [steps, dim] in like's dtype: sines, then cosines, of the number of steps to the chunk's end."""
    work = exact(like)
    rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=work, device=like.device) / dim)
    angles = torch.arange(steps - 1, -1, -1, dtype=work, device=like.device)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), -1).to(like.dtype)


def cut_into_chunks(memory: Tensor, chunk: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Steps as chunks and their summaries, the first chunk filled up with zeros from the left.

    Args:
        memory: [B, T, D] steps.    chunk: C.    mask: [B, T] bool, steps that hold something.
    Returns: summaries [B, M, D], contents [B, M, C, D], and the mask [B, M, C], None without one. Summaries are means,
        with a mask the sum of the steps that hold something over their number + 1e-5 (lucidrains' form).
    """
    if chunk < 1:
        raise OptionError(f"cut_into_chunks: chunk={chunk}, allowed: >= 1")
    missing = -memory.shape[1] % chunk
    contents = F.pad(memory, (0, 0, missing, 0)).unflatten(1, (-1, chunk))
    if mask is None:
        return contents.mean(2), contents, None
    match(memory=(memory, "B T D"), mask=(mask, "B T"))
    steps = F.pad(mask.bool(), (missing, 0)).unflatten(1, (-1, chunk))
    contents = contents.masked_fill(~steps[..., None], 0)
    return contents.sum(2) / (steps.sum(2, keepdim=True) + 1e-5), contents, steps


class MemoryRead(nn.Module):
    """Queries read a memory of chunks that is given with them.

    query_dim: E.    memory_dim: D.    features: S, also the output's width.    heads, head_dim (default: S / heads):
    of the attention inside chunks.    retrieve: k.    positional: add P to the contents.    bias: of q, k and v inside
    chunks.    summary_bias: of the search's projections (both, the second and not the first, are lucidrains').
    """

    def __init__(
        self,
        *,
        query_dim: int,
        memory_dim: int,
        features: int,
        heads: int,
        retrieve: int,
        head_dim: int | None = None,
        positional: bool = True,
        bias: bool = True,
        summary_bias: bool = False,
    ) -> None:
        super().__init__()
        if head_dim is None and features % heads:
            raise OptionError(f"MemoryRead: features={features} with heads={heads}, allowed: a multiple")
        if retrieve < 1:
            raise OptionError(f"MemoryRead: retrieve={retrieve}, allowed: >= 1")
        if positional and memory_dim % 2:
            raise OptionError(f"MemoryRead: memory_dim={memory_dim}, allowed with positional: even")
        self.heads, self.retrieve, self.positional = heads, retrieve, positional
        self.head_dim = features // heads if head_dim is None else head_dim
        inner = heads * self.head_dim
        self.summary_q = FanInLinear(query_dim, features, bias=summary_bias)
        self.summary_k = FanInLinear(memory_dim, features, bias=summary_bias)
        self.q_proj = FanInLinear(query_dim, inner, bias=bias)
        self.k_proj = FanInLinear(memory_dim, inner, bias=bias)
        self.v_proj = FanInLinear(memory_dim, inner, bias=bias)
        self.o_proj = FanInLinear(inner, features)

    def forward(
        self,
        x: Tensor,
        summaries: Tensor,
        contents: Tensor,
        *,
        visible: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> Tensor:
        """What the queries read; detach the memory to keep gradients out.

        Args:
            x: [B, Q, E].    summaries: [B, M, D].    contents: [B, M, C, D].    M >= 1.
            visible: [B or 1, Q or 1, M] bool, chunks that a query may read (default: all).
            steps: [B, M, C] bool, steps that hold something (default: all).
        Returns: [B, Q, S]. With fewer than k visible chunks, hidden ones take weight 0; with none, equal weights.
        """
        sizes = match(x=(x, "B Q E"), summaries=(summaries, "B M D"), contents=(contents, "B M C D"))
        if steps is not None:
            match(contents=(contents, "B M C D"), steps=(steps, "B M C"))
        if visible is not None:
            visible = visible.expand(*(max(a, b) for a, b in zip(visible.shape, (sizes["B"], sizes["Q"], 1))))
            match(x=(x, "B Q E"), contents=(contents, "B M C D"), visible=(visible, "B Q M"))
        if self.positional:
            contents = contents + backward_positions(sizes["C"], sizes["D"], contents)
        search, q = self._search_queries(x), self._split(self.q_proj(x))
        taken = min(self.retrieve, sizes["M"])
        # All chunks are projected once, or for few queries only those that are read.
        projected = sizes["Q"] * taken > sizes["M"]
        held = (self.k_proj(contents), self.v_proj(contents)) if projected else (contents,)

        def tile(rows: slice) -> Tensor:
            seen = None if visible is None else visible[:, rows]
            weights, index = self._search(search[0][:, rows], search[1], summaries, seen, taken, rows)
            batch = torch.arange(sizes["B"], device=x.device)[:, None, None]
            read = [each[batch, index] for each in held]
            k, v = read if projected else (self.k_proj(read[0]), self.v_proj(read[0]))
            return self._attend(q[:, rows], k, v, weights, None if steps is None else steps[batch, index])

        per_row = sizes["B"] * (sizes["M"] + 2 * taken * sizes["C"] * self.heads * self.head_dim)
        return self.o_proj(over_tiles(tile, range(sizes["Q"]), per_row, 1))

    def _search_queries(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries turned against raw summaries, [B, Q, D], and what the bias of W_k adds, [B, Q, 1].

        (x W_q) . (s W_k) = ((x W_q) W_k^T) . s, so that a step does not project the whole memory again.
        """
        q = self.summary_q(x)
        added = None if self.summary_k.bias is None else q @ self.summary_k.bias[:, None].to(q.dtype)
        return F.linear(q, self.summary_k.weight.T), added

    def _search(
        self, q: Tensor, added: Tensor | None, summaries: Tensor, visible: Tensor | None, taken: int, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Weights and indices [B, T, k] of the chunks that queries read."""
        z = q @ summaries.to(q.dtype).mT
        z = z if added is None else z + added[:, rows]
        z = z.to(exact(z)) / math.sqrt(self.summary_k.out_features)
        if visible is not None:
            z = z.masked_fill(~visible, HIDDEN)
        best = z.topk(taken, -1)
        return best.values.softmax(-1), best.indices

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, steps: Tensor | None) -> Tensor:
        """q [B, T, H, d] over k, v [B, T, k, C, H d], each chunk alone, mixed by weights [B, T, k]: [B, T, H d]."""
        k, v = (self._split(each).transpose(-3, -2) for each in (k, v))
        z = (k @ q[:, :, None, :, :, None]).squeeze(-1)
        z = z.to(exact(z)) / math.sqrt(self.head_dim)
        if steps is not None:
            z = z.masked_fill(~steps[..., None, :], HIDDEN)
        # Mixing before the output projection is the same, because the weights sum to 1.
        p = z.softmax(-1) * weights[..., None, None]
        return (p.to(v.dtype)[..., None, :] @ v).squeeze(-2).sum(2).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class HCAMState(MixerState):
    """summaries: [B, M, D].    contents: [B, M, C, D].    unfinished: [B, < C, D], steps after the last full chunk."""

    summaries: Tensor
    contents: Tensor
    unfinished: Tensor


@register(
    "hcam",
    kind="mixer",
    paper="Towards mental time travel: a hierarchical memory for reinforcement learning agents",
    arxiv="2105.14039",
    year=2021,
    applies_to="from scratch",
    small={"chunk": 2, "retrieve": 2, "detach": False},
    claim=(
        "Ballet, trained on 8 dances of 15 steps and a delay of 64, a convolution and one layer of width 128: steps "
        "right 0.958, and 0.850 with 32 dances and a delay of 512, where rotary softmax falls from 0.997 to 0.107 and "
        "a window of 16 knows nothing (0.004), as in the paper; softmax without positions stays at 0.993, against it "
        "(benchmarks/results/claims/hcam.json)."
    ),
)
class HCAMMixer(Mixer):
    """Attention to a few past chunks, found by their summaries.

    chunk: C, steps of a chunk.    retrieve: k, chunks that a step reads (2 or more to train the search).
    slots: the newest so many chunks are kept (default: all).    positional: tell the steps of a chunk apart by place.
    detach: no gradient enters the memory.
    """

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
        retrieve: int = 2,
        slots: int | None = None,
        positional: bool = True,
        detach: bool = True,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.require(not positional or dim % 2 == 0, f"dim={dim}, allowed with positional: even")
        for name, value in (("chunk", chunk), ("retrieve", retrieve), ("slots", slots)):
            self.require(value is None or value >= 1, f"{name}={value}, allowed: >= 1")
        self.chunk, self.slots, self.detach = chunk, slots, detach
        self.read = MemoryRead(
            query_dim=dim, memory_dim=dim, features=dim, heads=heads, retrieve=retrieve, positional=positional
        )

    def start(self, batch: int, like: Tensor) -> HCAMState:
        return HCAMState(
            owner=self.owner,
            position=start_position(batch, like),
            summaries=like.new_zeros(batch, 0, self.dim),
            contents=like.new_zeros(batch, 0, self.chunk, self.dim),
            unfinished=like.new_zeros(batch, 0, self.dim),
        )

    def state_bytes(self, batch: int, length: int) -> int:
        start = self.start(batch, self.meta())
        chunks = length // self.chunk if self.slots is None else min(length // self.chunk, self.slots)
        numbers = chunks * (self.chunk + 1) + length % self.chunk
        return start.bytes() + batch * numbers * self.dim * start.contents.element_size()

    def mix(
        self, x: Tensor, state: HCAMState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, HCAMState]:
        given = x.detach() if self.detach else x
        steps = torch.cat((state.unfinished.to(x.dtype), given), 1)
        whole = steps.shape[1] // self.chunk * self.chunk
        fresh = steps[:, :whole].unflatten(1, (-1, self.chunk))
        summaries = torch.cat((state.summaries.to(x.dtype), fresh.mean(2)), 1)
        contents = torch.cat((state.contents.to(x.dtype), fresh), 1)
        before = state.contents.shape[1]
        y = self._read(x, summaries, contents, before, state.unfinished.shape[1])
        if self.slots is not None and contents.shape[1] > self.slots:
            # Clones, so that older chunks are freed.
            summaries, contents = (each[:, -self.slots :].clone() for each in (summaries, contents))
        unfinished = steps[:, whole:].clone()
        return y, replace(state, summaries=summaries, contents=contents, unfinished=unfinished)

    def _read(self, x: Tensor, summaries: Tensor, contents: Tensor, before: int, waiting: int) -> Tensor:
        """Each step reads the chunks complete before it: `before` of them, and those that end inside x."""
        count = contents.shape[1]
        if count == 0:
            # Zero, and part of the graph, so that a loss on it has a backward pass.
            read = self.read.o_proj(x.new_zeros(*x.shape[:2], self.read.o_proj.in_features))
            return read.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)
        complete = before + (waiting + torch.arange(x.shape[1], device=x.device)) // self.chunk
        chunks = torch.arange(count, device=x.device)
        visible = chunks < complete[:, None]
        if self.slots is not None:
            visible = visible & (chunks >= complete[:, None] - self.slots)
        y = self.read(x, summaries, contents, visible=visible[None])
        return y.masked_fill((complete == 0)[:, None], 0)
