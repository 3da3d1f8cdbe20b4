"""The kernels of the linear family as operators of PyTorch, opaque to `torch.compile`, with gradients.

    foveate::linear_scan     q, k, v, g -> o, final state          none, fixed, scalar and vector decay
    foveate::delta_scan      q, k, v, beta, g -> o, final state    none, fixed and scalar decay
    foveate::linear_step     one token                     none, fixed, scalar and vector decay; a backward pass raises

Shapes as in `foveate.attention.linear.linear_scan`; states are float32; `offsets` are cu_seqlens as integers. Further
outputs are what the backward pass needs (empty where it needs nothing) and carry no gradient; nor do gradients of
gradients exist. `gate`: whether g will want a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.attention.backends.triton import scan_configs
from foveate.attention.backends.triton.delta_launch import Kept, delta_backward, delta_forward
from foveate.attention.backends.triton.operators import refusal
from foveate.attention.backends.triton.recurrent_step import recurrent_step
from foveate.attention.backends.triton.scan_chunk_backward import LONGEST, scan_backward, scan_forward
from foveate.attention.backends.triton.scan_launch import Cut
from foveate.attention.backends.triton.scan_vector import vector_forward
from foveate.attention.backends.triton.scan_vector_backward import vector_backward


def _none(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def _some(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if x is None else x


@torch.library.custom_op("foveate::linear_scan", mutates_args=())
def linear_scan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None, scale: float,
    offsets: Sequence[int] | None, gate: bool, wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o (float32 when `wide`), the final state, and the states before pieces."""
    dtype = torch.float32 if wide else None
    if g is not None and g.dim() == 4:
        o, final, states = vector_forward(q, k, v, g, initial, scale, offsets, gate, out_dtype=dtype)
    else:
        o, final, states = scan_forward(q, k, v, g, initial, scale, offsets, gate, out_dtype=dtype)
    return o, final, _some(states, q)


@linear_scan.register_fake
def _(q, k, v, g, initial, scale, offsets, gate, wide):  # type: ignore[no-untyped-def]
    pick = scan_configs.vector if g is not None and g.dim() == 4 else scan_configs.scan
    cut = _cut(q, v, offsets, gate, pick)
    o = q.new_empty(v.shape, dtype=torch.float32 if wide else q.dtype)
    return o, _states(q, v, cut.sequences), _states(q, v, cut.pieces) if cut.split else _some(None, q)


def _cut(q: Tensor, v: Tensor, offsets: Sequence[int] | None, gate: bool, pick: Any) -> Cut:
    config = pick(int(q.shape[3]), int(v.shape[3]), q.element_size())
    return Cut.fill(q, v, offsets, config, longest=LONGEST if gate else None)


