"""The best block columns and diagonals of each head as the lists that kernels read; the host does not wait.

Row i reads block c <= i where column c or the diagonal i - c blocks back is chosen. Chosen are the first column, the
main diagonal, and the highest of the rest; ties go to the lower index. A block's rank is how many stand before it, a
comparison with all others: n of them for each of n blocks, in parallel, no sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime
from foveate.attention.backends.triton.operators import operator
from foveate.attention.sparse_plan import SPARE_ENTRIES, SparsePlan, room_of_rows
from foveate.errors import ShapeError


@triton.jit
def _scores(POOLED, at, n, forced):
    score = tl.load(POOLED + at, mask=at < n, other=float("-inf"))
    return tl.where(at == forced, float("inf"), score)


@triton.jit(do_not_specialize=["n", "count"])
def choose_kernel(POOLED, COUNTS, CHOSEN, n, count, TILE: tl.constexpr, OTHERS: tl.constexpr):
    """CHOSEN int8 [2, heads, n] of POOLED [2, heads, n]; COUNTS int64 [2, heads] or None; grid (tiles, 2 heads)."""
    row = tl.program_id(1)
    # Columns come first in the grid, and of them the first block is always read; of diagonals the last, the main one.
    forced = tl.where(row < tl.num_programs(1) // 2, 0, n - 1)
    if COUNTS is not None:
        count = tl.load(COUNTS + row).to(tl.int32)
    POOLED += row.to(tl.int64) * n
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    own = _scores(POOLED, at, n, forced)
    before = tl.zeros([TILE], tl.int32)
    for start in range(0, n, OTHERS):
        other = start + tl.arange(0, OTHERS)
        theirs = _scores(POOLED, other, n, forced)
        level = (theirs[None, :] == own[:, None]) & (other[None, :] < at[:, None])
        before += tl.sum(((theirs[None, :] > own[:, None]) | level).to(tl.int32), 1)
    tl.store(CHOSEN + row.to(tl.int64) * n + at, (before < count).to(tl.int8), mask=at < n)


@triton.jit
def _reads(COLUMNS, DIAGONALS, i, c, n):
    """1 where rows i read blocks c, else 0; i and c broadcast against each other."""
    there = (c <= i) & (i < n)
    column = tl.load(COLUMNS + c, mask=c < n, other=0)
    diagonal = tl.load(DIAGONALS + (n - 1 - i + c), mask=there, other=0)
    return tl.where(there, (column | diagonal).to(tl.int32), 0)


@triton.jit(do_not_specialize=["n"])
def count_kernel(CHOSEN, COUNTS, n, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """COUNTS int64 [1 + heads n]: a zero, then the blocks of each row; grid (tiles of rows, heads)."""
    head = tl.program_id(1).to(tl.int64)
    columns = CHOSEN + head * n
    diagonals = columns + tl.num_programs(1).to(tl.int64) * n
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    counts = tl.zeros([TILE], tl.int32)
    for start in range(0, tl.minimum(n, (tl.program_id(0) + 1) * TILE), CHUNK):
        c = start + tl.arange(0, CHUNK)
        counts += tl.sum(_reads(columns, diagonals, i[:, None], c[None, :], n), 1)
    tl.store(COUNTS + 1 + head * n + i, counts.to(tl.int64), mask=i < n)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(COUNTS, tl.zeros([], tl.int64))


@triton.jit(do_not_specialize=["n"])
def fill_kernel(CHOSEN, ROW_PTR, COL, N_FULL, ORDER, n, CHUNK: tl.constexpr):
    """The list of one row, how much of it needs no mask, and its place in the order; grid (n, heads)."""
    i = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    columns = CHOSEN + head * n
    diagonals = columns + tl.num_programs(1).to(tl.int64) * n
    ROW_PTR += head * n
    begin = tl.load(ROW_PTR + i)
    count = tl.load(ROW_PTR + i + 1) - begin
    filled = tl.zeros([], tl.int32)
    own = tl.zeros([], tl.int32)
    for start in range(0, i + 1, CHUNK):
        c = start + tl.arange(0, CHUNK)
        reads = _reads(columns, diagonals, i, c, n)
        tl.store(COL + begin + filled + tl.cumsum(reads, 0) - 1, c, mask=reads > 0)
        filled += tl.sum(reads, 0)
        own += tl.sum(tl.where(c == i, reads, 0), 0)
    tl.store(N_FULL + head * n + i, filled - own)
    before = tl.zeros([], tl.int32)
    for start in range(0, n, CHUNK):
        j = start + tl.arange(0, CHUNK)
        theirs = tl.load(ROW_PTR + j + 1, mask=j < n, other=0) - tl.load(ROW_PTR + j, mask=j < n, other=0)
        ahead = (j < n) & ((theirs > count) | ((theirs == count) & (j < i)))
        before += tl.sum(ahead.to(tl.int32), 0)
    tl.store(ORDER + head * n + before, (head * n + i).to(tl.int32))


def _room(pooled: Tensor, most: int) -> int:
    """The most blocks that the lists can hold: each row those of as many columns and of as many diagonals."""
    return pooled.shape[1] * room_of_rows(pooled.shape[2], 2 * most)


def _like_lists(pooled: Tensor, counts: Tensor | None, count: int, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, bound = pooled.shape[1] * pooled.shape[2], _room(pooled, most)
    room: int | torch.SymInt = torch.library.get_ctx().new_dynamic_size() if bound > SPARE_ENTRIES else bound
    col, n_full, order = (pooled.new_empty(size, dtype=torch.int32) for size in (room, rows, rows))
    return pooled.new_empty(rows + 1, dtype=torch.int64), col, n_full, order


@operator(_like_lists)
def _block_lists(pooled: Tensor, counts: Tensor | None, count: int, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_ptr, col, n_full and order of the plan; count of all heads where there are no counts."""
    heads, n = pooled.shape[1:]
    rows, device = heads * n, pooled.device
    chosen = torch.empty(pooled.shape, dtype=torch.int8, device=device)
    listed = torch.empty(rows + 1, dtype=torch.int64, device=device)
    choose_kernel[(runtime.cdiv(n, 32), 2 * heads)](
        pooled, counts, chosen, n, count, TILE=32, OTHERS=128, num_warps=4
    )  # fmt: skip
    count_kernel[(runtime.cdiv(n, 32), heads)](chosen, listed, n, TILE=32, CHUNK=128, num_warps=4)
    row_ptr = listed.cumsum(0)
    room = _room(pooled, most)
    if room > SPARE_ENTRIES:
        room = int(row_ptr[-1])
    col = torch.empty(room, dtype=torch.int32, device=device)
    n_full = torch.empty(rows, dtype=torch.int32, device=device)
    order = torch.empty(rows, dtype=torch.int32, device=device)
    fill_kernel[(n, heads)](
        chosen, row_ptr, col, n_full, order, n, CHUNK=min(1024, runtime.power_of_two(n, 16)), num_warps=4
    )
    return row_ptr, col, n_full, order


