"""block_flash_bwd against automatic differentiation of the definition in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention.backends.triton import block_flash_bwd as module
from foveate.attention.backends.triton.block_flash import block_flash_fwd
from foveate.attention.backends.triton.block_flash_bwd import block_flash_bwd
from foveate.attention.backends.triton.configs import BackwardConfig, BlockConfig
from tests.kernels.definitions import DEVICE, causal_counts, error, poison
from tests.kernels.test_block_flash import draw, draw_plan

SMALL = (BackwardConfig(32, 16, 4, 1), BackwardConfig(16, 32, 4, 1))
GATES = {torch.float32: 2e-5, torch.float16: 1.5e-2, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch, module)


def definition(q, k, v, allowed, scale=None, sink=None, softcap=None):
    """o, lse in float64, with finite gradients where a query reads nothing (there lse is meaningless)."""
    G = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    blind = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed & ~blind, -torch.inf)
    if sink is not None:
        scores = torch.cat((scores, sink[None, :, None, None].expand_as(scores[..., :1])), -1)
        v = torch.cat((v, torch.zeros_like(v[:, :, :1])), 2)
    weights = scores.softmax(-1).masked_fill(blind, 0.0)
    return weights @ v, scores.logsumexp(-1).masked_fill(blind[..., 0], 0.0)


def check(q, k, v, plan, means, *, causal=True, sink=None, config=SMALL, with_lse=False, **options):
    B, Hq, M, N, dtype = q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.dtype
    allowed = means.repeat_interleave(Hq // means.shape[1], 1).expand(B, -1, -1, -1)
    if causal:
        allowed = allowed & (causal_counts(1, 1, M, N) > 0)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want_o, want_lse = definition(*exact, allowed, sink=None if sink is None else sink.double(), **options)
    do = torch.randn_like(want_o).to(dtype)
    dlse = torch.randn_like(want_lse).float() if with_lse else None
    loss = (want_o * do.double()).sum()
    if dlse is not None:
        loss = loss + (want_lse * dlse.double()).sum()
    want = torch.autograd.grad(loss, exact)
    forward = BlockConfig(32, 32, 4, 1)
    o, lse = block_flash_fwd(q, k, v, plan, causal=causal, sink=sink, config=forward, **options)
    got = block_flash_bwd(do, dlse, q, k, v, o, lse, plan, causal=causal, config=config, **options)
    for ours, exactly in zip(got, want):
        assert ours.dtype == dtype
        assert error(ours, exactly) <= GATES[dtype]
    return got


@pytest.mark.parametrize("m, n", [(1, 1), (15, 15), (65, 65), (127, 127), (20, 100)])
def test_lengths(m, n):
    check(*draw(M=m, N=n), *draw_plan(m, n, share=0.9), with_lse=True)


@pytest.mark.parametrize("heads, batch", [(1, 1), (1, 2), (2, 1), (6, 2), (6, 1)])
def test_heads_and_batches_of_plans(heads, batch):
    check(*draw(B=2, Hq=6, Hkv=2, M=70, N=70), *draw_plan(70, 70, heads, batch))


@pytest.mark.parametrize("block_m, block_n", [(16, 64), (64, 16), (48, 32)])
def test_blocks_that_differ_from_tiles(block_m, block_n):
    check(*draw(), *draw_plan(100, 100, block_m=block_m, block_n=block_n))


@pytest.mark.parametrize("dim, dim_v", [(80, 80), (64, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widths_and_dtypes(dim, dim_v, dtype):
    check(*draw(M=64, N=64, D=dim, DV=dim_v, dtype=dtype), *draw_plan(64, 64, share=0.8), config=None)


def test_not_causal():
    check(*draw(), *draw_plan(100, 100), causal=False)


def test_sink_softcap_and_scale():
    check(*draw(), *draw_plan(100, 100), sink=torch.randn(4, device=DEVICE), softcap=3.0, scale=0.3, with_lse=True)


def test_rows_that_read_nothing_and_keys_that_no_row_reads():
    dq, dk, dv, _ = check(*draw(), *draw_plan(100, 100, share=0.0), sink=torch.randn(4, device=DEVICE))
    assert all(each.eq(0).all() for each in (dq, dk, dv))


def test_strided_inputs_and_repeatability():
    q, k, v = draw(B=2)
    q2, k2 = (torch.empty_like(x.transpose(1, 2)).copy_(x.transpose(1, 2)).transpose(1, 2) for x in (q, k))
    plan, means = draw_plan(100, 100)
    check(q2, k2, v[:1, :1].expand(2, 2, -1, -1), plan, means)
    o, lse = block_flash_fwd(q, k, v, plan)
    once, again = (block_flash_bwd(o, None, q, k, v, o, lse, plan, config=SMALL) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


def test_transposed_lists():
    plan, _ = draw_plan(100, 130, heads=2, batch=2, block_m=16, block_n=32)
    mask = torch.zeros(4, plan.row_blocks, plan.key_blocks, dtype=torch.bool)
    for row in range(4 * plan.row_blocks):
        for col in plan.col[plan.row_ptr[row] : plan.row_ptr[row + 1]].tolist():
            mask[row // plan.row_blocks, row % plan.row_blocks, col] = True
    lists = plan.by_keys
    for entry in range(4 * plan.key_blocks):
        rows = lists.row[lists.ptr[entry] : lists.ptr[entry + 1]].tolist()
        head, col = divmod(entry, plan.key_blocks)
        assert rows == mask[head, :, col].nonzero()[:, 0].tolist()
        assert lists.n_masked[entry] == sum((col + 1) * 32 - 1 > r * 16 + 30 for r in rows)
    assert sorted(lists.order.tolist()) == list(range(4 * plan.key_blocks))
