"""Sigmoid weights in block_flash: forward and backward against definitions in float64, the operator, the backend."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from torch.library import opcheck

from foveate.attention import Blocks, Dense, Tokens, VerticalSlash, Window
from foveate.attention.backends import reference
from foveate.attention.backends.triton import block_flash as forward_module
from foveate.attention.backends.triton import block_flash_bwd as backward_module
from foveate.attention.backends.triton import ops, plans
from foveate.attention.backends.triton.block_flash import block_flash_fwd
from foveate.attention.backends.triton.block_flash_bwd import block_flash_bwd
from foveate.attention.backends.triton.configs import BackwardConfig, BlockConfig
from foveate.attention.call import Call
from foveate.errors import ShapeError
from tests.kernels.compiling import compiled
from tests.kernels.definitions import DEVICE, GATES, causal_counts, error, poison
from tests.kernels.test_block_flash import draw, draw_plan
from tests.kernels.test_plans import HKV, HQ, lists, make, padded, some_blocks

BIAS = -3.0
FORWARD = BlockConfig(32, 32, 4, 2, edge=16)
BACKWARD = (BackwardConfig(32, 16, 4, 1), BackwardConfig(16, 32, 4, 1))
GRADIENT_GATES = {torch.float32: 2e-5, torch.float16: 1.5e-2, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch, forward_module, backward_module)


def allowed_by(means, q, k, causal):
    allowed = means.repeat_interleave(q.shape[1] // means.shape[1], 1).expand(q.shape[0], -1, -1, -1)
    return allowed & (causal_counts(1, 1, q.shape[2], k.shape[2]) > 0) if causal else allowed


def definition(q, k, v, allowed, bias=BIAS, scale=None, softcap=None):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.where(allowed, 1 / (1 + torch.exp(-scores - bias)), 0.0)
    # A key that is not read must not matter, whatever it holds.
    return weights @ v.nan_to_num(0.0)


def check(q, k, v, plan, means, *, config=FORWARD, causal=True, bias=BIAS, **options):
    want = definition(q.double(), k.double(), v.double(), allowed_by(means, q, k, causal), bias, **options)
    o, lse = block_flash_fwd(q, k, v, plan, config=config, causal=causal, bias=bias, **options)
    assert lse is None
    assert error(o, want) <= GATES[q.dtype]
    return o


def check_gradients(q, k, v, plan, means, *, config=BACKWARD, causal=True, bias=BIAS, **options):
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    o = definition(*exact, allowed_by(means, q, k, causal), bias, **options)
    do = torch.randn_like(o).to(q.dtype)
    want = torch.autograd.grad((o * do.double()).sum(), exact)
    *got, delta = block_flash_bwd(
        do, None, q, k, v, None, None, plan, causal=causal, bias=bias, config=config, **options
    )
    assert delta is None
    for ours, exactly in zip(got, want):
        assert ours.dtype == q.dtype
        assert error(ours, exactly) <= GRADIENT_GATES[q.dtype]
    return got


@pytest.mark.parametrize("m, n", [(1, 1), (15, 15), (63, 63), (65, 65), (127, 127), (20, 100)])
def test_lengths(m, n):
    check(*draw(M=m, N=n), *draw_plan(m, n, share=0.9))
    check(*draw(M=m, N=n), *draw_plan(m, n, columns=9))
    check_gradients(*draw(M=m, N=n), *draw_plan(m, n, share=0.9))


@pytest.mark.parametrize("heads, batch", [(1, 2), (2, 1), (6, 2)])
def test_heads_and_batches_of_plans(heads, batch):
    qkv = draw(B=2, Hq=6, Hkv=2, M=70, N=70)
    check(*qkv, *draw_plan(70, 70, heads, batch, columns=9))
    check_gradients(*qkv, *draw_plan(70, 70, heads, batch))


@pytest.mark.parametrize("block_m, block_n", [(16, 64), (48, 32)])
def test_blocks_that_differ_from_tiles(block_m, block_n):
    given = {"block_m": block_m, "block_n": block_n}
    check(*draw(), *draw_plan(100, 100, columns=5, **given), config=BlockConfig(32, 32, 4, 2))
    check_gradients(*draw(), *draw_plan(100, 100, **given))


@pytest.mark.parametrize("dim, dim_v", [(80, 80), (64, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widths_and_dtypes(dim, dim_v, dtype):
    qkv = draw(M=64, N=64, D=dim, DV=dim_v, dtype=dtype)
    check(*qkv, *draw_plan(64, 64, columns=5, share=0.8), config=None)
    if dim < 256:
        check_gradients(*qkv, *draw_plan(64, 64, share=0.8), config=None)


@pytest.mark.parametrize("kind", [{"tma": True}, {"persistent": True}])
def test_variants(kind):
    check(*draw(), *draw_plan(100, 100, columns=9), config=replace(FORWARD, **kind))


def test_not_causal():
    check(*draw(), *draw_plan(100, 100, columns=9), causal=False)
    check_gradients(*draw(), *draw_plan(100, 100), causal=False)


@pytest.mark.parametrize("bias", [0.0, 2.0, -math.log(100)])
def test_bias_softcap_and_scale(bias):
    check(*draw(), *draw_plan(100, 100, columns=9), bias=bias, softcap=3.0, scale=0.3)
    check_gradients(*draw(), *draw_plan(100, 100), bias=bias, softcap=3.0, scale=0.3)


def test_small_weights_are_exact():
    """Weights near exp(-9), as with a bias for a prompt of 8192 tokens."""
    check(*draw(), *draw_plan(100, 100, columns=9), bias=-9.0)
    check_gradients(*draw(), *draw_plan(100, 100), bias=-9.0)


def test_large_scores_and_repeatability():
    q, k, v = draw()
    plan, means = draw_plan(100, 100, columns=9)
    scale = 90 / (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).abs().max().item()
    assert torch.equal(*(check(q, k, v, plan, means, scale=scale) for _ in range(2)))
    do, (plan, _) = torch.randn_like(q), draw_plan(100, 100)
    once, again = (block_flash_bwd(do, None, q, k, v, None, None, plan, bias=BIAS, scale=scale) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once[:3], again[:3]))


def test_rows_that_read_nothing_and_keys_that_no_row_reads():
    plan, means = draw_plan(100, 100, share=0.0)
    assert check(*draw(), plan, means).eq(0).all()
    assert all(each.eq(0).all() for each in check_gradients(*draw(), plan, means))


def test_unlisted_keys_are_never_read():
    q, k, v = draw(M=64, N=64)
    plan, means = draw_plan(64, 64, heads=1, share=0.0, columns=10)
    unread = ~means[0, 0, -1]
    k[:, :, unread], v[:, :, unread] = float("nan"), float("nan")
    o, _ = block_flash_fwd(q, k, v, plan, config=FORWARD, bias=BIAS)
    want = definition(q.double(), k.double().nan_to_num(0.0), v.double(), allowed_by(means, q, k, True))
    assert error(o, want) <= 1e-5


def test_strided_and_expanded_inputs():
    q, k, v = draw(B=2)
    q, k = (torch.empty_like(x.transpose(1, 2)).copy_(x.transpose(1, 2)).transpose(1, 2) for x in (q, k))
    v = v[:1, :1].expand(2, 2, -1, -1)
    plan, means = draw_plan(100, 100)
    check(q, k, v, plan, means)
    check_gradients(q, k, v, plan, means)


def test_outputs_of_two_halves_of_a_plan_add_up():
    q, k, v = draw()
    mask = torch.rand(1, 4, 4, 4, device=DEVICE) < 0.7
    half = torch.rand_like(mask, dtype=torch.float32) < 0.5
    whole, one, two = (
        block_flash_fwd(
            q, k, v, Blocks.from_mask(each, block_m=32, block_n=32).lower(100, 100), config=FORWARD, bias=BIAS
        )[0]
        for each in (mask, mask & half, mask & ~half)
    )
    assert error(one + two, whole.double()) <= 1e-6


def test_what_does_not_go_together_is_named():
    q, k, v = draw()
    plan, _ = draw_plan(100, 100, columns=4)
    with pytest.raises(ShapeError, match="sink with a bias"):
        block_flash_fwd(q, k, v, plan, bias=BIAS, sink=torch.zeros(4, device=DEVICE))


# The operator.


@pytest.mark.parametrize("gradients, columns", [(False, 0), (True, 0), (True, 5)])
def test_opcheck(gradients, columns):
    q, k, v = (x.requires_grad_(gradients) for x in draw(M=32, N=32))
    plan, _ = draw_plan(32, 32, block_m=16, block_n=16, columns=columns)
    keys = plan.by_keys
    listed = (keys.ptr, keys.row, keys.n_masked, keys.order) if gradients else (None,) * 4
    rows = (plan.row_ptr, plan.col, plan.n_full, plan.order)
    single = vars(ops.stripes(plan, True)).values() if columns else (None,) * 4
    arguments = (q, k, v, *rows, *single, *listed, None, 1, 4, 16, 16, 0.2, True, 3.0, BIAS)
    opcheck(torch.ops.foveate.block_flash.default, arguments)


def test_compiled_training_without_graph_breaks():
    q, k, v = (x.requires_grad_() for x in draw(M=32, N=32))
    plan, _ = draw_plan(32, 32, block_m=16, block_n=16)
    assert plan.by_keys is plan.by_keys

    def step(q, k, v):
        return ops.block_flash(q, k, v, plan, bias=BIAS)[0].square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    want = torch.autograd.grad(step(q, k, v), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


# The backend of `attend`.


def sigmoid(plan, m=1, n=100, **options) -> Call:
    return make(plan, m, n, bias=BIAS, need_lse=False, **options)


def diagonals(heads, n=70):
    vertical = torch.randint(-1, n, (2, heads, 50), device=DEVICE)
    return VerticalSlash(vertical, torch.randint(-1, 6, (2, heads, 3), device=DEVICE), 16)


SERVED = {
    "blocks": lambda: sigmoid(some_blocks(100, 100), 100),
    "blocks of few queries": lambda: sigmoid(some_blocks(7, 100, heads=HKV), 7),
    "blocks not causal": lambda: sigmoid(some_blocks(37, 100), 37, causal=False),
    "columns and diagonals": lambda: sigmoid(diagonals(HQ), 70, 70),
    "dense prompt": lambda: sigmoid(Dense(), 150, 150),
    "dense continuation": lambda: sigmoid(Dense(), 20, 300, softcap=4.0),
    "dense not causal": lambda: sigmoid(Dense(), 140, 300, causal=False),
}


@pytest.mark.parametrize("case", SERVED)
def test_backend_equals_reference(case):
    call = SERVED[case]()
    assert plans.why_not(call) is None
    o, lse = plans.attend(call)
    want, _ = reference.attend(replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double()))
    assert lse is None
    assert error(o, want) <= 1e-5


@pytest.mark.parametrize("plan, m, n", [(Dense(), 20, 40), (some_blocks(70, 70, 32), 70, 70)])
def test_gradients_through_the_backend(plan, m, n):
    call = sigmoid(plan, m, n)
    found = []
    for backend, dtype in ((plans, torch.float32), (reference, torch.float64)):
        leaves = {x: getattr(call, x).detach().clone().to(dtype).requires_grad_() for x in ("q", "k", "v")}
        if backend is plans:
            assert plans.why_not(replace(call, **leaves)) is None
        o, _ = backend.attend(replace(call, **leaves))
        found.append(torch.autograd.grad((o * call.q.to(dtype)).sum(), list(leaves.values())))
    for ours, exactly in zip(*found):
        assert error(ours, exactly) <= 2e-5


def test_a_dense_plan_made_in_inference_serves_training():
    plans.every_block.cache_clear()
    with torch.inference_mode():
        plans.attend(sigmoid(Dense(), 20, 20))
    call = sigmoid(Dense(), 20, 20)
    q = call.q.requires_grad_()
    o, _ = plans.attend(replace(call, q=q))
    assert torch.autograd.grad(o.sum(), q)[0].isfinite().all()


REFUSED = {
    "weighed by softmax": [
        lambda: sigmoid(Dense()),
        lambda: sigmoid(Tokens(lists()), 3),
        lambda: sigmoid(Window(5), 20),
    ],
    "aligned": [
        lambda: sigmoid(Dense(), 20, positions=padded(20, 100)),
        lambda: sigmoid(Dense(), 20, window=5),
        lambda: sigmoid(Dense(), 20, log_weight=torch.zeros(2, HKV, 100, device=DEVICE)),
    ],
    "scale > 0": [lambda: sigmoid(Dense(), 20, scale=-1.0)],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_why_not(reason):
    for make_call in REFUSED[reason]:
        assert reason in plans.why_not(make_call())


# Compiled for Hopper; no GPU is needed.


@pytest.mark.parametrize("case", ["blocks of 128", "blocks of 32k", "blocks and columns", "blocks D64"])
def test_forward_kernels_use_wgmma_and_spill_nothing(case):
    kernel = compiled(case, "attention_cases")[-1]
    assert kernel["kernel"] == "block_flash_kernel"
    assert kernel["spills"] == 0
    assert kernel["wgmma"] > 0
    assert kernel["cp_async"] > 0
    assert kernel["shared"] <= 227 * 1024


@pytest.mark.parametrize("case", ["gradients", "gradients D64"])
def test_backward_is_two_kernels_that_spill_next_to_nothing(case):
    kernels = compiled(case, "attention_cases")
    assert [each["kernel"] for each in kernels] == ["query_gradient_kernel", "key_gradient_kernel"]
    for kernel in kernels:
        assert kernel["wgmma"] + kernel["mma"] > 0
        assert kernel["cp_async"] > 0
        assert kernel["shared"] <= 227 * 1024
        # Addresses, as with softmax weights (test_compiled).
        assert kernel["stack"] <= 144
