"""Recall in language: the tokens that repeat a bigram seen earlier, and how much of a loss gap they make up.

A token i is a recall hit when the bigram (x_{i-1}, x_i) stood earlier in the same context. Restricted to bigrams that
are rare in the training data, a hit must be read from the context and cannot be remembered (Arora et al. 2023, arXiv
2312.04927, count below 1250 in their 10B tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.shapes import match
from foveate.errors import ShapeError


@dataclass(frozen=True)
class BigramCounts:
    """How often bigrams occur in a corpus. codes: sorted [n], first * vocab + second; counts: [n]."""

    codes: Tensor
    counts: Tensor
    vocab: int

    @classmethod
    def of(cls, ids: Tensor, vocab: int) -> BigramCounts:
        """Count the bigrams of rows ids [B, N]."""
        codes, counts = _codes(ids, vocab).flatten().unique(return_counts=True)
        return cls(codes, counts, vocab)

    def look_up(self, ids: Tensor) -> Tensor:
        """[B, N] the count of the bigram that ends at each token; 0 for the first token of a row."""
        codes = _codes(ids, self.vocab)
        if self.codes.numel() == 0:
            return torch.zeros_like(ids)
        place = torch.searchsorted(self.codes, codes).clamp(max=self.codes.numel() - 1)
        found = torch.where(self.codes[place] == codes, self.counts[place], 0)
        return torch.nn.functional.pad(found, (1, 0))


def _codes(ids: Tensor, vocab: int) -> Tensor:
    match(ids=(ids, "B N"))
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
        raise ShapeError(f"ids from {int(ids.min())} to {int(ids.max())}, allowed: 0 to vocab - 1 = {vocab - 1}")
    return ids[:, :-1].long() * vocab + ids[:, 1:].long()


def recall_hits(ids: Tensor, vocab: int, *, corpus: BigramCounts | None = None, rare_below: int = 1250) -> Tensor:
    """[B, N] bool: tokens whose bigram stood earlier in their row, and is rare in `corpus` when that is given."""
    codes = _codes(ids, vocab)
    order = codes.argsort(dim=1, stable=True)
    ranked = codes.gather(1, order)
    # In a stable order all but the first of equal codes have an equal one earlier in the row.
    again = torch.nn.functional.pad(ranked[:, 1:] == ranked[:, :-1], (1, 0))
    hits = torch.nn.functional.pad(torch.zeros_like(again).scatter(1, order, again), (1, 0))
    return hits if corpus is None else hits & (corpus.look_up(ids) < rare_below)


@dataclass(frozen=True)
class RecallGap:
    """Two models' losses on recall hits and on the rest.

    share: hits among tokens.    loss, other_loss: mean loss (nats) on hits, for the model and for the one it is
    compared with.    rest, other_rest: the same on the rest.    gap_share: how much of the total difference lies on
    hits (nan when there is no difference).
    """

    share: float
    loss: float
    other_loss: float
    rest: float
    other_rest: float
    gap_share: float


def recall_gap(losses: Tensor, other: Tensor, hits: Tensor) -> RecallGap:
    """Slice two models' per-token losses [B, N] by hits [B, N]."""
    match(losses=(losses, "B N"), other=(other, "B N"), hits=(hits, "B N"))
    losses, other = losses.double(), other.double()
    total = (losses - other).sum()
    on_hits = ((losses - other) * hits).sum()

    def mean(values: Tensor, where: Tensor) -> float:
        return float(values[where].mean()) if bool(where.any()) else float("nan")

    return RecallGap(
        share=float(hits.double().mean()),
        loss=mean(losses, hits),
        other_loss=mean(other, hits),
        rest=mean(losses, ~hits),
        other_rest=mean(other, ~hits),
        gap_share=float(on_hits / total) if float(total) != 0 else float("nan"),
    )
