"""Titans' neural memory written once per chunk: the coarser layer of the open implementation, with its options.

    xs = RMSNorm(x) for keys, values and gates;  xr = RMSNorm(x) for queries and the heads' gate
    theta_t = max_rate sigmoid(xs W + b) per token and head;  alpha_c, eta_c = sigmoid of xs W + b, mean over chunk c
    W and S after chunk c, and what token t reads: see `foveate.attention.weight_chunks`
    y = (M(q) * sigmoid(xr W_g), heads joined) W_o        one head: y = M(q)

M(z) = z + LayerNorm(MLP(z)) (1 + gain), with exact GELU; the gain is written like a matrix, and every head starts from
weights of its own. The inner loss is a mean over the features.

Paper: Behrouz et al. 2024 (arXiv 2501.00663) for the idea; the layer is that of lucidrains/titans-pytorch (read for its
definition), which differs from the paper in gates per chunk, in one gradient per chunk, in gradients at weights that
are refreshed every `refresh` tokens or never, and in the order of operations. There a call must begin where a chunk
does; here a sequence may be split anywhere. Left out: pooling by attention, weights from another layer, a learned
refresh.

State: per head W, S, base and the running chunk's gradient, 4 |W| numbers in float32. Cost: O(N |W|) per head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from foveate.attention.memories import ACTIVATIONS, FORMS, MLPMemory
from foveate.attention.weight_chunks import ChunkState, chunk_memory_scan
from foveate.attention.weight_states import MemoryState
from foveate.mixers.base import Initialised, Mixer, MixerState, exact, start_position
from foveate.mixers.linear.recurrence import split_heads
from foveate.mixers.memory.titans import InitialWeights
from foveate.mixers.memory.titans_window import PAPER
from foveate.mixers.parts import RMSNorm
from foveate.registry import register

# float32's machine epsilon, in every dtype.
EPS = 2.0**-23


class HeadNorm(Initialised):
    """RMSNorm of each head [.., H, D] times (1 + gain); gain [H, D]."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(head_dim, EPS, gain=False)
        self.gain = nn.Parameter(torch.zeros(heads, head_dim))

    def initial_values(self) -> dict[str, Tensor]:
        return {"gain": torch.zeros_like(self.gain)}

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * (1 + self.gain).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class TitansChunkedState(MixerState):
    """memory: see `ChunkState`."""

    memory: ChunkState


