"""Sums over attention weights, on the device: what each key receives, what each block of keys receives from each block
of queries, and the softmax's denominator. Never M x N in memory, no atomics.

    lse[i] = log sum_j exp(s[i, j]);   column mass[j] = sum_i exp(s[i, j] - lse[i]);   block mass = its mean by blocks

Two passes: the log-sum-exp of the queries (flash attention without values; few queries share the keys out among
thread blocks), then the sums, each by the one thread block that stores it. Keys stand at their slots; the M queries are
the last of N unless their positions are given.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import configs, runtime
from foveate.attention.backends.triton.block_flash import products
from foveate.attention.backends.triton.operators import operator
from foveate.errors import ShapeError


@triton.jit
def _head(HQ: tl.constexpr, HKV: tl.constexpr, AXIS: tl.constexpr):
    """Sequence, KV head, and query head counted over all sequences (int64), of a grid whose first axis counts the query
    heads of a KV head first (they read the same keys, so they run together) and whose axis AXIS counts KV heads."""
    G: tl.constexpr = HQ // HKV
    b = (tl.program_id(AXIS) // HKV).to(tl.int64)
    h_kv = (tl.program_id(AXIS) % HKV).to(tl.int64)
    return b, h_kv, b * HQ + h_kv * G + tl.program_id(0) % G


@triton.jit
def _positions(QPOS, b, r, m, n):
    """Where queries r stand; -1 for those past the last one."""
    if QPOS is not None:
        return tl.load(QPOS + b * m + r, mask=r < m, other=-1).to(tl.int32)
    else:
        return tl.where(r < m, n - m + r, -1)


@triton.jit
def _visible(q_pos, slot, n, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """q_pos and slot broadcast against each other."""
    see = (q_pos >= 0) & (slot < n)
    if CAUSAL:
        see = see & (slot <= q_pos)
    if WINDOW:
        see = see & (q_pos - slot <= window)
    return see


@triton.jit
def _key_range(q_pos, n, window, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Multiples of BLOCK_N around the keys that queries at q_pos may see."""
    lo = 0
    hi = n
    if CAUSAL:
        hi = tl.minimum(n, tl.max(q_pos, 0) + 1)
    if WINDOW:
        near = tl.min(tl.where(q_pos < 0, n, q_pos), 0) - window
        lo = tl.maximum(near, 0) // BLOCK_N * BLOCK_N
    return lo, hi


