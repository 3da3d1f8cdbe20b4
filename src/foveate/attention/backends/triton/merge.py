"""Merging partial attention outputs by their log-sum-exps, on the device.

    lse = log sum_p exp(lse_p);   o = sum_p exp(lse_p - lse) o_p

A part that read nothing has lse_p = -inf and its o_p is never read; where all did, o = 0 and lse = -inf.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime
from foveate.attention.backends.triton.splits import pieces_of_all
from foveate.errors import ShapeError


@triton.jit(
    do_not_specialize=[
        "rows",
        "step",
        "count",
        "segments",
        "blocks",
        "room",
        "window",
        "sinks",
        "heads",
        "m",
        "per_segment",
    ]
)
def merge_kernel(
    PARTS,
    LSES,
    OUT,
    LSE,
    SINK,
    LENGTH,
    rows,
    step,
    count,
    segments,
    blocks,
    room,
    window,
    sinks,
    heads,
    m,
    per_segment,
    PLANNED: tl.constexpr,
    KIND: tl.constexpr,
    M: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per output row: part p of it lies at row `base + p * step` of PARTS."""
    row = tl.program_id(0)
    segment = row // per_segment
    if PLANNED:
        _, pieces = pieces_of_all(LENGTH, segments, blocks, room, window, sinks, KIND, M, PAGE, BLOCK_N, SEGMENTS)
        s = tl.arange(0, SEGMENTS)
        first = tl.sum(tl.where(s < segment, pieces, 0), 0)
        parts = tl.sum(tl.where(s == segment, pieces, 0), 0)
        base = first.to(tl.int64) * per_segment + row % per_segment
    else:
        parts = count
        base = segment.to(tl.int64) * count * per_segment + row % per_segment
    d = tl.arange(0, BLOCK_DV)
    top = tl.full([], float("-inf"), tl.float32)
    mass = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for start in range(0, parts, BLOCK_S):
        p = start + tl.arange(0, BLOCK_S)
        at = base + p.to(tl.int64) * step
        lse = tl.load(LSES + at, mask=p < parts, other=float("-inf")) * 1.4426950408889634
        new = tl.maximum(top, tl.max(lse, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(lse - safe)
        keep = tl.exp2(top - safe)
        read = (lse > float("-inf"))[:, None] & (d < DV)[None, :]
        o = tl.load(PARTS + at[:, None] * DV + d[None, :], mask=read, other=0.0).to(tl.float32)
        acc = acc * keep + tl.sum(weight[:, None] * o, 0)
        mass = mass * keep + tl.sum(weight, 0)
        top = new
    if SINK is not None:
        sink = tl.load(SINK + (row // m) % heads).to(tl.float32) * 1.4426950408889634
        new = tl.maximum(top, sink)
        keep = tl.exp2(top - new)
        acc = acc * keep
        mass = mass * keep + tl.exp2(sink - new)
        top = new
    tl.store(
        OUT + row.to(tl.int64) * DV + d, (acc / tl.where(mass > 0, mass, 1.0)).to(OUT.dtype.element_ty), mask=d < DV
    )
    if LSE is not None:
        tl.store(LSE + row, tl.where(mass > 0, (top + tl.log2(mass)) * 0.6931471805599453, float("-inf")))


def block_of_parts(parts: int, block_dv: int) -> int:
    """Parts that one program of `merge_kernel` reads at a time: at most 8192 numbers in registers."""
    return max(1, min(runtime.power_of_two(parts), 8192 // block_dv))


def merge_lse(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge parts of attention over disjoint key sets.

    outputs [P, ..., Dv] contiguous, any float dtype; lses [P, ...] float32, natural log.
    Returns o [..., Dv] in outputs' dtype and lse [...] float32.
    """
    if outputs.shape[:-1] != lses.shape or lses.dtype != torch.float32:
        raise ShapeError(f"lses {list(lses.shape)} {lses.dtype} do not fit outputs {list(outputs.shape)} (float32)")
    outputs, lses = outputs.contiguous(), lses.contiguous()
    P, DV = outputs.shape[0], outputs.shape[-1]
    o, lse = torch.empty_like(outputs[0]), torch.empty_like(lses[0])
    rows = lse.numel()
    if not rows:
        return o, lse
    block_dv = runtime.power_of_two(DV, 16)
    # One segment of `rows` rows: part p of row r lies at p * rows + r.
    merge_kernel[(rows,)](
        outputs, lses, o, lse, None, None,
        rows, rows, P, 1, 0, 0, 0, 0, 1, 1, rows,
        PLANNED=False, KIND=0, M=1, PAGE=1, BLOCK_N=1, SEGMENTS=1,
        DV=DV, BLOCK_DV=block_dv, BLOCK_S=block_of_parts(P, block_dv), PDL=False, num_warps=4,
    )  # fmt: skip
    return o, lse
