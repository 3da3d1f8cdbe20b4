"""The kernels of `attention.quantize`: coding by groups and back, one launch each way, bit for bit its definition.

Lists of rows that lie evenly apart are read where they lie, a part of a buffer along the tokens for instance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime
from foveate.attention.backends.triton.operators import operator
from foveate.errors import ShapeError

INTERPRET: tl.constexpr = tl.constexpr(runtime.INTERPRET)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32 x in a dtype, to nearest, ties to even; by itself the interpreter would cut bfloat16 off."""
    if INTERPRET and dtype == tl.bfloat16:
        raw = x.to(tl.int32, bitcast=True)
        x = ((raw + 0x7FFF + ((raw >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _places(entries, width, T: tl.constexpr, C: tl.constexpr):
    """The program's list, the first entry of its tile (both int64), its channels, and which of them exist."""
    tiles = tl.cdiv(entries, T)
    at = tl.program_id(0)
    c = tl.program_id(1) * C + tl.arange(0, C)
    return (at // tiles).to(tl.int64), (at % tiles).to(tl.int64) * T, c, (c < width)[None, :]


@triton.jit
def encode_kernel(
    X, CODE, SCALE, LEAST, x_list, entries, width,
    BITS: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """X, lists of [entries, width] x_list apart -> per list CODE [ceil(entries BITS / 32), width], SCALE and LEAST
    [entries / GROUP, width]."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    PER: tl.constexpr = 32 // BITS
    own, first, c, inside = _places(entries, width, T, C)
    at = first + tl.arange(0, T)
    x = tl.load(X + own * x_list + at[:, None] * width + c[None, :], mask=(at < entries)[:, None] & inside, other=0.0)
    x = tl.reshape(x.to(tl.float32), (T // GROUP, GROUP, C))
    # +0 where either zero is the least; reductions pass NaN over.
    nan = tl.max((x != x).to(tl.int32), 1) > 0
    least = tl.where(nan, float("nan"), tl.min(x, 1) + 0.0)
    most = tl.max(x, 1) + 0.0
    # Rounded to the stored dtype at each step, as the definition does.
    dtype: tl.constexpr = SCALE.dtype.element_ty
    span = _rounded(most - least, dtype).to(tl.float32)
    scale = _rounded(tl.math.div_rn(span, tl.full([T // GROUP, C], LEVELS, tl.float32)), dtype)
    step = tl.where(scale.to(tl.float32) == 0.0, 1.0, scale.to(tl.float32))
    step = tl.broadcast_to(step[:, None, :], (T // GROUP, GROUP, C))
    code = tl.math.div_rn(x - least[:, None, :], step)
    # NaN becomes 0; nothing is below.
    code = tl.minimum(tl.where(code > 0.0, code, 0.0), LEVELS)
    # Adding 1.5 * 2^23 leaves an integer, rounded half to even.
    code = code + 12582912.0 - 12582912.0
    codes = tl.reshape(code.to(tl.int32), (T // PER, PER, C)) << (tl.arange(0, PER) * BITS)[None, :, None]
    words, groups = tl.cdiv(entries, PER), entries // GROUP
    word = first // PER + tl.arange(0, T // PER)
    CODE += own * words * width
    tl.store(CODE + word[:, None] * width + c[None, :], tl.sum(codes, 1), mask=(word < words)[:, None] & inside)
    group = first // GROUP + tl.arange(0, T // GROUP)
    there = (group < groups)[:, None] & inside
    place = own * groups * width + group[:, None] * width + c[None, :]
    tl.store(SCALE + place, scale, mask=there)
    tl.store(LEAST + place, _rounded(least, dtype), mask=there)


@triton.jit
def decode_kernel(
    CODE, SCALE, LEAST, X, code_list, scale_list, least_list, entries, width,
    BITS: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The way back; lists of CODE, SCALE and LEAST lie code_list, scale_list and least_list apart."""
    PER: tl.constexpr = 32 // BITS
    own, first, c, inside = _places(entries, width, T, C)
    at = first + tl.arange(0, T)
    live = (at < entries)[:, None] & inside
    # Neighbours read the same word and the same scale: from cache.
    word = tl.load(CODE + own * code_list + (at // PER)[:, None] * width + c[None, :], mask=live, other=0)
    code = (word >> ((at % PER) * BITS).to(tl.int32)[:, None]) & ((1 << BITS) - 1)
    group = (at // GROUP)[:, None] * width + c[None, :]
    scale = tl.load(SCALE + own * scale_list + group, mask=live, other=0.0).to(tl.float32)
    least = tl.load(LEAST + own * least_list + group, mask=live, other=0.0).to(tl.float32)
    # Launched without fused products: each step is rounded.
    x = code.to(tl.float32) * scale + least
    X += own * entries * width
    tl.store(X + at[:, None] * width + c[None, :], _rounded(x, X.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class View:
    """[B, H, N, D] as `lists` lists of [entries, width] with the coded dim along entries.

    rows: whether each row is a list of its own, as the codes of a row end inside a word.
    """

    lists: int
    entries: int
    width: int
    rows: bool
    tile: dict[str, int]

    @classmethod
    def of(cls, sizes: Sequence[int], bits: int, group: int, dim: int) -> View:
        """Raises ShapeError where the sizes and options do not fit each other."""
        if bits not in (1, 2, 4, 8) or dim not in (2, 3):
            raise ShapeError(f"bits={bits}, dim={dim}, allowed: 1, 2, 4 or 8 bits along dim 2 (tokens) or 3 (channels)")
        B, H, N, D = sizes
        if group < 1 or group & (group - 1) or sizes[dim] % group:
            raise ShapeError(f"group={group} over {sizes[dim]} entries, allowed: a power of two that divides them")
        least = max(group, 32 // bits)
        if dim == 2:
            # A tile of some 2048 numbers, of up to 8192 where groups are long.
            channels = min(64, runtime.power_of_two(D, 1), max(1, 8192 // least))
            return cls(B * H, N, D, False, {"T": max(least, 2048 // channels), "C": channels})
        if D % (32 // bits):
            return cls(B * H * N, D, 1, True, {"T": max(least, min(2048, runtime.power_of_two(D))), "C": 1})
        return cls(B * H, N * D, 1, False, {"T": max(least, 2048), "C": 1})

    @property
    def grid(self) -> tuple[int, int]:
        return self.lists * runtime.cdiv(self.entries, self.tile["T"]), runtime.cdiv(self.width, self.tile["C"])

    def read(self, x: Tensor) -> tuple[Tensor, int]:
        """x [B, H, n, d] and how far apart its lists lie; a copy where they do not lie evenly."""
        B, H, n, d = x.shape
        whole = (x.stride(3) == 1 or d == 1) and (x.stride(2) == d or n == 1)
        even = B == 1 or H == 1 or x.stride(0) == H * x.stride(1)
        if self.rows or not (whole and even):
            return x.contiguous(), d if self.rows else n * d
        return x, x.stride(0) if H == 1 else x.stride(1)


def _coded(sizes: Sequence[int], bits: int, group: int, dim: int) -> tuple[list[int], list[int]]:
    """Sizes of the codes and of the scales of [B, H, N, D]."""
    words, groups = list(sizes), list(sizes)
    words[dim], groups[dim] = (sizes[dim] * bits + 31) // 32, sizes[dim] // group
    return words, groups


def _decoded(groups: Sequence[int], group: int, dim: int) -> list[int]:
    sizes = list(groups)
    sizes[dim] = groups[dim] * group
    return sizes


def _like_codes(x: Tensor, bits: int, group: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    words, groups = _coded(x.shape, bits, group, dim)
    return x.new_empty(words, dtype=torch.int32), x.new_empty(groups), x.new_empty(groups)


@operator(_like_codes, gradients=False)
def _kv_encode(x: Tensor, bits: int, group: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    view = View.of(x.shape, bits, group, dim)
    words, groups = _coded(x.shape, bits, group, dim)
    code = torch.empty(words, dtype=torch.int32, device=x.device)
    scale, least = (torch.empty(groups, dtype=x.dtype, device=x.device) for _ in range(2))
    if x.numel():
        x, x_list = view.read(x)
        encode_kernel[view.grid](
            x, code, scale, least, x_list, view.entries, view.width,
            BITS=bits, GROUP=group, **view.tile, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return code, scale, least


def kv_encode(x: Tensor, *, bits: int, group: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and leasts of x [B, H, N, D] (float32, bfloat16, float16), in groups along dim (2 or 3).

    group: a power of two that divides N (dim 2) or D (dim 3).
    Returns int32 codes, [B, H, ceil(N bits / 32), D] or [B, H, N, ceil(D bits / 32)], and scales and leasts in x's
    dtype, [B, H, N / group, D] or [B, H, N, D / group]. A backward pass through it raises BackendError.
    """
    runtime.check_floats(x=x)
    View.of(x.shape, bits, group, dim)
    code, scale, least = _kv_encode(x, bits, group, dim)
    return code, scale, least


def _like_numbers(code: Tensor, scale: Tensor, least: Tensor, bits: int, group: int, dim: int) -> Tensor:
    return scale.new_empty(_decoded(scale.shape, group, dim))


@operator(_like_numbers, gradients=False)
def _kv_decode(code: Tensor, scale: Tensor, least: Tensor, bits: int, group: int, dim: int) -> Tensor:
    sizes = _decoded(scale.shape, group, dim)
    view = View.of(sizes, bits, group, dim)
    x = torch.empty(sizes, dtype=scale.dtype, device=code.device)
    if x.numel():
        (code, code_list), (scale, scale_list), (least, least_list) = (view.read(each) for each in (code, scale, least))
        decode_kernel[view.grid](
            code, scale, least, x, code_list, scale_list, least_list, view.entries, view.width,
            BITS=bits, GROUP=group, **view.tile, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return x


def kv_decode(code: Tensor, scale: Tensor, least: Tensor, *, bits: int, group: int, dim: int) -> Tensor:
    """The numbers back from what `kv_encode` returned: [B, H, N, D] in the dtype of the scales."""
    runtime.check_floats(scale=scale, least=least)
    sizes = _decoded(scale.shape, group, dim)
    View.of(sizes, bits, group, dim)
    words, _ = _coded(sizes, bits, group, dim)
    if list(code.shape) != words or code.dtype != torch.int32 or least.shape != scale.shape:
        raise ShapeError(
            f"codes {list(code.shape)} {code.dtype} and leasts {list(least.shape)} with scales {list(scale.shape)}, "
            f"allowed: {words} torch.int32 and {list(scale.shape)}"
        )
    x: Tensor = _kv_decode(code, scale, least, bits, group, dim)
    return x
