"""What the last queries of a prompt put on each key and along each diagonal, which FlexPrefill chooses blocks by.

    w[r, j] = softmax over j <= N - m + r of scale q[r] . k[j];   column[j] = mean_r w[r, j]
    diagonal[c] = (1 / m) sum_r w[r, c - (m - 1 - r)]: keys N - 1 - c back, so that the last entry is the main diagonal

Two kernels: log-sum-exps of the queries, the keys shared out among thread blocks; then the weights again, tile by tile
of keys. A tile moved right by m - 1 - r in row r touches its own tile of diagonals and the next one (two where tiles
are half as wide as m): partial sums, each stored by the one thread block that has the tile and joined afterwards. No
weights in memory, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import availability, configs, runtime
from foveate.attention.backends.triton.block_flash import products
from foveate.attention.backends.triton.operators import operator
from foveate.attention.backends.triton.score_reduce import lse_kernel
from foveate.errors import ShapeError

BLOCKS = (16, 32, 64, 128)
# A row of queries and keys longer than this leaves no room for two tiles of keys in shared memory.
ROW_BYTES = 512
MOST_SPLITS = 32
# Wider tiles of turned weights do not fit in registers.
TOKEN_TILE = 64


@triton.jit(do_not_specialize=["n", "tiles", "share", "scale"])
def mass_kernel(
    Q, K, LSE, OUT, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, n, tiles, share, scale,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, POOLED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """OUT [2 + BLOCK_M / BLOCK_N, B, Hq, tiles (* BLOCK_N)]: columns, then diagonals of the tile and of those after it;
    grid (shares of tiles x heads of a group, B * Hkv). Pooled: one number for each, BLOCK_M = BLOCK_N.

    LSE [SPLITS, B, Hq, BLOCK_M] by shares of the keys, the first of which every query sees.
    """
    G: tl.constexpr = HQ // HKV
    b = (tl.program_id(1) // HKV).to(tl.int64)
    h_kv = (tl.program_id(1) % HKV).to(tl.int64)
    # The query heads of a KV head read the same keys, so they run together.
    h = h_kv * G + tl.program_id(0) % G
    head = b * HQ + h
    heads = tl.num_programs(1).to(tl.int64) * G
    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q_row = Q + b * stride_qb + h * stride_qh + r.to(tl.int64)[:, None] * stride_qm + d[None, :]
    q = tl.load(q_row, mask=(d < D)[None, :], other=0.0)
    split = tl.arange(0, SPLITS).to(tl.int64)
    parts = tl.load(LSE + (split[:, None] * heads + head) * BLOCK_M + r[None, :]) * 1.4426950408889634
    top = tl.max(parts, 0)
    lse = top + tl.log2(tl.sum(tl.exp2(parts - top[None, :]), 0))
    key = tl.arange(0, BLOCK_N)
    k_at = K + b * stride_kb + h_kv * stride_kh
    # How far each row moves right.
    turn = BLOCK_M - 1 - r
    first = tl.program_id(0) // G * share
    for tile in range(first, tl.minimum(first + share, tiles)):
        slot = tile * BLOCK_N + key
        k_row = k_at + slot.to(tl.int64)[:, None] * stride_kn + d[None, :]
        k = tl.load(k_row, mask=(slot < n)[:, None] & (d < D)[None, :], other=0.0)
        scores = products(q, k, 0.0, 0.0, False, PRECISION, UPCAST) * scale
        see = slot[None, :] <= n - BLOCK_M + r[:, None]
        w = tl.exp2(tl.where(see, scores - lse[:, None], float("-inf"))) * (1.0 / BLOCK_M)
        if POOLED:
            near = tl.sum(tl.sum(tl.where(key[None, :] <= r[:, None], w, 0.0), 1), 0)
            far = tl.sum(tl.sum(tl.where(key[None, :] > r[:, None], w, 0.0), 1), 0)
            out = OUT + head * tiles + tile
            tl.store(out, near + far)
            tl.store(out + heads * tiles, near)
            tl.store(out + 2 * heads * tiles, far)
        else:
            out = OUT + head * tiles * BLOCK_N + slot
            tl.store(out, tl.sum(w, 0))
            # Each row turned within the tile; what left it at the right came back in at the left.
            source = (key[None, :] - turn[:, None]) & (BLOCK_N - 1)
            moved = tl.gather(w, source, 1)
            after = (source + turn[:, None]) // BLOCK_N
            for step in tl.static_range(0, BLOCK_M // BLOCK_N + 1):
                out += heads * tiles * BLOCK_N
                tl.store(out, tl.sum(tl.where(after == step, moved, 0.0), 0))


def why_not(last: Tensor, k: Tensor) -> str | None:
    """Why the kernels do not serve these queries [B, Hq, m, D] and keys [B, Hkv, N, D]."""
    m, D = last.shape[2:]
    if m not in BLOCKS or m > k.shape[2]:
        return f"m = {m} last queries of N = {k.shape[2]}, allowed: {BLOCKS}, at most N"
    reason = availability.why_not_dtypes(last, k)
    if reason is None and k.is_cuda:
        reason = availability.why_not_device(k)
    if reason is not None:
        return reason
    if k.is_cuda and k.dtype == torch.float32:
        return "exact float32 products have no tensor cores, and tiles of this size do not fit in registers without"
    if last.stride(-1) != 1 or k.stride(-1) != 1:
        return "queries and keys need a unit last stride"
    if runtime.power_of_two(D, 16) * last.element_size() > ROW_BYTES:
        return f"D = {D} of {last.dtype}, allowed: rows of at most {ROW_BYTES} bytes"
    return None


def _tile(m: int, pooled: bool) -> tuple[int, int]:
    """Keys of a tile, and numbers stored for each."""
    tile = m if pooled else min(m, TOKEN_TILE)
    return tile, 1 if pooled else tile


def _like_masses(last: Tensor, k: Tensor, scale: float, pooled: bool) -> Tensor:
    tile, width = _tile(int(last.shape[2]), pooled)
    N = k.shape[2]
    whole = last.new_empty(2, *last.shape[:2], runtime.cdiv(N, tile) * width, dtype=torch.float32)
    return whole if pooled else whole[..., :N]


@operator(_like_masses, gradients=False)
def _last_queries_mass(last: Tensor, k: Tensor, scale: float, pooled: bool) -> Tensor:
    parts = [
        _masses(runtime.part_of(last, part), runtime.part_of(k, part), scale, pooled)
        for part in runtime.batches(last.shape[0], k.shape[1])
    ]
    mass = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return mass if pooled else mass[..., : k.shape[2]]


def _masses(last: Tensor, k: Tensor, scale: float, pooled: bool) -> Tensor:
    """[2, B, Hq, whole tiles] of a batch whose heads fit in one launch."""
    B, Hq, m, _ = last.shape
    tile, width = _tile(m, pooled)
    tiles = runtime.cdiv(k.shape[2], tile)
    parts = torch.empty(2 + m // tile, B, Hq, tiles * width, dtype=torch.float32, device=k.device)
    if parts.numel():
        _launch(last, k, scale, pooled, tile, parts)
        # Diagonals after the last tile lie in the future.
        for step in range(1, m // tile + 1):
            parts[1, ..., step * width :].add_(parts[1 + step, ..., : -step * width])
    return parts[:2]


def column_and_diagonal_mass(last: Tensor, k: Tensor, *, scale: float, pooled: bool = False) -> Tensor:
    """Mean weight of the last queries on each key, and along each diagonal: [2, B, Hq, N] float32.

    Args:
        last: [B, Hq, m, D], the last m of N queries, m a power of two from 16 to 128.    k: [B, Hkv, N, D].
        pooled: sums of both over blocks of m instead: [2, B, Hq, ceil(N / m)].
    Raises:
        ShapeError for what `why_not` names; BackendError where a backward pass goes through it.
    O(m N D) time per head, O(N) memory; three launches where pooled, four where not.
    """
    B, Hq, _, D = last.shape
    if k.dim() != 4 or k.shape[0] != B or k.shape[3] != D or Hq % k.shape[1]:
        raise ShapeError(f"queries {list(last.shape)} do not fit keys {list(k.shape)}")
    reason = why_not(last, k)
    if reason is not None:
        raise ShapeError(reason)
    mass: Tensor = _last_queries_mass(last, k, scale, pooled)
    return mass


def _launch(last: Tensor, k: Tensor, scale: float, pooled: bool, tile: int, parts: Tensor) -> None:
    B, Hq, m, D = last.shape
    H, N = k.shape[1], k.shape[2]
    wanted = runtime.multiprocessors(k.device.index)
    splits = min(MOST_SPLITS, runtime.power_of_two(2 * wanted // (B * Hq)))
    lse = torch.empty(splits, B, Hq, m, dtype=torch.float32, device=k.device)
    shape: dict[str, object] = {
        "HQ": Hq, "HKV": H, "D": D, "BLOCK_D": runtime.power_of_two(D, 16),
        "PRECISION": runtime.dot_precision(k.dtype), "UPCAST": runtime.upcast(k.dtype),
    }  # fmt: skip
    strides = (*last.stride()[:3], *k.stride()[:3])
    config = configs.reduction(D, k.element_size(), m)
    lse_kernel[(runtime.cdiv(m, config.block_m) * Hq // H, splits, B * H)](
        last, k, None, lse, *strides, m, N, splits, 0, scale * runtime.LOG2E,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, CAUSAL=True, WINDOW=False, **shape,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    tiles = runtime.cdiv(N, tile)
    share = max(1, tiles * B * Hq // (4 * wanted))
    wide = D * k.element_size() > ROW_BYTES // 2
    mass_kernel[(runtime.cdiv(tiles, share) * Hq // H, B * H)](
        last, k, lse, parts, *strides, N, tiles, share, scale * runtime.LOG2E,
        BLOCK_M=m, BLOCK_N=tile, SPLITS=splits, POOLED=pooled, **shape,
        num_warps=8 if m == 128 else 4, num_stages=2 if wide else 3,
    )  # fmt: skip
