"""Launch configurations of the linear family: a small table by head width. Nothing is tuned while running.

An entry may enter only after `benchmarks/gpu_scans.py` has found it correct on the device it names.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from foveate.attention.backends.triton import runtime


@dataclass(frozen=True)
class ScanConfig:
    """Of the scan without and with scalar decay.

    chunk: tokens per chunk. block_v: value channels of a thread block; its state has all key channels.
    sum_*: of the kernel that sums the writes of a piece. per_sm: thread blocks wanted on each multiprocessor; with
    fewer than half of them, sequences are split. shortest: chunks of a piece, at least.
    """

    chunk: int
    block_v: int
    num_warps: int
    num_stages: int
    sum_k: int = 128
    sum_v: int = 128
    sum_warps: int = 8
    sum_stages: int = 3
    per_sm: int = 2
    shortest: int = 8


# D 128: the fastest correct one of `benchmarks/gpu_scans.py` on one H200, 2026-11-24 (Triton 3.6.0, bfloat16), forward
# and gradients. 64 and 256: not checked, and so left to torch by backend="auto".
SCAN: dict[int, ScanConfig] = {
    64: ScanConfig(64, 64, 4, 3, sum_k=64, sum_v=64, sum_warps=4),
    128: ScanConfig(64, 64, 4, 2),
    256: ScanConfig(64, 32, 8, 1, sum_v=64),
}


def width(key_dim: int, value_dim: int) -> int:
    """The table's key: head widths up to 64, 128 or 256."""
    return min(256, max(64, runtime.power_of_two(max(key_dim, value_dim))))


@functools.lru_cache(maxsize=256)
def scan(key_dim: int, value_dim: int, itemsize: int) -> ScanConfig:
    if itemsize == 4:
        # float32 products run without tensor cores and hold both operands in registers.
        return ScanConfig(16, 32, 4, 1, sum_k=64, sum_v=32, sum_warps=4, sum_stages=1)
    return SCAN[width(key_dim, value_dim)]


@dataclass(frozen=True)
class DeltaConfig:
    """Of the delta rule.

    chunk, block_v, num_warps, num_stages, per_sm, shortest: as in `ScanConfig`, of the walk. prepare_warps: of the
    kernel that inverts a chunk's triangle. sum_*: of the walk that sums the writes of a piece, with
    `sum_v` columns of a state or of a piece's map.
    solve: precision of products inside the inverse, for half precision inputs.
    """

    chunk: int
    block_v: int
    num_warps: int
    num_stages: int
    prepare_warps: int = 4
    sum_v: int = 64
    sum_warps: int = 4
    sum_stages: int = 2
    per_sm: int = 2
    shortest: int = 8
    solve: str = "tf32"


# D 128: correct on one H200, 2026-11-24, forward and gradients; tiles of 32 value channels were not (gate gradients,
# a last chunk that is not whole). 64 and 256: not checked.
DELTA: dict[int, DeltaConfig] = {
    64: DeltaConfig(64, 64, 4, 2),
    128: DeltaConfig(64, 64, 4, 2, per_sm=1),
    256: DeltaConfig(32, 32, 4, 1, sum_v=32, sum_stages=1),
}


@functools.lru_cache(maxsize=256)
def delta(key_dim: int, value_dim: int, itemsize: int) -> DeltaConfig:
    if itemsize == 4:
        return DeltaConfig(16, 32, 4, 1, sum_v=32, sum_stages=1, solve="ieee")
    return DELTA[width(key_dim, value_dim)]


@dataclass(frozen=True)
class VectorConfig:
    """Of the scan with one decay per key channel: as `ScanConfig`; scores_warps of the kernel that weighs scores."""

    chunk: int
    block_v: int
    num_warps: int
    num_stages: int
    scores_warps: int = 8
    per_sm: int = 2
    shortest: int = 8


# D 128: the fastest correct one on one H200, 2026-11-24, with gradients; tiles of 32 value channels read out of bounds.
# 64 and 256: not checked.
VECTOR: dict[int, VectorConfig] = {
    64: VectorConfig(64, 64, 4, 1),
    128: VectorConfig(32, 64, 4, 1, scores_warps=4),
    256: VectorConfig(32, 32, 8, 1),
}


@functools.lru_cache(maxsize=256)
def vector(key_dim: int, value_dim: int, itemsize: int) -> VectorConfig:
    if itemsize == 4:
        return VectorConfig(16, 32, 4, 1, scores_warps=4)
    return VECTOR[width(key_dim, value_dim)]
