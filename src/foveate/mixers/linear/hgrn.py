"""HGRN: an elementwise recurrence whose forget gates are bounded from below, the more so the deeper the layer.

    i, f, u = x W_i, x W_f, x W_g;  a = lb + (1 - lb) sigmoid(f)
    h_t = a_t h_{t-1} + (1 - a_t) silu(i_t);  y = (RMSNorm(h) * silu(u)) W_o

    lower bounds: P = softmax over layers of a table [layers, dim] that all layers share, lb_l = sum_{1 <= m <= l} P_m

Paper: Qin et al. 2023 (arXiv 2311.04823). Real gates, as in the layer studied in arXiv 2507.06457 (the paper's first
form has complex ones). Layer 0 has no bound. In a hybrid the table counts all layers of the model.

State: [B, expand dim] float32. Cost: O(N dim).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.scans import elementwise_scan
from foveate.mixers.base import Mixer, exact, start_position
from foveate.mixers.linear.recurrence import LinearState
from foveate.mixers.parts import GatedRMSNorm
from foveate.registry import register


def forget_lower_bounds(table: Tensor) -> Tensor:
    """Lower bounds of forget gates [layers, D] from the shared table [layers, D]: 0 in layer 0, rising, below 1."""
    share = table.softmax(0)
    return share.cumsum(0) - share[0]


def bounded_log_forget(f: Tensor, table: Tensor | None, layer: int) -> Tensor:
    """log(lb + (1 - lb) sigmoid(f)) in float32 (float64 for float64), lb of this layer; no bound without a table."""
    log_forget = F.logsigmoid(f.to(exact(f)))
    if table is None:
        return log_forget
    bound = forget_lower_bounds(table.to(log_forget.dtype))[layer]
    # Rounding can leave a sum of shares a little above its limits, and g must not be above 0.
    return torch.logaddexp(bound.log(), torch.log1p(-bound) + log_forget).clamp(max=0)


@register(
    "hgrn",
    kind="mixer",
    paper="Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
    arxiv="2311.04823",
    year=2023,
    applies_to="from scratch",
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, 2400 steps at one rate: accuracy 0.014 "
        "with 0.8 kB of state; softmax 1.000 with 132 kB, linear attention 0.658 with 17 kB "
        "(benchmarks/results/mqar.json)."
    ),
)
class HGRNMixer(Mixer):
    """An elementwise gated recurrence with lower-bounded forget gates.

    expand: width of the recurrence over dim.    heads: not used.
    """

    shared = ("lower_bounds",)

    def __init__(self, *, dim: int, layer: int = 0, layers: int = 1, heads: int = 4, expand: float = 1.0) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.width = int(dim * expand)
        self.require(self.width >= 1, f"expand={expand}, allowed: at least one channel")
        self.i_proj = nn.Linear(dim, self.width, bias=False)
        self.f_proj = nn.Linear(dim, self.width, bias=False)
        self.g_proj = nn.Linear(dim, self.width, bias=False)
        self.lower_bounds = nn.Parameter(torch.zeros(layers, self.width)) if layer > 0 else None
        self.o_norm = GatedRMSNorm(self.width)
        self.o_proj = nn.Linear(self.width, dim, bias=False)

    def initial_values(self) -> dict[str, Tensor]:
        return {} if self.lower_bounds is None else {"lower_bounds": torch.zeros_like(self.lower_bounds)}

    def start(self, batch: int, like: Tensor) -> LinearState:
        memory = torch.zeros(batch, self.width, dtype=exact(like), device=like.device)
        return LinearState(owner=self.owner, position=start_position(batch, like), memory=memory)

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        g = bounded_log_forget(self.f_proj(x), self.lower_bounds, self.layer)
        written = F.silu(self.i_proj(x)).to(g.dtype) * -torch.expm1(g)
        h, memory = elementwise_scan(written, g, initial_state=state.memory, cu_seqlens=cu_seqlens)
        o = self.o_norm(h.to(x.dtype), self.g_proj(x))
        return self.o_proj(o), replace(state, memory=memory)