def columns_and_diagonals(
    pooled: Tensor, counts: int | Tensor, *, most: int, batch: int, tokens: int, block: int
) -> SparsePlan:
    """The plan of a prompt of `tokens` (M = N) in blocks of `block`.

    Args:
        pooled: float32 [2, batch * heads, n], n = ceil(tokens / block): scores of block columns, and of block diagonals
            (the last entry is the main one). No gradient goes through them.
        counts: how many of each are read, at least 1, at most `most`: an int, or int64 [2, batch * heads].
    Every row ends with its own block. `col` may be longer than `row_ptr[-1]`. O(heads n^2) work, O(rows + lists)
    memory; waits for the device only where the lists' bound exceeds SPARE_ENTRIES. Raises ShapeError.
    """
    n = pooled.shape[-1]
    if pooled.dim() != 3 or pooled.shape[0] != 2 or pooled.dtype != torch.float32 or n != runtime.cdiv(tokens, block):
        raise ShapeError(f"pooled {list(pooled.shape)} {pooled.dtype}, allowed: float32 [2, batch * heads, n]")
    if 2 * pooled.shape[1] > runtime.GRID_AXIS:
        raise ShapeError(
            f"pooled has {pooled.shape[1]} heads of all sequences, allowed: at most {runtime.GRID_AXIS // 2}; "
            "give fewer sequences at a time"
        )
    given, count = (counts.contiguous(), 0) if isinstance(counts, Tensor) else (None, counts)
    row_ptr, col, n_full, order = _block_lists(pooled.detach().contiguous(), given, count, most)
    heads = pooled.shape[1] // batch
    return SparsePlan(row_ptr, col, n_full, order, batch, heads, tokens, tokens, block, block, spare=True)
