"""Gathering chosen keys and values into packed tensors, both in one launch.

    out[b, h, j] = x[b, h_kv, index[b, h, j]],  0 where the entry is absent

Keys may be moved on the way: a key rotated at position p, wanted at position r, is turned by the rotation of r - p, so
that it is rounded once, not unrotated and rotated again. Serves caches that drop tokens, and the column stripes of
block-sparse attention.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime
from foveate.attention.backends.triton.operators import operator
from foveate.attention.positions import Rope
from foveate.errors import ShapeError


@triton.jit
def _copy(
    X, OUT, stride_b, stride_h, stride_n, b, h_kv, out, slot, there, live, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    row = X + b * stride_b + h_kv * stride_h + slot.to(tl.int64)[:, None] * stride_n + d[None, :]
    x = tl.load(row, mask=there[:, None] & (d < D)[None, :], other=0.0)
    tl.store(OUT + out[:, None] * D + d[None, :], x, mask=live[:, None] & (d < D)[None, :])


@triton.jit
def _copy_turned(
    X, OUT, RATES, turn, stride_b, stride_h, stride_n, b, h_kv, out, slot, there, live,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows of X, the pairs of their first 2 HALF features turned by turn [BLOCK] positions; the others as they are."""
    pair = tl.arange(0, BLOCK_H)
    first = 2 * pair if INTERLEAVED else pair
    second = first + 1 if INTERLEAVED else pair + HALF
    rate = tl.load(RATES + pair, mask=pair < HALF, other=0.0)
    angle = turn.to(rate.dtype)[:, None] * rate[None, :]
    cos, sin = tl.cos(angle), tl.sin(angle)
    row = X + b * stride_b + h_kv * stride_h + slot.to(tl.int64)[:, None] * stride_n
    inside = there[:, None] & (pair < HALF)[None, :]
    x = tl.load(row + first[None, :], mask=inside, other=0.0).to(rate.dtype)
    y = tl.load(row + second[None, :], mask=inside, other=0.0).to(rate.dtype)
    to = OUT + out[:, None] * D
    held = live[:, None] & (pair < HALF)[None, :]
    tl.store(to + first[None, :], (x * cos - y * sin).to(OUT.dtype.element_ty), mask=held)
    tl.store(to + second[None, :], (y * cos + x * sin).to(OUT.dtype.element_ty), mask=held)
    if D > 2 * HALF:
        d = 2 * HALF + tl.arange(0, BLOCK_R)
        rest = tl.load(row + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        tl.store(to + d[None, :], rest, mask=live[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["n", "count"])
def rows_kernel(
    K, V, INDEX, K_OUT, V_OUT, POS, AT, RATES,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_ib, stride_ih,
    stride_pb, stride_ph, stride_ab, stride_ah, stride_an,
    n, count, HEADS: tl.constexpr, SHARED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Grid (pieces of BLOCK entries, B * heads of the index); SHARED index heads read one KV head.

    POS: positions of entries, AT: of slots (None: slot j stands at j); both only with RATES.
    """
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    h = (tl.program_id(1) % HEADS).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    slot = tl.load(INDEX + b * stride_ib + h * stride_ih + at, mask=live, other=-1)
    there = (slot >= 0) & (slot < n)
    out = (b * HEADS + h) * count + at
    h_kv = h // SHARED
    if RATES is None:
        _copy(K, K_OUT, stride_kb, stride_kh, stride_kn, b, h_kv, out, slot, there, live, D, BLOCK_D)
    else:
        old = slot
        if AT is not None:
            old = tl.load(AT + b * stride_ab + h_kv * stride_ah + slot.to(tl.int64) * stride_an, mask=there, other=0)
        turn = tl.load(POS + b * stride_pb + h * stride_ph + at, mask=there, other=0) - old
        _copy_turned(
            K, K_OUT, RATES, turn, stride_kb, stride_kh, stride_kn, b, h_kv, out, slot, there, live,
            D, HALF, BLOCK_H, BLOCK_R, INTERLEAVED,
        )  # fmt: skip
    _copy(V, V_OUT, stride_vb, stride_vh, stride_vn, b, h_kv, out, slot, there, live, DV, BLOCK_DV)


def _like_rows(
    k: Tensor, v: Tensor, index: Tensor, pos: Tensor | None, at: Tensor | None, *rope: Any
) -> tuple[Tensor, Tensor]:
    heads = k.shape[1] if index.shape[1] == 1 else index.shape[1]
    shape = (k.shape[0], heads, index.shape[2])
    return k.new_empty(*shape, k.shape[3]), v.new_empty(*shape, v.shape[3])


@operator(_like_rows, gradients=False)
def _kv_compact(
    k: Tensor,
    v: Tensor,
    index: Tensor,
    pos: Tensor | None,
    at: Tensor | None,
    turned: int,
    base: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    B, Hkv, N, D = k.shape
    DV = v.shape[3]
    heads, count = (Hkv if index.shape[1] == 1 else index.shape[1]), index.shape[2]
    k_out, v_out = (torch.empty(B, heads, count, x.shape[3], dtype=x.dtype, device=x.device) for x in (k, v))
    rates, half = None, turned // 2
    if turned:
        rates = _rates(Rope(turned, base), torch.float64 if k.dtype == torch.float64 else torch.float32, k.device)
    block_d, block_dv = runtime.power_of_two(D, 16), runtime.power_of_two(DV, 16)
    # Turned rows take more registers.
    block = max(8, (4096 if turned else 8192) // max(block_d, block_dv))
    for part in runtime.batches(B, heads) if count else []:
        own = [runtime.part_of(x, part) for x in (k, v, index, k_out, v_out)]
        placed = (None if x is None else runtime.part_of(x, part) for x in (pos, at))
        rows_kernel[(runtime.cdiv(count, block), (part.stop - part.start) * heads)](
            *own, *placed, rates, *k.stride()[:3], *v.stride()[:3],
            *_strides(index)[:2], *_strides(pos)[:2], *_strides(at),
            N, count, HEADS=heads, SHARED=heads // Hkv, D=D, DV=DV, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK=block,
            HALF=half, BLOCK_H=runtime.power_of_two(half, 16), BLOCK_R=runtime.power_of_two(D - 2 * half, 16),
            INTERLEAVED=interleaved, num_warps=4,
        )  # fmt: skip
    return k_out, v_out


def kv_compact(
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    pos: Tensor | None = None,
    at: Tensor | None = None,
    rope: Rope | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of k [B, Hkv, N, D] and v [B, Hkv, N, Dv] (last stride 1, any dtype) that `index` names.

    Args:
        index: int32 or int64 [B or 1, H, K], H a multiple of Hkv, or 1 for all heads; consecutive index heads share a
            KV head; an entry < 0 or >= N gives zeros.
        rope: keys are turned from their positions to those in `pos` by this rotary embedding (floating-point keys).
        pos: int [B or 1, K] or [B or 1, H or 1, K], where each entry's key shall stand; with rope only.
        at: int [B or 1, N] or [B or 1, Hkv or 1, N], where each slot's key stands, N or 1 of them; default: slot j at
            position j. For unrotated keys a single 0.
    Returns contiguous [B, H, K, D] and [B, H, K, Dv], H = Hkv where the index has one head. O(B H K D). The angle
    (r - p) * rate is made in float32 (float64 for float64 keys): off by 2^-24 of itself. A backward pass through it
    raises BackendError.
    """
    B, Hkv = k.shape[:2]
    fits = v.shape[:3] == k.shape[:3] and index.dim() == 3 and index.shape[0] in (1, B)
    if not fits or (index.shape[1] != 1 and index.shape[1] % Hkv):
        raise ShapeError(f"index {list(index.shape)} does not fit k {list(k.shape)} and v {list(v.shape)}")
    runtime.check_unit_stride(k=k, v=v)
    index = index if index.stride(-1) == 1 else index.contiguous()
    pos, at = _moves(k, pos, at, rope, Hkv if index.shape[1] == 1 else index.shape[1], index.shape[2])
    turned = (0, 1.0, False) if rope is None else (rope.dim, rope.base, rope.style == "interleaved")
    k_out, v_out = _kv_compact(k, v, index, pos, at, *turned)
    return k_out, v_out


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of [B, H, N], 0 where a size of 1 serves all."""
    if x is None:
        return 0, 0, 0
    b, h, n = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride()))
    return b, h, n


def _moves(
    k: Tensor, pos: Tensor | None, at: Tensor | None, rope: Rope | None, heads: int, count: int
) -> tuple[Tensor | None, Tensor | None]:
    """pos and at as [., ., .]; None without a rope."""
    B, Hkv, N, D = k.shape
    if (rope is None) != (pos is None) or (rope is None and at is not None):
        raise ShapeError("kv_compact moves keys with both rope and pos (and at), allowed: both or none of them")
    if rope is None or pos is None:
        return None, None
    if not k.is_floating_point() or rope.dim % 2 or not 0 < rope.dim <= D:
        raise ShapeError(f"rope.dim={rope.dim} of {k.dtype} keys, allowed: even, at most {D}, floating-point keys")
    if rope.style not in ("half", "interleaved"):
        raise ShapeError(f"rope.style={rope.style!r}, allowed: 'half', 'interleaved'")
    pos = pos[:, None] if pos.dim() == 2 else pos
    at = at[:, None] if at is not None and at.dim() == 2 else at
    for name, x, own, sizes in (("pos", pos, heads, (count,)), ("at", at, Hkv, (1, N))):
        if x is None:
            continue
        fits = x.dim() == 3 and x.shape[0] in (1, B) and x.shape[1] in (1, own) and x.shape[2] in sizes
        if not fits or x.dtype not in (torch.int32, torch.int64):
            raise ShapeError(
                f"{name} {list(x.shape)} {x.dtype}, allowed: int32 or int64 [{B} or 1, {own} or 1, {sizes[-1]}]"
            )
    return (pos if pos.stride(-1) == 1 else pos.contiguous()), at


@functools.lru_cache(maxsize=32)
def _rates(rope: Rope, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`Rope.rates`, kept over calls."""
    return rope.rates(dtype, device)
