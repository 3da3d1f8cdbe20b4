"""Gathering chosen keys and values into packed tensors, both in one launch.

    out[b, h, j] = x[b, h_kv, index[b, h, j]],  0 where the entry is absent

Serves caches that drop tokens, and the column stripes of block-sparse attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime
from foveate.errors import ShapeError


@triton.jit
def _copy(
    X, OUT, stride_b, stride_h, stride_n, b, h_kv, out, slot, there, live, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    row = X + b * stride_b + h_kv * stride_h + slot.to(tl.int64)[:, None] * stride_n + d[None, :]
    x = tl.load(row, mask=there[:, None] & (d < D)[None, :], other=0.0)
    tl.store(OUT + out[:, None] * D + d[None, :], x, mask=live[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["n", "count"])
def rows_kernel(
    K, V, INDEX, K_OUT, V_OUT,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_ib, stride_ih,
    n, count, HEADS: tl.constexpr, SHARED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (pieces of BLOCK entries, B * heads of the index); SHARED index heads read one KV head."""
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    h = (tl.program_id(1) % HEADS).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    slot = tl.load(INDEX + b * stride_ib + h * stride_ih + at, mask=live, other=-1)
    there = (slot >= 0) & (slot < n)
    out = (b * HEADS + h) * count + at
    h_kv = h // SHARED
    _copy(K, K_OUT, stride_kb, stride_kh, stride_kn, b, h_kv, out, slot, there, live, D, BLOCK_D)
    _copy(V, V_OUT, stride_vb, stride_vh, stride_vn, b, h_kv, out, slot, there, live, DV, BLOCK_DV)


def kv_compact(k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of k [B, Hkv, N, D] and v [B, Hkv, N, Dv] (last stride 1, any dtype) that `index` names.

    index: int32 or int64 [B or 1, H, K], H a multiple of Hkv, or 1 for all heads; consecutive index heads share a KV
    head; an entry < 0 or >= N gives zeros.
    Returns contiguous [B, H, K, D] and [B, H, K, Dv], H = Hkv where the index has one head. O(B H K D).
    """
    B, Hkv, N, D = k.shape
    DV = v.shape[3]
    fits = v.shape[:3] == k.shape[:3] and index.dim() == 3 and index.shape[0] in (1, B)
    if not fits or (index.shape[1] != 1 and index.shape[1] % Hkv):
        raise ShapeError(f"index {list(index.shape)} does not fit k {list(k.shape)} and v {list(v.shape)}")
    runtime.check_unit_stride(k=k, v=v)
    index = index if index.stride(-1) == 1 else index.contiguous()
    heads, count = (Hkv if index.shape[1] == 1 else index.shape[1]), index.shape[2]
    k_out, v_out = (torch.empty(B, heads, count, x.shape[3], dtype=x.dtype, device=x.device) for x in (k, v))
    if not count:
        return k_out, v_out
    block_d, block_dv = runtime.power_of_two(D, 16), runtime.power_of_two(DV, 16)
    block = max(8, 8192 // max(block_d, block_dv))
    rows_kernel[(triton.cdiv(count, block), B * heads)](
        k, v, index, k_out, v_out, *k.stride()[:3], *v.stride()[:3],
        index.stride(0) if index.shape[0] > 1 else 0, index.stride(1) if index.shape[1] > 1 else 0,
        N, count, HEADS=heads, SHARED=heads // Hkv, D=D, DV=DV, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return k_out, v_out
