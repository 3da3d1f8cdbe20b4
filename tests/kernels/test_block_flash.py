"""block_flash_fwd against its definition in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention import Blocks
from foveate.attention.backends.triton import block_flash as module
from foveate.attention.backends.triton.block_flash import block_flash_fwd
from foveate.attention.backends.triton.configs import BlockConfig
from foveate.errors import PlanError, ShapeError
from tests.kernels.definitions import DEVICE, GATES, attention, causal_counts, error, lse_error

SMALL = BlockConfig(32, 32, 4, 2, edge=16)


def draw(B=1, Hq=4, Hkv=2, M=100, N=100, D=32, DV=None, dtype=torch.float32):
    shapes = ((B, Hq, M, D), (B, Hkv, N, D), (B, Hkv, N, DV or D))
    return tuple(torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)


def draw_plan(m, n, heads=4, batch=1, block_m=32, block_n=32, columns=0, share=0.5):
    """A random plan and the bool [batch, heads, M, N] that it means before causality."""
    mask = torch.rand(batch, heads, -(-m // block_m), -(-n // block_n), device=DEVICE) < share
    plan = Blocks.from_mask(mask, block_m=block_m, block_n=block_n).lower(m, n)
    means = mask.repeat_interleave(block_m, 2)[:, :, :m].repeat_interleave(block_n, 3)[..., :n]
    if columns:
        listed = torch.randint(-2, n, (batch, heads, columns), device=DEVICE)
        plan = plan.with_columns(listed)
        means = means | (listed[..., None] == torch.arange(n, device=DEVICE)).any(2)[:, :, None]
    return plan, means


def check(q, k, v, plan, means, dtype=torch.float32, config=SMALL, causal=True, **options):
    B, Hq, M, N = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    counts = means.repeat_interleave(Hq // means.shape[1], 1).expand(B, -1, -1, -1).double()
    if causal:
        counts = counts * causal_counts(1, 1, M, N)
    want_o, want_lse = attention(q, k, v, counts, **options)
    o, lse = block_flash_fwd(q, k, v, plan, config=config, causal=causal, **options)
    assert error(o, want_o) <= GATES[dtype]
    assert lse_error(lse, want_lse) <= 2e-3
    return o, lse


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Every buffer that the launcher asks for starts as NaN."""

    def empty(*size, **options):
        return torch.full(size[0] if isinstance(size[0], tuple | list) else size, float("nan"), **options)

    class Poisoned:
        def __getattr__(self, name):
            return empty if name == "empty" else getattr(torch, name)

    monkeypatch.setattr(module, "torch", Poisoned())


@pytest.mark.parametrize("m, n", [(1, 1), (15, 15), (63, 63), (65, 65), (127, 127), (20, 100)])
@pytest.mark.parametrize("columns", [0, 9])
def test_lengths(m, n, columns):
    check(*draw(M=m, N=n), *draw_plan(m, n, columns=columns))


@pytest.mark.parametrize("heads, batch", [(1, 1), (1, 2), (2, 1), (6, 2), (6, 1)])
@pytest.mark.parametrize("columns", [0, 9])
def test_heads_and_batches_of_plans(heads, batch, columns):
    check(*draw(B=2, Hq=6, Hkv=2, M=70, N=70), *draw_plan(70, 70, heads, batch, columns=columns))


@pytest.mark.parametrize("block_m, block_n", [(16, 64), (64, 16), (48, 32), (32, 96)])
def test_blocks_that_differ_from_tiles(block_m, block_n):
    config = BlockConfig(32, 32, 4, 2)
    check(*draw(), *draw_plan(100, 100, block_m=block_m, block_n=block_n, columns=5), config=config)


