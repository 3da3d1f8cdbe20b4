"""Contextual Memory Reweaving: hidden states of earlier text, kept at a few layers of a pretrained model, are rebuilt
for the present token and blended into its hidden state.

Capture. A text is read in segments; after its segment, a token's states at all layers of C are kept or forgotten:
    r_t = 1/2 mean over C of scale(|h_t - mean h|) + 1/2 scale(-log p(token t)),    scale: min-max within a chunk
    of each `chunk` tokens the `kept` with the largest r_t >= threshold; of all, the `entries` with the largest
    r_j * (position_j + 1) / (tokens seen) stay
Reconstruction at layer l, for states x and kept states h_j of earlier segments, LN without parameters:
    m_j = sum over l' in C of softmax(a_l)_l' (LN h_j^l' + U V LN h_j^l')
    w = softmax over a null key and all j of ((W_q LN x) . (W_k m_j) / sqrt(width) - b log(1 + distance))
    R = sum_j w_j W_v m_j                              the null key has the score (W_q LN x) . n / sqrt(width), value 0
Reweaving:
    x' = x + strength * sigmoid(W_g [LN x; R]) * W_o R,      W_o = 0 at first: the model is unchanged until trained
Without training (`trained=False`): w over the `nearest` states alone, with LN h_j^l for m_j and all W = identity, and
    x' = (1 - blend) x + blend |x| R / |R|, where the largest cosine is at least `cosine`; else x' = x

Memory: |C| entries d numbers per sequence. Time per token and layer of C: O(entries width); once per segment
O(|C| entries d (rank + width)) for what is read.

Paper: 2025 (arXiv 2502.02046), which gives no formulas and has no code. It names the capture of states at several
layers, their layered reconstruction and their return without an outside store; all formulas and numbers here are this
library's. States are kept before reweaving, so that a memory is of the text and not of memories.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import OptionError, ShapeError
from foveate.registry import register


@dataclass
class Memory:
    """What is kept of a batch of texts.

    states: [B, C, M, d], layer outputs.    positions: [B, M] int64, ascending where kept; -1: empty.
    relevance: [B, M] float32.    waiting: [B, C, p, d], states of the unfinished segment.
    surprise: [B, p] float32, their tokens' -log p in nats.    seen: tokens read.
    """

    states: Tensor
    positions: Tensor
    relevance: Tensor
    waiting: Tensor
    surprise: Tensor
    seen: int = 0
    # Keys and values of a layer, made once per segment where nothing is trained.
    made: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def bytes(self) -> int:
        """Of all tensors of the batch."""
        held = (self.states, self.positions, self.relevance, self.waiting, self.surprise)
        return sum(each.numel() * each.element_size() for each in held)


def relevance(states: Tensor, surprise: Tensor) -> Tensor:
    """How worth keeping each token of a chunk is: states [..., C, w, d], surprise [..., w] -> [..., w] in [0, 1]."""
    away = (states - states.mean(-2, keepdim=True)).float().norm(dim=-1)
    return 0.5 * _scaled(away).mean(-2) + 0.5 * _scaled(surprise.float())


def _scaled(x: Tensor) -> Tensor:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)


@register(
    "cmr",
    kind="adapter",
    paper="Contextual Memory Reweaving in Large Language Models Using Layered Latent State Reconstruction",
    arxiv="2502.02046",
    year=2025,
    applies_to="pretrained causal language models, after training the memory's weights (or as trained=False)",
    claim=(
        "Not reproduced: windows of 512 tokens, eight facts 2000 tokens earlier, 150 steps on the bundled model: "
        "recall 0.106 with a memory of three layers, 0.109 with one, 0.088 of the window alone, chance 0.091 "
        "(benchmarks/results/claims/cmr.json)."
    ),
)
class ContextualMemory(nn.Module):
    """Kept hidden states of earlier text, rebuilt and blended into the stream at a few layers.

    dim: d, the model's hidden size.    captured: |C|, how many layers capture and reweave.
    segment: tokens after which states are kept and can be read, a multiple of `chunk`.    chunk, kept, threshold,
    entries: what is kept.    width, rank: of reading and of mixing layers.    strength: of the reweaving.
    trained: whether there are weights; else nearest, cosine, blend apply.
    """

    def __init__(
        self,
        *,
        dim: int,
        captured: int = 3,
        segment: int = 512,
        chunk: int = 64,
        kept: int = 8,
        threshold: float = 0.3,
        entries: int = 512,
        width: int = 128,
        rank: int = 16,
        strength: float = 1.0,
        trained: bool = True,
        nearest: int = 8,
        cosine: float = 0.5,
        blend: float = 0.05,
    ) -> None:
        sizes = {"dim": dim, "captured": captured, "chunk": chunk, "entries": entries, "width": width, "rank": rank}
        for name, value in {**sizes, "nearest": nearest}.items():
            _require(value >= 1, f"{name}={value}, allowed: >= 1")
        _require(segment >= chunk and segment % chunk == 0, f"segment={segment}, allowed: a multiple of chunk={chunk}")
        _require(1 <= kept <= chunk, f"kept={kept}, allowed: 1 to chunk={chunk}")
        _require(0 <= blend <= 1, f"blend={blend}, allowed: 0 to 1")
        super().__init__()
        self.dim, self.captured, self.segment, self.chunk = dim, captured, segment, chunk
        self.kept, self.threshold, self.entries = kept, threshold, entries
        self.trained, self.nearest, self.cosine, self.blend = trained, nearest, cosine, blend
        self.strength, self.width = strength, width
        if not trained:
            return

        def linears(inner: int, outer: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Linear(inner, outer, bias=False) for _ in range(captured))

        self.mix = nn.Parameter(torch.zeros(captured, captured))
        self.down = nn.Parameter(torch.randn(captured, captured, dim, rank) * dim**-0.5)
        self.up = nn.Parameter(torch.zeros(captured, captured, rank, dim))
        self.q, self.k, self.v = linears(dim, width), linears(dim, width), linears(dim, width)
        self.gate, self.out = linears(dim + width, dim), linears(width, dim)
        self.null = nn.Parameter(torch.zeros(captured, width))
        self.fading = nn.Parameter(torch.zeros(captured))
        for each in self.out:
            nn.init.zeros_(each.weight)  # type: ignore[arg-type]

    def start(self, batch: int, like: Tensor) -> Memory:
        """An empty memory, in the dtype and on the device of `like`."""
        none = like.new_zeros(batch, 0, dtype=torch.float32)
        empty = like.new_zeros(batch, self.captured, 0, self.dim)
        return Memory(empty, none.long(), none, empty, none)

    @torch.no_grad()
    def capture(self, memory: Memory, states: Tensor, surprise: Tensor) -> Memory:
        """The memory after T more tokens, which do not reach beyond the segment.

        states: [B, C, T, d], outputs of the layers of C.    surprise: [B, T], -log p of the tokens, nats.
        Raises ShapeError.
        """
        B, C, T, d = states.shape
        if self.captured != C or d != self.dim or memory.states.shape[0] != B or surprise.shape != (B, T):
            raise ShapeError(
                f"capture: states {list(states.shape)}, surprise {list(surprise.shape)}, allowed: "
                f"[{memory.states.shape[0]}, {self.captured}, T, {self.dim}] and its [B, T]"
            )
        if memory.waiting.shape[2] + T > self.segment:
            raise ShapeError(
                f"capture: {T} tokens after {memory.waiting.shape[2]} of a segment of {self.segment}, allowed: up to "
                "its end; cut the text there"
            )
        waiting = torch.cat((memory.waiting, states.detach()), 2)
        surprise = torch.cat((memory.surprise, surprise.detach().float()), 1)
        after = replace(memory, waiting=waiting, surprise=surprise, seen=memory.seen + T)
        return self._keep(after) if waiting.shape[2] == self.segment else after

    def _keep(self, memory: Memory) -> Memory:
        """The segment is complete: its best tokens join the memory."""
        chunks = memory.waiting.unflatten(2, (-1, self.chunk)).transpose(1, 2)
        worth = relevance(chunks, memory.surprise.unflatten(1, (-1, self.chunk)))
        best = worth.topk(self.kept, -1)
        first = memory.seen - self.segment
        starts = first + torch.arange(0, self.segment, self.chunk, device=worth.device)[:, None]
        at = torch.where(best.values >= self.threshold, best.indices + starts, -1).flatten(1)
        new = _take(memory.waiting, (best.indices + starts - first).flatten(1))
        positions = torch.cat((memory.positions, at), 1)
        score = torch.cat((memory.relevance, best.values.flatten(1)), 1)
        states = torch.cat((memory.states, new), 2)
        standing = (score * (positions + 1) / memory.seen).masked_fill(positions < 0, -1.0)
        stay = standing.topk(min(self.entries, standing.shape[1]), -1).indices
        stay = stay.gather(1, positions.gather(1, stay).argsort(-1))
        none = memory.surprise[:, :0]
        return Memory(
            _take(states, stay),
            positions.gather(1, stay),
            score.gather(1, stay),
            memory.waiting[:, :, :0],
            none,
            memory.seen,
        )

    def forward(self, x: Tensor, memory: Memory, index: int) -> Tensor:
        """The hidden states x [B, T, d] of the coming tokens at the index-th layer of C, rewoven; in x's dtype."""
        if memory.positions.shape[1] == 0:
            return x
        if not self.trained:
            return self._blended(x, memory, index)
        weights = self.mix.dtype
        normed = _normed(x.to(weights))
        k, v = self._keys(memory, index)
        query = self.q[index](normed)
        scores = query @ k.mT / self.width**0.5
        ahead = memory.seen + torch.arange(x.shape[1], device=x.device)[None, :, None]
        distance = (ahead - memory.positions[:, None]).to(weights)
        scores = scores - self.fading[index] * torch.log1p(distance)
        scores = scores.masked_fill(memory.positions[:, None] < 0, -torch.inf)
        null = (query @ self.null[index] / self.width**0.5)[..., None]
        found = torch.cat((null, scores), -1).softmax(-1)[..., 1:] @ v
        gate = torch.sigmoid(self.gate[index](torch.cat((normed, found), -1)))
        return x + (self.strength * gate * self.out[index](found)).to(x.dtype)

    def _keys(self, memory: Memory, index: int) -> tuple[Tensor, Tensor]:
        if index in memory.made and not torch.is_grad_enabled():
            return memory.made[index]
        rebuilt = self.reconstruct(memory, index)
        made = self.k[index](rebuilt), self.v[index](rebuilt)
        if not torch.is_grad_enabled():
            memory.made[index] = made
        return made

    def reconstruct(self, memory: Memory, index: int, *, without_own: bool = False) -> Tensor:
        """Kept states as the index-th layer of C would have them, from all layers of C: [B, M, d], normed.

        without_own: from the other layers alone (|C| >= 2).
        """
        states = _normed(memory.states.to(self.mix.dtype))
        share = self.mix[index]
        if without_own:
            share = share.masked_fill(torch.arange(self.captured, device=share.device) == index, -torch.inf)
        mapped = states + (states @ self.down[index]) @ self.up[index]
        return torch.einsum("c,bcmd->bmd", share.softmax(-1), mapped)

    def reconstruction_loss(self, memory: Memory) -> Tensor:
        """Mean squared error of each layer's kept states, rebuilt from the other layers; 0 where nothing is kept or
        there is one layer."""
        real = (memory.positions >= 0)[..., None]
        if self.captured == 1 or not bool(real.any()):
            return self.mix.sum() * 0.0
        states = _normed(memory.states.to(self.mix.dtype))
        errors = [
            (self.reconstruct(memory, index, without_own=True) - states[:, index]).square().mean(-1, keepdim=True)
            for index in range(self.captured)
        ]
        return torch.stack([each[real].mean() for each in errors]).mean()

    def _blended(self, x: Tensor, memory: Memory, index: int) -> Tensor:
        normed, keys = _normed(x.float()), _normed(memory.states[:, index].float())
        empty = memory.positions[:, None] < 0
        scores = (normed @ keys.mT / self.dim**0.5).masked_fill(empty, -torch.inf)
        best = scores.topk(min(self.nearest, scores.shape[-1]), -1)
        weights = torch.zeros_like(scores).scatter(-1, best.indices, best.values.softmax(-1)).nan_to_num(0.0)
        found = weights @ keys
        alike = F.normalize(normed, dim=-1) @ F.normalize(keys, dim=-1).mT
        near = alike.masked_fill(empty, -1.0).amax(-1, keepdim=True) >= self.cosine
        blended = (1 - self.blend) * x.float() + self.blend * x.float().norm(dim=-1, keepdim=True) * F.normalize(
            found, dim=-1
        )
        return torch.where(near, blended.to(x.dtype), x)


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _take(states: Tensor, index: Tensor) -> Tensor:
    """Tokens index [B, K] of states [B, C, N, d] -> [B, C, K, d]."""
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise OptionError(f"ContextualMemory: {message}")
