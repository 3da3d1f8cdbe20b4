"""Launch configurations: a small shipped table, looked up by the nearest key. Nothing is tuned while running.

An entry may enter only after `benchmarks/gpu_attention.py` has found it correct on the device it names.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeConfig:
    """Of `gather_decode`. per_sm: thread blocks wanted on each multiprocessor."""

    block_n: int
    num_warps: int
    num_stages: int
    per_sm: int


# (listed: an index or a computed range is followed, log2 of the list's length, D) -> configuration.
# D 128: the fastest correct ones of `benchmarks/gpu_attention.py` on one H100 80GB HBM3, 2026-11-24 (Triton 3.6.0,
# bfloat16, 32 query heads over 8 KV heads). D 64 and 256: not measured yet, chosen for the same bytes per tile.
DECODE: dict[tuple[bool, int, int], DecodeConfig] = {
    (False, 17, 128): DecodeConfig(128, 4, 3, 1),
    (False, 12, 64): DecodeConfig(128, 4, 3, 2),
    (False, 17, 64): DecodeConfig(128, 4, 3, 2),
    (False, 17, 256): DecodeConfig(32, 4, 3, 2),
    (True, 10, 128): DecodeConfig(128, 4, 2, 2),
    (True, 12, 128): DecodeConfig(32, 4, 3, 6),
    (True, 17, 128): DecodeConfig(128, 4, 3, 1),
    (True, 12, 64): DecodeConfig(128, 4, 3, 2),
    (True, 12, 256): DecodeConfig(32, 4, 3, 2),
}


@functools.lru_cache(maxsize=4096)
def decode(listed: bool, length: int, head_dim: int, itemsize: int) -> DecodeConfig:
    """The entry nearest in log2 of length and of head width (bytes of a row count, so float32 looks twice as wide)."""
    width = math.log2(max(16, head_dim) * itemsize / 2)
    size = math.log2(max(1, length))
    keys = [key for key in DECODE if key[0] == listed]
    best = min(keys, key=lambda key: (abs(math.log2(key[2]) - width), abs(key[1] - size)))
    return DECODE[best]


@dataclass(frozen=True)
class TopkConfig:
    """Of `topk_select`: a row is cut into chunks, each read `block` scores at a time."""

    block: int
    num_warps: int
    most_chunks: int


# The fastest of the same run (float32, 2048 of 131072 in 8 rows).
TOPK = TopkConfig(block=2048, num_warps=4, most_chunks=32)
# Rows up to this long are selected by one thread block that holds them in registers.
TOPK_SINGLE = 8192


@dataclass(frozen=True)
class BlockConfig:
    """Of `block_flash_fwd`.

    tma: keys of full blocks come by the tensor memory accelerator. persistent: a grid of `per_sm` thread blocks per
    multiprocessor takes all the work. registers: most per thread; at 128, two blocks of 8 warps share a multiprocessor,
    and one multiplies while the other exponentiates. edge: keys of a tile of partial blocks and of columns.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    persistent: bool = False
    per_sm: int = 1
    registers: int | None = None
    edge: int = 32


# (most query rows of a tile, D) -> configuration. Not measured yet: design/kernels.md, 4c.
BLOCKS: dict[tuple[int, int], BlockConfig] = {
    (64, 64): BlockConfig(64, 64, 4, 3),
    (128, 64): BlockConfig(128, 128, 8, 3),
    (64, 128): BlockConfig(64, 64, 4, 3),
    (128, 128): BlockConfig(128, 64, 8, 3),
    (64, 256): BlockConfig(64, 32, 4, 2),
    (128, 256): BlockConfig(64, 32, 4, 2),
}


@functools.lru_cache(maxsize=256)
def blocks(head_dim: int, itemsize: int, block_m: int) -> BlockConfig:
    """The entry nearest in head width, for plans whose query blocks are `block_m`."""
    rows = 64 if block_m % 128 else 128
    width = math.log2(max(16, head_dim) * itemsize / 2)
    best = min(BLOCKS, key=lambda key: (key[0] != rows, abs(math.log2(key[1]) - width)))
    # float32 products run without tensor cores and need registers for both operands.
    return BLOCKS[best] if itemsize == 2 else BlockConfig(32, 32, 4, 2)
