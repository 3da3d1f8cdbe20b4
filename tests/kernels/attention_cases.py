"""Launches of sigmoid attention and of moved keys whose compiled form is checked, at their shipped configurations.

Run as a program in a process of its own (see `compiling`): prints one JSON object per kernel launched. "softmax" before
a name launches the same with softmax weights, to compare.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial

import torch

from tests.kernels.cases import BF16, empty_plan
from tests.kernels.compiling import pretend_hopper, record_launches


def forward(n: int, block: int = 128, d: int = 128, columns: int = 0, bias: float | None = -9.0) -> None:
    from foveate.attention.backends.triton.block_flash import block_flash_fwd

    q, k = torch.empty(1, 32, n, d, dtype=BF16), torch.empty(1, 8, n, d, dtype=BF16)
    block_flash_fwd(q, k, k, empty_plan(n, block, columns), bias=bias, return_lse=False)


def backward(n: int, d: int = 128, bias: float | None = -9.0) -> None:
    from foveate.attention.backends.triton.block_flash_bwd import block_flash_bwd

    q, k = torch.empty(1, 32, n, d, dtype=BF16), torch.empty(1, 8, n, d, dtype=BF16)
    block_flash_bwd(q, None, q, k, k, q, torch.empty(1, 32, n), empty_plan(n, 128), bias=bias)


def compaction(n: int, kept: int, d: int = 128, dim: int | None = 128, style: str = "half") -> None:
    from foveate.attention import Rope
    from foveate.attention.backends.triton.kv_compact import kv_compact

    k, index = torch.empty(1, 8, n, d, dtype=BF16), torch.empty(1, 8, kept, dtype=torch.int64)
    rope = None if dim is None else Rope(dim, style=style)
    kv_compact(k, k, index, pos=None if dim is None else torch.empty(1, kept, dtype=torch.int64), rope=rope)


CASES = {
    "blocks of 128": partial(forward, 131072),
    "blocks of 32k": partial(forward, 32768),
    "blocks and columns": partial(forward, 131072, columns=2048),
    "blocks D64": partial(forward, 131072, d=64),
    "gradients": partial(backward, 32768),
    "gradients D64": partial(backward, 32768, d=64),
    "compaction": partial(compaction, 131072, 4096, dim=None),
    "compaction, half": partial(compaction, 131072, 4096),
    "compaction, interleaved": partial(compaction, 131072, 4096, style="interleaved"),
    "compaction, partial": partial(compaction, 131072, 4096, d=96, dim=32),
}

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    found = record_launches()
    pretend_hopper()
    for each in sys.argv[1:]:
        del found[:]
        name = each.removeprefix("softmax ")
        CASES[name](**({} if name == each else {"bias": None}))
        for kernel in found:
            print(json.dumps({"case": each, **kernel}))
