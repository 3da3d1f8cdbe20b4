"""Launch configurations of the linear family: a small table by head width. Nothing is tuned while running.

An entry may enter only after `benchmarks/gpu_scans.py` has found it correct on the device it names. The tables are
extended by what `foveate tune` found on this machine ("scan", "delta", "vector").
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from foveate.attention.backends.triton import runtime, tuned


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


# Head width -> configuration. 128: the fastest correct ones of `benchmarks/gpu_scans.py` on one H200, 2026-11-24
# (Triton 3.6.0, bfloat16), forward and with gradients alike. 64 and 256: checked there, not timed.
SCAN: dict[int, ScanConfig] = {
    64: ScanConfig(64, 64, 4, 3, sum_k=64, sum_v=64, sum_warps=4),
    128: ScanConfig(64, 64, 4, 2),
    256: ScanConfig(64, 64, 8, 1, sum_v=64),
}


def width(key_dim: int, value_dim: int) -> int:
    """The table's key: head widths up to 64, 128 or 256."""
    return min(256, max(64, runtime.power_of_two(max(key_dim, value_dim))))


def columns(wide: int, most: int, chunk: int, itemsize: int) -> int:
    """Columns of a product for a tensor `wide` columns wide: a power of two, at most `most` (a configuration's choice).

    But at least 64 beside half precision chunks of 64: narrower ones were wrong on an H200 (Triton 3.6.0) where the
    last chunk is not whole, or read memory out of bounds, as in https://github.com/triton-lang/triton/issues/11366.
    Columns too many are masked.
    """
    least = 64 if itemsize == 2 and chunk >= 64 else 16
    return max(least, min(most, runtime.power_of_two(wide, 16)))


@functools.lru_cache(maxsize=256)
def scan(key_dim: int, value_dim: int, itemsize: int) -> ScanConfig:
    if itemsize == 4:
        # float32 products run without tensor cores and hold both operands in registers.
        return ScanConfig(16, 32, 4, 1, sum_k=64, sum_v=32, sum_warps=4, sum_stages=1)
    return tuned.extended("scan", SCAN)[width(key_dim, value_dim)]


@dataclass(frozen=True)
class DeltaConfig:
    """Of the delta rule.

    chunk, block_v, num_warps, num_stages, per_sm, shortest: as in `ScanConfig`, of the walk, whose products have
    block_v rows: 16 for each warp. prepare_*: of the kernel that inverts a chunk's triangle; registers: at most that
    many per thread. sum_*: of the walk that sums the writes of a piece, with `sum_v` columns of a state or of a piece's
    map.
    back_*: of the walk backwards in time, whose products have `chunk` rows.
    solve: precision of products inside the inverse: "tf32", "bf16" or "ieee".
    """

    chunk: int
    block_v: int
    num_warps: int
    num_stages: int
    prepare_warps: int = 4
    prepare_registers: int | None = None
    sum_v: int = 64
    sum_warps: int = 4
    sum_stages: int = 2
    back_v: int = 64
    back_warps: int = 4
    back_stages: int = 2
    per_sm: int = 2
    shortest: int = 8
    solve: str = "tf32"


# Head width -> configuration, forward and with gradients alike. 128: the fastest correct one of
# `benchmarks/gpu_scans.py` on one H200, 2026-11-24 (Triton 3.6.0, bfloat16). 64 and 256: correct there, not tuned.
DELTA: dict[int, DeltaConfig] = {
    64: DeltaConfig(64, 64, 4, 2),
    128: DeltaConfig(64, 128, 8, 3, prepare_registers=168, sum_stages=3, per_sm=1, solve="bf16"),
    256: DeltaConfig(32, 64, 8, 1, sum_v=64, sum_warps=8, sum_stages=1, back_warps=8, back_stages=1),
}


@functools.lru_cache(maxsize=256)
def delta(key_dim: int, value_dim: int, itemsize: int) -> DeltaConfig:
    if itemsize == 4:
        return DeltaConfig(16, 32, 4, 1, sum_v=32, sum_stages=1, back_v=32, back_stages=1, solve="ieee")
    return tuned.extended("delta", DELTA)[width(key_dim, value_dim)]


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


# Head width -> configuration. 128: the faster correct one of `benchmarks/gpu_scans.py` on one H200, 2026-11-24 (Triton
# 3.6.0, bfloat16, forward and gradients). 64 and 256: found correct there, not tuned.
VECTOR: dict[int, VectorConfig] = {
    64: VectorConfig(64, 64, 4, 1),
    128: VectorConfig(32, 64, 4, 1, scores_warps=4),
    256: VectorConfig(32, 64, 8, 1),
}


@functools.lru_cache(maxsize=256)
def vector(key_dim: int, value_dim: int, itemsize: int) -> VectorConfig:
    if itemsize == 4:
        return VectorConfig(16, 32, 4, 1, scores_warps=4)
    return tuned.extended("vector", VECTOR)[width(key_dim, value_dim)]
