"""The attention kernels as operators of torch (`torch.ops.foveate.*`): one node each for torch.compile and export, with
shapes without data, and with gradients where there are some.

    block_flash     o, lse     gradients of q, k, v and sink; with a bias sigmoid weights, and an lse of no entries
    gather_decode   o, lse     none: a backward pass raises
    topk            positions  not differentiable
    merge           o, lse     gradients of both

The functions here take what the launchers take and call the operators, which importing this module registers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.attention.backends.triton import block_flash as forward
from foveate.attention.backends.triton import block_flash_bwd as backward
from foveate.attention.backends.triton import gather_decode as decoding
from foveate.attention.backends.triton.merge import merge_lse
from foveate.attention.backends.triton.operators import LIBRARY, operator
from foveate.attention.backends.triton.stripes import Stripes, stripes
from foveate.attention.backends.triton.topk import topk_select
from foveate.attention.sparse_plan import ByKeys, SparsePlan


def _like_attention(q: Tensor, width: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    """Shapes of o and lse for queries q and values `width` wide."""
    return q.new_empty(*q.shape[:3], width), q.new_empty(q.shape[:3], dtype=torch.float32)


def _like_block_flash(q: Tensor, k: Tensor, v: Tensor, *rest: Any, bias: float | None = None) -> tuple[Tensor, Tensor]:
    # `bias` is the last argument, by place where the schema's default does not stand.
    o, lse = _like_attention(q, v.shape[3])
    softmax = bias is None and all(each is None for each in rest[20:])
    return o, lse if softmax else lse[:, :, :0].contiguous()


def _stripes(column: Tensor | None, bits: Tensor | None, free: Tensor | None, cut: Tensor | None) -> Stripes | None:
    if column is None:
        return None
    assert bits is not None
    assert free is not None
    assert cut is not None
    return Stripes(column, bits, free, cut)


@operator(_like_block_flash)
def _block_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    n_full: Tensor,
    order: Tensor,
    column: Tensor | None,
    bits: Tensor | None,
    free: Tensor | None,
    cut: Tensor | None,
    key_ptr: Tensor | None,
    key_row: Tensor | None,
    key_masked: Tensor | None,
    key_order: Tensor | None,
    sink: Tensor | None,
    batch: int,
    heads: int,
    block_m: int,
    block_n: int,
    scale: float,
    causal: bool,
    softcap: float | None,
    bias: float | None = None,
) -> tuple[Tensor, Tensor]:
    columns = _stripes(column, bits, free, cut)
    plan = SparsePlan(row_ptr, col, n_full, order, batch, heads, q.shape[2], k.shape[2], block_m, block_n)
    o, lse = forward.block_flash_fwd(
        q, k, v, plan, scale=scale, causal=causal, sink=sink, softcap=softcap, bias=bias, columns=columns
    )
    if lse is None:
        lse = q.new_empty(*q.shape[:2], 0, dtype=torch.float32)
    return o, lse


def _like_inputs(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *rest: Any, **named: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, lse.new_empty(lse.shape)


@operator(_like_inputs)
def _block_flash_gradients(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    n_full: Tensor,
    order: Tensor,
    column: Tensor | None,
    bits: Tensor | None,
    free: Tensor | None,
    cut: Tensor | None,
    key_ptr: Tensor | None,
    key_row: Tensor | None,
    key_masked: Tensor | None,
    key_order: Tensor | None,
    batch: int,
    heads: int,
    block_m: int,
    block_n: int,
    scale: float,
    causal: bool,
    softcap: float | None,
    bias: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lists = None
    if key_ptr is not None:
        assert key_row is not None
        assert key_masked is not None
        assert key_order is not None
        lists = ByKeys(key_ptr, key_row, key_masked, key_order)
    plan = SparsePlan(row_ptr, col, n_full, order, batch, heads, q.shape[2], k.shape[2], block_m, block_n)
    dq, dk, dv, delta = backward.block_flash_bwd(
        do,
        dlse,
        q,
        k,
        v,
        o,
        lse,
        plan,
        scale=scale,
        causal=causal,
        softcap=softcap,
        bias=bias,
        lists=lists,
        columns=_stripes(column, bits, free, cut),
    )
    return dq, dk, dv, torch.empty_like(lse) if delta is None else delta


def _save_block_flash(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *listed = inputs[:15]
    ctx.options = inputs[16:]
    ctx.save_for_backward(q, k, v, *output, *listed, inputs[15])


def _block_flash_backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    *given, sink = ctx.saved_tensors
    dq, dk, dv, delta = _block_flash_gradients(do, dlse, *given, *ctx.options)
    d_sink = None
    if sink is not None and ctx.needs_input_grad[15]:
        lse = given[4]
        share = torch.exp(sink.float()[None, :, None] - lse)
        d_sink = -(share * delta).sum((0, 2)).to(sink.dtype)
    return (dq, dk, dv, *[None] * 12, d_sink, *[None] * 8)


torch.library.register_autograd(
    "foveate::block_flash", _block_flash_backward, setup_context=_save_block_flash, lib=LIBRARY
)


def block_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    *,
    scale: float | None = None,
    causal: bool = True,
    sink: Tensor | None = None,
    softcap: float | None = None,
    bias: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`block_flash_fwd` as an operator with gradients: o [B, Hq, M, Dv], lse [B, Hq, M] float32 (None with a bias)."""
    forward.check_plan(plan, q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sink))
    columns: tuple[Tensor | None, ...] = (None,) * 4
    if plan.columns is not None and plan.columns.shape[-1]:
        own = stripes(plan, causal)
        columns = (own.column, own.bits, own.free, own.cut)
    lists: tuple[Tensor | None, ...] = (None,) * 4
    if learns:
        keys = plan.by_keys
        lists = (keys.ptr, keys.row, keys.n_masked, keys.order)
    o, lse = _block_flash(
        q, k, v, plan.row_ptr, plan.col, plan.n_full, plan.order, *columns, *lists, sink,
        plan.batch, plan.heads, plan.block_m, plan.block_n,
        q.shape[-1] ** -0.5 if scale is None else scale, causal, softcap, bias,
    )  # fmt: skip
    return o, lse if bias is None else None


