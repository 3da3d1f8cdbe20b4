"""HybridCache: every kind of state behind one transformers cache."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import UnsupportedCacheError
from foveate.lm import HybridCache
from foveate.lm.cache import CACHE_NAME
from tests.lm.test_model import KINDS, prompts, tiny


def filled() -> HybridCache:
    model, (ids, mask) = tiny(), prompts()
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=True)[CACHE_NAME]


def test_rows_move_in_every_layer():
    cache = filled()
    before = [cache.state(layer) for layer in range(len(KINDS))]
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert all(torch.equal(cache.state(n).position, before[n].position[[2, 0, 1]]) for n in range(len(KINDS)))
    cache.batch_repeat_interleave(2)
    assert cache.state(0).position.tolist() == [16, 16, 7, 7, 14, 14]
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert cache.state(3).position.tolist() == [16, 7]
    assert cache.layers[0].batch_size == 2


def test_lengths_count_columns_and_not_tokens():
    cache = filled()
    assert cache.get_seq_length() == 16
    assert cache.get_mask_sizes(4, 0) == (20, 0)
    assert cache.layers[0].get_max_length() == cache.layers[0].get_max_cache_shape() == -1
    assert not cache.is_compileable


def test_crop_is_refused_once_something_is_stored():
    HybridCache(3).crop(0)
    cache = filled()
    with pytest.raises(UnsupportedCacheError, match="has read 16 tokens: recurrent states cannot be rolled back"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.state(0) is None
    assert cache.bytes() == 0
    cache.crop(0)


def test_key_value_calls_are_refused():
    with pytest.raises(UnsupportedCacheError, match="has no update: it stores mixer states"):
        HybridCache(1).update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
