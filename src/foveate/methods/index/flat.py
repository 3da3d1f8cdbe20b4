"""The exact index: every key is scored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.scoring import query_scores
from foveate.methods.index.base import Found, KeyIndex


@dataclass
class FlatIndex(KeyIndex):
    """Scores all keys and takes the best; of equals any. O(n D) per query, no memory."""

    @classmethod
    def build(cls, keys: Tensor, length: Tensor) -> FlatIndex:
        return cls(length.clone())

    def find(self, q: Tensor, keys: Tensor, count: int, beam: int) -> Found:
        n = int(self.length.max())
        scores = query_scores(q, keys[:, :, :n])
        absent = torch.arange(n) >= self.length[:, None, None]
        best = scores.masked_fill_(absent, -torch.inf).topk(min(count, n), dim=-1)
        index = best.indices.masked_fill(best.values == -torch.inf, -1)
        return Found(index, self.length[:, None].expand(q.shape[:2]).clone())

    def insert(self, keys: Tensor, length: Tensor, queries: Tensor | None, real: Tensor | None) -> None:
        """Nothing to do: the keys themselves are the index."""

    @property
    def nbytes(self) -> int:
        return 0
