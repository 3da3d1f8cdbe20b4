"""Links between the keys of one head: who is reached from whom in an attention-aware graph.

    nearest    for every query, its `neighbours` keys with the largest inner product, exactly, in blocks
    project    a query's best `pivots` keys are linked to its other nearest keys: what one query wants lies together
    prune      of a key p's candidates, by rising distance to p, one is kept if it is closer to p than to every one
               kept before; what is left fills up, to at most R links
    reverse    every link is offered backwards, and pruned the same way
    connect    a key that no walk from the entries can reach hangs in a tree below its nearest key that can be
               reached, so that every key is reachable

Distances are Euclidean, between keys. The last `TREE` columns of a row of links are for the trees alone.
keys [n, D] and queries [m, D] are float32 or float64; links int32 [n, R], -1 absent. All of it runs on the device of
its inputs, without loops over keys or queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.backends import cpp_graph

TREE = 4
CANDIDATES = 96
BLOCK_ENTRIES = 1 << 23
ANCHORS = 8192


def nearest_keys(queries: Tensor, keys: Tensor, count: int, bias: Tensor | None = None) -> Tensor:
    """The `count` keys with the largest inner product plus bias [n] (None: 0) of each query: int64 [m, count], best
    first. O(m n D)."""
    count = min(count, keys.shape[0])
    if cpp_graph.why_not_nearest(queries, keys) is None:
        return cpp_graph.nearest(queries, keys, count, bias)
    block = max(1, BLOCK_ENTRIES // max(1, keys.shape[0]))
    nearest = torch.empty(queries.shape[0], count, dtype=torch.int64, device=keys.device)
    # One buffer for all blocks: a fresh one each time costs as much in page faults as its product.
    scores = keys.new_empty(min(block, queries.shape[0]), keys.shape[0])
    for part, out in zip(queries.split(block), nearest.split(block)):
        products = torch.mm(part, keys.T, out=scores[: part.shape[0]])
        out.copy_((products if bias is None else products.add_(bias)).topk(count, dim=-1).indices)
    return nearest


def link(links: Tensor, keys: Tensor, queries: Tensor, *, neighbours: int, pivots: int) -> Tensor:
    """Add to links [n, R], in place, what the queries say; returns each query's best key, int64 [m]."""
    nearest = nearest_keys(queries, keys, neighbours)
    pivot = nearest[:, :pivots]
    sources = pivot[:, :, None].expand(-1, -1, nearest.shape[1]).flatten()
    targets = nearest[:, None].expand(-1, pivot.shape[1], -1).flatten()
    touched = relink(links, keys, sources, targets)
    ends = links[touched, : links.shape[1] - TREE]
    sources = touched[:, None].expand_as(ends)[ends >= 0]
    relink(links, keys, ends[ends >= 0].long(), sources)
    return nearest[:, 0]


