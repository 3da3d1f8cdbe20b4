"""BaseConv: Zoology's gated convolution, the simplest layer that stands for H3, Hyena and RWKV.

    y = (x W + b) * conv(x) + x                                            (activation: silu on both factors)

    short   conv: causal, depthwise, `kernel` taps, with bias
    long    conv(x)_t = sum_{s <= t} h_{t-s} x_s + x_t with one filter h per channel, up to `max_length` taps:
            "implicit": h_t = MLP(z_t), z_t = [t / (L - 1), cos(f w), -sin(f w)], w = 2 pi t / L, f from 1e-4 to
            bands - 1, L = max_length, MLP = Linear, ReLU, Linear; "explicit": h learned

Paper: Arora et al. 2023 (arXiv 2312.04927). The filter is cut to the taps that the input reaches, so no longer filter
wraps around.

State: the last kernel - 1 inputs [B, kernel - 1, C]; a long filter's is all inputs [B, S, C], and so grows. Cost:
O(N C kernel), long O(N log N C) for a prompt and O(S C) for one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.convolutions import toeplitz_matmul
from foveate.errors import ShapeError
from foveate.mixers.base import Initialised, Mixer, MixerState, exact, start_position
from foveate.mixers.parts import ShortConvolution
from foveate.registry import register


@dataclass(frozen=True, kw_only=True)
class ConvolutionState(MixerState):
    """inputs: [B, S, C], each row's last inputs at the right end, zeros before its first."""

    inputs: Tensor

    @classmethod
    def mergeable(cls, states: Sequence[Self]) -> bool:
        # Rows of fewer slots are filled up from the left.
        return len({each.owner for each in states}) == 1

    @classmethod
    def merge(cls, states: Sequence[Self]) -> Self:
        slots = max((each.inputs.shape[1] for each in states), default=0)
        return super().merge(
            [replace(each, inputs=F.pad(each.inputs, (0, 0, slots - each.inputs.shape[1], 0))) for each in states]
        )


class LongConvolution(Initialised):
    """A causal convolution with one filter as long as the sequence for each channel, plus its input."""

    def __init__(self, channels: int, length: int, *, implicit: bool, bands: int, hidden: int) -> None:
        super().__init__()
        self.length, self.bands = length, bands
        if implicit:
            self.filter: nn.Module | None = nn.Sequential(
                nn.Linear(1 + 2 * bands, hidden), nn.ReLU(), nn.Linear(hidden, channels)
            )
            self.taps = None
        else:
            self.filter = None
            self.taps = nn.Parameter(torch.empty(channels, length))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        return {} if self.taps is None else {"taps": torch.randn_like(self.taps) / math.sqrt(self.length)}

    def _features(self, length: int, like: Tensor) -> Tensor:
        """z [T, 1 + 2 bands] of the first T taps."""
        tap = torch.arange(length, dtype=like.dtype, device=like.device)[:, None]
        frequency = torch.linspace(1e-4, self.bands - 1, self.bands, dtype=like.dtype, device=like.device)
        angle = frequency * (2 * math.pi / self.length) * tap
        return torch.cat((tap / max(self.length - 1, 1), angle.cos(), -angle.sin()), -1)

    def taps_of(self, length: int) -> Tensor:
        """h [C, T], tap t for a distance of t tokens."""
        if self.taps is not None:
            return self.taps[:, :length]
        assert self.filter is not None
        like = next(self.filter.parameters())
        return self.filter(self._features(length, like)).T

    def forward(self, inputs: Tensor, tokens: int) -> Tensor:
        """The last `tokens` outputs for inputs [B, S, C]."""
        length = inputs.shape[1]
        if length > self.length:
            raise ShapeError(
                f"baseconv: {length} tokens with max_length={self.length}, allowed: a max_length that reaches them "
                "(the filter has no taps beyond)"
            )
        oldest_first = self.taps_of(length).flip(-1)
        with torch.autocast(inputs.device.type, enabled=False):
            wide = inputs.to(exact(inputs))
            if tokens == 1:
                y = (wide * oldest_first.T.to(wide.dtype)).sum(1, keepdim=True)
            else:
                y = toeplitz_matmul(oldest_first.to(wide.dtype), wide, causal=True)[:, length - tokens :]
        return y.to(inputs.dtype) + inputs[:, length - tokens :]


@register(
    "baseconv",
    kind="mixer",
    paper="Zoology: Measuring and Improving Recall in Efficient Language Models",
    arxiv="2312.04927",
    year=2023,
    applies_to="from scratch",
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, 2400 steps at one rate: accuracy "
        "0.003 with short filters and 0.016 with filters of 256 tokens, against 1.000 of softmax: "
        "convolutions alone do not recall, as Zoology found (benchmarks/results/mqar.json)."
    ),
)
class BaseConvMixer(Mixer):
    """A gated causal convolution, short or as long as the sequence.

    kernel: taps; None for a long filter.    max_length: taps of a long filter, and the longest sequence it takes.
    filter: "implicit" (an MLP of the distance) or "explicit".    bands, hidden: frequencies and width of that MLP.
    activation: silu on both factors.    heads: not used.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        kernel: int | None = 3,
        max_length: int = 2048,
        filter: str = "implicit",
        bands: int = 1,
        hidden: int = 16,
        activation: bool = False,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(kernel is None or kernel >= 1, f"kernel={kernel}, allowed: >= 1, or none for a long filter")
        self.require(filter in ("implicit", "explicit"), f"filter={filter!r}, allowed: 'implicit', 'explicit'")
        for name, value in (("max_length", max_length), ("bands", bands), ("hidden", hidden)):
            self.require(value >= 1, f"{name}={value}, allowed: >= 1")
        self.activation = activation
        self.projection = nn.Linear(dim, dim)
        self.short = None if kernel is None else ShortConvolution(dim, kernel, bias=True, activation=None)
        self.long = (
            LongConvolution(dim, max_length, implicit=filter == "implicit", bands=bands, hidden=hidden)
            if kernel is None
            else None
        )
        self.packs = self.constant_state = kernel is not None

    def start(self, batch: int, like: Tensor) -> ConvolutionState:
        inputs = like.new_zeros(batch, 0, self.dim) if self.short is None else self.short.start(batch, like)
        return ConvolutionState(owner=self.owner, position=start_position(batch, like), inputs=inputs)

    def state_bytes(self, batch: int, length: int) -> int:
        start = self.start(batch, self.meta())
        grown = 0 if self.short is not None else batch * length * self.dim * start.inputs.element_size()
        return start.bytes() + grown

    def mix(
        self, x: Tensor, state: ConvolutionState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, ConvolutionState]:
        if self.short is not None:
            convolved, inputs = self.short(x, state.inputs, cu_seqlens)
        else:
            assert self.long is not None
            inputs = torch.cat((state.inputs.to(x.dtype), x), 1)
            convolved = self.long(inputs, x.shape[1])
        gate = self.projection(x)
        if self.activation:
            gate, convolved = F.silu(gate), F.silu(convolved)
        return gate * convolved + x, replace(state, inputs=inputs)
