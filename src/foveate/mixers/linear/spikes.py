"""Spike coding of activations, and 8-bit weights: SpikingBrain's W8ASpike, a training-free coding of linear layers.

    Vth = mean |x| / k over the last axis, within [1e-5, 1e4];   s = round(x / Vth), half to even;   x ~ s Vth
    y = Vth (W s) + b, and W s = sum over time of (weight of the step) W s_t, with spikes s_t of 0 and +-1

| code | spikes | steps T | s |
|---|---|---|---|
| binary | 0, 1 | max s | sum of s_t (s >= 0 only) |
| ternary | -1, 0, 1 | max abs s | sum of s_t |
| bitwise | 0, 1 | bits of max s | sum of 2^(T-1-t) s_t (s >= 0 only) |
| bidirectional | -1, 0, 1 | bits of max abs s | sum of 2^(T-1-t) s_t |
| twos-complement | 0, 1 | bits of max abs s, + 1 | the same, minus 2^T where the first spike is 1 |

A spiking neuron (integrate, fire at Vth, soft reset, no leak) emits these counts; with additions in place of products
an event-driven chip saves energy. Here it is simulated: `SpikeLinear` computes with the counts, the same number.

Paper: arXiv 2509.05276, with the authors' W8ASpike code. Weights are int8, symmetric, a scale for each row and group of
`group` inputs, max |w| / 127 (theirs are calibrated). T is the least that holds the largest count; give `steps` for
shapes that do not depend on the data. Gradients pass the rounding as if it were not there.

Cost: as a linear layer; a code costs T times its input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import OptionError, ShapeError, UnsupportedModelError
from foveate.mixers.base import exact

CODES = ("binary", "ternary", "bitwise", "bidirectional", "twos-complement")
LEAST, LARGEST = 1e-5, 1e4


def spike_counts(x: Tensor, k: float = 3.0) -> tuple[Tensor, Tensor]:
    """Whole spike counts s [..., C] and the threshold Vth [..., 1] of each token, with s Vth close to x [..., C].

    k: spikes that a channel of mean size fires; larger is finer. Where Vth is not cut, |x - s Vth| <= Vth / 2.
    """
    if k <= 0:
        raise OptionError(f"spike_counts: k={k}, allowed: > 0")
    threshold = (x.abs().mean(-1, keepdim=True) / k).clamp(LEAST, LARGEST)
    scaled = x / threshold
    return scaled + (scaled.round() - scaled).detach(), threshold


def encode(counts: Tensor, code: str, steps: int | None = None) -> Tensor:
    """Counts [...] of whole numbers as spikes [T, ...] in the counts' dtype, the first step first.

    code: see the module's docstring.    steps: T; default the least that will do. Raises OptionError for an unknown
    code, ShapeError for counts that do not fit it or too few steps.
    """
    _check_code(code)
    if code in ("binary", "bitwise") and bool((counts < 0).any()):
        raise ShapeError(f"encode: counts down to {counts.min().item():g} with code={code!r}, allowed: >= 0")
    largest = int(counts.abs().max()) if counts.numel() else 0
    bits = max(1, largest.bit_length())
    needed = {"binary": largest, "ternary": largest, "twos-complement": bits + 1}.get(code, bits)
    T = max(needed, 1) if steps is None else steps
    if needed > T:
        raise ShapeError(f"encode: counts up to {largest} in steps={steps} with code={code!r}, allowed: >= {needed}")
    size, sign = counts.abs().long(), counts.sign()
    shape = (T, *[1] * counts.dim())
    if code in ("binary", "ternary"):
        return sign * (size > torch.arange(T, device=counts.device).view(shape)).to(counts.dtype)
    place = torch.arange(T - 1, -1, -1, device=counts.device).view(shape)
    if code == "twos-complement":
        return (((counts.long() % 2**T) >> place) & 1).to(counts.dtype)
    return sign * ((size >> place) & 1).to(counts.dtype)


def step_weights(code: str, steps: int, *, signed: bool = True) -> Tensor:
    """What a spike of each step stands for, [T] float32.

    signed: of "twos-complement", whose first spike stands for -2^(T-1); without it the sum is s mod 2^T.
    """
    _check_code(code)
    if code in ("binary", "ternary"):
        return torch.ones(steps)
    weights = 2.0 ** torch.arange(steps - 1, -1, -1)
    if code == "twos-complement" and signed:
        weights[0] = -weights[0]
    return weights


def decode(spikes: Tensor, code: str, *, signed: bool = True) -> Tensor:
    """The counts [...] of spikes [T, ...]; `signed` as in `step_weights`."""
    weights = step_weights(code, spikes.shape[0], signed=signed).to(spikes)
    return torch.tensordot(weights, spikes, 1)


def spike_matmul(spikes: Tensor, weight: Tensor, code: str) -> Tensor:
    """The product that events make, a step at a time: spikes [T, ..., C] and weight [C, E] -> counts @ weight."""
    weights = step_weights(code, spikes.shape[0]).tolist()
    total = spikes.new_zeros(*spikes.shape[1:-1], weight.shape[-1])
    for each, spike in zip(weights, spikes):
        total = total + each * (spike @ weight)
    return total


def firing_rate(spikes: Tensor) -> Tensor:
    """The share of steps and channels with a spike, a scalar; 1 - firing rate is the sparsity."""
    return spikes.abs().mean()


def _check_code(code: str) -> None:
    if code not in CODES:
        raise OptionError(f"code={code!r}, allowed: {CODES}")


class SpikeLinear(nn.Module):
    """A linear layer on spike counts with 8-bit weights: x [..., C] -> [..., E] in x's dtype.

    weight: [E, C / group, group] int8.    scale: [E, C / group, 1].    k: see `spike_counts`; None leaves x as it is.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, k: float | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.k = k

    @property
    def in_features(self) -> int:
        return self.weight.shape[1] * self.weight.shape[2]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @classmethod
    def of(
        cls, linear: nn.Linear, *, k: float | None = 3.0, group: int = 128, scale: Tensor | None = None
    ) -> SpikeLinear:
        """The coded form of a layer; `group` inputs share a scale, all of them where fewer.

        scale: [E, C / group, 1] > 0, calibrated ones; default max |w| / 127.
        """
        group = min(group, linear.in_features)
        if group < 1 or linear.in_features % group:
            raise OptionError(f"SpikeLinear: group={group}, allowed: divisors of in_features = {linear.in_features}")
        if k is not None and k <= 0:
            raise OptionError(f"SpikeLinear: k={k}, allowed: > 0, or None")
        weight = linear.weight.detach().to(exact(linear.weight)).unflatten(1, (-1, group))
        if scale is None:
            scale = (weight.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
        elif scale.shape != (*weight.shape[:2], 1) or not bool((scale > 0).all()):
            raise ShapeError(f"SpikeLinear: scale {list(scale.shape)}, allowed: {[*weight.shape[:2], 1]}, all > 0")
        coded = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        return cls(coded, scale.to(weight.dtype), None if linear.bias is None else linear.bias.detach(), k)

    def matrix(self) -> Tensor:
        """The weights that the integers stand for, [E, C] in float32 (float64 for float64 scales)."""
        return (self.weight.to(exact(self.scale)) * self.scale).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        # Half precision does not hold every count.
        wide, matrix = x.to(exact(x)), self.matrix().to(exact(x))
        if self.k is None:
            y = F.linear(wide, matrix)
        else:
            counts, threshold = spike_counts(wide, self.k)
            y = threshold * F.linear(counts, matrix)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def linears(model: nn.Module, skip: tuple[str, ...] = ("lm_head",)) -> dict[str, nn.Linear]:
    """A model's linear layers by name, without those whose name, or its last part, is in `skip`."""
    return {
        name: layer
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, nn.Linear) and name and name not in skip and name.rpartition(".")[2] not in skip
    }