def relink(links: Tensor, keys: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """Offer links sources[i] -> targets[i]; choose anew among them and the links there are. Returns who was touched."""
    n, width = keys.shape[0], links.shape[1] - TREE
    touched = sources.unique()
    old = links[touched, :width].long()
    sources = torch.cat((touched[:, None].expand_as(old)[old >= 0], sources))
    targets = torch.cat((old[old >= 0], targets))
    pairs = (sources * n + targets)[sources != targets].unique()
    sources, targets = pairs // n, pairs % n
    cost = pair_distances(keys, sources, targets)
    order = cost.argsort(stable=True)
    order = order[sources[order].argsort(stable=True)]
    sources, targets = sources[order], targets[order]
    # Touched keys are ascending, and so are the sorted sources: a pair's row, and its rank within the row.
    row = torch.searchsorted(touched, sources)
    first = torch.searchsorted(sources, touched)
    rank = torch.arange(sources.numel(), device=keys.device) - first[row]
    near = rank < CANDIDATES
    wide = int(rank[near].max()) + 1 if bool(near.any()) else 0
    candidates = torch.full((touched.numel(), wide), -1, device=keys.device)
    candidates[row[near], rank[near]] = targets[near]
    block = max(1, BLOCK_ENTRIES // max(1, wide * keys.shape[1]))
    for some, around in zip(touched.split(block), candidates.split(block)):
        links[some, :width] = prune(keys, some, around, width).to(links.dtype)
    return touched


def pair_distances(keys: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of keys[a[i]] and keys[b[i]]."""
    block = max(1, BLOCK_ENTRIES // keys.shape[1])
    parts = [(keys[x] - keys[y]).square_().sum(-1) for x, y in zip(a.split(block), b.split(block))]
    return torch.cat(parts) if parts else keys.new_empty(0)


def prune(keys: Tensor, centre: Tensor, candidates: Tensor, width: int) -> Tensor:
    """At most `width` of the candidates [P, C] (by rising distance, -1 absent) of centre [P]: int64 [P, width].

    Each round keeps every row's first candidate left, and takes out those that are no closer to the centre than to it.
    """
    around = keys[candidates.clamp_min(0)]
    own = (around - keys[centre][:, None]).square_().sum(-1)
    norms = around.square().sum(-1)
    left = candidates >= 0
    kept = torch.zeros_like(left)
    for _ in range(min(width, candidates.shape[1])):
        if not bool(left.any()):
            break
        some = left.any(1, keepdim=True)
        pick = left.to(torch.uint8).argmax(1, keepdim=True)
        kept.scatter_(1, pick, kept.gather(1, pick) | some)
        chosen = around.gather(1, pick[..., None].expand(-1, -1, around.shape[2]))
        apart = norms + norms.gather(1, pick) - 2 * (around @ chosen.transpose(1, 2))[..., 0]
        left &= own < apart
        left.scatter_(1, pick, False)
    # Kept ones first, then those skipped, each by rising distance; absent ones last.
    kind = torch.where(kept, 0, torch.where(candidates >= 0, 1, 2))
    order = kind.argsort(dim=1, stable=True)[:, :width]
    made = candidates.gather(1, order)
    return torch.nn.functional.pad(made, (0, width - made.shape[1]), value=-1)


def reachable(links: Tensor, entries: Tensor) -> Tensor:
    """Bool [n]: keys that a walk along links from the entries can come to."""
    seen = torch.zeros(links.shape[0], dtype=torch.bool, device=links.device)
    front = entries.unique()
    while front.numel():
        seen[front] = True
        ahead = links[front].flatten()
        ahead = ahead[ahead >= 0].long()
        front = ahead[~seen[ahead]].unique()
    return seen


def connect(links: Tensor, keys: Tensor, entries: Tensor) -> None:
    """Hang every key that cannot be reached from the entries below a near one that can, in place. O(n ANCHORS D).

    Anchors are reachable keys whose tree columns are free (there always are some: leaves), evenly sampled. The keys
    below an anchor form a heap of TREE children each, the closest on top.
    """
    seen = reachable(links, entries)
    lost = (~seen).nonzero()[:, 0]
    if not lost.numel():
        return
    first = links.shape[1] - TREE
    links[lost, first:] = -1
    anchors = (seen & (links[:, first:] < 0).all(1)).nonzero()[:, 0]
    if anchors.numel() > ANCHORS:
        anchors = anchors[torch.linspace(0, anchors.numel() - 1, ANCHORS, device=keys.device).long()]
    # The closest in Euclidean distance: the largest x . a - |a|^2 / 2.
    around = keys[anchors]
    above = anchors[nearest_keys(keys[lost], around, 1, -around.square().sum(-1) / 2)[:, 0]]
    order = pair_distances(keys, lost, above).argsort(stable=True)
    order = order[above[order].argsort(stable=True)]
    lost, above = lost[order], above[order]
    at = torch.arange(lost.numel(), device=keys.device)
    start = torch.searchsorted(above, above)
    rank = at - start
    # Member j of a tree is child j mod TREE of its anchor, or of member j // TREE - 1.
    parent = torch.where(rank < TREE, above, lost[(start + rank // TREE - 1).clamp_min(0)])
    links[parent, first + rank % TREE] = lost.to(links.dtype)