@triton.jit(do_not_specialize=["m", "n", "splits", "window", "scale"])
def lse_kernel(
    Q, K, QPOS, LSE, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    m, n, splits, window, scale, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """LSE [splits, B, Hq, M], natural log; grid (query tiles x heads of a group, splits, B * Hkv)."""
    b, h_kv, head = _head(HQ, HKV, 2)
    h = head - b * HQ
    r = tl.program_id(0) // (HQ // HKV) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_pos = _positions(QPOS, b, r, m, n)
    d = tl.arange(0, BLOCK_D)
    q_row = Q + b * stride_qb + h * stride_qh + r.to(tl.int64)[:, None] * stride_qm + d[None, :]
    q = tl.load(q_row, mask=(r < m)[:, None] & (d < D)[None, :], other=0.0)
    k_at = K + b * stride_kb + h_kv * stride_kh
    lo, hi = _key_range(q_pos, n, window, BLOCK_N, CAUSAL, WINDOW)
    share = tl.cdiv(tl.cdiv(hi - lo, BLOCK_N), splits) * BLOCK_N
    lo += tl.program_id(1) * share
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for start in range(lo, tl.minimum(lo + share, hi), BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        k_row = k_at + slot.to(tl.int64)[:, None] * stride_kn + d[None, :]
        k = tl.load(k_row, mask=(slot < n)[:, None] & (d < D)[None, :], other=0.0)
        scores = products(q, k, 0.0, 0.0, False, PRECISION, UPCAST) * scale
        scores = tl.where(_visible(q_pos[:, None], slot[None, :], n, window, CAUSAL, WINDOW), scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        mass = mass * tl.exp2(top - safe) + tl.sum(tl.exp2(scores - safe[:, None]), 1)
        top = new
    some = mass > 0
    lse = tl.where(some, (top + tl.log2(tl.where(some, mass, 1.0))) * 0.6931471805599453, float("-inf"))
    heads = tl.num_programs(2).to(tl.int64) * (HQ // HKV)
    out = (tl.program_id(1) * heads + head) * m + r
    tl.store(LSE + out, lse, mask=r < m)


@triton.jit
def _base_two(LSE, at, live):
    """Log-sum-exp in base 2; inf where a query reads nothing, so that its weights are 0."""
    lse = tl.load(LSE + at, mask=live, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)


@triton.jit(do_not_specialize=["m", "n", "window", "scale"])
def column_kernel(
    Q, K, QPOS, LSE, OUT, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    m, n, window, scale, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """OUT [B, Hq, N]; grid (key tiles x heads of a group, B * Hkv). Scores are computed with keys as rows."""
    b, h_kv, head = _head(HQ, HKV, 1)
    first = tl.program_id(0) // (HQ // HKV) * BLOCK_N
    slot = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k_row = K + b * stride_kb + h_kv * stride_kh + slot.to(tl.int64)[:, None] * stride_kn + d[None, :]
    k = tl.load(k_row, mask=(slot < n)[:, None] & (d < D)[None, :], other=0.0)
    q_at = Q + b * stride_qb + (head - b * HQ) * stride_qh
    rows = head * m
    begin = 0
    end = m
    if QPOS is None:
        if CAUSAL:
            begin = tl.maximum(first - (n - m), 0) // BLOCK_M * BLOCK_M
        if WINDOW:
            end = tl.minimum(m, first + BLOCK_N + window - (n - m))
    acc = tl.zeros([BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_M):
        r = start + tl.arange(0, BLOCK_M)
        q_row = q_at + r.to(tl.int64)[:, None] * stride_qm + d[None, :]
        q = tl.load(q_row, mask=(r < m)[:, None] & (d < D)[None, :], other=0.0)
        scores = products(k, q, 0.0, 0.0, False, PRECISION, UPCAST) * scale
        p = tl.exp2(scores - _base_two(LSE, rows + r, r < m)[None, :])
        q_pos = _positions(QPOS, b, r, m, n)
        p = tl.where(_visible(q_pos[None, :], slot[:, None], n, window, CAUSAL, WINDOW), p, 0.0)
        acc += tl.sum(p, 1)
    tl.store(OUT + head * n + slot, acc, mask=slot < n)


@triton.jit(do_not_specialize=["m", "n", "tiles", "block_m", "window", "scale"])
def block_kernel(
    Q, K, QPOS, LSE, OUT, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    m, n, tiles, block_m, window, scale, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ROWS_FIRST: tl.constexpr,
):  # fmt: skip
    """OUT [B, Hq, query blocks, key tiles]: mean weight; grid (shares of key tiles x heads of a group, query blocks,
    B * Hkv), with ROWS_FIRST (query blocks x heads of a group, shares, B * Hkv).

    A query block of block_m <= BLOCK_M queries.
    """
    if ROWS_FIRST:
        row, rows = tl.program_id(0) // (HQ // HKV), tl.num_programs(0) // (HQ // HKV)
        share = tl.program_id(1)
    else:
        row, rows = tl.program_id(1), tl.num_programs(1)
        share = tl.program_id(0) // (HQ // HKV)
    b, h_kv, head = _head(HQ, HKV, 2)
    h = head - b * HQ
    within = tl.arange(0, BLOCK_M)
    r = row * block_m + within
    live = (within < block_m) & (r < m)
    q_pos = tl.where(live, _positions(QPOS, b, r, m, n), -1)
    d = tl.arange(0, BLOCK_D)
    q_row = Q + b * stride_qb + h * stride_qh + r.to(tl.int64)[:, None] * stride_qm + d[None, :]
    q = tl.load(q_row, mask=live[:, None] & (d < D)[None, :], other=0.0)
    lse = _base_two(LSE, head * m + r, live)
    k_at = K + b * stride_kb + h_kv * stride_kh
    lo, hi = _key_range(q_pos, n, window, BLOCK_N, CAUSAL, WINDOW)
    count = tl.sum(live.to(tl.float32), 0)
    out = OUT + (head * rows + row) * tiles
    first = share * SHARE
    begin = tl.maximum(first, lo // BLOCK_N)
    end = tl.minimum(first + SHARE, tl.cdiv(hi, BLOCK_N))
    unseen = first + tl.arange(0, SHARE)
    tl.store(out + unseen, 0.0, mask=(unseen < tiles) & ((unseen < begin) | (unseen >= end)))
    for tile in range(begin, end):
        slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k_row = k_at + slot.to(tl.int64)[:, None] * stride_kn + d[None, :]
        k = tl.load(k_row, mask=(slot < n)[:, None] & (d < D)[None, :], other=0.0)
        scores = products(q, k, 0.0, 0.0, False, PRECISION, UPCAST) * scale
        see = _visible(q_pos[:, None], slot[None, :], n, window, CAUSAL, WINDOW)
        weights = tl.where(see, tl.exp2(scores - lse[:, None]), 0.0)
        tl.store(out + tile, tl.sum(tl.sum(weights, 1), 0) / count)


def _check(q: Tensor, k: Tensor, q_positions: Tensor | None) -> None:
    B, Hq, M, D = q.shape
    if k.dim() != 4 or k.shape[0] != B or k.shape[3] != D or Hq % k.shape[1]:
        raise ShapeError(f"q {list(q.shape)} does not fit k {list(k.shape)}")
    if q_positions is not None and (q_positions.shape[1:] != (M,) or q_positions.shape[0] not in (1, B)):
        raise ShapeError(f"q_positions {list(q_positions.shape)}, allowed: [{B} or 1, {M}]")
    runtime.check_floats(q=q, k=k)
    runtime.check_unit_stride(q=q, k=k)


def _common(
    q: Tensor, k: Tensor, q_positions: Tensor | None, causal: bool, window: int | None
) -> tuple[tuple[int, ...], dict[str, object], Tensor | None]:
    """Strides, constants and positions [B, M] for the kernels."""
    B, Hq, M, D = q.shape
    if q_positions is not None:
        q_positions = q_positions.expand(B, M).contiguous()
    shape: dict[str, object] = {
        "HQ": Hq, "HKV": k.shape[1], "D": D, "BLOCK_D": runtime.power_of_two(D, 16), "CAUSAL": causal,
        "WINDOW": window is not None, "PRECISION": runtime.dot_precision(q.dtype), "UPCAST": runtime.upcast(q.dtype),
    }  # fmt: skip
    return (*q.stride()[:3], *k.stride()[:3]), shape, q_positions


def _like_rows(
    q: Tensor, k: Tensor, q_positions: Tensor | None, scale: float, causal: bool, window: int | None
) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _row_sums(
    q: Tensor, k: Tensor, q_positions: Tensor | None, scale: float, causal: bool, window: int | None
) -> Tensor:
    """`log_sum_exp` of a batch whose heads fit in one launch."""
    strides, shape, q_positions = _common(q, k, q_positions, causal, window)
    (B, Hq, M, D), N = q.shape, k.shape[2]
    config = configs.reduction(D, q.element_size(), M)
    row_tiles, tiles = runtime.cdiv(M, config.block_m), runtime.cdiv(N, config.block_n)
    splits = max(1, min(tiles, 2 * runtime.multiprocessors(q.device.index) // max(1, row_tiles * B * Hq)))
    lse = torch.empty(splits, B, Hq, M, dtype=torch.float32, device=q.device)
    if lse.numel():
        lse_kernel[(row_tiles * Hq // k.shape[1], splits, B * k.shape[1])](
            q, k, q_positions, lse, *strides, M, N, splits, window or 0, scale * runtime.LOG2E,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, **shape,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return lse[0] if splits == 1 else lse.logsumexp(0)


def _launch_rows(
    q: Tensor, k: Tensor, q_positions: Tensor | None, scale: float, causal: bool, window: int | None
) -> Tensor:
    parts = []
    for part in runtime.batches(q.shape[0], k.shape[1]):
        own = (runtime.part_of(q, part), runtime.part_of(k, part), runtime.part_of(q_positions, part))
        parts.append(_row_sums(*own, scale, causal, window))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@operator(_like_rows, gradients=False)
def _log_sum_exp(
    q: Tensor, k: Tensor, q_positions: Tensor | None, scale: float, causal: bool, window: int | None
) -> Tensor:
    return _launch_rows(q, k, q_positions, scale, causal, window)


def log_sum_exp(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    q_positions: Tensor | None = None,
) -> Tensor:
    """Natural log of each query's softmax denominator over k [B, Hkv, N, D]: [B, Hq, M] float32, -inf for none.

    q: [B, Hq, M, D]. q_positions: integer [B or 1, M], < 0 sees nothing; default: the last M of N.
    window: keys further back than that are not seen. A backward pass through it raises BackendError.
    """
    _check(q, k, q_positions)
    lse: Tensor = _log_sum_exp(q, k, q_positions, scale, causal, window)
    return lse


@operator(lambda q, k, *rest: q.new_empty(*q.shape[:2], k.shape[2], dtype=torch.float32), gradients=False)
def _column_mass(
    q: Tensor,
    k: Tensor,
    q_positions: Tensor | None,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    if lse is None:
        lse = _launch_rows(q, k, q_positions, scale, causal, window)
    B, Hq, M, D = q.shape
    N = k.shape[2]
    config = configs.reduction(D, q.element_size(), M)
    out = torch.empty(B, Hq, N, dtype=torch.float32, device=q.device)
    for part in runtime.batches(B, k.shape[1]) if out.numel() else []:
        own_q, own_k, own_lse, own_out = (runtime.part_of(x, part) for x in (q, k, lse, out))
        strides, shape, at = _common(own_q, own_k, runtime.part_of(q_positions, part), causal, window)
        # Tiles lie the other way round here: many keys by few queries.
        column_kernel[(runtime.cdiv(N, config.keys) * Hq // k.shape[1], (part.stop - part.start) * k.shape[1])](
            own_q, own_k, at, own_lse.contiguous(), own_out, *strides,
            M, N, window or 0, scale * runtime.LOG2E,
            BLOCK_M=config.queries, BLOCK_N=config.keys, **shape,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out


def column_mass(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    q_positions: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Weight that each key receives from the M queries given: [B, Hq, N] float32. Arguments as in `log_sum_exp`.

    lse: that of the queries, where it is known. O(M N D) time, O(M + N) memory.
    """
    _check(q, k, q_positions)
    mass: Tensor = _column_mass(q, k, q_positions, lse, scale, causal, window)
    return mass


def _like_blocks(q: Tensor, k: Tensor, q_positions: Tensor | None, lse: Tensor | None, *sizes: Any) -> Tensor:
    rows, blocks = runtime.cdiv(q.shape[2], sizes[0]), runtime.cdiv(k.shape[2], sizes[1])
    return q.new_empty(*q.shape[:2], rows, blocks, dtype=torch.float32)


@operator(_like_blocks, gradients=False)
def _block_mass(
    q: Tensor,
    k: Tensor,
    q_positions: Tensor | None,
    lse: Tensor | None,
    block_m: int,
    block_n: int,
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    if lse is None:
        lse = _launch_rows(q, k, q_positions, scale, causal, window)
    B, Hq, M, D = q.shape
    N = k.shape[2]
    config = configs.reduction(D, q.element_size(), block_m)
    tile = min(block_n & -block_n, config.block_n)
    parts, rows = block_n // tile, runtime.cdiv(M, block_m)
    tiles = runtime.cdiv(N, block_n) * parts
    out = torch.empty(B, Hq, rows, tiles, dtype=torch.float32, device=q.device)
    # Rows stand on the grid's second axis while they fit there.
    shares, tall = runtime.cdiv(tiles, 32), rows > runtime.GRID_AXIS
    first, second = (rows, shares) if tall else (shares, rows)
    for part in runtime.batches(B, k.shape[1]) if out.numel() else []:
        own_q, own_k, own_lse, own_out = (runtime.part_of(x, part) for x in (q, k, lse, out))
        strides, shape, at = _common(own_q, own_k, runtime.part_of(q_positions, part), causal, window)
        block_kernel[(first * Hq // k.shape[1], second, (part.stop - part.start) * k.shape[1])](
            own_q, own_k, at, own_lse.contiguous(), own_out, *strides,
            M, N, tiles, block_m, window or 0, scale * runtime.LOG2E,
            SHARE=32, BLOCK_M=runtime.power_of_two(block_m, 16), BLOCK_N=tile, ROWS_FIRST=tall, **shape,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out if parts == 1 else out.unflatten(-1, (-1, parts)).sum(-1)


def block_mass(
    q: Tensor,
    k: Tensor,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    q_positions: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Mean weight that a query block puts on a key block: [B, Hq, ceil(M / block_m), ceil(N / block_n)] float32.

    block_m: at most 128; block_n: a multiple of 16. Other arguments as in `column_mass`.
    """
    if not 1 <= block_m <= 128 or block_n < 16 or block_n % 16:
        raise ShapeError(f"blocks of {block_m} x {block_n}, allowed: 1 .. 128 queries, a multiple of 16 keys")
    _check(q, k, q_positions)
    mass: Tensor = _block_mass(q, k, q_positions, lse, block_m, block_n, scale, causal, window)
    return mass
