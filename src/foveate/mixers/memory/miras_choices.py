"""The choices of Miras that make a memory: how an error is felt (the attentional bias) and how the past is kept.

Biases, as the gradient of the loss by the error e = M(k) - v, per token:

    l2                  e
    lp                  p tanh(a e) (e^2 + eps)^((p - 1) / 2)            a = 10, eps = 1e-6: smooth sign and |.|
    huber               e where |e|_2 <= delta, else delta tanh(a e)
    huber-norm          e min(1, delta / |e|_2)
    huber-coordinates   e clipped to -delta .. delta
    shift               e + delta e / |e|_2                              robust to shifted values

Retentions, with s = eta grad and alpha in (0, 1); the weights are [I, O], one column per output unit:

    l2                  W <- alpha W - s
    lq                  A <- alpha A - s,  W = A / |A|_q^(q - 2)
    kl                  W <- c softmax(alpha log W - s) over the inputs of each output unit
    elastic-net         W <- soft(alpha W - s),  soft(z) = |z| atan(z / gamma) 2 / pi
    sigmoid             W <- sigmoid(alpha logit W - s)

All but the first are not linear in W. `memory_scan` takes lq's norm where a chunk ends and the other three steps where
one begins, and goes on linearly inside; chunks of one token are these formulas. delta is positive, one per token and
head.

Paper: Behrouz et al. 2025 (arXiv 2504.13173).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.attention.delta import Weights
from foveate.attention.memories import LossGradient, MLPMemory
from foveate.attention.weight_states import Lag
from foveate.errors import OptionError
from foveate.mixers.base import Initialised, exact

# How sharp the smooth sign is, and what keeps |e| away from 0.
SHARPNESS, SMOOTHING = 10.0, 1e-6
# No weight on a simplex or in (0, 1) comes nearer to its edge, and no norm nearer to 0.
FLOOR = 1e-6

BIASES = ("l2", "lp", "huber", "huber-norm", "huber-coordinates", "shift")
RETENTIONS = ("l2", "lq", "kl", "elastic-net", "sigmoid")
# Those that read a threshold.
THRESHOLDED = BIASES[2:]


def _norm(e: Tensor) -> Tensor:
    return (e.square().sum(-1, keepdim=True) + SMOOTHING**2).sqrt()


def _huber(e: Tensor, delta: Tensor) -> Tensor:
    return torch.where(_norm(e) <= delta, e, delta * torch.tanh(SHARPNESS * e))


def _lp(p: float) -> LossGradient:
    def gradient(e: Tensor, rows: Tensor | None) -> Tensor:
        return p * torch.tanh(SHARPNESS * e) * (e.square() + SMOOTHING).pow((p - 1) / 2)

    return gradient


def loss_gradient(bias: str, p: float = 3.0) -> LossGradient:
    """(e [.., D], delta [.., 1] or None) -> gradient [.., D] of one of BIASES; OptionError for another name."""
    if bias == "l2":
        return lambda e, rows: e
    if bias == "lp":
        return _lp(p)
    thresholded: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "huber": _huber,
        "huber-norm": lambda e, delta: e * (delta / _norm(e)).clamp(max=1),
        "huber-coordinates": lambda e, delta: torch.maximum(torch.minimum(e, delta), -delta),
        "shift": lambda e, delta: e + delta * e / _norm(e),
    }
    if bias not in thresholded:
        raise OptionError(f"bias={bias!r}, allowed: {BIASES}")
    found = thresholded[bias]

    def gradient(e: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            raise OptionError(f"bias={bias!r} without a threshold per token, allowed: loss_rows [B, T, H, 1]")
        return found(e, rows)

    return gradient


@dataclass(frozen=True)
class LqNorm:
    """W = A / |A|_q^(q - 2), per weight and head: a `normalise` of `memory_scan`."""

    q: float

    def __call__(self, weights: Tensor) -> Tensor:
        """[N, H, I, O] -> the factor [N, H]."""
        norm = torch.linalg.vector_norm(weights.flatten(2), self.q, dim=-1)
        return norm.clamp(min=FLOOR).pow(2 - self.q)

    def initial(self, weights: Tensor) -> Tensor:
        """Scaled to |A|_q = 1 per head [H, I, O], where W is A."""
        return weights / torch.linalg.vector_norm(weights.flatten(1), self.q, dim=-1)[:, None, None]


@dataclass(frozen=True)
class Simplex:
    """The KL retention: every output unit's weights are positive and sum to `mass`. A `lag` of `memory_scan`."""

    mass: float = 1.0

    def begin(self, weights: Tensor) -> Tensor:
        """The weights clamped to be positive, and scaled to their sum."""
        positive = weights.clamp(min=FLOOR)
        return self.mass * positive / positive.sum(-2, keepdim=True)

    def step(self, weights: Tensor, decay: Tensor, step: Tensor) -> Tensor:
        return self.mass * (decay * weights.log() - step).softmax(-2)

    def weights(self, logits: Tensor) -> Tensor:
        """Weights of free parameters."""
        return self.mass * logits.softmax(-2)


@dataclass(frozen=True)
class ElasticNet:
    """Decay and a smooth soft threshold. A `lag` of `memory_scan`."""

    gamma: float

    def begin(self, weights: Tensor) -> Tensor:
        return weights

    def step(self, weights: Tensor, decay: Tensor, step: Tensor) -> Tensor:
        z = decay * weights - step
        return z.abs() * torch.atan(z / self.gamma) * (2 / math.pi)


@dataclass(frozen=True)
class Sigmoid:
    """Weights in (0, 1), with steps on their logits (a Bregman retention). A `lag` of `memory_scan`."""

    def begin(self, weights: Tensor) -> Tensor:
        return weights.clamp(FLOOR, 1 - FLOOR)

    def step(self, weights: Tensor, decay: Tensor, step: Tensor) -> Tensor:
        return (decay * weights.logit() - step).sigmoid()

    def weights(self, logits: Tensor) -> Tensor:
        """Weights of free parameters."""
        return logits.sigmoid()


class FreeWeights(Initialised):
    """Learned starting weights per head, in the retention's own parameters: w0 [H, D, E] and w1 [H, E, D]."""

    def __init__(self, heads: int, dim: int, hidden: int, norm: LqNorm | None, lag: Lag | None) -> None:
        super().__init__()
        self.sizes, self.norm, self.lag = (heads, dim, hidden), norm, lag
        for name, value in self.initial_values().items():
            self.register_parameter(name, nn.Parameter(value))

    def initial_values(self) -> dict[str, Tensor]:
        first, second = MLPMemory().initial(*self.sizes)
        if isinstance(self.lag, Simplex | Sigmoid):
            first, second = torch.randn_like(first), torch.randn_like(second)
        elif self.norm is not None:
            first, second = self.norm.initial(first), self.norm.initial(second)
        return {"w0": first, "w1": second}

    def forward(self, like: Tensor) -> Weights:
        """The weights in the dtype that recurrences keep, on like's device."""
        free = tuple(getattr(self, name).to(like.device, exact(like)) for name in ("w0", "w1"))
        return tuple(self.lag.weights(w) for w in free) if isinstance(self.lag, Simplex | Sigmoid) else free
