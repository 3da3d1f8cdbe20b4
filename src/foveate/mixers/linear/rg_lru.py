"""RG-LRU: a diagonal recurrence that keeps the size of its state, in the recurrent layer of Griffin.

    r = sigmoid(W_r x + b_r), i = sigmoid(W_i x + b_i), W_r and W_i block-diagonal, one block per head
    a = exp(-8 r softplus(p));  h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t, without the root at a first token
    layer: y = (gelu(x W_y) * RG-LRU(conv(x W_x))) W_o

Papers: De et al. 2024 (arXiv 2402.19427), Griffin, and as one of the dynamical systems of arXiv 2405.15731. Laid out as
RecurrentGemma's layer: projections with bias, convolution with bias and no activation, gelu by tanh. The root is kept
from being that of 0, whose gradient is infinite, by a floor of 1e-24 below it.

State: h [B, width] float32, whether a first token has been, and the last inputs of the convolution. Cost: O(N width
width / heads).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.scans import elementwise_scan
from foveate.mixers.base import Initialised, Mixer, exact, start_position
from foveate.mixers.linear.recurrence import LinearState
from foveate.mixers.parts import ShortConvolution
from foveate.registry import register

RATE = 8.0
# a with r = 1 / 8 starts between these, and so remembers some 10 to 1000 tokens.
LEAST, MOST = 0.9, 0.999


class RGLRU(Initialised):
    """The recurrence alone.

    recurrent_param: p [width].    input_gate_weight, recurrent_gate_weight: [H, width / H, width / H], x on the left.
    input_gate_bias, recurrent_gate_bias: [H, width / H].
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        block = width // heads
        self.recurrent_param = nn.Parameter(torch.empty(width))
        self.input_gate_weight = nn.Parameter(torch.empty(heads, block, block))
        self.input_gate_bias = nn.Parameter(torch.empty(heads, block))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(heads, block, block))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(heads, block))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        # softplus(p) = -log a, with the squares of a uniform.
        rate = -0.5 * torch.empty_like(self.recurrent_param).uniform_(LEAST**2, MOST**2).log()
        reach = self.input_gate_weight.shape[-1] ** -0.5
        weights = {
            name: torch.empty_like(getattr(self, name)).uniform_(-reach, reach)
            for name in ("input_gate_weight", "recurrent_gate_weight")
        }
        biases = {name: torch.zeros_like(self.input_gate_bias) for name in ("input_gate_bias", "recurrent_gate_bias")}
        return {"recurrent_param": rate.expm1().log(), **weights, **biases}

    def forward(self, x: Tensor, h: Tensor, begun: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scan x [B, N, width] from h [R, width]; R is B, or the number of packed sequences.

        begun: [R] bool, whether a sequence has had its first token. Returns outputs like x, and the last h.
        """
        keep, let_in = self.log_keep(x), self.gate(x, "input")
        root = (-torch.expm1(2 * keep)).clamp(min=1e-24).sqrt()
        root = torch.where(first_tokens(x, begun, cu_seqlens)[..., None], 1.0, root)
        y, last = elementwise_scan(x.to(root.dtype) * let_in * root, keep, initial_state=h, cu_seqlens=cu_seqlens)
        return y.to(x.dtype), last

    def gate(self, x: Tensor, name: str) -> Tensor:
        """The input or recurrent gate, [B, N, width] float32 (float64 for float64)."""
        weight, bias = getattr(self, f"{name}_gate_weight"), getattr(self, f"{name}_gate_bias")
        raw = torch.einsum("bnhi,hij->bnhj", x.unflatten(-1, (weight.shape[0], -1)), weight) + bias
        return raw.to(exact(raw)).sigmoid().flatten(2)

    def log_keep(self, x: Tensor) -> Tensor:
        """log a, [B, N, width]."""
        gate = self.gate(x, "recurrent")
        return -RATE * gate * F.softplus(self.recurrent_param.to(gate.dtype))


def first_tokens(x: Tensor, begun: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B, N] bool, the first tokens of the sequences that have not begun."""
    first = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    if cu_seqlens is None:
        first[:, 0] = ~begun
        return first
    bounds = cu_seqlens.to(x.device)
    present = bounds.diff() > 0
    first[0, bounds[:-1][present]] = ~begun[present]
    return first


@dataclass(frozen=True, kw_only=True)
class RGLRUState(LinearState):
    """begun: [B] bool, whether a row has had its first token."""

    begun: Tensor


@register(
    "rg-lru",
    kind="mixer",
    paper="Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
    arxiv="2402.19427",
    year=2024,
    applies_to="from scratch",
    claim=(
        "Text, four layers, 400 steps: perplexity per byte 2.95, softmax 3.17, linear attention 7.42. Recall of 16 "
        "pairs in 128 tokens: 0.063, linear attention 0.995: one number per channel does not hold pairs "
        "(benchmarks/results/claims/dsf.json)."
    ),
)
class RGLRUMixer(Mixer):
    """Griffin's recurrent layer around the real-gated linear recurrent unit.

    expand: width of the recurrence over dim.    kernel: taps of the short convolution.    heads: blocks of the gates.
    """

    def __init__(
        self, *, dim: int, layer: int = 0, layers: int = 1, heads: int = 4, expand: float = 1.0, kernel: int = 4
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.width = int(dim * expand)
        self.require(
            self.width >= 1 and self.width % heads == 0,
            f"dim={dim}, expand={expand}, allowed: a width that {heads} heads divide",
        )
        self.require(kernel >= 1, f"kernel={kernel}, allowed: >= 1")
        self.y_proj = nn.Linear(dim, self.width)
        self.x_proj = nn.Linear(dim, self.width)
        self.conv = ShortConvolution(self.width, kernel, bias=True, activation=None)
        self.lru = RGLRU(self.width, heads)
        self.o_proj = nn.Linear(self.width, dim)

    def start(self, batch: int, like: Tensor) -> RGLRUState:
        return RGLRUState(
            owner=self.owner,
            position=start_position(batch, like),
            memory=torch.zeros(batch, self.width, dtype=exact(like), device=like.device),
            convolutions=(self.conv.start(batch, like),),
            begun=torch.zeros(batch, dtype=torch.bool, device=like.device),
        )

    def mix(
        self, x: Tensor, state: RGLRUState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, RGLRUState]:
        convolved, cache = self.conv(self.x_proj(x), state.convolutions[0], cu_seqlens)
        h, memory = self.lru(convolved, state.memory, state.begun, cu_seqlens)
        seen = torch.ones_like(state.begun) if cu_seqlens is None else cu_seqlens.to(x.device).diff() > 0
        y = self.o_proj(F.gelu(self.y_proj(x), approximate="tanh") * h)
        return y, replace(state, memory=memory, convolutions=(cache,), begun=state.begun | seen)
