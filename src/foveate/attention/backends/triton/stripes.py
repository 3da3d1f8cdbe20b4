"""Single key columns of a block-sparse plan, packed so that a kernel reads them like any block of keys.

Columns are sorted per head, and their keys and values gathered into a stripe once per call. What a row still has to
test is kept as bits: whether one of the blocks it lists has the column already. A row's columns end at its last query;
the whole tiles before its first query need no causal mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime
from foveate.attention.backends.triton.operators import operator
from foveate.attention.sparse_plan import SparsePlan, lists_of_room, made_once

# Columns per stripe are a multiple of this, so tiles and words of bits never straddle a head.
WIDTH = 128


@dataclass(frozen=True)
class Stripes:
    """column: int32 [lists, W], ascending, absent ones last as n; bits: int32 [rows, W / 32], 1 where the column is
    to be read; free, cut: int32 [rows], columns that every query of the row sees, and that any of them sees."""

    column: Tensor
    bits: Tensor
    free: Tensor
    cut: Tensor


@triton.jit
def read_bits(BITS, at, cut):
    """Whether the columns `at` of a row's stripe, below `cut`, are to be read, as 0 or 1."""
    return (tl.load(BITS + at // 32, mask=at < cut, other=0) >> (at % 32)) & 1


@triton.jit(do_not_specialize=["row_blocks", "n", "width", "words"])
def uncovered_kernel(
    COLUMN, BLOCKS, BITS, row_blocks, n, width, words, BLOCK_N: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Grid (rows,). BLOCKS [rows, words]: listed key blocks as bits."""
    row = tl.program_id(0).to(tl.int64)
    COLUMN += row // row_blocks * width
    for start in range(0, width, STEP):
        at = start + tl.arange(0, STEP)
        slot = tl.load(COLUMN + at, mask=at < width, other=n)
        block = slot // BLOCK_N
        word = tl.load(BLOCKS + row * words + block // 32, mask=slot < n, other=-1)
        read = ((word >> (block % 32)) & 1) ^ 1
        packed = tl.sum(tl.reshape(read, (STEP // 32, 32)) << tl.arange(0, 32)[None, :], 1)
        group = start // 32 + tl.arange(0, STEP // 32)
        tl.store(BITS + row * (width // 32) + group, packed, mask=group < width // 32)


def stripes(plan: SparsePlan, causal: bool) -> Stripes:
    """The plan's columns in the form that kernels read, made once per plan."""
    assert plan.columns is not None
    return made_once(plan, ("stripes", causal), lambda: _stripes(plan, causal), plan.columns)


def _stripes(plan: SparsePlan, causal: bool) -> Stripes:
    assert plan.columns is not None
    sizes = (plan.m, plan.n, plan.block_m, plan.block_n)
    return Stripes(*_made_stripes(plan.columns, plan.row_ptr, plan.col, *sizes, causal))


def _width(columns: int) -> int:
    return runtime.cdiv(columns, WIDTH) * WIDTH


def _like_stripes(columns: Tensor, row_ptr: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = row_ptr.shape[0] - 1, _width(columns.shape[2])
    sizes = ((columns.shape[0] * columns.shape[1], width), (rows, width // 32), (rows,), (rows,))
    column, bits, free, cut = (columns.new_empty(size, dtype=torch.int32) for size in sizes)
    return column, bits, free, cut


@operator(_like_stripes)
def _made_stripes(
    columns: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    m: int,
    n: int,
    block_m: int,
    block_n: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Stripes` of columns [B, heads, V] beside the lists of a plan, whose col may be longer than it says."""
    device, row_blocks = columns.device, runtime.cdiv(m, block_m)
    listed = columns.flatten(0, 1)
    listed = torch.where((listed < 0) | (listed >= n), n, listed).sort(-1).values
    repeated = F.pad(listed[:, 1:] == listed[:, :-1], (1, 0))
    listed = listed.masked_fill(repeated, n).sort(-1).values
    listed = F.pad(listed, (0, _width(listed.shape[1]) - listed.shape[1]), value=n).to(torch.int32)
    first = torch.arange(row_blocks, device=device) * block_m
    last = (first + block_m).clamp(max=m) - 1
    ends = torch.stack((first, last)) + (n - m) if causal else torch.full((2, row_blocks), n - 1, device=device)
    free, cut = (
        torch.searchsorted(listed, end.to(torch.int32).expand(listed.shape[0], -1).contiguous(), right=True)
        .flatten()
        .to(torch.int32)
        for end in ends
    )
    rows, words = cut.numel(), runtime.cdiv(runtime.cdiv(n, block_n), 32)
    # Entries past the last list belong to a row that is not there.
    row, col = lists_of_room(row_ptr, col)
    blocks = torch.zeros((rows + 1) * words, dtype=torch.int32, device=device)
    # A block is listed once, so a sum of bits is their union.
    blocks.index_add_(0, row * words + col // 32, torch.ones_like(col) << (col & 31))
    bits = torch.empty(rows, listed.shape[1] // 32, dtype=torch.int32, device=device)
    uncovered_kernel[(rows,)](
        listed, blocks, bits, row_blocks, n, listed.shape[1], words, BLOCK_N=block_n, STEP=1024, num_warps=4
    )
    return listed, bits, free, cut
