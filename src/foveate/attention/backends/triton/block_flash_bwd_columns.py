"""Gradients of block-sparse flash attention from single key columns (the formulas stand in block_flash_bwd.py).

Queries read a row's columns out of the packed stripe, as the forward kernel does. Gradients of the stripe's keys and
values are float32 sums over the queries of one query head, made in a fixed order by a kernel of their own; the kernel
of keys and values adds them to its sums before it rounds. A list names a key once, so every sum has one place. Where
there are too few tiles of columns to fill a GPU, queries are cut into parts.

Memory beside the stripes: float32 [B, Hq, parts, W, D + Dv] and int32 [lists, N + 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import configs, runtime
from foveate.attention.backends.triton.block_flash_bwd_parts import key_tile, query_tile
from foveate.attention.backends.triton.kv_compact import kv_compact
from foveate.attention.backends.triton.stripes import WIDTH, Stripes, read_bits
from foveate.attention.sparse_plan import SparsePlan

# Thread blocks wanted on each multiprocessor, and tiles of queries that a part has at least. Unmeasured.
PER_SM = 4
LEAST_TILES = 8


@triton.jit
def query_columns(
    acc, q, do, lse, delta, q_pos, row, head_row, stripe, KS, VS, COLUMN, BITS, FREE, CUT, width, scale, softcap, bias,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc plus the gradient of a tile of queries from its row's columns; stripe: where its keys lie in KS (int64)."""
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    KS += stripe * D
    VS += stripe * DV
    COLUMN += head_row.to(tl.int64) * width
    BITS += row.to(tl.int64) * (width // 32)
    cut = tl.load(CUT + row)
    whole = tl.load(FREE + row) // BLOCK_N * BLOCK_N
    at = tl.arange(0, BLOCK_N)
    bits = read_bits(BITS, at, whole)
    for _ in range(0, whole, BLOCK_N):
        k_row = KS + at[:, None] * D + d[None, :]
        v_row = VS + at[:, None] * DV + dv[None, :]
        k = tl.load(k_row) if D == BLOCK_D else tl.load(k_row, mask=(d < D)[None, :], other=0.0)
        v = tl.load(v_row) if DV == BLOCK_DV else tl.load(v_row, mask=(dv < DV)[None, :], other=0.0)
        acc = query_tile(
            k, v, (bits != 0)[None, :], acc, q, do, lse, delta, scale, softcap, bias, SOFTCAP, SIGMOID, PRECISION,
            UPCAST,
        )  # fmt: skip
        at += BLOCK_N
        bits = read_bits(BITS, at, whole)

    at = whole + tl.arange(0, BLOCK_N)
    slot = tl.load(COLUMN + at, mask=at < cut, other=0)
    bits = read_bits(BITS, at, cut)
    for _ in range(whole, cut, BLOCK_N):
        there = bits != 0
        k_row = KS + at[:, None] * D + d[None, :]
        v_row = VS + at[:, None] * DV + dv[None, :]
        k = tl.load(k_row, mask=there[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(v_row, mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        see = there[None, :]
        if CAUSAL:
            see = see & (slot[None, :] <= q_pos[:, None])
        acc = query_tile(k, v, see, acc, q, do, lse, delta, scale, softcap, bias, SOFTCAP, SIGMOID, PRECISION, UPCAST)
        at += BLOCK_N
        slot = tl.load(COLUMN + at, mask=at < cut, other=0)
        bits = read_bits(BITS, at, cut)
    return acc


@triton.jit
def _tile_bits(BITS, tile, at, width, SPLIT: tl.constexpr):
    """Whether the queries of a tile (the first one's, where it is negative) read the columns `at`, as 0 or 1."""
    row = tl.maximum(tile, 0) // SPLIT
    return (tl.load(BITS + row.to(tl.int64) * (width // 32) + at // 32) >> (at % 32)) & 1


@triton.jit(do_not_specialize=["row_blocks", "parts", "m", "n", "total", "width", "scale", "softcap", "bias"])
def column_gradient_kernel(
    Q, KS, VS, DO, STATE, DK, DV_OUT, COLUMN, BITS, stride_qb, stride_qh, stride_qm,
    row_blocks, parts, m, n, total, width, scale, softcap, bias,
    HQ: tl.constexpr, HKV: tl.constexpr, HEADS: tl.constexpr, BATCHED: tl.constexpr, PLAN_M: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr, SOFTCAP: tl.constexpr,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the stripe, parts of the queries, query heads, sequences, in one number).

    DK, DV_OUT: float32 [B, HQ, parts, width, .], before the scale. The last queries see every column, so all tiles
    begin with them and go back: programs that run at the same time read the same queries.
    """
    SPLIT: tl.constexpr = PLAN_M // BLOCK_M
    G: tl.constexpr = HQ // HKV
    STRIPES: tl.constexpr = HQ if HEADS == HQ else HKV
    columns = width // BLOCK_N
    part = tl.program_id(0) // columns % parts
    head = tl.program_id(0) // columns // parts
    b = (head // HQ).to(tl.int64)
    h = (head % HQ).to(tl.int64)
    head_row = b * HEADS if BATCHED else tl.full([], 0, tl.int64)
    stripe = b * STRIPES
    if HEADS == HQ:
        head_row += h
        stripe += h
    else:
        stripe += h // G
        if HEADS == HKV:
            head_row += h // G
    BITS += head_row * row_blocks * (width // 32)
    at = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(COLUMN + head_row * width + at)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    k_row = KS + (stripe * width + at)[:, None] * D + d[None, :]
    v_row = VS + (stripe * width + at)[:, None] * DV + dv[None, :]
    k = tl.load(k_row) if D == BLOCK_D else tl.load(k_row, mask=(d < D)[None, :], other=0.0)
    v = tl.load(v_row) if DV == BLOCK_DV else tl.load(v_row, mask=(dv < DV)[None, :], other=0.0)

    # Tiles of queries [begin, end) see a column, those from `free` on all of them; absent columns stand last, as n.
    first = tl.min(slot, 0)
    end = tl.cdiv(m, BLOCK_M)
    begin = 0
    free = 0
    if CAUSAL:
        begin = tl.maximum(first - (n - m), 0) // BLOCK_M
        free = tl.cdiv(tl.maximum(tl.max(tl.where(slot < n, slot, 0), 0) - (n - m), 0), BLOCK_M)
    begin = tl.where(first < n, begin, end)
    own = begin + (end - begin) * part // parts
    end = begin + (end - begin) * (part + 1) // parts
    free = tl.minimum(tl.maximum(free, own), end)

    q_at = Q + b * stride_qb + h * stride_qh
    do_at = DO + (b * HQ + h) * m * DV
    lse_at = STATE
    delta_at = STATE
    if not SIGMOID:
        lse_at += (b * HQ + h) * m
        delta_at = lse_at + total
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    bits = _tile_bits(BITS, end - 1, at, width, SPLIT)
    for j in range(0, end - free):
        tile = end - 1 - j
        dk, dv_acc = key_tile(
            tile * BLOCK_M, bits != 0, k, v, dk, dv_acc, slot, q_at, do_at, lse_at, delta_at, stride_qm, m, n, scale,
            softcap, bias, False, EVEN, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, SOFTCAP, SIGMOID, PRECISION, UPCAST,
        )  # fmt: skip
        bits = _tile_bits(BITS, tile - 1, at, width, SPLIT)
    if CAUSAL:
        bits = _tile_bits(BITS, free - 1, at, width, SPLIT)
        for j in range(0, free - own):
            tile = free - 1 - j
            dk, dv_acc = key_tile(
                tile * BLOCK_M, bits != 0, k, v, dk, dv_acc, slot, q_at, do_at, lse_at, delta_at, stride_qm, m, n,
                scale, softcap, bias, True, EVEN, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, SOFTCAP, SIGMOID, PRECISION,
                UPCAST,
            )  # fmt: skip
            bits = _tile_bits(BITS, tile - 1, at, width, SPLIT)
    out_row = (head.to(tl.int64) * parts + part) * width + at
    tl.store(DK + out_row[:, None] * D + d[None, :], dk, mask=(d < D)[None, :])
    tl.store(DV_OUT + out_row[:, None] * DV + dv[None, :], dv_acc, mask=(dv < DV)[None, :])


@triton.jit
def add_columns(
    dk, dv_acc, SUM_K, SUM_V, PLACE, head_row, stripe, slot, n, width,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Sums of a tile of keys plus those of the columns among them; stripe: which one of SUM_K's (int64)."""
    place = tl.load(PLACE + (n.to(tl.int64) + 1) * head_row + slot, mask=slot < n, other=-1)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    there = (place >= 0)[:, None]
    row = (stripe * width + place)[:, None]
    dk += tl.load(SUM_K + row * D + d[None, :], mask=there & (d < D)[None, :], other=0.0)
    dv_acc += tl.load(SUM_V + row * DV + dv[None, :], mask=there & (dv < DV)[None, :], other=0.0)
    return dk, dv_acc


@dataclass(frozen=True)
class Columns:
    """A plan's columns in one backward pass.

    keys, values: [B, H, W, .], the packed stripes, H = Hq where the plan has a list per query head, else Hkv.
    place: int32 [lists, N + 1], where a slot stands in its list's stripe, -1 where in none; the last is no slot's.
    """

    stripes: Stripes
    keys: Tensor
    values: Tensor
    place: Tensor

    @classmethod
    def of(cls, stripes: Stripes, k: Tensor, v: Tensor, plan: SparsePlan) -> Columns:
        column = stripes.column
        keys, values = kv_compact(k, v, column.view(plan.batch, plan.heads, -1))
        place = torch.full((column.shape[0], plan.n + 1), -1, dtype=torch.int32, device=k.device)
        order = torch.arange(column.shape[1], dtype=torch.int32, device=k.device)
        # Absent columns are slot N, whose entry is not read.
        place.scatter_(1, column.long(), order.expand_as(column))
        return cls(stripes, keys, values, place)

    @property
    def width(self) -> int:
        return self.keys.shape[2]

    def gradients(
        self,
        do: Tensor,
        q: Tensor,
        state: Tensor | None,
        plan: SparsePlan,
        config: configs.BackwardConfig,
        block_m: int,
        factors: tuple[float, float, float],
        shape: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Sums of `keys` and `values`, float32 [B, H, W, .], before the scale.

        state: as `delta_kernel` writes it; block_m, factors, shape: of the launch of the kernel of keys and values.
        """
        B, Hq, M, D = q.shape
        DV, H, width = self.values.shape[3], self.keys.shape[1], self.width
        block_n = min(WIDTH, config.block_n)
        programs = B * Hq * (width // block_n)
        parts = parts_of_queries(programs, runtime.cdiv(M, block_m), q.device)
        dk = torch.empty(B, Hq, parts, width, D, dtype=torch.float32, device=q.device)
        dv = torch.empty(B, Hq, parts, width, DV, dtype=torch.float32, device=q.device)
        column_gradient_kernel[(programs * parts,)](
            q, self.keys, self.values, do, state, dk, dv, self.stripes.column, self.stripes.bits, *q.stride()[:3],
            plan.row_blocks, parts, M, plan.n, B * Hq * M, width, *factors,
            BATCHED=plan.batch > 1, EVEN=M % block_m == 0, BLOCK_M=block_m, BLOCK_N=block_n, **shape,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if parts * Hq == H:
            return dk[:, :, 0], dv[:, :, 0]
        return dk.view(B, H, -1, width, D).sum(2), dv.view(B, H, -1, width, DV).sum(2)


def parts_of_queries(programs: int, tiles: int, device: torch.device) -> int:
    """Parts that the queries of a tile of columns are cut into, `tiles` tiles of queries in all."""
    wanted = PER_SM * runtime.multiprocessors(device.index)
    return max(1, min(runtime.cdiv(wanted, programs), tiles // LEAST_TILES))