@pytest.mark.parametrize("dim, dim_v", [(32, 32), (80, 80), (64, 128), (192, 64), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widths_and_dtypes(dim, dim_v, dtype):
    qkv = draw(M=64, N=64, D=dim, DV=dim_v, dtype=dtype)
    check(*qkv, *draw_plan(64, 64, columns=5, share=0.8), dtype=dtype, config=None)


@pytest.mark.parametrize("kind", [{"tma": True}, {"persistent": True}, {"tma": True, "persistent": True}])
def test_variants(kind):
    check(*draw(), *draw_plan(100, 100, columns=9), config=replace(SMALL, **kind))


def test_not_causal():
    check(*draw(), *draw_plan(100, 100, columns=9), causal=False)


@pytest.mark.parametrize("columns", [0, 9])
def test_sink_softcap_and_scale(columns):
    sink = torch.randn(4, device=DEVICE)
    check(*draw(), *draw_plan(100, 100, columns=columns), sink=sink, softcap=3.0, scale=0.3)


def test_rows_that_read_nothing():
    plan, means = draw_plan(100, 100, share=0.0)
    o, lse = check(*draw(), plan, means)
    assert o.eq(0).all()
    assert lse.eq(-torch.inf).all()
    sink = torch.randn(4, device=DEVICE)
    o, lse = check(*draw(), plan, means, sink=sink)
    assert o.eq(0).all()


def test_columns_alone_and_columns_wholly_covered():
    check(*draw(), *draw_plan(100, 100, share=0.0, columns=40))
    check(*draw(), *draw_plan(100, 100, share=1.0, columns=40))


def test_unlisted_keys_are_never_read():
    q, k, v = draw(M=64, N=64)
    plan, means = draw_plan(64, 64, heads=1, share=0.0, columns=10)
    unread = ~means[0, 0, -1]
    k[:, :, unread], v[:, :, unread] = float("nan"), float("nan")
    o, _ = block_flash_fwd(q, k, v, plan, config=SMALL)
    counts = means.expand(1, 4, -1, -1) * causal_counts(1, 1, 64, 64)
    want, _ = attention(q, k.nan_to_num(0.0), v, counts)
    assert error(o, want) <= 1e-5


def test_large_scores_and_repeatability():
    q, k, v = draw()
    plan, means = draw_plan(100, 100, columns=9)
    scale = 60 / (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).abs().max().item()
    first = check(q, k, v, plan, means, scale=scale)
    again = block_flash_fwd(q, k, v, plan, config=SMALL, scale=scale)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_strided_and_expanded_inputs():
    q, k, v = draw(B=2)
    q2, k2 = (torch.empty_like(x.transpose(1, 2)).copy_(x.transpose(1, 2)).transpose(1, 2) for x in (q, k))
    v2 = v[:1, :1].expand(2, 2, -1, -1)
    for tma in (False, True):
        check(q2, k2, v2, *draw_plan(100, 100), config=replace(SMALL, tma=tma))


def test_any_work_order_gives_the_same():
    q, k, v = draw()
    plan, means = draw_plan(100, 100, columns=9)
    shuffled = replace(plan, order=torch.randperm(plan.order.numel(), device=DEVICE).to(torch.int32))
    assert torch.equal(check(q, k, v, plan, means)[0], check(q, k, v, shuffled, means)[0])


def test_work_order_runs_one_head_after_another():
    plan, _ = draw_plan(200, 200)
    order, counts = plan.order.long(), plan.row_ptr.diff()
    assert (order // 7).tolist() == sorted((order // 7).tolist())
    assert (counts[order].view(4, 7).diff(dim=1) <= 0).all()


def test_bad_input_is_named():
    q, k, v = draw()
    plan, _ = draw_plan(100, 100)
    with pytest.raises(PlanError, match="does not fit q"):
        block_flash_fwd(q[:, :, :50], k, v, plan)
    with pytest.raises(PlanError, match="multiples of 16"):
        block_flash_fwd(q, k, v, replace(plan, block_m=24))
    with pytest.raises(PlanError, match="columns"):
        block_flash_fwd(q, k, v, plan.with_columns(torch.zeros(1, 2, 3)))
    with pytest.raises(ShapeError, match="scale=0"):
        block_flash_fwd(q, k, v, plan, scale=0)
    with pytest.raises(ShapeError, match="does not fit k"):
        block_flash_fwd(q, k[..., :16], v, plan)
