"""S6: the selective state space of Mamba, a diagonal system of its own per channel whose step depends on the token.

    [u, z] = x W_in;  u = silu(conv(u));  [r, B, C] = u W_x;  dt = softplus(r W_dt + dt_bias) per channel
    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  A = -exp(A_log) [D, n]
    s_t = h_t . C_t + D u_t;  y = (s * silu(z)) W_out

`selective_scan` is the recurrence alone.

Papers: Gu and Dao 2023 (arXiv 2312.00752), and as one of the dynamical systems of arXiv 2405.15731. Laid out as the
authors' layer, in and out projections without bias.

State: h [B, D, n] float32, D = expand dim, and the last inputs of the convolution. Cost: O(N D n); the scan holds
B N n numbers for as many channels at once as make 2^24 of them, and autograd those of all channels.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.scans import elementwise_scan
from foveate.attention.shapes import match
from foveate.errors import ShapeError
from foveate.mixers.base import Mixer, exact, start_position
from foveate.mixers.linear.gated_deltanet import initial_step_bias
from foveate.mixers.linear.recurrence import LinearState
from foveate.mixers.parts import ShortConvolution
from foveate.registry import register

PIECE_ENTRIES = 1 << 24


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = h_t . C_t + D u_t, each channel on its own.

    Args:
        u, dt: [B, N, D], dt >= 0.    A: [D, n], <= 0.    B, C: [B, N, n], or [B, N, G, n] with one for every D / G
        channels in a row.    D: [D], the skip.
        initial_state: [R, D, n], R = B or the number of packed sequences; default 0.
        cu_seqlens: [R + 1], boundaries of sequences packed into a batch of 1.
    Returns:
        y [B, N, D] in u's dtype; the last state [R, D, n], float32 (float64 for float64).
    Raises:
        ShapeError; OptionError where dt A > 0; StateError.
    """
    B, C = (each if each.dim() == 4 else each.unsqueeze(2) for each in (B, C))
    sizes = match(u=(u, "B N D"), dt=(dt, "B N D"), A=(A, "D n"), B=(B, "B N G n"), C=(C, "B N G n"))
    batch, length, channels, groups, n = (sizes[letter] for letter in "BNDGn")
    if groups == 0 or channels % groups:
        raise ShapeError(f"u has {channels} channels and B has {groups} groups, allowed: a divisor")
    group = torch.arange(channels, device=u.device) // (channels // groups)
    wide = exact(u)
    outputs, states = [], []
    for part in torch.arange(channels, device=u.device).split(max(1, PIECE_ENTRIES // (batch * length * n))):
        step = dt[..., part].to(wide)
        written = (step * u[..., part])[..., None] * B[:, :, group[part]].to(wide)
        h, last = elementwise_scan(
            written,
            step[..., None] * A[part].to(wide),
            initial_state=None if initial_state is None else initial_state[:, part],
            cu_seqlens=cu_seqlens,
        )
        outputs.append((h * C[:, :, group[part]].to(wide)).sum(-1))
        states.append(last)
    y = torch.cat(outputs, -1)
    if D is not None:
        y = y + D.to(wide) * u
    return y.to(u.dtype), torch.cat(states, 1)


@register(
    "s6",
    kind="mixer",
    paper="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    arxiv="2312.00752",
    year=2023,
    applies_to="from scratch",
    claim=(
        "Text, four layers, 400 steps: perplexity per byte 2.73, softmax 3.17, linear attention 7.42. Recall of 16 "
        "pairs in 128 tokens: 0.390 with 16 and 0.547 with 4 numbers of state per channel, linear attention 0.995, "
        "softmax 1.000: a larger state did not help in 600 steps (benchmarks/results/claims/dsf.json). Multi-query "
        "recall, 64 pairs: 0.019 (benchmarks/results/mqar.json)."
    ),
)
class S6Mixer(Mixer):
    """Selective state space with a step per channel (Mamba's first layer).

    expand: inner width over dim.    state_dim: n, numbers per channel.    kernel: taps of the short convolution.
    step_rank: rank of the step's projection (default: dim / 16, rounded up).    heads: not used.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        expand: float = 2.0,
        state_dim: int = 16,
        kernel: int = 4,
        step_rank: int | None = None,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.inner, self.state_dim = int(dim * expand), state_dim
        self.step_rank = math.ceil(dim / 16) if step_rank is None else step_rank
        self.require(self.inner >= 1, f"expand={expand}, allowed: at least one channel")
        self.require(state_dim >= 1, f"state_dim={state_dim}, allowed: >= 1")
        self.require(kernel >= 1, f"kernel={kernel}, allowed: >= 1")
        self.require(self.step_rank >= 1, f"step_rank={step_rank}, allowed: >= 1")
        self.in_proj = nn.Linear(dim, 2 * self.inner, bias=False)
        self.conv = ShortConvolution(self.inner, kernel, bias=True)
        self.x_proj = nn.Linear(self.inner, self.step_rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(self.step_rank, self.inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.inner))
        self.A_log = nn.Parameter(torch.empty(self.inner, state_dim))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.o_proj = nn.Linear(self.inner, dim, bias=False)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        rates = torch.arange(1, self.state_dim + 1, dtype=self.A_log.dtype, device=self.A_log.device)
        return {
            "dt_bias": initial_step_bias(self.dt_bias),
            "A_log": rates.log().expand_as(self.A_log),
            "D": torch.ones_like(self.D),
        }

    def start(self, batch: int, like: Tensor) -> LinearState:
        return LinearState(
            owner=self.owner,
            position=start_position(batch, like),
            memory=torch.zeros(batch, self.inner, self.state_dim, dtype=exact(like), device=like.device),
            convolutions=(self.conv.start(batch, like),),
        )

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        u, z = self.in_proj(x).chunk(2, -1)
        u, cache = self.conv(u, state.convolutions[0], cu_seqlens)
        raw, b, c = self.x_proj(u).split([self.step_rank, self.state_dim, self.state_dim], -1)
        step = self.dt_proj(raw)
        dt = F.softplus(step.to(exact(step)) + self.dt_bias.to(exact(step)))
        A = -self.A_log.to(exact(step)).exp()
        s, memory = selective_scan(u, dt, A, b, c, self.D, initial_state=state.memory, cu_seqlens=cu_seqlens)
        return self.o_proj(s * F.silu(z)), replace(state, memory=memory, convolutions=(cache,))
