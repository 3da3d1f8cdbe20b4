"""Gradients of plans with key columns against automatic differentiation of the definition in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention import VerticalSlash
from foveate.attention.backends import reference
from foveate.attention.backends.triton import block_flash as forward_module
from foveate.attention.backends.triton import block_flash_bwd as module
from foveate.attention.backends.triton import block_flash_bwd_columns as columns_module
from foveate.attention.backends.triton import plans
from foveate.attention.backends.triton.block_flash import block_flash_fwd
from foveate.attention.backends.triton.block_flash_bwd import block_flash_bwd
from foveate.attention.backends.triton.configs import BackwardConfig
from foveate.attention.backends.triton.stripes import stripes
from tests.kernels.compiling import compiled
from tests.kernels.definitions import DEVICE, error, poison
from tests.kernels.test_block_flash import draw, draw_plan
from tests.kernels.test_block_gradients import check
from tests.kernels.test_plans import HKV, HQ, B, make
from tests.kernels.test_sigmoid_kernels import check_gradients

WIDE = (BackwardConfig(32, 32, 4, 1), BackwardConfig(32, 128, 4, 1))


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch, forward_module, module, columns_module)


def listing(m, n, listed, share=0.5, block=32):
    """A plan of random blocks that reads the slots `listed` [batch, heads, V], and what it means."""
    plan, means = draw_plan(m, n, listed.shape[1], listed.shape[0], block, block, share=share)
    named = (listed[..., None] == torch.arange(n, device=DEVICE)).any(2)
    return plan.with_columns(listed), means | named[:, :, None]


@pytest.mark.parametrize("m, n", [(1, 1), (35, 35), (20, 100)])
def test_lengths(m, n):
    check(*draw(M=m, N=n), *draw_plan(m, n, columns=9), config=WIDE, with_lse=True)


@pytest.mark.parametrize("heads, batch", [(1, 2), (2, 1), (4, 2)])
def test_heads_and_batches_of_plans(heads, batch):
    check(*draw(B=2, M=40, N=40), *draw_plan(40, 40, heads, batch, columns=9), config=WIDE)


@pytest.mark.parametrize("block_m, block_n", [(16, 64), (48, 32)])
def test_blocks_that_differ_from_tiles(block_m, block_n):
    qkv = draw(Hq=2, Hkv=1, M=70, N=70)
    check(*qkv, *draw_plan(70, 70, 2, block_m=block_m, block_n=block_n, columns=9), config=WIDE)


@pytest.mark.parametrize("dim, dim_v", [(64, 64), (40, 72)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widths_and_dtypes(dim, dim_v, dtype):
    check(*draw(Hq=2, Hkv=1, M=64, N=64, D=dim, DV=dim_v, dtype=dtype), *draw_plan(64, 64, 2, columns=9), config=None)


def test_not_causal():
    check(*draw(M=40, N=70), *draw_plan(40, 70, columns=9), causal=False, config=WIDE)
    check_gradients(*draw(M=40, N=70), *draw_plan(40, 70, columns=9), causal=False, config=WIDE)


def test_sink_softcap_and_scale():
    sink = torch.randn(4, device=DEVICE)
    options = {"sink": sink, "softcap": 3.0, "scale": 0.3, "with_lse": True}
    check(*draw(M=40, N=40), *draw_plan(40, 40, columns=9), config=WIDE, **options)


@pytest.mark.parametrize("heads", [1, 4])
def test_sigmoid_weights(heads):
    check_gradients(*draw(M=40, N=40), *draw_plan(40, 40, heads, columns=9), config=WIDE)


def test_sigmoid_bias_and_softcap():
    options = {"bias": -2.0, "softcap": 3.0, "scale": 0.3}
    check_gradients(*draw(M=40, N=40), *draw_plan(40, 40, columns=9), config=WIDE, **options)


def test_absent_repeated_and_outside_columns():
    listed = torch.tensor(
        [[7, 7, -1, 69, 70, 5000, 0], [-1] * 7, [3, -5, 3, 64, 64, 63, 65], [70] * 6 + [69]], device=DEVICE
    )
    check(*draw(M=70, N=70), *listing(70, 70, listed[None]), config=WIDE)
    check(*draw(M=20, N=70), *listing(20, 70, listed[None, 1:2]), config=WIDE)


def test_columns_alone_and_of_several_tiles():
    listed = torch.stack([torch.randperm(160, device=DEVICE)[:140] for _ in range(2)])[None]
    qkv = draw(Hq=2, Hkv=1, M=70, N=160)
    tiles = (BackwardConfig(32, 32, 4, 1), BackwardConfig(32, 64, 4, 1))
    check(*qkv, *listing(70, 160, listed, share=0.0), config=tiles)


def test_columns_in_listed_blocks_count_once():
    """Bit for bit the gradients without columns."""
    q, k, v = draw(Hq=2, Hkv=1, M=70, N=70)
    plan, _ = draw_plan(70, 70, 2, share=1.0, columns=40)
    o, lse = block_flash_fwd(q, k, v, plan)
    do = torch.randn_like(o)
    found, want = (
        block_flash_bwd(do, None, q, k, v, o, lse, each, config=WIDE) for each in (plan, replace(plan, columns=None))
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, want))


@pytest.mark.parametrize("heads", [1, 2])
def test_queries_in_parts_and_repeatability(monkeypatch, heads):
    monkeypatch.setattr(columns_module, "parts_of_queries", lambda *sizes: 3)
    q, k, v = draw(Hq=2, Hkv=1, M=70, N=70)
    plan, means = draw_plan(70, 70, heads, columns=9)
    check(q, k, v, plan, means, config=WIDE)
    o, lse = block_flash_fwd(q, k, v, plan)
    once, again = (block_flash_bwd(o, None, q, k, v, o, lse, plan, config=WIDE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


def test_parts_fill_the_device_and_are_not_too_short(monkeypatch):
    monkeypatch.setattr(columns_module.runtime, "multiprocessors", lambda index: 132)
    parts = columns_module.parts_of_queries
    device = torch.device(DEVICE)
    assert parts(528, 1000, device) == 1
    assert parts(66, 1000, device) == 8
    assert parts(1, 3, device) == 1
    assert parts(1, 40, device) == 5


def test_strided_inputs_and_keys_that_are_never_read():
    q, k, v = draw(B=2, M=40, N=40)
    q, k = (torch.empty_like(x.transpose(1, 2)).copy_(x.transpose(1, 2)).transpose(1, 2) for x in (q, k))
    plan, means = draw_plan(40, 40, 1, share=0.0, columns=10)
    _, dk, dv, _ = check(q, k, v[:1, :1].expand(2, 2, -1, -1), plan, means, config=WIDE)
    unread = ~means[0, 0, -1]
    assert dk[:, :, unread].eq(0).all()
    assert dv[:, :, unread].eq(0).all()


# Through the backend of `attend`, by the plan's own definition.


def gradients(backend, call, dtype, names):
    leaves = {x: getattr(call, x).detach().to(dtype, copy=True).requires_grad_() for x in names}
    call = replace(call, **leaves)
    if backend is plans:
        assert plans.why_not(call) is None
    o, lse = backend.attend(call)
    loss = (o * call.q.detach().roll(1, 2)).sum() + (0.0 if call.bias is not None else lse.sin().sum())
    return torch.autograd.grad(loss, list(leaves.values()))


@pytest.mark.parametrize("heads, bias", [(HKV, -2.0), (HQ, None)])
def test_vertical_slash(monkeypatch, heads, bias):
    monkeypatch.setattr(module.configs, "backward", lambda *sizes: WIDE)
    vertical = torch.randint(-1, 45, (B, heads, 20), device=DEVICE)
    slash = torch.randint(-1, 2, (B, heads, 2), device=DEVICE)
    # Every query reads its own block, so that each has a finite lse.
    slash[..., 0] = 0
    names = ("q", "k", "v") if bias is not None else ("q", "k", "v", "sink")
    sink = None if bias is not None else torch.randn(HQ, device=DEVICE)
    call = make(VerticalSlash(vertical, slash, 32), 40, n=40, sink=sink, softcap=4.0, bias=bias)
    found = gradients(plans, call, torch.float32, names)
    for ours, exactly in zip(found, gradients(reference, call, torch.float64, names)):
        assert error(ours, exactly) <= 2e-5


def test_columns_prepared_before_and_a_plan_without_any():
    q, k, v = draw(Hq=2, Hkv=1, M=40, N=40)
    plan, _ = draw_plan(40, 40, 2, columns=9)
    o, lse = block_flash_fwd(q, k, v, plan)
    bare = replace(plan, columns=None)
    found, want, none, without = (
        block_flash_bwd(o, None, q, k, v, o, lse, each, columns=ready, config=WIDE)
        for each, ready in (
            (bare, stripes(plan, True)), (plan, None), (plan.with_columns(plan.columns[..., :0]), None), (bare, None),
        )
    )  # fmt: skip
    for pair in (*zip(found, want), *zip(none, without)):
        assert torch.equal(*pair)
    assert not torch.equal(want[1], without[1])


# Compiled for Hopper; no GPU is needed.


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("gradients and columns", marks=pytest.mark.slow),
        pytest.param("gradients of 64 and columns", marks=pytest.mark.slow),
        "gradients and columns D64",
        pytest.param("gradients and columns D256", marks=pytest.mark.slow),
    ],
)
def test_kernels_use_tensor_cores_and_spill_next_to_nothing(case):
    kernels = compiled(case)[-3:]
    names = ["query_gradient_kernel", "column_gradient_kernel", "key_gradient_kernel"]
    assert [each["kernel"] for each in kernels] == names
    for kernel in kernels:
        assert kernel["wgmma"] + kernel["mma"] > 0
        assert kernel["cp_async"] > 0
        assert kernel["shared"] <= 227 * 1024
        # Addresses, as without columns (test_compiled).
        assert kernel["stack"] <= 144
