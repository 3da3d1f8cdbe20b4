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

    topk_select(torch.empty(8, n, dtype=dtype), k)


def blocks(n: int, block: int = 128, d: int = 128, columns: int = 0, **config) -> None:
    from foveate.attention import SparsePlan
    from foveate.attention.backends.triton.block_flash import block_flash_fwd
    from foveate.attention.backends.triton.configs import BlockConfig

    q = torch.empty(1, 32, n, d, dtype=BF16)
    k = torch.empty(1, 8, n, d, dtype=BF16)
    rows = 32 * n // block
    counts = torch.zeros(rows, dtype=torch.int32)
    plan = SparsePlan(
        torch.zeros(rows + 1, dtype=torch.int64), counts[:0], counts, counts, 1, 32, n, n, block, block,
        torch.zeros(1, 32, columns, dtype=torch.int32) if columns else None,
    )  # fmt: skip
    block_flash_fwd(q, k, k, plan, config=BlockConfig(**config) if config else None)


TMA = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3, "tma": True}

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
    "topk short": partial(topk, 2048, 64, torch.float32),
    "topk 8192": partial(topk, 8192, 512, torch.float32),
    "blocks of 128": partial(blocks, 131072),
    "blocks of 64 and columns": partial(blocks, 131072, 64, columns=2048),
    "blocks D64": partial(blocks, 131072, d=64),
    "blocks by descriptors": partial(blocks, 131072, **TMA),
    "decode 4096 D256": partial(decode, 131072, 4096, d=256),
}
