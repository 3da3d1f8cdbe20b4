"""KeyIndex: finds, for a query, the stored keys with the largest inner products.

Indexes hold no keys of their own unless they must: keys are handed to every call as the buffer they lie in,
keys [B, Hkv, capacity, D] on the host, of which sequence b uses the first length[b] rows. What an index holds is
batch-first, so that it follows its layer when sequences are reordered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import ShapeError, StateError


@dataclass(frozen=True)
class Found:
    """What a search found.

    index: int64 [B, Hq, k], rows by falling inner product, -1 where a sequence has fewer.
    scanned: int64 [B, Hq], keys whose inner product was computed.
    """

    index: Tensor
    scanned: Tensor


def recall_of(found: Found, best: Found) -> float | None:
    """The share of the rows in `best` [B, Hq, k] that `found` [B, Hq, K] has too, the mean over heads and sequences.

    Sequences without keys do not count; None where none has any.
    """
    held = (best.index[..., None] == found.index[..., None, :]).any(-1) & (best.index >= 0)
    counts = (best.index >= 0).sum(-1)
    some = counts > 0
    return float((held.sum(-1)[some] / counts[some]).double().mean()) if bool(some.any()) else None


@dataclass
class KeyIndex(ABC):
    """Maximum-inner-product search over the keys of B sequences and Hkv heads, by Hq = G Hkv query heads.

    length: int64 [B] on the host, keys indexed per sequence.
    """

    length: Tensor

    @abstractmethod
    def find(self, q: Tensor, keys: Tensor, count: int, beam: int) -> Found:
        """`search` without its checks."""

    @abstractmethod
    def insert(self, keys: Tensor, length: Tensor, queries: Tensor | None, real: Tensor | None) -> None:
        """Take in the rows self.length[b] <= j < length[b] of every sequence."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the index holds beside the keys."""

    @property
    def host_bytes(self) -> int:
        """All of them lie in the host's memory, and a layer's cache counts them so."""
        return self.nbytes

    def search(self, q: Tensor, keys: Tensor, length: Tensor, *, count: int, beam: int = 0) -> Found:
        """The `count` best rows of keys [B, Hkv, capacity, D] for q [B, Hq, D].

        beam: candidates that an approximate search keeps; at least `count`.
        Raises StateError when the index holds other numbers of keys than `length` [B] says.
        """
        if q.shape[0] != keys.shape[0] or q.shape[-1] != keys.shape[-1] or q.shape[1] % keys.shape[1]:
            raise ShapeError(f"search: q {list(q.shape)} does not fit keys {list(keys.shape)}")
        self.check_current(length)
        return self.find(q, keys, count, max(beam, count))

    def append(self, keys: Tensor, length: Tensor, queries: Tensor | None = None, real: Tensor | None = None) -> None:
        """Take in new keys, up to `length` [B]; queries [B, Hq, M, D] that came with them, of which real [B, M] exist
        (None: all), help where they can."""
        if self.length.shape != length.shape or bool((length < self.length).any()):
            raise StateError(
                f"the index holds {self.length.tolist()} keys per sequence and cannot go back to {length.tolist()}; "
                "build a new one"
            )
        self.insert(keys, length, queries, real)
        self.length = length.clone()

    def check_current(self, length: Tensor) -> None:
        if self.length.shape != length.shape or not torch.equal(self.length, length):
            raise StateError(
                f"stale index: it holds {self.length.tolist()} keys per sequence, and {length.tolist()} are stored; "
                "call append() after every change of the keys, or build a new index"
            )