def code_linears(
    model: nn.Module, k: float | None = 3.0, group: int = 128, skip: tuple[str, ...] = ("lm_head",)
) -> list[str]:
    """Put coded layers (`SpikeLinear`) in the place of a model's linear layers, for good; returns their names.

    group: inputs that share a scale, at most: each layer takes the largest divisor of its inputs up to it.    k, skip:
    as in `spiking`. Raises UnsupportedModelError for a model without linear layers.
    """
    found = linears(model, skip)
    if not found:
        raise UnsupportedModelError(f"code_linears: {type(model).__name__} has no linear layers outside skip={skip}")
    for name, layer in found.items():
        fitting = next(each for each in range(min(group, layer.in_features), 0, -1) if layer.in_features % each == 0)
        model.set_submodule(name, SpikeLinear.of(layer, k=k, group=fitting))
    return list(found)


@contextmanager
def spiking(
    model: nn.Module, *, k: float | None = 3.0, group: int = 128, skip: tuple[str, ...] = ("lm_head",)
) -> Iterator[Any]:
    """Run a model with all its linear layers coded (`SpikeLinear`) while the block runs; yields {name: SpikeLinear}.

    skip: names, or last parts of names, of layers to leave. On leaving, also by an exception, the layers are those from
    before. Raises UnsupportedModelError for a model without linear layers, OptionError for a group that does not fit.
    """
    found = linears(model, skip)
    if not found:
        raise UnsupportedModelError(f"spiking: {type(model).__name__} has no linear layers outside skip={skip}")
    coded = {name: SpikeLinear.of(layer, k=k, group=group) for name, layer in found.items()}
    try:
        for name, layer in coded.items():
            model.set_submodule(name, layer)
        yield coded
    finally:
        for name, before in found.items():
            model.set_submodule(name, before)
