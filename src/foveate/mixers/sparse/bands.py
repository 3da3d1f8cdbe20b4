"""Keys around blocks of queries: what attention within a band costs O(N w) with, and no N x N mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bands(x: Tensor, block: int, before: int, after: int) -> Tensor:
    """The tokens around each block of `block` tokens: [B, H, N, D] -> [B, H, R, before + block + after, D].

    R = ceil(N / block). Tokens outside the sequence are zeros, see `band_places`. A view of one padded copy.
    """
    rows = -(-x.shape[2] // block)
    padded = F.pad(x, (0, 0, before, rows * block - x.shape[2] + after))
    return padded.unfold(2, before + block + after, block).transpose(-1, -2)


def band_places(length: int, block: int, before: int, after: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which tokens stand there: queries [R, block] and keys [R, before + block + after]; -1 outside the sequence."""
    first = torch.arange(0, length, block, device=device)[:, None]
    queries = first + torch.arange(block, device=device)
    keys = first + torch.arange(-before, block + after, device=device)
    return tuple(each.masked_fill((each < 0) | (each >= length), -1) for each in (queries, keys))  # type: ignore[return-value]


def unband(o: Tensor, length: int) -> Tensor:
    """Blocks of queries [B, H, R, block, D] -> [B, H, N, D]."""
    return o.flatten(2, 3)[:, :, :length]