@operator(lambda q, k, v, *rest, **named: _like_attention(q, v.shape[-1]), gradients=False)
def _gather_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    length: Tensor | None,
    page_size: int,
    start: Tensor | None,
    scale: float | None,
    causal: bool,
    window: int | None,
    sinks: int | None,
    sink: Tensor | None,
    softcap: float | None,
    log_weight: Tensor | None,
    k_positions: Tensor | None,
    q_positions: Tensor | None,
    num_splits: int | None,
) -> tuple[Tensor, Tensor]:
    o, lse = decoding.gather_decode(
        q,
        k,
        v,
        index=index,
        length=length,
        page_size=page_size,
        start=start,
        scale=scale,
        causal=causal,
        window=window,
        sinks=sinks,
        sink=sink,
        softcap=softcap,
        log_weight=log_weight,
        k_positions=k_positions,
        q_positions=q_positions,
        num_splits=num_splits,
    )
    assert lse is not None
    return o, lse


def gather_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    index: Tensor | None = None,
    length: Tensor | None = None,
    page_size: int = 1,
    start: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    log_weight: Tensor | None = None,
    k_positions: Tensor | None = None,
    q_positions: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The launcher of this name as an operator: o [B, Hq, M, Dv] and lse [B, Hq, M] float32."""
    o, lse = _gather_decode(
        q, k, v, index, length, page_size, start, scale, causal, window, sinks, sink, softcap, log_weight,
        k_positions, q_positions, num_splits,
    )  # fmt: skip
    return o, lse


@operator(lambda scores, k, *rest, **named: scores.new_empty(*scores.shape[:-1], k, dtype=torch.int32))
def _topk(scores: Tensor, k: int, length: Tensor | None, finite: bool = False) -> Tensor:
    return topk_select(scores, k, length=length, finite=finite)


def topk(scores: Tensor, k: int, *, length: Tensor | None = None, finite: bool = False) -> Tensor:
    """`topk_select` as an operator: int32 [..., k], ascending, -1 where a row has fewer scores."""
    positions: Tensor = _topk(scores.detach(), k, length, finite)
    return positions


@operator(lambda outputs, lses: (outputs.new_empty(outputs.shape[1:]), lses.new_empty(lses.shape[1:])))
def _merge(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return merge_lse(outputs, lses)


def _save_merge(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _merge_backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    outputs, lses, o, lse = ctx.saved_tensors
    share = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0.0))[..., None]
    # What a part that read nothing holds is never read, and has no gradient.
    parts = torch.where(share > 0, outputs.float(), 0.0)
    along = ((parts - o.float()) * do.float()).sum(-1)
    return (share * do).to(outputs.dtype), share[..., 0] * (along + dlse)


torch.library.register_autograd("foveate::merge", _merge_backward, setup_context=_save_merge, lib=LIBRARY)


def merge(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_lse` as an operator with gradients: parts [P, ..., Dv] and [P, ...] float32 to o [..., Dv] and lse."""
    o, lse = _merge(outputs, lses)
    return o, lse
