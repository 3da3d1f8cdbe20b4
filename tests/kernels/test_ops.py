"""The operators: their contracts with torch (opcheck), gradients, and one node each under torch.compile."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from torch.library import opcheck

from foveate.attention.backends.triton import ops
from foveate.attention.backends.triton.block_flash import block_flash_fwd
from foveate.attention.backends.triton.gather_decode import gather_decode
from foveate.attention.merge import merge as merge_reference
from foveate.errors import BackendError
from tests.kernels.definitions import DEVICE, causal_counts, error
from tests.kernels.test_block_flash import draw, draw_plan
from tests.kernels.test_block_gradients import definition

NO_GRADIENTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def plan_arguments(plan, gradients: bool):
    keys = plan.by_keys
    lists = (keys.ptr, keys.row, keys.n_masked, keys.order) if gradients else (None,) * 4
    return (plan.row_ptr, plan.col, plan.n_full, plan.order), lists


@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck_block_flash(gradients):
    q, k, v = (x.requires_grad_(gradients) for x in draw(M=32, N=32))
    plan, _ = draw_plan(32, 32, block_m=16, block_n=16)
    rows, lists = plan_arguments(plan, gradients)
    sink = torch.randn(4, device=DEVICE, requires_grad=gradients)
    arguments = (q, k, v, *rows, *[None] * 4, *lists, sink, 1, 4, 16, 16, 0.2, True, 3.0)
    opcheck(torch.ops.foveate.block_flash.default, arguments)


@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck_block_flash_with_columns(gradients):
    q, k, v = (x.requires_grad_(gradients) for x in draw(M=32, N=32))
    plan, _ = draw_plan(32, 32, block_m=16, block_n=16, columns=5)
    rows, lists = plan_arguments(plan, gradients)
    own = ops.stripes(plan, True)
    columns = (own.column, own.bits, own.free, own.cut)
    sink = torch.randn(4, device=DEVICE, requires_grad=gradients)
    arguments = (q, k, v, *rows, *columns, *lists, sink, 1, 4, 16, 16, 0.2, True, None)
    opcheck(torch.ops.foveate.block_flash.default, arguments)


def test_opcheck_gather_decode():
    index = torch.randint(-1, 70, (1, 2, 20), device=DEVICE)
    length = torch.tensor([[20, 7]], device=DEVICE)
    options = (1, None, 0.3, True, None, 0, torch.randn(4, device=DEVICE), 5.0, None, None, None, 2)
    arguments = (*draw(M=2, N=70), index, length, *options)
    opcheck(torch.ops.foveate.gather_decode.default, arguments, test_utils=NO_GRADIENTS)


def test_opcheck_topk():
    scores = torch.randn(2, 3, 40, device=DEVICE)
    length = torch.randint(0, 41, (2, 3), device=DEVICE)
    opcheck(torch.ops.foveate.topk.default, (scores, 7, length), test_utils=NO_GRADIENTS)


def test_opcheck_merge():
    parts = torch.randn(3, 2, 5, 16, device=DEVICE, requires_grad=True)
    lses = torch.randn(3, 2, 5, device=DEVICE, requires_grad=True)
    opcheck(torch.ops.foveate.merge.default, (parts, lses))


@pytest.mark.parametrize("columns", [0, 9])
def test_gradients_of_block_flash(columns):
    q, k, v = draw(M=50, N=50)
    plan, means = draw_plan(50, 50, heads=2, columns=columns)
    sink = torch.randn(4, device=DEVICE)
    leaves = [x.requires_grad_() for x in (q, k, v, sink)]
    o, lse = ops.block_flash(q, k, v, plan, sink=sink, softcap=4.0)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    allowed = means.repeat_interleave(2, 1) & (causal_counts(1, 1, 50, 50) > 0)
    blind = ~allowed.any(-1)
    dlse = dlse.masked_fill(blind, 0.0)
    got = torch.autograd.grad((o * do).sum() + (lse * dlse).sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want_o, want_lse = definition(*exact[:3], allowed, sink=exact[3], softcap=4.0)
    want = torch.autograd.grad((want_o * do).sum() + (want_lse * dlse).sum(), exact)
    for ours, exactly in zip(got, want):
        assert error(ours, exactly) <= 2e-5


def test_gradients_of_merge():
    parts = torch.randn(3, 2, 5, 16, device=DEVICE)
    lses = torch.randn(3, 2, 5, device=DEVICE)
    lses[1, 0] = lses[:, 1, 1] = -torch.inf
    leaves = [parts.requires_grad_(), lses.requires_grad_()]
    o, lse = ops.merge(parts, lses)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    dlse[1, 1] = 0.0
    got = torch.autograd.grad((o * do).sum() + (lse[lse > -torch.inf] * dlse[lse > -torch.inf]).sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    shares = exact[1].exp() / exact[1].exp().sum(0).clamp_min(1e-300)
    seen = lse > -torch.inf
    want_lse = exact[1][:, seen].exp().sum(0).log()
    loss = ((shares[..., None] * exact[0]).sum(0) * do).sum() + (want_lse * dlse[seen]).sum()
    want = torch.autograd.grad(loss, exact)
    assert error(o, merge_reference(list(parts.detach()), list(lses.detach()))[0]) <= 1e-6
    for ours, exactly in zip(got, want):
        assert error(ours, exactly) <= 1e-6


def test_gradients_that_do_not_exist_are_refused():
    q, k, v = draw(M=1)
    o, _ = ops.gather_decode(q.requires_grad_(), k, v)
    with pytest.raises(BackendError, match="no gradients"):
        o.sum().backward()


def test_a_sink_alone_may_learn():
    q, k, v = draw(M=40, N=40)
    plan, means = draw_plan(40, 40, columns=9)
    sink = torch.randn(4, device=DEVICE, requires_grad=True)
    o, _ = ops.block_flash(q, k, v, plan, sink=sink)
    do = torch.randn_like(o)
    exact = sink.detach().double().requires_grad_()
    allowed = means & (causal_counts(1, 1, 40, 40) > 0)
    want_o, _ = definition(q.double(), k.double(), v.double(), allowed, sink=exact)
    (got,), (want,) = (torch.autograd.grad((each * do).sum(), leaf) for each, leaf in ((o, sink), (want_o, exact)))
    assert error(got, want) <= 2e-5


def test_compiled_without_graph_breaks():
    q, k, v = draw(M=32, N=32)
    plan, _ = draw_plan(32, 32, block_m=16, block_n=16)

    def step(q, k, v):
        o, lse = ops.block_flash(q, k, v, plan)
        slots = ops.topk(lse[:, :2], 5)
        few, few_lse = ops.gather_decode(q[:, :, -1:], k, v, index=slots)
        both, _ = ops.merge(torch.stack((o[:, :, -1:], few)), torch.stack((lse[:, :, -1:], few_lse)))
        return 2 * both

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), step(q, k, v))


@pytest.mark.parametrize("columns", [0, 5])
def test_compiled_training_without_graph_breaks(columns):
    q, k, v = (x.requires_grad_() for x in draw(M=32, N=32))
    plan, _ = draw_plan(32, 32, block_m=16, block_n=16, columns=columns)
    assert plan.by_keys is plan.by_keys

    def step(q, k, v):
        return ops.block_flash(q, k, v, plan)[0].square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    want = torch.autograd.grad(step(q, k, v), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_operators_equal_their_launchers():
    q, k, v = draw()
    plan, _ = draw_plan(100, 100, columns=9)
    for ours, theirs in zip(ops.block_flash(q, k, v, plan), block_flash_fwd(q, k, v, plan)):
        assert torch.equal(ours, theirs)
    one = q[:, :, :1]
    pairs = zip(ops.gather_decode(one, k, v, window=20, sinks=2), gather_decode(one, k, v, window=20, sinks=2))
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs)
