"""The ordinary graph index: hierarchical navigable small worlds of the usearch package.

Its links join keys that are close to each other. Queries of attention lie elsewhere than keys, so a search must
look at many more keys than one whose links were made from queries (attention_graph). It is here to be compared with.

One graph per sequence and KV head, inner-product metric, with vectors of its own in float32. Sequences that were
reordered share graphs until they take in new keys; then each has its own.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.errors import MissingPackageError
from foveate.methods.index.base import Found, KeyIndex


def check_installed() -> None:
    """Raise MissingPackageError unless usearch can be imported."""
    try:
        importlib.import_module("usearch.index")
    except ImportError as error:
        raise MissingPackageError("usearch", "the index 'usearch'", "pip install 'foveate[ann]'") from error


def new_graph(width: int, degree: int) -> Any:
    check_installed()
    from usearch.index import Index, MetricKind

    return Index(ndim=width, metric=MetricKind.IP, dtype="f32", connectivity=degree // 2)


@dataclass
class UsearchIndex(KeyIndex):
    """HNSW over keys.

    row: int64 [B], which graphs a sequence uses. graphs: per row of graphs, one per KV head.
    """

    row: Tensor
    graphs: list[list[Any]]

    @classmethod
    def build(cls, keys: Tensor, length: Tensor, *, degree: int = 32) -> UsearchIndex:
        B, H, _, D = keys.shape
        graphs = [[new_graph(D, degree) for _ in range(H)] for _ in range(B)]
        made = cls(torch.zeros_like(length), torch.arange(B), graphs)
        made.append(keys, length)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> UsearchIndex:
        graphs = [[graph.copy() for graph in heads] for heads in self.graphs]
        return UsearchIndex(self.length.clone(), self.row.clone(), graphs)

    def find(self, q: Tensor, keys: Tensor, count: int, beam: int) -> Found:
        B, Hq, _ = q.shape
        group = Hq // keys.shape[1]
        index = torch.full((B, Hq, min(count, int(self.length.max()))), -1)
        scanned = torch.zeros(B, Hq, dtype=torch.int64)
        vectors = q.detach().float().numpy()
        for b, row in enumerate(self.row.tolist()):
            if not int(self.length[b]):
                continue
            for h in range(Hq):
                graph = self.graphs[row][h // group]
                graph.expansion_search = beam
                # One by one: a batch tells only the sum of the distances it computed.
                found = graph.search(vectors[b, h], count, threads=1)
                rows = torch.from_numpy(found.keys.astype("int64"))
                index[b, h, : rows.numel()] = rows
                scanned[b, h] = found.computed_distances
        return Found(index, scanned)

    def insert(self, keys: Tensor, length: Tensor, queries: Tensor | None, real: Tensor | None) -> None:
        self._own()
        for b, (start, stop) in enumerate(zip(self.length.tolist(), length.tolist())):
            for h, graph in enumerate(self.graphs[b]):
                vectors = keys[b, h, start:stop].detach().float().numpy()
                graph.add(torch.arange(start, stop).numpy(), vectors, threads=1)

    def _own(self) -> None:
        """Give each sequence graphs of its own, and let go of those that none uses."""
        rows = self.row.tolist()
        if rows == list(range(len(self.graphs))):
            return
        used: set[int] = set()
        graphs = []
        for row in rows:
            graphs.append([graph.copy() for graph in self.graphs[row]] if row in used else self.graphs[row])
            used.add(row)
        self.graphs, self.row = graphs, torch.arange(len(rows))

    @property
    def nbytes(self) -> int:
        return sum(int(graph.memory_usage) for heads in self.graphs for graph in heads)
