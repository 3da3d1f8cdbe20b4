"""Launch configurations: a small shipped table, looked up by the nearest key. Nothing is tuned while running.

Every entry says what it rests on. Checked: compared with float64 on the GPU named. Timed: against other configurations
there. Unchecked: no GPU result in the repository; tests run its kernel in Triton's interpreter and compile it for
sm_90. The files named are in `benchmarks/results`, with Triton 3.6.0. `foveate tune` adds entries for the user's own
GPU, each checked first.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from foveate.attention.backends.triton.tuned import extended


@dataclass(frozen=True)
class DecodeConfig:
    """Of `gather_decode`. per_sm: thread blocks wanted on each multiprocessor."""

    block_n: int
    num_warps: int
    num_stages: int
    per_sm: int


# (listed: an index or a computed range is followed, log2 of the list's length, D) -> configuration.
# D 128, lists of 1024 and 4096 and all of 128k: checked and timed on an H100, the fastest (gpu_decode_topk_h100.json:
# bfloat16, 32 query heads over 8 KV heads), and checked on an H200 (bench_gpu_h200.json). Lists of 128k: unchecked,
# taken from dense ones. D 64 and 256: unchecked, chosen for the same bytes per tile.
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
    table = extended("decode", DECODE)
    keys = [key for key in table if key[0] == listed]
    best = min(keys, key=lambda key: (abs(math.log2(key[2]) - width), abs(key[1] - size)))
    return table[best]


@dataclass(frozen=True)
class TopkConfig:
    """Of `topk_select`: a row is cut into chunks, each read up to `block` scores at a time.

    per_sm: chunks of all rows wanted on each multiprocessor. width, late_warps: the fewest kept scores that the second
    and third launch read at a time, and the fewest warps that do it, 128 scores or more to each.
    """

    block: int
    num_warps: int
    most_chunks: int
    least_block: int = 512
    per_sm: int = 2
    width: int = 512
    late_warps: int = 4


# Checked and timed on an H200, the fastest (gpu_topk_h200.json): 24 to 27 us for 2048 of 131072 float32 scores in 8
# rows. Two thread blocks to a multiprocessor, but rows of up to `TOPK_LONG` scores in at most 32 chunks, longer ones in
# 64: every thread block reads the counts of all chunks of its row.
TOPK = TopkConfig(block=4096, num_warps=8, most_chunks=32, width=1024)
TOPK_OF_LONG = TopkConfig(block=4096, num_warps=8, most_chunks=64)
TOPK_LONG = 262144
# Rows up to this long are selected by one thread block that holds them in registers: chunks win from 2048 on there.
TOPK_SINGLE = 1024


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


# (query rows of a plan's block, log2 of the number of keys, D) -> configuration.
# D 128, blocks of 128: checked and timed on an H100, the fastest (gpu_prefill_h100.json: bfloat16, 32 query heads over
# 8 KV heads), and checked on an H200 (gpu_attention2_h200.json). D 64, blocks of 128: checked on an H200 with sigmoid
# weights, timed against no other (gpu_sigmoid_h200.json). D 256 and blocks of 64: no result in the repository;
# `benchmarks/gpu_sigmoid.py --only shapes` checks blocks of 64.
BLOCKS: dict[tuple[int, int, int], BlockConfig] = {
    (128, 17, 128): BlockConfig(128, 64, 8, 4, tma=True),
    (128, 15, 128): BlockConfig(64, 64, 4, 3, tma=True),
    (64, 15, 128): BlockConfig(64, 64, 4, 3, tma=True),
    (64, 15, 64): BlockConfig(64, 64, 4, 3),
    (128, 15, 64): BlockConfig(128, 128, 8, 3),
    (64, 15, 256): BlockConfig(64, 32, 4, 2),
    (128, 15, 256): BlockConfig(64, 32, 4, 2),
}


@functools.lru_cache(maxsize=256)
def blocks(head_dim: int, itemsize: int, block_m: int, keys: int) -> BlockConfig:
    """The entry nearest in head width, then in length, for plans whose query blocks are `block_m`."""
    # float32 products run without tensor cores and need registers for both operands. Unchecked.
    if itemsize > 2:
        return BlockConfig(32, 32, 4, 2)
    rows, width, length = 64 if block_m % 128 else 128, math.log2(max(16, head_dim)), math.log2(max(1, keys))
    table = extended("blocks", BLOCKS)
    best = min(table, key=lambda key: (key[0] != rows, abs(math.log2(key[2]) - width), abs(key[1] - length)))
    return table[best]


@dataclass(frozen=True)
class BackwardConfig:
    """Of one of the two kernels of `block_flash_bwd`: queries by keys of a tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# D -> (gradients of queries, gradients of keys and values). D 128: checked and timed on an H200, the fastest (32k
# tokens, density 0.107: gpu_attention2_h200.json). D 64: timed there against no other (gpu_sigmoid_h200.json), with no
# error in the repository; `benchmarks/gpu_sigmoid.py --only shapes` checks it. D 256: unchecked. Plans
# with columns, whose kernel takes the second entry too: unchecked.
BACKWARD: dict[int, tuple[BackwardConfig, BackwardConfig]] = {
    64: (BackwardConfig(128, 64, 8, 3), BackwardConfig(64, 128, 8, 3)),
    128: (BackwardConfig(128, 64, 8, 3), BackwardConfig(64, 64, 4, 2)),
    256: (BackwardConfig(32, 32, 4, 2), BackwardConfig(32, 32, 8, 2)),
}


@functools.lru_cache(maxsize=256)
def backward(head_dim: int, itemsize: int) -> tuple[BackwardConfig, BackwardConfig]:
    """The entry nearest in head width."""
    if itemsize > 2:
        return BackwardConfig(32, 32, 4, 1), BackwardConfig(32, 32, 4, 1)
    width = math.log2(max(16, head_dim))
    return BACKWARD[min(BACKWARD, key=lambda key: abs(math.log2(key) - width))]


@dataclass(frozen=True)
class ReduceConfig:
    """Of `score_reduce`: block_m x block_n, queries by keys, where queries are rows; keys x queries where keys are."""

    block_m: int
    block_n: int
    keys: int
    queries: int
    num_warps: int
    num_stages: int


@functools.lru_cache(maxsize=256)
def reduction(head_dim: int, itemsize: int, queries: int) -> ReduceConfig:
    """By bytes of a row and by how many queries there are.

    D 128 in bfloat16: checked on an H200 with 1, 64, 8192 and 32768 queries, timed against torch but no other
    configuration (gpu_attention2_h200.json). Other widths and float32: unchecked.
    """
    if itemsize > 2:
        return ReduceConfig(32, 32, 32, 32, 4, 2)
    few = min(128, max(16, 1 << (max(1, queries) - 1).bit_length()))
    if head_dim > 128:
        return ReduceConfig(min(few, 64), 64, 64, min(few, 64), 4, 2)
    if few < 128:
        return ReduceConfig(few, 128, 128, few, 4, 3)
    return ReduceConfig(128, 64, 128, 64, 8, 3)
