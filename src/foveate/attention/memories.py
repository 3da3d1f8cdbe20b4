"""Memories that are small networks: an MLP with its inner gradients in closed form.

    y = act(.. act(x W_1) .. W_{L-1}) W_L;    M(x) = y,  x + LN(y)  or  x + LN(y) (1 + gain)
    d_L = LN'(dloss),  d_{l-1} = (d_l W_l^T) act'(z_{l-1})

A weight's gradient is the sum over tokens of (its input)^T (its delta): `MLPMemory.gradients` gives both per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.delta import Linear, Weights
from foveate.errors import OptionError

LossGradient = Callable[[Tensor, Tensor | None], Tensor]
ACTIVATIONS = ("silu", "gelu")
FORMS = ("plain", "residual", "residual-gain")


def squared_error(error: Tensor, rows: Tensor | None = None) -> Tensor:
    """The gradient of |e|^2 by e."""
    return 2 * error


@dataclass(frozen=True)
class MLPMemory:
    """M(x) = MLP(x), or x + LN(MLP(x)), or x + LN(MLP(x)) (1 + gain); the MLP has no biases.

    depth: matrices.    activation: between them, "silu" or "gelu" (exact).    form: "plain", "residual" or
    "residual-gain".    eps: of the LayerNorm, which has no parameters of its own.
    Weights: `depth` matrices [I, O], then the gain [D] if there is one.
    """

    depth: int = 2
    activation: str = "silu"
    form: str = "plain"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise OptionError(f"MLPMemory: depth={self.depth}, allowed: >= 1")
        if self.activation not in ACTIVATIONS:
            raise OptionError(f"MLPMemory: activation={self.activation!r}, allowed: {ACTIVATIONS}")
        if self.form not in FORMS:
            raise OptionError(f"MLPMemory: form={self.form!r}, allowed: {FORMS}")

    def shapes(self, dim: int, hidden: int) -> list[tuple[int, ...]]:
        """Shapes of one head's weights."""
        widths = [dim, *[hidden] * (self.depth - 1), dim]
        gain: list[tuple[int, ...]] = [(dim,)] if self.form == "residual-gain" else []
        return [*pairwise(widths), *gain]

    def initial(self, heads: int, dim: int, hidden: int) -> list[Tensor]:
        """Weights per head: matrices normal with variance 1 / I, a gain of 0."""
        return [
            torch.zeros(heads, *shape) if len(shape) == 1 else torch.randn(heads, *shape) / math.sqrt(shape[0])
            for shape in self.shapes(dim, hidden)
        ]

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        """M(x) where linear(l, x) applies weight l."""
        y = linear(0, x)
        for layer in range(1, self.depth):
            y = linear(layer, self._activate(y))
        if self.form == "plain":
            return y
        y, _ = self._norm(y)
        return x + y + linear(self.depth, y) if self.form == "residual-gain" else x + y

    def gradients(
        self, weights: Weights, k: Tensor, v: Tensor, loss_gradient: LossGradient, rows: Tensor | None = None
    ) -> tuple[Weights, Weights]:
        """Each weight's input and the loss's gradient by its output, per token [B, H, C, .], at fixed weights."""
        inputs, before = [k], []
        for layer in range(self.depth - 1):
            before.append(inputs[-1] @ weights[layer])
            inputs.append(self._activate(before[-1]))
        y = inputs[-1] @ weights[self.depth - 1]
        if self.form == "plain":
            d = loss_gradient(y - v, rows)
            gain: list[Tensor] = []
        else:
            y, inverse = self._norm(y)
            factor = 1 + weights[self.depth].unsqueeze(-2) if self.form == "residual-gain" else 1
            outer = loss_gradient(k + y * factor - v, rows)
            gain = [outer] if self.form == "residual-gain" else []
            inputs += [y] * len(gain)
            d = outer * factor
            d = inverse * (d - d.mean(-1, keepdim=True) - y * (d * y).mean(-1, keepdim=True))
        deltas = [d]
        for layer in reversed(range(self.depth - 1)):
            d = (d @ weights[layer + 1].transpose(-1, -2)) * self._slope(before[layer])
            deltas.insert(0, d)
        return tuple(inputs), (*deltas, *gain)

    def _norm(self, y: Tensor) -> tuple[Tensor, Tensor]:
        centred = y - y.mean(-1, keepdim=True)
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return centred * inverse, inverse

    def _activate(self, z: Tensor) -> Tensor:
        return F.silu(z) if self.activation == "silu" else F.gelu(z)

    def _slope(self, z: Tensor) -> Tensor:
        """The activation's derivative."""
        if self.activation == "silu":
            s = z.sigmoid()
            return s * (1 + z * (1 - s))
        return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
