"""When what was found for one query may serve a later one: by counting steps, or by how much the queries differ.

A policy says for every sequence of a batch whether something new is due; sequences decide for themselves, so a batch
behaves as its rows would alone. `NearestQuery` also chooses, for every head, among several earlier queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

NEVER = 2**62


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
        if self.flat and query.device.type == "cpu":
            return torch.tensor([each < self.threshold for each in _flat_cosines(query, reference)])
        return (similarity(query, reference, flat=self.flat) < self.threshold).cpu()


@dataclass(frozen=True)
class NearestQuery:
    """Anew where a query lies far from the earlier one: |q - p|^2 >= 2 D (1 - threshold)^2, in float32.

    2 D is what independent queries of unit variance have; a threshold of 1 always starts anew. `match` chooses among
    several earlier queries; as a policy with one of them, a sequence starts anew when any of its heads would.
    """

    threshold: float

    def due(self, number: int, query: Tensor, reference: Tensor) -> Tensor:
        return (~self._near(_squared_distance(query, reference), query.shape[-1])).any(1).cpu()

    def match(self, query: Tensor, held: Tensor, at: Tensor, fits: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest of n earlier queries of each head: its position, int64 [B, Hq], and bool, whether it is near.

        query: [B, Hq, D]; held: [B, n, Hq, D]; at: int64 [B, n, 1], their positions; fits: bool [B, n, 1 or Hq], those
        that may serve. Ties go to the lowest position; NEVER where none may.
        """
        distance = torch.where(fits, _squared_distance(query[:, None], held), torch.inf)
        least = distance.amin(1)
        nearest = torch.where(fits & (distance == least[:, None]), at, NEVER).amin(1)
        return nearest, self._near(least, query.shape[-1])

    def _near(self, distance: Tensor, width: int) -> Tensor:
        return distance < 2 * width * (1 - self.threshold) ** 2


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).square().sum(-1)


def _flat_cosines(query: Tensor, reference: Tensor) -> list[float]:
    """`similarity(flat=True)` on the CPU by few operators, which cost a decode step more than their arithmetic."""
    pairs = torch.stack((query, reference), 1).flatten(2).float()
    found = []
    for (a, both), (_, b) in (pairs @ pairs.transpose(1, 2)).tolist():
        found.append(max(-1.0, min(1.0, both / max(1e-8, math.sqrt(a)) / max(1e-8, math.sqrt(b)))))
    return found


def similarity(query: Tensor, reference: Tensor, *, flat: bool = False) -> Tensor:
    """Cosine of queries [B, Hq, D], in [-1, 1]: the mean over heads, or of all heads as one vector: [B] float32."""
    a, b = query.float(), reference.float()
    if flat:
        return F.cosine_similarity(a.flatten(1), b.flatten(1), dim=-1).clamp(-1, 1)
    return F.cosine_similarity(a, b, dim=-1).clamp(-1, 1).mean(1)
