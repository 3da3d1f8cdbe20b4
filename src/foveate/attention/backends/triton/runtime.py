"""What the launchers share: the device's size, dtype rules of `tl.dot`, small arithmetic."""

from __future__ import annotations

import functools
from typing import overload

import torch
import triton
from torch import Tensor

from foveate.attention.backends.triton.availability import FLOATS as FLOATS
from foveate.errors import ShapeError

LOG2E = 1.4426950408889634
INTERPRET: bool = triton.knobs.runtime.interpret
# Thread blocks along a grid's second and third axis, at most; along its first, 2^31 - 1.
GRID_AXIS = 65535


@functools.lru_cache(maxsize=16)
def multiprocessors(index: int | None) -> int:
    """Streaming multiprocessors of a CUDA device; 4 in the interpreter, so that small tests split too."""
    if INTERPRET or index is None:
        return 4
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@functools.lru_cache(maxsize=16)
def has_dependent_launch(index: int | None) -> bool:
    """Whether a kernel may start while its predecessor ends (compute capability 9.0 and later)."""
    return not INTERPRET and index is not None and torch.cuda.get_device_capability(index)[0] >= 9


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact ("ieee"); tf32 would lose ten bits that the caller did not give up."""
    return "ieee" if dtype == torch.float32 else "tf32"


def upcast(dtype: torch.dtype) -> bool:
    """The interpreter's `tl.dot` cannot read bfloat16."""
    return INTERPRET and dtype == torch.bfloat16


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes 15 us of host time per call."""
    return -(-a // b)


def power_of_two(x: int, least: int = 1) -> int:
    return max(least, 1 << (x - 1).bit_length()) if x > 0 else least


def batches(sequences: int, heads: int) -> list[slice]:
    """A batch cut so that the heads of each part fit on a grid's second or third axis; one part where all do."""
    step = GRID_AXIS // heads
    if not step:
        raise ShapeError(f"{heads} heads of a sequence, allowed: at most {GRID_AXIS}, a limit of CUDA's grids")
    return [slice(first, min(first + step, sequences)) for first in range(0, max(1, sequences), step)]


@overload
def part_of(x: Tensor, part: slice) -> Tensor: ...
@overload
def part_of(x: None, part: slice) -> None: ...
def part_of(x: Tensor | None, part: slice) -> Tensor | None:
    """The sequences `part` of x [B, ...]; all of it where one entry serves every sequence."""
    return x if x is None or x.shape[0] in (1, part.stop - part.start) else x[part]


def check_unit_stride(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            raise ShapeError(f"{name} has last stride {tensor.stride(-1)}, allowed: 1; call .contiguous()")


def check_floats(**tensors: Tensor) -> None:
    first = next(iter(tensors.values())).dtype
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or tensor.dtype != first:
            raise ShapeError(f"{name} is {tensor.dtype}, allowed: one of float32, bfloat16, float16, the same for all")
