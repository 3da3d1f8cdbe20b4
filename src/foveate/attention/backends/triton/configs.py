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
DECODE: dict[tuple[bool, int, int], DecodeConfig] = {
    (False, 12, 128): DecodeConfig(64, 4, 3, 2),
    (False, 17, 128): DecodeConfig(64, 4, 3, 2),
    (False, 12, 64): DecodeConfig(128, 4, 3, 2),
    (False, 17, 64): DecodeConfig(128, 4, 3, 2),
    (False, 17, 256): DecodeConfig(32, 4, 3, 2),
    (True, 10, 128): DecodeConfig(64, 4, 3, 2),
    (True, 12, 128): DecodeConfig(64, 4, 3, 2),
    (True, 17, 128): DecodeConfig(64, 4, 3, 2),
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


TOPK = TopkConfig(block=2048, num_warps=8, most_chunks=32)
# Rows up to this long are selected by one thread block that holds them in registers.
TOPK_SINGLE = 8192
