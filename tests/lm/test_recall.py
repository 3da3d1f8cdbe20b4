"""Recall hits: tokens that repeat a bigram of their own context."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from foveate.errors import ShapeError
from foveate.lm.recall import BigramCounts, recall_gap, recall_hits


def by_hand(rows: list[list[int]]) -> list[list[bool]]:
    found = []
    for row in rows:
        seen: set[tuple[int, int]] = set()
        hits = [False]
        for pair in pairwise(row):
            hits.append(pair in seen)
            seen.add(pair)
        found.append(hits)
    return found


def test_hits_are_repeated_bigrams():
    ids = torch.randint(0, 4, (5, 40), generator=torch.Generator().manual_seed(0))
    assert recall_hits(ids, 4).tolist() == by_hand(ids.tolist())
    assert recall_hits(torch.tensor([[7, 1, 7, 1, 2]]), 8).tolist() == [[False, False, False, True, False]]


def test_frequent_bigrams_of_the_corpus_are_no_recall():
    corpus = BigramCounts.of(torch.tensor([[1, 2] * 5]), 9)
    assert corpus.look_up(torch.tensor([[1, 2, 1, 8]])).tolist() == [[0, 5, 4, 0]]
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4]])
    assert recall_hits(ids, 9, corpus=corpus, rare_below=5).tolist() == [[*[False] * 6, True, True]]


def test_the_gap_is_split_between_hits_and_the_rest():
    hits = torch.tensor([[False, True, False, True]])
    gap = recall_gap(torch.tensor([[1.0, 3.0, 1.0, 5.0]]), torch.tensor([[1.0, 1.0, 0.0, 2.0]]), hits)
    assert gap.share == 0.5
    assert (gap.loss, gap.other_loss, gap.rest, gap.other_rest) == (4, 1.5, 1, 0.5)
    assert gap.gap_share == pytest.approx(5 / 6)
    same = recall_gap(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    assert math.isnan(same.gap_share)
    assert math.isnan(same.loss)


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(ShapeError, match="ids from 0 to 9, allowed: 0 to vocab - 1 = 4"):
        recall_hits(torch.tensor([[0, 9]]), 5)
