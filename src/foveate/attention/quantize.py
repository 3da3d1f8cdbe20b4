"""Numbers coded in 1, 2, 4 or 8 bits by groups, and back: caches of keys and values that take fewer bytes.

    least = min, scale = (max - least) / (2^bits - 1)                of a group, both rounded to x's dtype
    code  = round((x - least) / scale), at most 2^bits - 1           round half to even; 0 where scale is 0
    x     ~ code * scale + least                                     product and sum are rounded one by one

Arithmetic is float32 (float64 for float64). A group is `group` consecutive tokens of one channel (dim 2) or consecutive
channels of one token (dim 3). 32 / bits codes lie in an int32, the first in the lowest bits, consecutive along the same
dim; the last word is filled with zeros. A group of equal numbers has scale 0 and comes back exactly, one with a NaN has
scale and least NaN and codes 0; -0 comes back as +0. 16-bit numbers in groups of 64 take bits + 1/2 bits each.

backend: "torch" is the definition and runs anywhere, "triton" gives the same bits in one launch (CUDA; float32,
bfloat16, float16; groups of a power of two up to 4096; no gradients); "auto" takes it where it can, unless the variable
FOVEATE_BACKEND names the other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.backends.triton import availability
from foveate.attention.shapes import match
from foveate.errors import BackendError, ShapeError

NAMES = ("auto", "torch", "triton")
# A kernel's tile holds whole groups.
MAX_GROUP = 4096


@dataclass
class Coded:
    """Coded numbers: code int32; scale and least in the dtype of what was coded."""

    code: Tensor
    scale: Tensor
    least: Tensor


def quantize(x: Tensor, bits: int, group: int, dim: int, *, backend: str = "auto") -> Coded:
    """Code x [B, H, N, D] in groups of `group` numbers along dim (2: tokens, 3: channels).

    bits: 1, 2, 4 or 8.    group: divides the size of dim.
    Returns code int32 [B, H, ceil(N bits / 32), D] or [B, H, N, ceil(D bits / 32)], and scale and least in x's dtype,
    [B, H, N / group, D] or [B, H, N, D / group]. Raises ShapeError, BackendError. O(N H D).
    """
    match(x=(x, "B H N D"))
    _check(bits, dim)
    if group < 1 or x.shape[dim] % group:
        raise ShapeError(f"group={group} over {x.shape[dim]} entries of dim {dim}, allowed: what divides them")
    if _by_kernel(backend, group, x):
        from foveate.attention.backends.triton.kv_quant import kv_encode

        return Coded(*kv_encode(x, bits=bits, group=group, dim=dim))
    return _quantize(x, bits, group, dim)


def dequantize(coded: Coded, bits: int, group: int, dim: int, *, backend: str = "auto") -> Tensor:
    """The numbers back, [B, H, N, D] in the dtype of the scales, given what `quantize` was."""
    code, scale, least = coded.code, coded.scale, coded.least
    match(scale=(scale, "B H N D"), least=(least, "B H N D"))
    _check(bits, dim)
    words = list(scale.shape)
    words[dim] = -(-scale.shape[dim] * group * bits // 32)
    if code.dtype != torch.int32 or list(code.shape) != words:
        raise ShapeError(
            f"dequantize: code {list(code.shape)} {code.dtype}, allowed: {words} int32 with scales of "
            f"{list(scale.shape)}, {bits} bits and groups of {group} along dim {dim}"
        )
    if _by_kernel(backend, group, scale, least):
        from foveate.attention.backends.triton.kv_quant import kv_decode

        return kv_decode(code, scale, least, bits=bits, group=group, dim=dim)
    return _dequantize(coded, bits, group, dim)


def _check(bits: int, dim: int) -> None:
    if bits not in (1, 2, 4, 8) or dim not in (2, 3):
        raise ShapeError(f"bits={bits}, dim={dim}, allowed: 1, 2, 4 or 8 bits along dim 2 (tokens) or 3 (channels)")


def _by_kernel(backend: str, group: int, *tensors: Tensor) -> bool:
    """Whether the kernels run a call; BackendError where they were asked for and cannot."""
    if backend == "auto" and os.environ.get("FOVEATE_BACKEND") in NAMES:
        backend = os.environ["FOVEATE_BACKEND"]
    if backend not in NAMES:
        raise BackendError(f"backend={backend!r}, allowed: {NAMES}")
    reason = None if backend == "torch" else _why_not_triton(group, *tensors)
    if backend == "triton" and reason is not None:
        raise BackendError(f"backend='triton' cannot run this call: {reason}; use backend='auto'")
    return backend != "torch" and reason is None


def _why_not_triton(group: int, *tensors: Tensor) -> str | None:
    reason = availability.why_not_device(tensors[0]) or availability.why_not_dtypes(*tensors)
    if reason is None and (group & (group - 1) or group > MAX_GROUP):
        reason = f"the kernels code groups of a power of two up to {MAX_GROUP}, not {group}"
    if reason is None and availability.learns(*tensors):
        reason = "the kernels have no gradients"
    return reason


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _quantize(x: Tensor, bits: int, group: int, dim: int) -> Coded:
    levels = 2**bits - 1
    grouped = x.unflatten(dim, (x.shape[dim] // group, group))
    # Of zeros of both signs either may be the least; the sum makes it +0.
    least, most = grouped.amin(dim + 1) + 0.0, grouped.amax(dim + 1) + 0.0
    # On a GPU torch multiplies by the reciprocal of a number, and divides by a tensor.
    scale = (most - least) / least.new_full((), levels)
    step = torch.where(scale == 0, 1, scale).unsqueeze(dim + 1).to(_exact(x))
    # In bfloat16 the quotient alone would be off by whole codes.
    code = (grouped.to(_exact(x)) - least.unsqueeze(dim + 1)).div_(step).round_()
    # NaN becomes the least integer, or 0 on a GPU; clamped, 0.
    code = code.to(torch.int32).clamp_(0, levels)
    return Coded(pack(code.flatten(dim, dim + 1), bits, dim), scale, least)


def _dequantize(coded: Coded, bits: int, group: int, dim: int) -> Tensor:
    scale, least = coded.scale.unsqueeze(dim + 1), coded.least.unsqueeze(dim + 1)
    groups = coded.scale.shape[dim]
    code = unpack(coded.code, bits, dim).narrow(dim, 0, groups * group).unflatten(dim, (groups, group))
    # `addcmul` rounds once or twice, as the machine has it.
    made = code.to(_exact(scale)).mul_(scale).add_(least)
    return made.flatten(dim, dim + 1).to(scale.dtype)


def pack(code: Tensor, bits: int, dim: int) -> Tensor:
    """32 / bits codes of consecutive entries along dim in one int32, the first in the lowest bits; zeros behind."""
    per = 32 // bits
    missing = -code.shape[dim] % per
    if missing:
        code = F.pad(code, [0, 0] * (code.dim() - 1 - dim) + [0, missing])
    words = code.unflatten(dim, (code.shape[dim] // per, per))
    # Codes do not overlap, so their sum is their union; int32 wraps where the highest bit is set.
    return torch.bitwise_left_shift(words, _shifts(words, bits, dim)).sum(dim + 1, dtype=torch.int32)


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """The inverse of `pack`: int32 codes, those behind the last included."""
    words = words.unsqueeze(dim + 1)
    code = torch.bitwise_right_shift(words, _shifts(words, bits, dim)) & (2**bits - 1)
    return code.flatten(dim, dim + 1)


def _shifts(words: Tensor, bits: int, dim: int) -> Tensor:
    """Where the codes of a word begin, along dim + 1."""
    shape = [1] * words.dim()
    shape[dim + 1] = -1
    return torch.arange(0, 32, bits, device=words.device, dtype=torch.int32).view(shape)