@register(
    "titans-memory-chunked",
    kind="mixer",
    paper=PAPER,
    arxiv="2501.00663",
    year=2024,
    applies_to="from scratch",
    small={"chunk": 4, "expansion": 1.5, "refresh": 8},
    claim=(
        "Trained on 128 tokens with 8 pairs at the start, asked after 0, 128, 384, 896 and 1920 tokens of noise: "
        "0.875, 0.946, 0.245, 0.039 and 0.015 (benchmarks/results/claims/titans.json). Multi-query recall, 64 pairs "
        "in 256 tokens: 0.995 with 526 kB of state; linear attention 0.658 with 17 kB (benchmarks/results/mqar.json)."
    ),
)
class TitansChunkedMixer(Mixer):
    """A neural memory that takes one gradient step per chunk, as in the open implementation of Titans.

    head_dim: D (default dim / heads; with one head dim).    depth: matrices of the memory's MLP.    expansion: its
    hidden width over D.    activation: "silu" or "gelu".    form: "plain", "residual" or "residual-gain".    chunk:
    tokens of a step.    refresh: tokens, whole chunks, after which gradients are taken at the present weights (default:
    never).    max_rate: largest inner learning rate.    momentum: keep S.    pre_norm: RMSNorm of x.    qk_norm:
    RMSNorm of queries and keys.    post_norm: RMSNorm of what is read.    modulation: a learned rate per weight and
    chunk.    max_norm: bounds the norm of each gradient softly (default: not).    orthogonal: Newton-Schulz of S.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        head_dim: int | None = None,
        depth: int = 2,
        expansion: float = 4.0,
        activation: str = "gelu",
        form: str = "residual-gain",
        chunk: int = 64,
        refresh: int | None = None,
        max_rate: float = 1.0,
        momentum: bool = True,
        pre_norm: bool = True,
        qk_norm: bool = False,
        post_norm: bool = False,
        modulation: bool = False,
        max_norm: float | None = None,
        orthogonal: bool = False,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        width = dim // heads if head_dim is None else head_dim
        self.require(width >= 1, f"head_dim={width}, allowed: >= 1")
        self.require(heads > 1 or width == dim, f"head_dim={width} with heads=1, allowed: dim = {dim}")
        self.require(depth >= 1, f"depth={depth}, allowed: >= 1")
        self.require(int(expansion * width) >= 1, f"expansion={expansion}, allowed: at least one hidden channel")
        self.require(activation in ACTIVATIONS, f"activation={activation!r}, allowed: {ACTIVATIONS}")
        self.require(form in FORMS, f"form={form!r}, allowed: {FORMS}")
        self.require(chunk >= 1, f"chunk={chunk}, allowed: >= 1")
        whole = refresh is None or (refresh >= 1 and refresh % chunk == 0)
        self.require(whole, f"refresh={refresh}, allowed: None or a multiple of chunk = {chunk}")
        self.require(max_rate > 0, f"max_rate={max_rate}, allowed: > 0")
        self.require(max_norm is None or max_norm > 0, f"max_norm={max_norm}, allowed: None or > 0")
        self.memory, self.chunk, self.max_rate = MLPMemory(depth, activation, form), chunk, max_rate
        self.refresh = None if refresh is None else refresh // chunk
        self.momentum, self.max_norm, self.orthogonal = momentum, max_norm, orthogonal
        inner = heads * width
        self.weights = InitialWeights(self.memory, heads, width, int(expansion * width))
        self.store_norm = RMSNorm(dim, EPS) if pre_norm else nn.Identity()
        self.retrieve_norm = RMSNorm(dim, EPS) if pre_norm else nn.Identity()
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.rate_proj = nn.Linear(dim, heads)
        self.decay_proj = nn.Linear(dim, heads)
        self.momentum_proj = nn.Linear(dim, heads) if momentum else None
        self.modulation_proj = nn.Linear(dim, heads * len(self.weights.names)) if modulation else None
        self.q_norm = HeadNorm(heads, width) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(heads, width) if qk_norm else nn.Identity()
        self.o_norm = HeadNorm(heads, width) if post_norm else nn.Identity()
        self.gate_proj = nn.Linear(dim, heads, bias=False) if heads > 1 else None
        self.o_proj = nn.Linear(inner, dim, bias=False) if heads > 1 else nn.Identity()

    @property
    def gates(self) -> int:
        """Values per head and chunk."""
        return 1 + self.momentum + (0 if self.modulation_proj is None else len(self.weights.names))

    def start(self, batch: int, like: Tensor) -> TitansChunkedState:
        held = MemoryState.start(self.weights(like), batch, momentum=self.momentum)
        memory = ChunkState.start(held, self.gates)
        return TitansChunkedState(owner=self.owner, position=start_position(batch, like), memory=memory)

    def _logits(self, x: Tensor) -> Tensor:
        """[B, N, H, gates]."""
        parts = [self.decay_proj(x).unsqueeze(-1)]
        if self.momentum_proj is not None:
            parts.append(self.momentum_proj(x).unsqueeze(-1))
        if self.modulation_proj is not None:
            parts.append(split_heads(self.modulation_proj(x), self.heads))
        return torch.cat(parts, -1)

    def mix(
        self, x: Tensor, state: TitansChunkedState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, TitansChunkedState]:
        stored, read = self.store_norm(x), self.retrieve_norm(x)
        rate = self.rate_proj(stored)
        o, memory = chunk_memory_scan(
            self.memory,
            state.memory,
            self.q_norm(split_heads(self.q_proj(read), self.heads)),
            self.k_norm(split_heads(self.k_proj(stored), self.heads)),
            split_heads(self.v_proj(stored), self.heads),
            rate=self.max_rate * rate.to(exact(rate)).sigmoid(),
            logits=self._logits(stored),
            chunk_size=self.chunk,
            refresh=self.refresh,
            max_norm=self.max_norm,
            orthogonal=self.orthogonal,
            cu_seqlens=cu_seqlens,
        )
        o = self.o_norm(o)
        if self.gate_proj is not None:
            o = o * self.gate_proj(read).sigmoid().unsqueeze(-1)
        return self.o_proj(o.flatten(2)), replace(state, memory=memory)
