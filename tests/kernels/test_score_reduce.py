"""score_reduce against full weights in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention.backends.triton import score_reduce as module
from foveate.attention.backends.triton.score_reduce import block_mass, column_mass, log_sum_exp
from foveate.errors import ShapeError
from tests.kernels.definitions import DEVICE, error, lse_error, poison


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch, module)


def draw(B=1, Hq=4, Hkv=2, M=50, N=80, D=32, dtype=torch.float32):
    return torch.randn(B, Hq, M, D, device=DEVICE).to(dtype), torch.randn(B, Hkv, N, D, device=DEVICE).to(dtype)


def definition(q, k, scale, causal=True, window=None, q_positions=None):
    """Weights [B, Hq, M, N] and lse [B, Hq, M] in float64."""
    M, N = q.shape[2], k.shape[2]
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
    at = torch.arange(N - M, N, device=DEVICE)[None] if q_positions is None else q_positions
    at, slot = at[:, None, :, None], torch.arange(N, device=DEVICE)
    see = (at >= 0).expand(-1, -1, -1, N)
    see = see & (slot <= at) if causal else see
    see = see if window is None else see & (at - slot <= window)
    scores = scores.masked_fill(~see, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]), lse


GATES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}


def check(q, k, block_m=16, block_n=32, **options):
    gate = GATES[q.dtype]
    weights, lse = definition(q, k, 0.3, **options)
    assert lse_error(log_sum_exp(q, k, scale=0.3, **options), lse) <= 2e-3
    assert error(column_mass(q, k, scale=0.3, **options), weights.sum(2)) <= gate
    rows, cols = -(-q.shape[2] // block_m), -(-k.shape[2] // block_n)
    want = torch.zeros(*q.shape[:2], rows, cols, dtype=torch.float64, device=DEVICE)
    for r in range(rows):
        part = weights[:, :, r * block_m : (r + 1) * block_m].mean(2)
        part = torch.nn.functional.pad(part, (0, cols * block_n - k.shape[2]))
        want[:, :, r] = part.unflatten(-1, (cols, block_n)).sum(-1)
    got = block_mass(q, k, block_m=block_m, block_n=block_n, scale=0.3, **options)
    assert error(got, want) <= gate


@pytest.mark.parametrize("m, n", [(1, 1), (1, 65), (15, 63), (50, 127), (100, 100)])
def test_lengths(m, n):
    check(*draw(M=m, N=n))


@pytest.mark.parametrize("options", [{"causal": False}, {"window": 9}, {"window": 0}, {"causal": False, "window": 5}])
def test_visibility(options):
    check(*draw(), **options)


@pytest.mark.parametrize("window", [None, 20])
def test_chosen_queries_and_padding(window):
    at = torch.stack([torch.randperm(80, device=DEVICE)[:50] for _ in range(2)])
    at[1, :7] = -1
    check(*draw(B=2), q_positions=at, window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_widths_and_dtypes(dtype, dim):
    q, k = draw(M=20, D=dim, dtype=dtype)
    check(q / (dim / 32) ** 0.5, k)


@pytest.mark.parametrize("block_m, block_n", [(16, 16), (24, 48), (64, 96)])
def test_block_sizes(block_m, block_n):
    check(*draw(), block_m=block_m, block_n=block_n)


def test_agrees_with_the_statistics():
    from foveate.attention import statistics

    q, k = draw()
    for name, options in (("column_mass", {}), ("log_sum_exp", {}), ("block_mass", {"block_m": 16, "block_n": 32})):
        ours = getattr(module, name)(q, k, scale=0.3, window=11, **options)
        assert error(ours, getattr(statistics, name)(q, k, scale=0.3, window=11, **options).double()) <= 1e-5


def test_given_lse_and_strides():
    q, k = draw()
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    weights, lse = definition(q, k, 0.3)
    assert error(column_mass(q, k, scale=0.3, lse=lse.float()), weights.sum(2)) <= 1e-5


def test_bad_input_is_named():
    q, k = draw()
    with pytest.raises(ShapeError, match="does not fit k"):
        column_mass(q, k[..., :16], scale=1.0)
    with pytest.raises(ShapeError, match="blocks of 256"):
        block_mass(q, k, block_m=256, block_n=64, scale=1.0)
    with pytest.raises(ShapeError, match="q_positions"):
        column_mass(q, k, scale=1.0, q_positions=torch.zeros(1, 3, device=DEVICE))
