"""Launches whose compiled form is checked: the shapes that the benchmark times, at their shipped configurations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

BF16 = torch.bfloat16


def decode(n: int, listed: int | None = None, d: int = 128, planned: bool = False, m: int = 1, **options) -> None:
    from foveate.attention.backends.triton.gather_decode import gather_decode

    q = torch.empty(1, 32, m, d, dtype=BF16)
    # Nothing is read, so the pages of `k` are never touched.
    k = torch.empty(1, 8, n, d, dtype=BF16)
    index = None if listed is None else torch.empty(1, 8, listed, dtype=torch.int32)
    length = torch.empty(1, 8, dtype=torch.int32) if planned else None
    gather_decode(q, k, k, index=index, length=length, **options)


def topk(n: int, k: int, dtype: torch.dtype) -> None:
    from foveate.attention.backends.triton.topk import topk_select

    topk_select(torch.empty(8, n, dtype=dtype), k, finite=True)


def empty_plan(n: int, block: int, columns: int = 0):
    """Rows without entries, for 32 heads."""
    from foveate.attention import SparsePlan

    rows = 32 * n // block
    counts = torch.zeros(rows, dtype=torch.int32)
    return SparsePlan(
        torch.zeros(rows + 1, dtype=torch.int64), counts[:0], counts, counts, 1, 32, n, n, block, block,
        torch.zeros(1, 32, columns, dtype=torch.int32) if columns else None,
    )  # fmt: skip


def blocks(n: int, block: int = 128, d: int = 128, columns: int = 0, **config) -> None:
    from foveate.attention.backends.triton.block_flash import block_flash_fwd
    from foveate.attention.backends.triton.configs import BlockConfig

    q = torch.empty(1, 32, n, d, dtype=BF16)
    k = torch.empty(1, 8, n, d, dtype=BF16)
    plan = empty_plan(n, block, columns)
    block_flash_fwd(q, k, k, plan, config=BlockConfig(**config) if config else None)


def gradients(n: int, block: int = 128, d: int = 128, columns: int = 0, config=None) -> None:
    from foveate.attention.backends.triton.block_flash_bwd import block_flash_bwd

    q = torch.empty(1, 32, n, d, dtype=BF16)
    k = torch.empty(1, 8, n, d, dtype=BF16)
    block_flash_bwd(q, None, q, k, k, q, torch.empty(1, 32, n), empty_plan(n, block, columns), config=config)


def reduction(m: int, n: int, d: int = 128) -> None:
    from foveate.attention.backends.triton import score_reduce

    q, k = torch.empty(1, 32, m, d, dtype=BF16), torch.empty(1, 8, n, d, dtype=BF16)
    score_reduce.column_mass(q, k, scale=0.1)
    score_reduce.block_mass(q, k, block_m=64, block_n=64, scale=0.1)


def coding(bits: int, dim: int) -> None:
    from foveate.attention.backends.triton.kv_quant import kv_decode, kv_encode

    made = kv_encode(torch.empty(1, 8, 4096, 128, dtype=BF16), bits=bits, group=32, dim=dim)
    kv_decode(*made, bits=bits, group=32, dim=dim)


def last_queries(n: int, d: int = 128, pooled: bool = True) -> None:
    from foveate.attention.backends.triton.last_queries import column_and_diagonal_mass

    last, k = torch.empty(1, 32, 128, d, dtype=BF16), torch.empty(1, 8, n, d, dtype=BF16)
    column_and_diagonal_mass(last, k, scale=0.1, pooled=pooled)


def block_lists(n: int) -> None:
    from foveate.attention.backends.triton.block_lists import columns_and_diagonals

    columns_and_diagonals(torch.empty(2, 32, n), 8, most=8, batch=1, tokens=128 * n, block=128)


TMA = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3, "tma": True}
POINTERS = {**TMA, "tma": False}

CASES: dict[str, Callable[[], None]] = {
    "decode dense 128k": partial(decode, 131072),
    "decode 4096 of 128k": partial(decode, 131072, 4096),
    "decode 1024 of 128k": partial(decode, 131072, 1024),
    "decode pages": partial(decode, 131072, 256, page_size=16),
    "decode static cache": partial(decode, 131072, planned=True),
    "decode window": partial(decode, 131072, window=4095, sinks=4),
    "decode 4 queries": partial(decode, 131072, 4096, m=4),
    "decode 4096 D64": partial(decode, 131072, 4096, d=64),
    "topk float32": partial(topk, 131072, 2048, torch.float32),
    "topk bfloat16": partial(topk, 131072, 2048, BF16),
    "topk short": partial(topk, 1024, 64, torch.float32),
    "topk 8192": partial(topk, 8192, 512, torch.float32),
    "blocks of 128": partial(blocks, 131072),
    "blocks of 64 and columns": partial(blocks, 131072, 64, columns=2048),
    "blocks and columns": partial(blocks, 131072, columns=2048),
    "blocks of 32k": partial(blocks, 32768),
    "blocks D64": partial(blocks, 131072, d=64),
    "blocks by descriptors": partial(blocks, 131072, **TMA),
    "blocks by pointers": partial(blocks, 131072, **POINTERS),
    "gradients": partial(gradients, 32768),
    "gradients of 64": partial(gradients, 32768, 64),
    "gradients D64": partial(gradients, 32768, d=64),
    "gradients D256": partial(gradients, 32768, d=256),
    "gradients and columns": partial(gradients, 32768, columns=512),
    "gradients of 64 and columns": partial(gradients, 32768, 64, columns=512),
    "gradients and columns D64": partial(gradients, 32768, d=64, columns=512),
    "gradients and columns D256": partial(gradients, 32768, d=256, columns=512),
    "reduction of 64 queries": partial(reduction, 64, 131072),
    "reduction of all queries": partial(reduction, 32768, 32768),
    "last queries": partial(last_queries, 131072),
    "last queries D64": partial(last_queries, 131072, 64),
    "last queries by token": partial(last_queries, 131072, pooled=False),
    "block lists": partial(block_lists, 1024),
    "coding of tokens": partial(coding, 4, 2),
    "coding of channels": partial(coding, 4, 3),
    "decode 4096 D256": partial(decode, 131072, 4096, d=256),
}
