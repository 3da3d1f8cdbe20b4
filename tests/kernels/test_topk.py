"""topk_select against a stable sort: exactly the same positions."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention.backends.triton.configs import TopkConfig
from foveate.attention.backends.triton.topk import topk_select
from foveate.errors import ShapeError
from tests.kernels.definitions import DEVICE

# Several chunks of several blocks even for short rows.
CUT = TopkConfig(block=128, num_warps=4, most_chunks=3)
# Chunks that are one block.
WHOLE = TopkConfig(block=512, num_warps=4, most_chunks=3, least_block=128)
# What is kept of a chunk is read in parts.
PARTS = TopkConfig(block=512, num_warps=4, most_chunks=3, width=128)
CHUNKED = pytest.mark.parametrize("config", [CUT, WHOLE, PARTS], ids=["chunks of blocks", "chunks", "parts"])
CONFIGS = pytest.mark.parametrize("config", [None, CUT, WHOLE], ids=["one block", "chunks of blocks", "chunks"])


def expected(scores: torch.Tensor, k: int, length=None, finite=False) -> torch.Tensor:
    rows = []
    for r, row in enumerate(scores.double()):
        n = row.numel() if length is None else int(length[r])
        row = row[:n].masked_fill(row[:n].isnan(), -torch.inf)
        order = torch.sort(row, descending=True, stable=True).indices[:k]
        if finite:
            order = order[row[order] > -torch.inf]
        order = order.sort().values
        rows.append(torch.nn.functional.pad(order, (0, k - order.numel()), value=-1))
    return torch.stack(rows).to(torch.int32)


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, k", [(1, 1), (15, 4), (63, 63), (65, 1), (127, 20), (1000, 128), (1000, 999)])
def test_equals_a_stable_sort(config, dtype, n, k):
    scores = torch.randn(3, n, device=DEVICE).to(dtype)
    assert torch.equal(topk_select(scores, k, config=config), expected(scores, k))


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_positions(config, dtype):
    scores = torch.randint(-2, 3, (4, 777), device=DEVICE).to(dtype)
    scores[1] = 0.0
    scores[2, ::3] = -0.0
    scores[3] = -torch.inf
    for k in (1, 300, 777):
        assert torch.equal(topk_select(scores, k, config=config), expected(scores, k))


@CONFIGS
def test_extremes(config):
    tiny = torch.finfo(torch.float32).tiny
    values = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1.0, -1.0, tiny, -tiny, tiny / 8, 3e38, -3e38]
    scores = torch.tensor(values * 31, device=DEVICE)[torch.randperm(31 * len(values))][None]
    for k in (1, 40, 100, 200, 350, 403):
        assert torch.equal(topk_select(scores, k, config=config), expected(scores, k))


def test_neighbouring_float32_values_are_told_apart():
    base = torch.full((1, 600), 1.0, device=DEVICE).view(torch.int32)
    scores = (base + torch.randperm(600, device=DEVICE, dtype=torch.int32)).view(torch.float32)
    for config in (None, CUT, WHOLE):
        assert torch.equal(topk_select(scores, 77, config=config), expected(scores, 77))


@CONFIGS
def test_lengths_and_absent_entries(config):
    scores = torch.randn(5, 500, device=DEVICE)
    length = torch.tensor([500, 0, 7, 130, 64], device=DEVICE)
    scores[1] = float("nan")
    scores[2, 7:] = torch.inf
    got = topk_select(scores, 64, length=length, config=config)
    assert torch.equal(got, expected(scores, 64, length))


@pytest.mark.parametrize(
    "config, dtype",
    [
        (None, torch.float32), (None, torch.bfloat16), (None, torch.float16),
        (CUT, torch.float32), (WHOLE, torch.bfloat16), (PARTS, torch.float32),
    ],
)  # fmt: skip
def test_entries_that_are_not_finite_are_not_taken(config, dtype):
    scores = torch.randn(7, 400, device=DEVICE).to(dtype)
    scores[1] = -torch.inf
    scores[2, 70:] = -torch.inf
    scores[3] = scores[3].masked_fill(torch.rand(400, device=DEVICE) < 0.9, -torch.inf)
    scores[4, ::2] = torch.nan
    scores[4, 1::4] = -torch.inf
    scores[5] = torch.nan
    scores[6] = scores[6].sign().masked_fill(torch.rand(400, device=DEVICE) < 0.8, -torch.inf)
    for k in (70, 71, 400):
        got = topk_select(scores, k, finite=True, config=config)
        assert torch.equal(got, expected(scores, k, finite=True))
    length = torch.tensor([333, 0, 7, 130, 400, 64, 300], device=DEVICE)
    got = topk_select(scores, 71, length=length, finite=True, config=config)
    assert torch.equal(got, expected(scores, 71, length, finite=True))


def sampled_positions(n: int) -> torch.Tensor:
    """Where `bounds` looks for the sample: a hash of 1 .. 512 modulo 2^32, scaled to the row."""
    x = torch.arange(1, 513) * 0x9E3779B1 % 2**32
    x = (x ^ (x >> 15)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return (x ^ (x >> 16)) * n >> 32


def test_a_sample_that_misleads_costs_time_alone():
    n, k = 4224, 520
    at = sampled_positions(n)
    assert at.unique().numel() < k
    scores = torch.randn(5, n)
    # Only the sample is large, so that it bounds fewer than k scores; only it is low; it is nothing; it is all equal.
    scores[0, at] += 100
    scores[1, at] -= 100
    scores[2, at] = torch.nan
    scores[3, at] = 3e38
    # Most entries are masked, and fewer than k are not.
    scores[4] = scores[4].masked_fill(torch.rand(n) < 0.92, -1e9)
    scores[4, 7] = -torch.inf
    scores = scores.to(DEVICE)
    assert torch.equal(topk_select(scores, k, config=WHOLE), expected(scores, k))
    length = torch.tensor([n, 4200, 520, 17, n], device=DEVICE)
    assert torch.equal(topk_select(scores, k, length=length, config=WHOLE), expected(scores, k, length))


@CHUNKED
@pytest.mark.parametrize("k", [3, 40, 600])
def test_ranges_of_scores(config, k):
    x = torch.randn(8, 1200)
    rows = (
        x[0] + 1000, x[1] * 1e-42, (8 * x[2]).exp(), x[3].relu(), x[4].sort().values, (x[5] / x[6]) ** 3,
        x[6].masked_fill(torch.rand(1200) < 0.9, -torch.inf), x[7].masked_fill(torch.rand(1200) < 0.95, -1e9),
        x[0].masked_fill(torch.rand(1200) < 0.6, torch.inf), torch.full((1200,), torch.nan), -x[1].abs() - 5,
    )  # fmt: skip
    scores = torch.stack(rows).to(DEVICE)
    assert torch.equal(topk_select(scores, k, config=config), expected(scores, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranges_of_16_bit_scores(dtype):
    x = torch.randn(3, 1200)
    scores = torch.stack((x[0] + 100, x[1] * 1e-6, (x[2] * 4).exp())).to(DEVICE, dtype)
    for k in (3, 150, 900):
        assert torch.equal(topk_select(scores, k, config=PARTS), expected(scores, k))


def test_leading_dimensions_and_strides():
    scores = torch.randn(2, 3, 400, device=DEVICE)[:, :, :300]
    got = topk_select(scores, 10)
    assert got.shape == (2, 3, 10)
    assert torch.equal(got.view(6, 10), expected(scores.reshape(6, 300), 10))
    wide = torch.randn(2, 400, device=DEVICE)[:, :300]
    assert torch.equal(topk_select(wide, 10, config=CUT), expected(wide, 10))


def test_bad_input_is_named():
    with pytest.raises(ShapeError, match=r"k=9, allowed: 1 .. 8"):
        topk_select(torch.randn(2, 8), 9)
    with pytest.raises(ShapeError, match="float64"):
        topk_select(torch.randn(2, 8).double(), 2)
