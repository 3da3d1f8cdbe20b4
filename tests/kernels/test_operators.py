"""Sums of weights, caches and lists as operators: their contracts with torch, no gradients, one node when compiled."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from torch.library import opcheck

from foveate.attention import Rope
from foveate.attention.backends.triton import block_lists, last_queries, ops, score_reduce, stripes
from foveate.attention.backends.triton.kv_compact import kv_compact
from foveate.attention.backends.triton.kv_quant import kv_decode, kv_encode
from foveate.errors import BackendError
from tests.kernels.definitions import DEVICE
from tests.kernels.test_block_flash import draw_plan

# All but what follows gradients: there are none.
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")
TRACED = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
F16 = torch.float16


def queries(m=5, n=20, d=16, b=2, dtype=torch.float32):
    q, k = torch.randn(b, 4, m, d, device=DEVICE), torch.randn(b, 2, n, d, device=DEVICE)
    return q.to(dtype), k.to(dtype)


def slots(b=2, h=2, k=7):
    return torch.randint(-1, 20, (b, h, k), device=DEVICE)


POSITIONS = torch.arange(15, 20)[None].to(DEVICE)
LSE = torch.zeros(2, 4, 5, device=DEVICE)
CALLS = {
    "log_sum_exp": lambda: (*queries(), None, 0.3, True, None),
    "log_sum_exp windowed": lambda: (*queries(), POSITIONS, 0.3, True, 6),
    "log_sum_exp half": lambda: (*queries(dtype=F16), None, 0.3, False, None),
    "log_sum_exp empty": lambda: (*queries(m=0), None, 0.3, True, None),
    "column_mass": lambda: (*queries(), None, None, 0.3, True, None),
    "column_mass known": lambda: (*queries(), POSITIONS, LSE, 0.3, True, 6),
    "block_mass": lambda: (*queries(), None, None, 3, 16, 0.3, True, None),
    "block_mass of tiles": lambda: (*queries(n=50), None, None, 2, 48, 0.3, True, None),
    "last_queries_mass": lambda: (*queries(m=16), 0.3, False),
    "last_queries_mass whole tiles": lambda: (*queries(m=16, n=32), 0.3, False),
    "last_queries_mass pooled": lambda: (*queries(m=16), 0.3, True),
    "kv_compact": lambda: (*(queries()[1] for _ in range(2)), slots(h=4), None, None, 0, 1.0, False),
    "kv_compact empty": lambda: (*(queries()[1] for _ in range(2)), slots(k=0), None, None, 0, 1.0, False),
    "kv_compact whole": lambda: (*(queries()[1].int() for _ in range(2)), slots(1, 1), None, None, 0, 1.0, False),
    "kv_compact moved": lambda: (
        *(queries()[1] for _ in range(2)), slots(1, 1), slots(1, 1), None, 16, 1e4, True,
    ),
    "kv_encode": lambda: (torch.randn(1, 2, 32, 8, device=DEVICE), 4, 16, 2),
    "kv_encode channels": lambda: (torch.randn(1, 2, 3, 32, device=DEVICE).to(F16), 2, 16, 3),
    "kv_encode empty": lambda: (torch.randn(0, 2, 32, 8, device=DEVICE), 4, 16, 2),
    "kv_decode": lambda: (*kv_encode(torch.randn(1, 2, 32, 8, device=DEVICE), bits=4, group=16, dim=2), 4, 16, 2),
    "kv_decode channels": lambda: (
        *kv_encode(torch.randn(1, 2, 3, 32, device=DEVICE).to(F16), bits=2, group=16, dim=3), 2, 16, 3,
    ),
    # Lists without room to spare, which is not written to.
    "block_lists": lambda: (torch.rand(2, 2, 2, device=DEVICE), None, 1, 1),
    "block_lists of own counts": lambda: (
        torch.rand(2, 2, 2, device=DEVICE), torch.ones(2, 2, dtype=torch.int64, device=DEVICE), 0, 1,
    ),
    "stripes": lambda: striped(True),
    "stripes of all": lambda: striped(False),
}  # fmt: skip


def striped(causal):
    plan, _ = draw_plan(40, 40, block_m=16, block_n=16, columns=5)
    return plan.columns, plan.row_ptr, plan.col, 40, 40, 16, 16, causal


def operator_of(name):
    return getattr(torch.ops.foveate, {"stripes": "made_stripes"}.get(name.split()[0], name.split()[0])).default


@pytest.mark.parametrize("name", CALLS)
def test_operators_pass_opcheck(name):
    opcheck(operator_of(name), CALLS[name](), test_utils=TRACED)


def test_lists_counted_before_memory_is_asked_for_pass_opcheck(monkeypatch):
    monkeypatch.setattr(block_lists, "SPARE_ENTRIES", 0)
    arguments = (torch.rand(2, 2, 5, device=DEVICE), None, 1, 2)
    opcheck(torch.ops.foveate.block_lists.default, arguments, test_utils=TRACED)


DIFFERENTIABLE = [name for name in CALLS if len(name.split()) == 1 and name not in ("block_lists", "stripes")]


def learning(arguments):
    return [
        x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments
    ]  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_refused(name):
    opcheck(operator_of(name), learning(CALLS[name]()), test_utils=TESTS)
    found = operator_of(name)(*learning(CALLS[name]()))
    found = [found] if isinstance(found, torch.Tensor) else [x for x in found if x.is_floating_point()]
    with pytest.raises(BackendError, match=f"{name} has no gradients; use backend='torch'"):
        sum(x.sum() for x in found).backward()


def test_lists_take_no_gradient():
    pooled = torch.rand(2, 2, 5, device=DEVICE, requires_grad=True)
    made = block_lists.columns_and_diagonals(pooled, 2, most=2, batch=1, tokens=80, block=16)
    assert not made.row_ptr.requires_grad


def sums(q, k):
    lse = score_reduce.log_sum_exp(q, k, scale=0.3)
    return (
        score_reduce.column_mass(q, k, scale=0.3, lse=lse),
        score_reduce.block_mass(q, k, block_m=16, block_n=16, scale=0.3, window=9),
        last_queries.column_and_diagonal_mass(q, k, scale=0.3),
    )


def caches(q, k):
    index = torch.arange(3, device=k.device).expand(2, 2, 3)
    keys, values = kv_compact(k, k, index)
    turned, _ = kv_compact(k, k, index, pos=index, rope=Rope(16))
    return keys, values, turned, kv_decode(*kv_encode(keys, bits=4, group=16, dim=3), bits=4, group=16, dim=3)


def lists(q, k):
    pooled = q[:1, :2, :4, 0].expand(2, -1, -1)
    plan = block_lists.columns_and_diagonals(pooled, 2, most=2, batch=1, tokens=64, block=16)
    return plan.row_ptr, plan.n_full, plan.order


@pytest.mark.parametrize("step", [sums, caches, lists])
def test_compiled_without_graph_breaks(step):
    q, k = queries(m=16)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(compiled(q, k), step(q, k)):
        assert torch.equal(ours, eager)
        assert ours.stride() == eager.stride()


def test_stripes_need_no_wait_for_lists_with_room_to_spare(monkeypatch):
    pooled = torch.rand(2, 2, 5, device=DEVICE)
    made = block_lists.columns_and_diagonals(pooled, 2, most=2, batch=1, tokens=75, block=16)
    columns = torch.randint(-1, 75, (1, 2, 9), device=DEVICE)
    nnz = made.nnz
    assert nnz < made.col.numel()
    made.col[nnz:] = 2**30
    exact = type(made)(made.row_ptr, made.col[:nnz], made.n_full, made.order, 1, 2, 75, 75, 16, 16, columns)
    want = stripes._stripes(exact, True)
    monkeypatch.setattr(type(made), "nnz", property(lambda plan: pytest.fail("nnz was asked for")))
    found = stripes._stripes(made.with_columns(columns), True)
    for ours, theirs in zip(vars(found).values(), vars(want).values()):
        assert torch.equal(ours, theirs)


def test_plans_with_columns_compile_without_graph_breaks():
    q, k = queries(m=40, n=40, b=1)
    plan, _ = draw_plan(40, 40, block_m=16, block_n=16, columns=5)

    def step(q, k):
        return 2 * ops.block_flash(q, k, k, plan)[0]

    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(q, k), step(q, k))
