"""KNorm: the smallest norms stay."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import OptionError
from foveate.methods import SingleLayer
from foveate.methods.keep.knorm import KNorm
from tests.methods.driving import kept, random_qkv


def test_the_smallest_norms_stay() -> None:
    q, k, v = random_qkv()
    layer = SingleLayer(KNorm(budget=10))
    layer(q, k, v)
    for row in range(2):
        for head in range(2):
            norms = [sum(float(x) ** 2 for x in key) for key in k[row, head]]
            assert kept(layer, row, head) == sorted(sorted(range(40), key=norms.__getitem__)[:10])


def test_rotation_does_not_matter_and_neither_do_queries() -> None:
    q, k, v = random_qkv()
    k = torch.nn.functional.normalize(k, dim=-1) * torch.arange(40, 0, -1, dtype=k.dtype)[:, None]
    layer = SingleLayer(KNorm(budget=3))
    layer(q * 0, k, v)
    assert kept(layer) == [37, 38, 39]


@pytest.mark.parametrize(("layer", "stored"), [(0, 40), (1, 40), (2, 10)])
@pytest.mark.parametrize("when", ["prompt", "always"])
@pytest.mark.parametrize("chunked", [False, True])
def test_skipped_layers_stay_whole(layer: int, stored: int, when: str, chunked: bool) -> None:
    made = SingleLayer(KNorm(budget=10, skip_layers=2, when=when), layer=layer, layers=4, chunked=chunked)
    made(*random_qkv())
    made.finish_prefill()
    assert made.cache.stored == stored


def test_refusals() -> None:
    with pytest.raises(OptionError, match=r"skip_layers=-1, allowed: >= 0"):
        KNorm(skip_layers=-1)