def _states(q: Tensor, v: Tensor, rows: int) -> Tensor:
    return q.new_empty(rows, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


@torch.library.custom_op("foveate::linear_scan_backward", mutates_args=())
def linear_scan_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None, scale: float,
    offsets: Sequence[int] | None, gate: bool, final: Tensor, states: Tensor, do: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g (empty unless `gate`) and initial."""
    saved = (final, _none(states), do, dfinal)
    if g is not None and g.dim() == 4:
        dq, dk, dv, dg, dstart = vector_backward(q, k, v, g, initial, scale, offsets, gate, *saved)
    else:
        dq, dk, dv, dg, dstart = scan_backward(q, k, v, g, initial, scale, offsets, gate, *saved)
    return dq, dk, dv, _some(dg, q), dstart


@linear_scan_backward.register_fake
def _(q, k, v, g, initial, scale, offsets, gate, final, states, do, dfinal):  # type: ignore[no-untyped-def]
    dg = q.new_empty(g.shape, dtype=g.dtype) if gate else _some(None, q)
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape), dg, final.new_empty(final.shape)


def _save_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, initial, ctx.scale, ctx.offsets, ctx.gate, _ = inputs
    _, final, states = output
    ctx.save_for_backward(q, k, v, g, initial, final, states)
    ctx.set_materialize_grads(False)


def _scan_gradients(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *rest: Tensor | None) -> tuple[Any, ...]:
    q, k, v, g, initial, final, states = ctx.saved_tensors
    if do is None and dfinal is None:
        return (None,) * 9
    do = v.new_zeros(v.shape) if do is None else do
    dq, dk, dv, dg, dstart = linear_scan_backward(
        q, k, v, g, initial, ctx.scale, ctx.offsets, ctx.gate, final, states, do, dfinal
    )  # fmt: skip
    return dq, dk, dv, dg if ctx.gate else None, None if initial is None else dstart, None, None, None, None


linear_scan.register_autograd(_scan_gradients, setup_context=_save_scan)


@torch.library.custom_op("foveate::delta_scan", mutates_args=())
def delta_scan(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial: Tensor | None, scale: float,
    offsets: Sequence[int] | None, gate: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, the final state, and with `keep` errors, states before pieces and the pieces' matrices."""
    o, final, kept = delta_forward(q, k, v, beta, g, initial, scale, offsets, gate, keep)
    if not keep:
        return o, final, _some(None, q), _some(None, q), _some(None, q)
    return o, final, _some(kept.errors, q), _some(kept.states, q), _some(kept.maps, q)


@delta_scan.register_fake
def _(q, k, v, beta, g, initial, scale, offsets, gate, keep):  # type: ignore[no-untyped-def]
    cut = _cut(q, v, offsets, gate, scan_configs.delta)
    final, nothing = _states(q, v, cut.sequences), _some(None, q)
    o = q.new_empty(v.shape)
    if not keep:
        return o, final, nothing, _some(None, q), _some(None, q)
    if not cut.split:
        return o, final, q.new_empty(v.shape), nothing, _some(None, q)
    return (
        o,
        final,
        q.new_empty(v.shape),
        _states(q, v, cut.pieces),
        _states(q, v, cut.pieces).new_empty(cut.pieces, v.shape[2], q.shape[3], q.shape[3]),
    )


@torch.library.custom_op("foveate::delta_scan_backward", mutates_args=())
def delta_scan_backward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial: Tensor | None, scale: float,
    offsets: Sequence[int] | None, gate: bool, final: Tensor, errors: Tensor, states: Tensor, maps: Tensor,
    do: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, beta, g (empty unless `gate`) and initial."""
    kept = Kept(errors, _none(states), _none(maps))
    dq, dk, dv, dbeta, dg, dstart = delta_backward(
        q, k, v, beta, g, initial, scale, offsets, gate, final, kept, do, dfinal
    )  # fmt: skip
    return dq, dk, dv, dbeta, _some(dg, q), dstart


@delta_scan_backward.register_fake
def _(q, k, v, beta, g, initial, scale, offsets, gate, final, errors, states, maps, do, dfinal):  # type: ignore[no-untyped-def]
    dg = q.new_empty(g.shape, dtype=g.dtype) if gate else _some(None, q)
    rest = (beta.new_empty(beta.shape), dg, final.new_empty(final.shape))
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape), *rest


def _save_delta(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, beta, g, initial, ctx.scale, ctx.offsets, ctx.gate, _ = inputs
    _, *kept = output
    ctx.save_for_backward(q, k, v, beta, g, initial, *kept)
    ctx.set_materialize_grads(False)


def _delta_gradients(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *rest: Tensor | None) -> tuple[Any, ...]:
    q, k, v, beta, g, initial, *kept = ctx.saved_tensors
    if do is None and dfinal is None:
        return (None,) * 10
    do = v.new_zeros(v.shape) if do is None else do
    dq, dk, dv, dbeta, dg, dstart = delta_scan_backward(
        q, k, v, beta, g, initial, ctx.scale, ctx.offsets, ctx.gate, *kept, do, dfinal
    )  # fmt: skip
    start = None if initial is None else dstart
    return dq, dk, dv, dbeta, dg if ctx.gate else None, start, None, None, None, None


delta_scan.register_autograd(_delta_gradients, setup_context=_save_delta)


@torch.library.custom_op("foveate::linear_step", mutates_args=())
def linear_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor | None, scale: float,
    normalize: bool, eps: float, qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [B, 1, HV, V] and the state after the token."""
    return recurrent_step(q, k, v, g, beta, state, scale, normalize, eps, qk_l2norm)


@linear_step.register_fake
def _(q, k, v, g, beta, state, scale, normalize, eps, qk_l2norm):  # type: ignore[no-untyped-def]
    B, _, HV, V = v.shape
    return q.new_empty(v.shape), q.new_empty(B, HV, q.shape[3], V + normalize, dtype=torch.float32)


linear_step.register_autograd(refusal("linear_step"))
