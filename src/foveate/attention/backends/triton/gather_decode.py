"""Attention of a few queries over listed keys: flash decoding whose pieces divide the list that is really read.

    o[m] = sum_j p[m, j] v[j],  p = softmax over the listed, visible j of scale * q[m] . k[j] (+ log_weight[j])

The G query heads of a KV head and their M queries are the rows of one tile, so a key is read once. The list is cut
into pieces, one thread block each; `merge` puts their partial outputs together. A list is all keys, key slots, pages
of keys, or the first `sinks` keys with a window (computed, nothing is stored). The next tile's slots are loaded one
step ahead: loading them in the step that needs them costs the pipeline its depth (design/kernels.md, 2.9).

Safe in a CUDA graph: nothing is read back, and every size comes from shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import configs, runtime
from foveate.attention.backends.triton.merge import block_of_parts, merge_kernel
from foveate.attention.backends.triton.splits import (
    DENSE,
    PAGES,
    RANGES,
    TOKENS,
    list_entries,
    list_of_segment,
    pieces_of_all,
)
from foveate.errors import ShapeError


@triton.jit
def _slots(INDEX, at, entries, bound, gap, first, KIND: tl.constexpr, PAGE: tl.constexpr):
    """Key slots [BLOCK_N] of list entries `at`; -1 where there is none."""
    inside = at < entries
    if KIND == 1:
        slot = tl.load(INDEX + at, mask=inside, other=-1)
    elif KIND == 2:
        page = tl.load(INDEX + at // PAGE, mask=inside, other=-1)
        slot = tl.where(page < 0, -1, page * PAGE + at % PAGE)
    elif KIND == 3:
        slot = tl.where(at < first, at, at + gap)
    else:
        slot = at
    return tl.where(inside & (slot >= 0) & (slot < bound), slot, -1)


@triton.jit(
    do_not_specialize=[
        "segments", "n", "count", "splits", "window", "sinks", "qk_scale", "softcap",
        "stride_pb", "stride_ph", "stride_wb", "stride_wh",
    ]
)  # fmt: skip
def decode_kernel(
    Q, K, V, INDEX, LENGTH, START, KPOS, QPOS, LOGW, SINK, OUT, LSE,
    stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ib, stride_ih,
    stride_pb, stride_ph, stride_wb, stride_wh,
    segments, n, count, splits, window, sinks, qk_scale, softcap,
    HKV: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr,
    KIND: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PLANNED: tl.constexpr, FINAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (pieces, segments or 1, row tiles). OUT and LSE: the result when FINAL, else partial rows per piece."""
    if PDL:
        # The merge may be set up meanwhile; it waits for this launch to end before it reads.
        tl.extra.cuda.gdc_launch_dependents()
    piece = tl.program_id(0)
    if PLANNED:
        per_piece, pieces = pieces_of_all(
            LENGTH, segments, tl.num_programs(0), count, window, sinks, KIND, M, PAGE, BLOCK_N, SEGMENTS
        )
        ends = tl.cumsum(pieces, 0)
        segment = tl.sum((ends <= piece).to(tl.int32), 0)
        if segment >= segments:
            return
        part = piece - tl.sum(tl.where(tl.arange(0, SEGMENTS) < segment, pieces, 0), 0)
        listed = list_of_segment(LENGTH, segment, count, True)
        entries = list_entries(listed, window, sinks, KIND, M, PAGE)
        slot_out = piece.to(tl.int64)
    else:
        segment = tl.program_id(1)
        part = piece
        listed = list_of_segment(LENGTH, segment, count, True)
        entries = list_entries(listed, window, sinks, KIND, M, PAGE)
        per_piece = tl.cdiv(tl.cdiv(entries, BLOCK_N), splits)
        slot_out = segment.to(tl.int64) * splits + piece
    b = (segment // HKV).to(tl.int64)
    h = (segment % HKV).to(tl.int64)
    lo = part * per_piece * BLOCK_N
    hi = tl.minimum(lo + per_piece * BLOCK_N, entries)

    # Where keys are not listed by an index, the list's length is the number of keys.
    keys = n
    if KIND == 0 or KIND == 3:
        keys = listed
    first = tl.minimum(keys, sinks)
    gap = tl.maximum(first, keys - M - window) - first
    k_at = K + b * stride_kb + h * stride_kh
    v_at = V + b * stride_vb + h * stride_vh
    token = tl.full([], 0, tl.int64)
    if START is not None:
        token += tl.load(START + segment).to(tl.int64)
    index_at = INDEX
    if INDEX is not None:
        index_at = INDEX + b * stride_ib + h * stride_ih

    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = r < G * M
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q_at = Q + b * stride_qb + (h * G + r // M)[:, None] * stride_qh + (r % M)[:, None] * stride_qm + d[None, :]
    q = tl.load(q_at, mask=live[:, None] & (d < D)[None, :], other=0.0)
    if QPOS is not None:
        q_pos = tl.load(QPOS + b * M + r % M, mask=live, other=-1).to(tl.int32)
    else:
        q_pos = keys - M + r % M

    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    at = lo + tl.arange(0, BLOCK_N)
    slot = _slots(index_at, at, hi, keys, gap, first, KIND, PAGE)
    for _ in range(lo, hi, BLOCK_N):
        there = slot >= 0
        row = token + slot.to(tl.int64)
        k = tl.load(k_at + row[:, None] * stride_kn + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(v_at + row[:, None] * stride_vn + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        if UPCAST:
            scores = tl.dot(q.to(tl.float32), tl.trans(k).to(tl.float32), input_precision="ieee") * qk_scale
        else:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (1 + exp(2x)); qk_scale then holds scale / softcap, without log2(e).
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * 2.8853900817779268)))
        if LOGW is not None:
            w_at = LOGW + b * stride_wb + h * stride_wh + row
            scores += (tl.load(w_at, mask=there, other=0.0).to(tl.float32) * 1.4426950408889634)[None, :]
        see = there[None, :]
        if KPOS is not None:
            k_pos = tl.load(KPOS + b * stride_pb + h * stride_ph + row, mask=there, other=-1).to(tl.int32)
            see = see & (k_pos >= 0)[None, :]
        else:
            k_pos = slot
        if QPOS is not None:
            see = see & (q_pos >= 0)[:, None]
        if CAUSAL:
            see = see & (k_pos[None, :] <= q_pos[:, None])
        if WINDOW:
            near = q_pos[:, None] - k_pos[None, :] <= window
            see = see & (near | (k_pos < sinks)[None, :])
        scores = tl.where(see, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(scores - safe[:, None])
        keep = tl.exp2(top - safe)
        mass = mass * keep + tl.sum(p, 1)
        acc = acc * keep[:, None]
        if UPCAST:
            acc += tl.dot(p, v.to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new
        at += BLOCK_N
        slot = _slots(index_at, at, hi, keys, gap, first, KIND, PAGE)

    if FINAL and SINK is not None:
        sink = tl.load(SINK + h * G + r // M, mask=live, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        new = tl.maximum(top, sink)
        safe = tl.where(new == float("-inf"), 0.0, new)
        keep = tl.exp2(top - safe)
        acc = acc * keep[:, None]
        mass = mass * keep + tl.exp2(sink - safe)
        top = new
    some = mass > 0
    acc = acc / tl.where(some, mass, 1.0)[:, None]
    out_row = slot_out * (G * M) + r
    tl.store(
        OUT + out_row[:, None] * DV + dv[None, :],
        acc.to(OUT.dtype.element_ty),
        mask=live[:, None] & (dv < DV)[None, :],
    )
    if LSE is not None:
        lse = tl.where(some, (top + tl.log2(tl.where(some, mass, 1.0))) * 0.6931471805599453, float("-inf"))
        tl.store(LSE + out_row, lse, mask=live)


@dataclass(frozen=True)
class _List:
    """What is listed, in numbers the kernel takes."""

    kind: int
    page: int
    count: int
    entries: int
    window: int
    sinks: int


def _describe(
    index: Tensor | None, page_size: int, n: int, m: int, window: int | None, sinks: int, ranges: bool
) -> _List:
    if index is None and ranges:
        assert window is not None
        first = min(n, sinks)
        return _List(RANGES, 1, n, first + n - max(first, n - m - window), window, sinks)
    if index is None:
        return _List(DENSE, 1, n, n, window or 0, sinks)
    k = index.shape[-1]
    return _List(PAGES if page_size > 1 else TOKENS, page_size, k, k * page_size, window or 0, sinks)


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
    config: configs.DecodeConfig | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of q [B, Hq, M, D], M small, over listed keys.

    Args:
        k, v: [B, Hkv, N, D] and [B, Hkv, N, Dv], last stride 1; or packed [R, D] and [R, Dv] with `start`, then
            segment b * Hkv + h holds rows start .. start + length.
        index: int32 or int64 [B or 1, Hkv or 1, K]: key slots, or pages of `page_size` slots; an entry < 0 or past
            the keys is absent; a key named twice counts twice.
        length: int32 or int64 [B, Hkv]: index entries in use, or keys in use when there is no index.
        start: int32 or int64 [B * Hkv], for packed keys; needs `length`.
        window, sinks: keys further back than `window` (which does not count the query) are not seen, but for those
            at positions < sinks; without index and positions, only these two ranges are read.
        sink: [Hq], a learned logit per query head.   softcap: before masks and log_weight.
        log_weight: [B or 1, Hkv or 1, N] or packed [R], added to the scores.
        k_positions, q_positions: [B or 1, Hkv or 1, N] (or packed [R]) and [B, M], integer; < 0 sees and shows
            nothing. Default: key j stands at j and the queries are the last M keys.
        num_splits: pieces per segment (with `length`: pieces of all segments together).
    Returns:
        o [B, Hq, M, Dv] in q's dtype, lse [B, Hq, M] float32, natural log (None unless asked for);
        o = 0 and lse = -inf for a query that sees nothing.
    """
    B, Hq, M, D = q.shape
    packed = k.dim() == 2
    if packed:
        k, v = k[None, None], v[None, None]
        if start is None or length is None:
            raise ShapeError("packed keys [R, D] need start and length, one entry per KV head of each sequence")
    Hkv = start.numel() // B if start is not None else k.shape[1]
    N, DV = k.shape[2], v.shape[3]
    if Hq % Hkv or k.shape[3] != D or v.shape[2] != N:
        raise ShapeError(f"q {list(q.shape)} does not fit k {list(k.shape)} and v {list(v.shape)} with {Hkv} KV heads")
    runtime.check_floats(q=q, k=k, v=v)
    runtime.check_unit_stride(q=q, k=k, v=v)
    launches = runtime.batches(B, Hkv)
    if len(launches) > 1:
        keys = {"k": k, "v": v, "log_weight": log_weight, "k_positions": k_positions}
        batched = {"q": q, "index": index, "length": length, "q_positions": q_positions}
        if packed:
            # Their rows are found by `start`, whatever sequence they belong to.
            keys = {**keys, "k": k[0, 0], "v": v[0, 0]}
            batched["start"] = None if start is None else start.view(B, Hkv)
        else:
            batched, keys = batched | keys, {}
        return _in_parts(
            launches, batched, **keys, page_size=page_size, scale=scale, causal=causal, window=window, sinks=sinks,
            sink=sink, softcap=softcap, num_splits=num_splits, config=config, return_lse=return_lse,
        )  # fmt: skip
    segments, G = B * Hkv, Hq // Hkv
    placed = k_positions is not None or q_positions is not None
    if sinks and window is None:
        raise ShapeError(f"sinks={sinks} are read besides a window; give window")
    ranges = window is not None and index is None and not placed
    if packed and index is not None:
        raise ShapeError("packed keys are read whole; an index over them is not supported")
    what = _describe(index, page_size, N, M, window, sinks or 0, ranges)
    config = config or configs.decode(what.kind != DENSE, what.entries, max(D, DV), q.element_size())
    planned = length is not None and segments > 1
    rows = G * M
    block_r = min(64, runtime.power_of_two(rows, 16))
    row_tiles = runtime.cdiv(rows, block_r)
    tiles = max(1, runtime.cdiv(what.entries, config.block_n))
    wanted = config.per_sm * runtime.multiprocessors(q.device.index)
    if planned:
        pieces = num_splits or min(segments * tiles, max(1, wanted // row_tiles) + segments)
        pieces = max(pieces, segments + 1)
    else:
        pieces = min(tiles, num_splits or max(1, wanted // (segments * row_tiles)))
        pieces = runtime.cdiv(tiles, runtime.cdiv(tiles, pieces))
    final = pieces == 1 and not planned
    out = torch.empty(B, Hq, M, DV, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, Hq, M, dtype=torch.float32, device=q.device) if return_lse else None
    if final:
        part_o, part_lse = out, lse
    else:
        part_rows = (pieces if planned else pieces * segments) * rows
        part_o = torch.empty(part_rows, DV, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(part_rows, dtype=torch.float32, device=q.device)
    scale = D**-0.5 if scale is None else scale
    pdl = runtime.has_dependent_launch(q.device.index)
    block_dv = runtime.power_of_two(DV, 16)
    padded = runtime.power_of_two(segments) if planned else 1
    index, index_strides = _strides(index, B, Hkv)
    k_positions, position_strides = _strides(k_positions, B, Hkv)
    log_weight, weight_strides = _strides(log_weight, B, Hkv)
    grid = (pieces, 1 if planned else segments, row_tiles)
    decode_kernel[grid](
        q, k, v, index, length, start, k_positions, q_positions, log_weight, sink, part_o, part_lse,
        q.stride(0), q.stride(1), q.stride(2),
        0 if packed else k.stride(0), 0 if packed else k.stride(1), k.stride(2),
        0 if packed else v.stride(0), 0 if packed else v.stride(1), v.stride(2),
        *index_strides, *position_strides, *weight_strides,
        segments, N, what.count, pieces, what.window, what.sinks,
        scale / softcap if softcap else scale * runtime.LOG2E, (softcap or 0.0) * runtime.LOG2E,
        HKV=Hkv, G=G, M=M, D=D, DV=DV, BLOCK_D=runtime.power_of_two(D, 16), BLOCK_DV=block_dv,
        BLOCK_R=block_r, BLOCK_N=config.block_n, SEGMENTS=padded,
        KIND=what.kind, PAGE=what.page,
        CAUSAL=causal and (M > 1 or placed), WINDOW=window is not None and not (ranges and M == 1),
        SOFTCAP=bool(softcap), PLANNED=planned, FINAL=final,
        PRECISION=runtime.dot_precision(q.dtype), UPCAST=runtime.upcast(q.dtype), PDL=pdl and not final,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if not final:
        merge_kernel[(segments * rows,)](
            part_o, part_lse, out, lse, sink, length,
            segments * rows, rows, pieces, segments, pieces, what.count, what.window, what.sinks, Hq, M, rows,
            PLANNED=planned, KIND=what.kind, M=M, PAGE=what.page, BLOCK_N=config.block_n, SEGMENTS=padded,
            DV=DV, BLOCK_DV=block_dv, BLOCK_S=block_of_parts(pieces, block_dv), PDL=pdl,
            num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
    return out, lse


def _in_parts(launches: list[slice], batched: dict[str, Tensor | None], **same: Any) -> tuple[Tensor, Tensor | None]:
    """`gather_decode` for some sequences after others, of tensors [B or 1, ...] and of what is the same for all."""
    outs, lses = [], []
    for part in launches:
        own: dict[str, Any] = {name: x if x is None else runtime.part_of(x, part) for name, x in batched.items()}
        if own.get("start") is not None:
            own["start"] = own["start"].flatten()
        o, lse = gather_decode(**own, **same)
        outs.append(o)
        lses.append(lse)
    return torch.cat(outs), None if lses[0] is None else torch.cat([each for each in lses if each is not None])


def _strides(x: Tensor | None, batch: int, heads: int) -> tuple[Tensor | None, tuple[int, int]]:
    """Strides along sequences and heads of [B or 1, H or 1, n] (0 where broadcast); of packed [n], none."""
    if x is None or x.dim() == 1:
        return x, (0, 0)
    if x.dim() != 3 or x.shape[0] not in (1, batch) or x.shape[1] not in (1, heads) or x.stride(-1) != 1:
        raise ShapeError(
            f"{list(x.shape)} with strides {x.stride()} does not fit [{batch} or 1, {heads} or 1, n], last stride 1"
        )
    return x, (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0)


__all__ = ["DENSE", "PAGES", "RANGES", "TOKENS", "gather_decode"]
