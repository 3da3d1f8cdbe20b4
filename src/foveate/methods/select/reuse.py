"""When a selection made for one query may serve the next ones: by counting steps, or by how much queries differ.

A policy says for every sequence of a batch whether a new selection is due; sequences decide for themselves, so a batch
behaves as its rows would alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Reuse(Protocol):
    """A policy. number: decode steps since the prompt, 1, 2, ...; query and reference: [B, Hq, D], the query of this
    step and the one that the present selection was made for. Returns bool [B] on the host."""

    def due(self, number: int, query: Tensor, reference: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class EveryStride:
    """A new selection at steps stride, 2 stride, ..."""

    stride: int

    def due(self, number: int, query: Tensor, reference: Tensor) -> Tensor:
        return torch.full((query.shape[0],), number % self.stride == 0)


@dataclass(frozen=True)
class WhenDissimilar:
    """At every `interval`-th step, a new selection where the similarity of the two queries is below `threshold`.

    flat: one cosine of all heads together (else the mean of one per head). A threshold above 1 always selects anew,
    one of -1 or less never.
    """

    threshold: float
    interval: int = 1
    flat: bool = False

    def due(self, number: int, query: Tensor, reference: Tensor) -> Tensor:
        if number % self.interval:
            return torch.zeros(query.shape[0], dtype=torch.bool)
        return (similarity(query, reference, flat=self.flat) < self.threshold).cpu()


def similarity(query: Tensor, reference: Tensor, *, flat: bool = False) -> Tensor:
    """Cosine of queries [B, Hq, D], in [-1, 1]: the mean over heads, or of all heads as one vector: [B] float32."""
    a, b = query.float(), reference.float()
    if flat:
        return F.cosine_similarity(a.flatten(1), b.flatten(1), dim=-1).clamp(-1, 1)
    return F.cosine_similarity(a, b, dim=-1).clamp(-1, 1).mean(1)
