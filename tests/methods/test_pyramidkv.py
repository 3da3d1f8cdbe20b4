"""PyramidKV's layer budgets, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import OptionError
from foveate.methods import SingleLayer
from foveate.methods.budgets import falling_budget
from foveate.methods.keep.pyramidkv import PyramidKV
from foveate.methods.keep.snapkv import SnapKV
from tests.methods.driving import check_padded_rows_equal_singles, check_steps_equal_masked_dense, kept, random_qkv


def counts(method: PyramidKV, layers: int, tokens: int) -> list[int]:
    return [method.layer_count(layer, layers, tokens) for layer in range(layers)]


def test_original_by_hand() -> None:
    # room 40, least 40 // 4 = 10, most 70, step 60 // 3 = 20; the window of 8 comes on top.
    assert counts(PyramidKV(budget=48, window=8, beta=4), 4, 1000) == [78, 58, 38, 18]
    # most 70 is cut to 90 - 30 = 60, least becomes 20, step 40 // 3 = 13.
    assert counts(PyramidKV(budget=70, window=30, beta=4), 4, 90) == [90, 77, 64, 51]
    # 75 < 2 room: plain SnapKV.
    assert counts(PyramidKV(budget=48, window=8, beta=4), 4, 75) == [48, 48, 48, 48]
    assert counts(PyramidKV(budget=48, window=8, beta=4), 4, 47) == [47, 47, 47, 47]


def test_kvpress_by_hand() -> None:
    # mean 24, least 12, most 36 < 42: the window is included.
    assert counts(PyramidKV(ratio=0.5, window=6, beta=2, variant="kvpress"), 2, 48) == [36, 12]
    # most 117 is cut to 90, least becomes 30.
    assert counts(PyramidKV(budget=60, window=10, beta=20, variant="kvpress"), 4, 100) == [90, 70, 50, 30]
    # most 67.5 is cut to 66, least becomes 24; 55.5 and 34.5 are rounded half to even.
    assert counts(PyramidKV(budget=45, window=6, beta=2, variant="kvpress"), 5, 72) == [66, 56, 45, 34, 24]
    # least 2 < window: every layer keeps round(0.4 * 100).
    assert counts(PyramidKV(ratio=0.6, window=10, beta=20, variant="kvpress"), 3, 100) == [40, 40, 40]


@pytest.mark.parametrize("layers", [2, 5, 30])
@pytest.mark.parametrize("beta", [1, 3, 20])
def test_layers_share_the_mean_budget(layers: int, beta: int) -> None:
    made = counts(PyramidKV(budget=264, window=8, beta=beta), layers, 5000)
    free = [each - 8 for each in made]
    assert free == sorted(free, reverse=True)
    # Exact but for what the floor of the step leaves to every layer.
    assert 0 <= sum(free) - layers * 256 <= layers * (layers - 1) / 2
    if beta == 1:
        assert set(free) == {256}


def test_ada_pyramid_slopes_on_short_prompts_too() -> None:
    # room 40 of 67 free keys: most is cut to 67, least becomes 13, step 54 // 3 = 18.
    assert [falling_budget(layer, 4, 40, 67, 4) for layer in range(4)] == [67, 49, 31, 13]


def test_each_layer_keeps_its_count_of_snapkvs_best() -> None:
    q, k, v = random_qkv(N=64)
    for index, count in enumerate((20, 15, 10, 5)):
        layer = SingleLayer(PyramidKV(budget=12, window=3, beta=5, kernel=3), layer=index, layers=4)
        layer(q, k, v)
        # room 9, least 1, most 17, step 16 // 3 = 5.
        plain = SingleLayer(SnapKV(budget=count, window=3, kernel=3))
        plain(q, k, v)
        assert [kept(layer, 1, head) for head in range(2)] == [kept(plain, 1, head) for head in range(2)]


def test_steps_and_padding() -> None:
    def make() -> SingleLayer:
        return SingleLayer(PyramidKV(budget=12, window=3, beta=5, kernel=3), layer=1, layers=3)

    check_steps_equal_masked_dense(make(), random_qkv(), 30)
    check_padded_rows_equal_singles(make, random_qkv(B=3), 30, [12, 3, 0])


def test_a_ratio_below_the_window_leaves_the_window() -> None:
    assert counts(PyramidKV(ratio=0.9, window=8), 3, 50) == [8, 8, 8]


def test_refusals() -> None:
    with pytest.raises(OptionError, match=r"PyramidKV: budget=8, allowed: > window=8"):
        PyramidKV(budget=8, window=8)
    with pytest.raises(OptionError, match=r"kernel=4, allowed: an odd number"):
        PyramidKV(kernel=4)
    with pytest.raises(OptionError, match=r"variant='x', allowed"):
        PyramidKV(variant="x")


def test_one_layer_keeps_the_most() -> None:
    assert counts(PyramidKV(budget=48, window=8, beta=4), 1, 1000) == [78]
    assert counts(PyramidKV(budget=48, window=8, beta=4, variant="kvpress"), 1, 1000) == [84]
    assert torch.tensor(counts(PyramidKV(budget=10**6), 3, 100)).eq(100).all()
