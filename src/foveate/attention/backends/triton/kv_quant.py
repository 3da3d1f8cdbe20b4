"""Coding of keys and values in 1, 2, 4 or 8 bits by groups, and back: one launch each way.

    scale = (max - least) / (2^bits - 1),  code = round(clamp((x - least) / scale)),  x ~ code * scale + least

Rounding is half to even. A group is `group` consecutive tokens of one channel (dim 2) or consecutive channels of one
token (dim 3). 32 / bits codes lie in an int32, the first in the lowest bits, consecutive along the same dim. scale and
least have x's dtype; a group of equal numbers has scale 0 and comes back exactly. 16-bit numbers in groups of 64 take
bits + 1/2 bits each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime
from foveate.attention.backends.triton.operators import operator
from foveate.errors import ShapeError


@triton.jit
def _places(width, T: tl.constexpr, C: tl.constexpr):
    """First entry of the program's tile (int64), its channels, and which of them exist."""
    c = tl.program_id(1) * C + tl.arange(0, C)
    return tl.program_id(0).to(tl.int64) * T, c, (c < width)[None, :]


@triton.jit(do_not_specialize=["entries", "width"])
def encode_kernel(
    X, CODE, SCALE, LEAST, entries, width,
    BITS: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """X [entries, width] -> CODE [entries BITS / 32, width], SCALE and LEAST [entries / GROUP, width]."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    PER: tl.constexpr = 32 // BITS
    first, c, inside = _places(width, T, C)
    at = first + tl.arange(0, T)
    x = tl.load(X + at[:, None] * width + c[None, :], mask=(at < entries)[:, None] & inside, other=0.0)
    x = tl.reshape(x.to(tl.float32), (T // GROUP, GROUP, C))
    least, most = tl.min(x, 1), tl.max(x, 1)
    # Rounded to the stored dtype at each step, as an eager computation would.
    dtype: tl.constexpr = SCALE.dtype.element_ty
    span = (most - least).to(dtype).to(tl.float32)
    scale = tl.math.div_rn(span, tl.full([T // GROUP, C], LEVELS, tl.float32)).to(dtype)
    step = tl.where(scale == 0, 1.0, scale.to(tl.float32))
    step = tl.broadcast_to(step[:, None, :], (T // GROUP, GROUP, C))
    code = tl.math.div_rn(x - least[:, None, :], step)
    # Adding 1.5 * 2^23 leaves an integer, rounded half to even.
    code = tl.minimum(tl.maximum(code, 0.0), LEVELS) + 12582912.0 - 12582912.0
    words = tl.reshape(code.to(tl.int32), (T // PER, PER, C)) << (tl.arange(0, PER) * BITS)[None, :, None]
    word = first // PER + tl.arange(0, T // PER)
    tl.store(
        CODE + word[:, None] * width + c[None, :], tl.sum(words, 1), mask=(word < entries // PER)[:, None] & inside
    )
    group = first // GROUP + tl.arange(0, T // GROUP)
    there = (group < entries // GROUP)[:, None] & inside
    tl.store(SCALE + group[:, None] * width + c[None, :], scale, mask=there)
    tl.store(LEAST + group[:, None] * width + c[None, :], least.to(dtype), mask=there)


@triton.jit(do_not_specialize=["entries", "width"])
def decode_kernel(
    CODE, SCALE, LEAST, X, entries, width,
    BITS: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 32 // BITS
    first, c, inside = _places(width, T, C)
    at = first + tl.arange(0, T)
    live = (at < entries)[:, None] & inside
    # Neighbours read the same word and the same scale: from cache.
    word = tl.load(CODE + (at // PER)[:, None] * width + c[None, :], mask=live, other=0)
    code = (word >> ((at % PER) * BITS).to(tl.int32)[:, None]) & ((1 << BITS) - 1)
    group = (at // GROUP)[:, None] * width + c[None, :]
    scale = tl.load(SCALE + group, mask=live, other=0.0).to(tl.float32)
    least = tl.load(LEAST + group, mask=live, other=0.0).to(tl.float32)
    x = code.to(tl.float32) * scale + least
    tl.store(X + at[:, None] * width + c[None, :], x.to(X.dtype.element_ty), mask=live)


def _view(n: int, d: int, lists: int, bits: int, group: int, dim: int) -> tuple[int, int, dict[str, int]]:
    """Entries, width and tile of [lists, n, d] seen as [entries, width] with the coded dim along entries."""
    if bits not in (1, 2, 4, 8) or dim not in (2, 3):
        raise ShapeError(f"bits={bits}, dim={dim}, allowed: 1, 2, 4 or 8 bits along dim 2 (tokens) or 3 (channels)")
    size, per_word = (n, d)[dim - 2], 32 // bits
    if group < 1 or group & (group - 1) or size % group or size % per_word:
        raise ShapeError(
            f"group={group} over {size} entries, allowed: a power of two that divides them; so must {per_word}, the "
            "codes of a word"
        )
    least = max(group, per_word)
    if dim == 3:
        return lists * n * d, 1, {"T": max(least, 2048), "C": 1}
    channels = min(64, runtime.power_of_two(d, 1))
    return lists * n, d, {"T": max(least, 4096 // channels), "C": channels}


def _coded(sizes: Sequence[int], bits: int, group: int, dim: int) -> tuple[list[int], list[int]]:
    """Sizes of the codes and of the scales of [B, H, N, D]."""
    words, groups = list(sizes), list(sizes)
    words[dim], groups[dim] = sizes[dim] * bits // 32, sizes[dim] // group
    return words, groups


def _decoded(words: Sequence[int], bits: int, dim: int) -> list[int]:
    sizes = list(words)
    sizes[dim] = sizes[dim] * 32 // bits
    return sizes


def _like_codes(x: Tensor, bits: int, group: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    words, groups = _coded(x.shape, bits, group, dim)
    return x.new_empty(words, dtype=torch.int32), x.new_empty(groups), x.new_empty(groups)


@operator(_like_codes, gradients=False)
def _kv_encode(x: Tensor, bits: int, group: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, D = x.shape
    entries, width, tile = _view(N, D, B * H, bits, group, dim)
    words, groups = _coded(x.shape, bits, group, dim)
    code = torch.empty(words, dtype=torch.int32, device=x.device)
    scale, least = (torch.empty(groups, dtype=x.dtype, device=x.device) for _ in range(2))
    if x.numel():
        encode_kernel[(runtime.cdiv(entries, tile["T"]), runtime.cdiv(width, tile["C"]))](
            x.contiguous(), code, scale, least, entries, width, BITS=bits, GROUP=group, **tile, num_warps=4
        )
    return code, scale, least


def kv_encode(x: Tensor, *, bits: int, group: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and leasts of x [B, H, N, D] (float32, bfloat16, float16), in groups along dim (2 or 3).

    group: a power of two; it and the 32 / bits codes of a word must divide N (dim 2) or D (dim 3).
    Returns int32 codes, [B, H, N bits / 32, D] or [B, H, N, D bits / 32], and scales and leasts in x's dtype,
    [B, H, N / group, D] or [B, H, N, D / group]. A backward pass through it raises BackendError.
    """
    runtime.check_floats(x=x)
    B, H, N, D = x.shape
    _view(N, D, B * H, bits, group, dim)
    code, scale, least = _kv_encode(x, bits, group, dim)
    return code, scale, least


def _like_numbers(code: Tensor, scale: Tensor, least: Tensor, bits: int, group: int, dim: int) -> Tensor:
    return scale.new_empty(_decoded(code.shape, bits, dim))


@operator(_like_numbers, gradients=False)
def _kv_decode(code: Tensor, scale: Tensor, least: Tensor, bits: int, group: int, dim: int) -> Tensor:
    B, H, N, D = sizes = _decoded(code.shape, bits, dim)
    entries, width, tile = _view(N, D, B * H, bits, group, dim)
    x = torch.empty(sizes, dtype=scale.dtype, device=code.device)
    if x.numel():
        decode_kernel[(runtime.cdiv(entries, tile["T"]), runtime.cdiv(width, tile["C"]))](
            code.contiguous(), scale.contiguous(), least.contiguous(), x, entries, width,
            BITS=bits, GROUP=group, **tile, num_warps=4,
        )  # fmt: skip
    return x


def kv_decode(code: Tensor, scale: Tensor, least: Tensor, *, bits: int, group: int, dim: int) -> Tensor:
    """The numbers back from what `kv_encode` returned: [B, H, N, D] in the dtype of the scales."""
    B, H, N, D = sizes = _decoded(code.shape, bits, dim)
    _view(N, D, B * H, bits, group, dim)
    wanted = list(sizes)
    wanted[dim] //= group
    if list(scale.shape) != wanted or list(least.shape) != wanted:
        raise ShapeError(f"scales {list(scale.shape)} and leasts {list(least.shape)}, allowed: {wanted}")
    x: Tensor = _kv_decode(code, scale, least, bits, group, dim)
    return x
