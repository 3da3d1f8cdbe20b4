"""K-means over the keys of several heads at once."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.summaries import centroids

PIECE_ENTRIES = 1 << 24


def kmeans(x: Tensor, clusters: int, *, iterations: int = 300, seed: int = 0) -> Tensor:
    """Labels int64 [H, n] of points x [H, n, D] (float32) in at most `clusters` Euclidean clusters.

    K-means++ start (every next centre drawn with probability proportional to the squared distance to the nearest one
    so far), then Lloyd's rounds until no label changes, at most `iterations`. A cluster that runs empty keeps its
    centre. Ties go to the lower cluster. O(iterations n clusters D) per head; distances are computed in pieces.
    """
    H, n, _ = x.shape
    clusters = min(clusters, n)
    centres = _spread_out(x, clusters, seed)
    labels = _nearest(x, centres)
    for _ in range(iterations):
        sizes = x.new_zeros(H, clusters).scatter_add_(1, labels, x.new_ones(H, n))
        centres = torch.where(sizes[..., None] > 0, centroids(x, labels, clusters), centres)
        moved = _nearest(x, centres)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def _spread_out(x: Tensor, clusters: int, seed: int) -> Tensor:
    H, n, _ = x.shape
    # The same draws for every head, on every device and in every batch, so that a head's clusters are its own.
    draws = torch.rand(clusters, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws = draws.to(x.device).expand(-1, H)
    heads = torch.arange(H, device=x.device)
    chosen = (draws[0] * n).long()
    centres = [x[heads, chosen]]
    near = (x - centres[0][:, None]).square().sum(-1)
    for draw in draws[1:]:
        mass = near.double().cumsum(-1)
        chosen = torch.searchsorted(mass, (draw[:, None] * mass[:, -1:]), right=True)[:, 0].clamp_max(n - 1)
        centres.append(x[heads, chosen])
        near = torch.minimum(near, (x - centres[-1][:, None]).square().sum(-1))
    return torch.stack(centres, 1)


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    rows = max(1, PIECE_ENTRIES // (x.shape[0] * centres.shape[1]))
    half = centres.square().sum(-1)[:, None] / 2
    found = [torch.argmax(piece @ centres.transpose(1, 2) - half, -1) for piece in x.split(rows, 1)]
    return torch.cat(found, 1)
