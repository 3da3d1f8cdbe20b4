"""Work over rows of queries, a tile at a time, each tile made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Numbers of one tile: 64 MB in float32.
TILE = 1 << 24
LEAST_ROWS = 16


def over_tiles(tile: Callable[[slice], Tensor], rows: range, per_row: int, dim: int) -> Tensor:
    """Join `tile(rows)` of consecutive slices of `rows` along `dim`.

    per_row: how many numbers a row needs at a time. With several tiles and gradients, a tile keeps nothing of its own
    for the backward pass and runs a second time there.
    """
    size = max(LEAST_ROWS, TILE // max(per_row, 1))
    slices = [slice(begin, min(begin + size, rows.stop)) for begin in range(rows.start, rows.stop, size)]
    if len(slices) == 1:
        return tile(slices[0])
    if not torch.is_grad_enabled():
        return torch.cat([tile(each) for each in slices], dim)
    made = [checkpoint(tile, each, use_reentrant=False, preserve_rng_state=False) for each in slices]
    return torch.cat(made, dim)
