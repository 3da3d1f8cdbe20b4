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
    "decode 4096 D256": partial(decode, 131072, 4096, d=256),
}
