"""Small modules that several mixers are built of: norms and the short causal convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.convolutions import causal_conv
from foveate.mixers.base import Initialised, exact


class RMSNorm(Initialised):
    """x / sqrt(mean(x^2) + eps) over the last axis, times a learned gain; in float32 (float64 for float64), then x's
    dtype.

    gain: whether there is one.    groups: norm each of so many equal parts of the last axis alone.
    """

    def __init__(self, dim: int, eps: float = 1e-6, *, gain: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.eps, self.groups = eps, groups
        self.weight = nn.Parameter(torch.ones(dim)) if gain else None

    def initial_values(self) -> dict[str, Tensor]:
        return {} if self.weight is None else {"weight": torch.ones_like(self.weight)}

    def forward(self, x: Tensor) -> Tensor:
        parts = x.to(exact(x)).unflatten(-1, (self.groups, -1))
        wide = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)
        if self.weight is not None:
            wide = wide * self.weight.to(wide.dtype)
        return wide.to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x) * silu(gate), or with `gate_first` RMSNorm(x * silu(gate)) (Mamba-2)."""

    def __init__(self, dim: int, eps: float = 1e-5, *, gate_first: bool = False, groups: int = 1) -> None:
        super().__init__(dim, eps, groups=groups)
        self.gate_first = gate_first

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        opened = F.silu(gate.to(exact(x)))
        if self.gate_first:
            return super().forward(x.to(opened.dtype) * opened).to(x.dtype)
        return (super().forward(x.to(opened.dtype)) * opened).to(x.dtype)


class ShortConvolution(Initialised):
    """Causal depthwise convolution over tokens, see `foveate.attention.convolutions.causal_conv`.

    weight: [C, 1, W], as in a Conv1d; the last tap multiplies the current token. bias: [C] or None.
    """

    def __init__(self, channels: int, kernel: int, *, bias: bool = False, activation: str | None = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        # As torch's Conv1d: uniform within 1 / sqrt(taps).
        reach = self.weight.shape[-1] ** -0.5
        own = {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}
        return {name: torch.empty_like(each).uniform_(-reach, reach) for name, each in own.items()}

    def start(self, batch: int, like: Tensor) -> Tensor:
        """The cache before the first token: zeros [B, W - 1, C]."""
        return like.new_zeros(batch, self.weight.shape[-1] - 1, self.weight.shape[0])

    def forward(self, x: Tensor, cache: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, N, C] and the cache [R, W - 1, C] of the tokens before -> y [B, N, C] and the cache after."""
        y, after = causal_conv(
            x, self.weight, self.bias, activation=self.activation, cache=cache, cu_seqlens=cu_seqlens
        )
        # A view of a long prompt would keep all of it.
        return y, after.clone() if x.shape[1] > self.weight.shape[-1] else after
