"""qLSTM: a long short-term memory whose gates see the token alone, and so a linear recurrence.

    [z, u] = x W_in;  u = conv(u);  f, i, o = u W_g + b
    h_t = a_t h_{t-1} + sigmoid(i_t) u_t,  a = sigmoid(f), or reversed: a = sigmoid(-f)^relu(alpha), alpha learned
    y = (gelu(z) * sigmoid(o) * h) W_o

Paper: Sieber et al. 2024 (arXiv 2405.15731). sigmoid(-f)^alpha = exp(-alpha softplus(f)): the reversed gate is the
decay of a state space with step softplus(f). Once alpha is below 0 nothing is forgotten, and alpha has no gradient.
Linear layers are initialised by the shell.

State: h [B, expand dim] float32 and the last inputs of the convolution. Cost: O(N expand dim).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.scans import elementwise_scan
from foveate.mixers.base import Mixer, exact, start_position
from foveate.mixers.linear.recurrence import LinearState
from foveate.mixers.parts import ShortConvolution
from foveate.registry import register


@register(
    "qlstm",
    kind="mixer",
    paper="Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural "
    "Networks",
    arxiv="2405.15731",
    year=2024,
    applies_to="from scratch",
    claim=(
        "Recall of 16 pairs in 128 tokens: 0.090 with the reversed sigmoid and 0.069 without it, linear attention "
        "0.995, softmax 1.000; text, four layers, 400 steps: perplexity per byte 2.729 and 2.723, softmax 3.171: the "
        "reversed gate changes little at this size (benchmarks/results/claims/dsf.json)."
    ),
)
class QLSTMMixer(Mixer):
    """A linear recurrence with the gates of an LSTM.

    expand: inner width over dim.    kernel: taps of the short convolution.    reverse: forget by sigmoid(-f)^alpha.
    heads: not used.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        expand: float = 2.0,
        kernel: int = 4,
        reverse: bool = True,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.inner = int(dim * expand)
        self.require(self.inner >= 1, f"expand={expand}, allowed: at least one channel")
        self.require(kernel >= 1, f"kernel={kernel}, allowed: >= 1")
        self.in_proj = nn.Linear(dim, 2 * self.inner, bias=False)
        self.conv = ShortConvolution(self.inner, kernel, bias=True, activation=None)
        self.gates = nn.Linear(self.inner, 3 * self.inner)
        self.alpha = nn.Parameter(torch.ones(())) if reverse else None
        self.o_proj = nn.Linear(self.inner, dim, bias=False)

    def initial_values(self) -> dict[str, Tensor]:
        return {} if self.alpha is None else {"alpha": torch.ones_like(self.alpha)}

    def start(self, batch: int, like: Tensor) -> LinearState:
        return LinearState(
            owner=self.owner,
            position=start_position(batch, like),
            memory=torch.zeros(batch, self.inner, dtype=exact(like), device=like.device),
            convolutions=(self.conv.start(batch, like),),
        )

    def log_forget(self, f: Tensor) -> Tensor:
        """log a of the gate's input, float32 (float64 for float64)."""
        f = f.to(exact(f))
        return F.logsigmoid(f) if self.alpha is None else F.relu(self.alpha.to(f.dtype)) * F.logsigmoid(-f)

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        z, u = self.in_proj(x).chunk(2, -1)
        u, cache = self.conv(u, state.convolutions[0], cu_seqlens)
        f, i, o = self.gates(u).chunk(3, -1)
        written = u.to(exact(u)) * torch.sigmoid(i)
        h, memory = elementwise_scan(written, self.log_forget(f), initial_state=state.memory, cu_seqlens=cu_seqlens)
        y = self.o_proj(F.gelu(z) * torch.sigmoid(o) * h.to(z.dtype))
        return y, replace(state, memory=memory, convolutions=(cache,))
