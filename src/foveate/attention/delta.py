"""Memories whose weights are written by gradient steps while reading a sequence (Titans, Miras, TTT).

The delta rule with an arbitrary network in place of the matrix: token t takes one gradient step on how well the
network M maps k_t to v_t, with momentum and decay, and then q_t reads the network:

    S_t = exp(momentum_g_t) S_{t-1} - rate_t grad_W loss(M_{W0}(k_t), v_t)
    W_t = exp(g_t) W_{t-1} + S_t
    y_t = M_{W_t}(q_t)

W0 are the weights at the start of t's chunk of C tokens: this is the definition, not an approximation of a finer one,
and C = 1 is the exact recurrence. Gradients at fixed weights are sums of outer products of layer inputs x_j and layer
deltas d_j, so a layer at token i is, with b, m the products of decays and of momenta since the chunk began,

    x W_i = b_i x W + f_i x S - sum_{j <= i} G_ij rate_j (x.x_j) d_j
    G_ij = sum_{l=j..i} (b_i / b_l) (m_l / m_j)        f_i = sum_{l<=i} (b_i / b_l) m_l

and no weights per token are formed. Every ratio is the exponential of a sum of logarithms <= 0, so decays of 0 are
safe. Cost per head and chunk: about three passes of the network over C tokens, and O(C^2) per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.attention.linear_call import check_log_decay
from foveate.attention.shapes import match
from foveate.errors import OptionError, ShapeError, StateError

Weights = tuple[Tensor, ...]
Linear = Callable[[int, Tensor], Tensor]
Network = Callable[[Linear, Tensor], Tensor]

# As in backends/linear_decays.py: exp of it is 0 in float64.
LOWEST = -1000.0


@dataclass(frozen=True)
class WeightState:
    """What a memory knows between calls.

    weights: per layer [B, H, I, O], or [B, H, D] for an elementwise layer (a gain).
    momentum: S, shaped alike. With rate_of="reading", the running chunk's steps, which `weights` still lack.
    base: the weights at which the running chunk takes its gradients; None between chunks.
    phase: tokens of the running chunk that have been read.
    """

    weights: Weights
    momentum: Weights
    base: Weights | None = None
    phase: int = 0

    @classmethod
    def start(cls, weights: Weights, batch: int) -> WeightState:
        """The state before a sequence, from learned initial weights per head [H, I, O] or [H, D]."""
        expanded = tuple(w.unsqueeze(0).expand(batch, *w.shape) for w in weights)
        return cls(expanded, tuple(torch.zeros_like(w) for w in expanded))


def matrix_memory(linear: Linear, x: Tensor) -> Tensor:
    """The network of one matrix, M(x) = x W."""
    return linear(0, x)


def squared_error(y: Tensor, v: Tensor) -> Tensor:
    """The gradient of |y - v|^2 by y."""
    return 2 * (y - v)


def weight_state_scan(
    network: Network,
    state: WeightState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rate: Tensor | tuple[Tensor, ...],
    g: Tensor | None = None,
    momentum_g: Tensor | None = None,
    loss_gradient: Callable[[Tensor, Tensor], Tensor] = squared_error,
    read: Network | None = None,
    project: Callable[[Weights], Weights] | None = None,
    boundary: Callable[[Weights], Weights] | None = None,
    rate_of: Literal["written", "reading"] = "written",
    chunk_size: int = 64,
) -> tuple[Tensor, WeightState]:
    """Write k -> v into the memory and read it at q, token by token; the recurrence is in the module's docstring.

    Args:
        network: (linear, x [B, H, C, D]) -> M(x). It calls linear(l, x) once for each weight l: x W_l, or x * w_l for
            an elementwise one (a bias is a [1, O] matrix fed with ones). Tokens must not mix. Example:
            `lambda linear, x: x + norm(linear(1, gelu(linear(0, x))))`.
        state: `WeightState.start(weights, B)`, or what the last call returned. Whatever way a sequence is split over
            calls, the outputs agree.
        q, k, v: [B, T, H, D] (v, and what the network returns, may have another last axis).
        rate: inner learning rate, [B, T, H]; or one tensor per weight, [B, T, H] or [B, T, H, O].
        g, momentum_g: decay of W and of S, natural log, <= 0, [B, T, H]; default: no decay; no momentum, where S is
            the step of token t and is not kept.
        loss_gradient: (M(k), v) -> gradient by M(k); default that of the squared error, 2 (M(k) - v).
        read: another network for q; default `network`.
        project: maps the weights to those at which a chunk's gradients are taken; default: themselves (Moneta's norm).
        boundary: maps the weights when a chunk is complete; default: nothing.
        rate_of: "written": rate_j weighs the step of token j. "reading": rate_i weighs all steps of the chunk as
            token i sees them, and the last token's rate stands in the update (TTT); one tensor, no momentum.
        chunk_size: C, part of the definition; the same in training and decoding.
    Returns:
        y [B, T, H, D'] in q's dtype; the state after the last token, float32 (float64 for float64 inputs).
    Raises:
        ShapeError, StateError, OptionError. Gradients reach everything, also through the inner gradients.
    """
    sizes = match(q=(q, "B T H D"), k=(k, "B T H D"), v=(v, "B T H *"))
    _check(sizes, state, rate, g, momentum_g, rate_of, chunk_size)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads_first = [x.to(dtype).transpose(1, 2) for x in (q, k, v)]
    rates = rate if isinstance(rate, tuple) else (rate,) * len(state.weights)
    rates = tuple(_rows(r, dtype) for r in rates)
    decay, momentum_decay = (
        None if x is None else x.double().clamp(min=LOWEST).transpose(1, 2) for x in (g, momentum_g)
    )
    weights, momentum = (tuple(w.to(dtype) for w in group) for group in (state.weights, state.momentum))
    base, phase = state.base, state.phase
    outputs = []
    start = 0
    while start < sizes["T"]:
        piece = slice(start, min(start + chunk_size - phase, sizes["T"]))
        if base is None:
            base = project(weights) if project is not None else weights
        qc, kc, vc = (x[:, :, piece] for x in heads_first)
        factors = _factors(
            None if decay is None else decay[:, :, piece],
            None if momentum_decay is None else momentum_decay[:, :, piece],
            kc,
        )
        inputs, deltas = _gradients(network, base, kc, vc, loss_gradient)
        rows = tuple(r[:, :, piece] for r in rates)
        step = (_ReadingPiece if rate_of == "reading" else Piece)(weights, momentum, inputs, deltas, rows, factors)
        outputs.append((read or network)(step.linear, qc))
        weights, momentum = step.after()
        phase += piece.stop - start
        start = piece.stop
        if phase == chunk_size:
            if isinstance(step, _ReadingPiece):
                weights, momentum = step.settle(weights, momentum)
            weights = boundary(weights) if boundary is not None else weights
            base, phase = None, 0
    y = torch.cat(outputs, 2).transpose(1, 2).to(q.dtype)
    return y, WeightState(weights, momentum, base, phase)


def weight_state_read(network: Network, state: WeightState, q: Tensor) -> Tensor:
    """M_W(q) with the weights as they stand: q [B, T, H, D] -> [B, T, H, D'], nothing is written."""
    dtype = state.weights[0].dtype
    y = network(lambda layer, x: apply_rule(x, state.weights[layer]), q.to(dtype).transpose(1, 2))
    return y.transpose(1, 2).to(q.dtype)


@dataclass(frozen=True)
class Factors:
    """Scalars of one piece: G [B, H, C, C]; b, and with momentum m, f and n = m_C / m_j, [B, H, C, 1]."""

    G: Tensor
    b: Tensor
    m: Tensor | None = None
    f: Tensor | None = None
    n: Tensor | None = None


def _factors(g: Tensor | None, momentum_g: Tensor | None, like: Tensor) -> Factors:
    decay_sum = like.new_zeros(like.shape[:3], dtype=torch.float64) if g is None else g.cumsum(-1)
    between = decay_ratios(decay_sum, like.dtype)
    b = decay_sum.exp().to(like.dtype).unsqueeze(-1)
    if momentum_g is None:
        return Factors(between, b)
    momentum_sum = momentum_g.cumsum(-1)
    ratios = decay_ratios(momentum_sum, like.dtype)
    m = momentum_sum.exp().to(like.dtype).unsqueeze(-1)
    return Factors(between @ ratios, b, m, between @ m, ratios[:, :, -1, :, None])


def decay_ratios(total: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(total_i - total_j) for i >= j, else 0."""
    C = total.shape[-1]
    later = torch.ones(C, C, dtype=torch.bool, device=total.device).triu(1)
    difference = total.unsqueeze(-1) - total.unsqueeze(-2)
    return difference.masked_fill(later, -torch.inf).to(dtype).exp()


@dataclass(frozen=True)
class Piece:
    """Tokens of one chunk: the weights before them, the layers' inputs and deltas, and how they weigh."""

    weights: Weights
    momentum: Weights
    inputs: Weights
    deltas: Weights
    rates: Weights
    factors: Factors

    def linear(self, layer: int, x: Tensor) -> Tensor:
        """Row i of x through layer `layer` as it is after token i."""
        factors = self.factors
        y = factors.b * apply_rule(x, self.weights[layer])
        if factors.f is not None:
            y = y + factors.f * apply_rule(x, self.momentum[layer])
        return y - self._change(layer, x, self.deltas[layer] * self.rates[layer])

    def after(self) -> tuple[Weights, Weights]:
        """Weights and momentum after the last token."""
        factors = self.factors
        weights, momentum = [], []
        for layer, (w, s) in enumerate(zip(self.weights, self.momentum)):
            steps = self.deltas[layer] * self.rates[layer]
            new = _scale(factors.b, w) - self._total(layer, factors.G[:, :, -1, :, None], steps)
            if factors.f is not None and factors.m is not None and factors.n is not None:
                new = new + _scale(factors.f, s)
                s = _scale(factors.m, s) - self._total(layer, factors.n, steps)
            weights.append(new)
            momentum.append(s)
        return tuple(weights), tuple(momentum)

    def _change(self, layer: int, x: Tensor, steps: Tensor) -> Tensor:
        """sum_j G_ij (x_i.x_j) steps_j, or its elementwise like."""
        keys, G = self.inputs[layer], self.factors.G
        if self.weights[layer].dim() == 3:
            return x * (G @ (keys * steps))
        return (G * (x @ keys.transpose(-1, -2))) @ steps

    def _total(self, layer: int, coefficients: Tensor, steps: Tensor) -> Tensor:
        rows = self.inputs[layer] * coefficients
        return (rows * steps).sum(-2) if self.weights[layer].dim() == 3 else rows.transpose(-1, -2) @ steps


class _ReadingPiece(Piece):
    """The reading token's rate: `momentum` keeps the chunk's steps, not yet multiplied by any rate."""

    def linear(self, layer: int, x: Tensor) -> Tensor:
        b = self.factors.b
        steps = b * apply_rule(x, self.momentum[layer]) - self._change(layer, x, self.deltas[layer])
        return b * apply_rule(x, self.weights[layer]) + self.rates[layer] * steps

    def after(self) -> tuple[Weights, Weights]:
        factors = self.factors
        last = factors.G[:, :, -1, :, None]
        steps = tuple(
            _scale(factors.b, s) - self._total(layer, last, self.deltas[layer]) for layer, s in enumerate(self.momentum)
        )
        return tuple(_scale(factors.b, w) for w in self.weights), steps

    def settle(self, weights: Weights, steps: Weights) -> tuple[Weights, Weights]:
        """The end of a chunk: take its steps with the last token's rate."""
        taken = tuple(w + _scale(r, s) for w, s, r in zip(weights, steps, self.rates))
        return taken, tuple(torch.zeros_like(s) for s in steps)


def _scale(factor: Tensor, w: Tensor) -> Tensor:
    """The factor [B, H, C, 1] of the last token times w [B, H, ...]."""
    last = factor[:, :, -1]
    return w * (last if w.dim() == 3 else last.unsqueeze(-1))


def apply_rule(x: Tensor, w: Tensor) -> Tensor:
    return x * w.unsqueeze(-2) if w.dim() == 3 else x @ w


def _rows(rate: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, H] or [B, T, H, O] -> [B, H, T, 1 or O]."""
    rate = rate.to(dtype)
    return (rate.unsqueeze(-1) if rate.dim() == 3 else rate).transpose(1, 2)


def _gradients(
    network: Network,
    weights: Weights,
    k: Tensor,
    v: Tensor,
    loss_gradient: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Weights, Weights]:
    """Each layer's input and the loss's gradient by its output, per token, at fixed weights."""
    outer = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        weights = tuple(w.clone() if w.is_inference() else w for w in weights)
        k, v = (x.clone() if x.is_inference() else x for x in (k, v))
        inputs: dict[int, Tensor] = {}
        results: dict[int, Tensor] = {}

        def linear(layer: int, x: Tensor) -> Tensor:
            if layer in inputs:
                raise OptionError(f"the network calls linear({layer}, x) twice, allowed: once for each weight")
            z = apply_rule(x, weights[layer])
            if not z.requires_grad:
                z.requires_grad_()
            inputs[layer], results[layer] = x, z
            return z

        y = network(linear, k)
        if len(results) != len(weights):
            raise OptionError(
                f"the network calls linear for {sorted(results)}, allowed: for all {len(weights)} weights"
            )
        order = range(len(weights))
        deltas = torch.autograd.grad(
            y, [results[n] for n in order], loss_gradient(y, v), create_graph=outer, materialize_grads=True
        )
    rows = tuple(inputs[n] for n in order)
    return (rows if outer else tuple(x.detach() for x in rows)), deltas


def _check(
    sizes: dict[str, int],
    state: WeightState,
    rate: Tensor | tuple[Tensor, ...],
    g: Tensor | None,
    momentum_g: Tensor | None,
    rate_of: str,
    chunk_size: int,
) -> None:
    B, T, H = (sizes[letter] for letter in "BTH")
    if T == 0:
        raise ShapeError("q has T = 0, allowed: at least one token")
    if chunk_size < 1:
        raise OptionError(f"chunk_size={chunk_size}, allowed: >= 1")
    if rate_of not in ("written", "reading"):
        raise OptionError(f"rate_of={rate_of!r}, allowed: 'written', 'reading'")
    if rate_of == "reading" and (momentum_g is not None or isinstance(rate, tuple)):
        raise OptionError("rate_of='reading' takes one rate [B, T, H] and no momentum_g")
    for w, s in zip(state.weights, state.momentum, strict=True):
        if w.dim() not in (3, 4) or tuple(w.shape[:2]) != (B, H) or w.shape != s.shape:
            raise StateError(
                f"weights {list(w.shape)}, momentum {list(s.shape)}, allowed: [B, H, ...] = [{B}, {H}, ...]"
            )
    if state.phase >= chunk_size:
        raise StateError(f"the state is {state.phase} tokens into a chunk, but chunk_size={chunk_size}: keep one size")
    rates = rate if isinstance(rate, tuple) else (rate,)
    if isinstance(rate, tuple) and len(rate) != len(state.weights):
        raise ShapeError(f"rate has {len(rate)} tensors for {len(state.weights)} weights, allowed: one for each")
    for n, each in enumerate(rates):
        fits = tuple(each.shape[:3]) == (B, T, H)
        per_channel = each.dim() == 4 and isinstance(rate, tuple) and each.shape[3] == state.weights[n].shape[-1]
        if not fits or not (each.dim() == 3 or per_channel):
            raise ShapeError(
                f"rate {list(each.shape)} does not fit [B, T, H] = {[B, T, H]}, or [B, T, H, O] in a tuple"
            )
    for name, decay in (("g", g), ("momentum_g", momentum_g)):
        if decay is not None:
            if tuple(decay.shape) != (B, T, H):
                raise ShapeError(f"{name} {list(decay.shape)} does not fit [B, T, H] = {[B, T, H]}")
            check_log_decay(decay, name)
