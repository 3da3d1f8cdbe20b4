"""The Triton backend of `attend` against the reference in float64, called directly (the interpreter is no GPU)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention import Blocks, Dense, PerHead, Positions, Tokens, VerticalSlash, Window
from foveate.attention.backends import reference
from foveate.attention.backends.triton import plans
from foveate.attention.call import Call
from tests.kernels.definitions import DEVICE, error, lse_error

B, HQ, HKV = 2, 4, 2


def make(plan, m=1, n=100, positions=None, d=32, **options) -> Call:
    shapes = ((B, HQ, m, d), (B, HKV, n, d), (B, HKV, n, d))
    q, k, v = (torch.randn(shape, device=DEVICE) for shape in shapes)
    usual = {"window": None, "causal": True, "log_weight": None, "sink": None, "softcap": None, "need_lse": True}
    return Call(q, k, v, plan, positions or Positions(), **{"scale": 0.2, **usual, **options})


def check(call: Call) -> None:
    assert plans.why_not(call) is None
    o, lse = plans.attend(call)
    want_o, want_lse = reference.attend(replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double()))
    assert o.dtype == call.q.dtype
    assert error(o, want_o) <= 1e-5
    assert lse_error(lse, want_lse) <= 2e-3


def lists(heads=HKV, n=100, batch=B):
    return torch.stack([torch.randperm(n, device=DEVICE)[:30] - 1 for _ in range(batch * heads)]).view(batch, heads, 30)


LENGTH = torch.tensor([[3, 30], [0, 17]], device=DEVICE)
DECODES = {
    "dense": Dense(),
    "window": Window(20),
    "window with sinks": Window(20, 4),
    "wide window": Window(500, 4),
    "tokens": Tokens(lists()),
    "tokens for all heads": Tokens(lists(1)),
    "tokens with lengths": Tokens(lists(), LENGTH),
    "tokens of one batch with lengths": Tokens(lists(batch=1), LENGTH[:1]),
}


def padded(m: int, n: int) -> Positions:
    at = torch.arange(n, device=DEVICE).expand(B, HKV, n).clone() - 5
    at[1, 1, ::3] = -1
    q = torch.arange(n - m, n, device=DEVICE).expand(B, m) - 5
    return Positions(q, at.clamp(min=-1), holes=True)


@pytest.mark.parametrize("plan", DECODES.values(), ids=DECODES.keys())
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("where", ["aligned", "padded"])
@pytest.mark.parametrize("window", [None, 12])
def test_decode(plan, m, where, window):
    positions = padded(m, 100) if where == "padded" else None
    check(make(plan, m, positions=positions, window=window))


def test_decode_options():
    sink, weight = torch.randn(HQ, device=DEVICE), torch.randn(B, HKV, 100, device=DEVICE)
    check(make(Tokens(lists()), sink=sink, softcap=4.0, log_weight=weight))
    check(make(Dense(), 3, sink=sink, softcap=4.0, log_weight=weight, causal=False))
    list_per_query = Tokens(lists()[:, :, None])
    check(make(list_per_query))


def test_keys_placed_after_the_query_are_not_seen():
    at = torch.randperm(100, device=DEVICE).expand(B, 1, -1)
    check(make(Dense(), positions=Positions(torch.full((B, 1), 40, device=DEVICE), at, holes=True)))
    check(make(Dense(), positions=Positions(None, 3 * at, holes=True)))


def some_blocks(m, n, block=16, heads=HQ, batch=B):
    mask = torch.rand(batch, heads, -(-m // block), -(-n // block), device=DEVICE) < 0.5
    return Blocks.from_mask(mask, block_m=block, block_n=block)


@pytest.mark.parametrize("heads, batch", [(HQ, B), (HKV, 1), (1, 1)])
@pytest.mark.parametrize("m", [100, 37])
def test_blocks(heads, batch, m):
    check(make(some_blocks(m, 100, heads=heads, batch=batch), m))


@pytest.mark.parametrize("heads", [1, HKV, HQ])
def test_vertical_slash(heads):
    vertical = torch.randint(-1, 70, (B, heads, 50), device=DEVICE)
    slash = torch.randint(-1, 6, (B, heads, 3), device=DEVICE)
    slash[..., 2] = slash[..., 1]
    plan = VerticalSlash(vertical, slash, 16)
    check(make(plan, 70, n=70))
    ours, theirs = plans.lowered(plan, 70, 70), plan.lower(70, 70)
    assert torch.equal(ours.row_ptr, theirs.row_ptr)
    assert torch.equal(ours.col[: ours.nnz], theirs.col)
    assert torch.equal(ours.n_full, theirs.n_full)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_blocks(causal):
    call = make(some_blocks(40, 40), 40, n=40, sink=torch.randn(HQ, device=DEVICE), softcap=4.0, causal=causal)
    found = []
    for backend, dtype in ((plans, torch.float32), (reference, torch.float64)):
        leaves = {x: getattr(call, x).detach().clone().to(dtype).requires_grad_() for x in ("q", "k", "v", "sink")}
        if backend is plans:
            assert plans.why_not(replace(call, **leaves)) is None
        o, _ = backend.attend(replace(call, **leaves))
        found.append(torch.autograd.grad((o * call.q.to(dtype)).sum(), list(leaves.values())))
    for ours, exactly in zip(*found):
        assert error(ours, exactly) <= 2e-5


def test_a_plan_is_lowered_once_until_it_changes(monkeypatch):
    lowered = []
    real = Blocks.lower
    monkeypatch.setattr(Blocks, "lower", lambda self, *sizes: lowered.append(sizes) or real(self, *sizes))
    plan = some_blocks(20, 20)
    for n in (20, 20, 32):
        check(make(plan, 20, n=n))
    assert lowered == [(20, 20), (20, 32)]
    columns = VerticalSlash(torch.tensor([[[3, 18]]], device=DEVICE), torch.tensor([[[0]]], device=DEVICE), 16)
    check(make(columns, 20, n=20))
    columns.vertical.fill_(10)
    columns.slash.fill_(1)
    check(make(columns, 20, n=20))


def test_block_options():
    check(make(some_blocks(100, 100), 100, sink=torch.randn(HQ, device=DEVICE), softcap=4.0))
    check(make(some_blocks(100, 100), 100, causal=False))


REFUSED = {
    "torch's own fused": make(Dense(), 20),
    "more than 16 queries": make(Window(5), 20),
    "PerHead": make(PerHead([Dense(), Dense()])),
    "per query head": make(Tokens(lists(HQ))),
    "one each": make(Tokens(lists()[:, :, None].expand(-1, -1, 3, -1)), 3),
    "inside a wider window": make(Window(5, 1), window=9),
    "aligned": make(some_blocks(100, 100), 100, window=5),
    "cover M": make(some_blocks(64, 100), 100),
    "16 divides": make(some_blocks(100, 100, 8), 100),
    "scale > 0": make(some_blocks(100, 100), 100, scale=-1.0),
    "does not fit batch": make(some_blocks(100, 100, heads=3), 100),
    "outnumber": make(Dense(), 5, 3),
    "at most 256": make(Dense(), d=288),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_why_not(reason):
    assert reason in plans.why_not(REFUSED[reason])


def test_why_not_gradients_and_float64():
    call = make(Dense())
    assert "float64" in plans.why_not(replace(call, q=call.q.double()))
    assert "gradients" in plans.why_not(replace(call, q=call.q.requires_grad_()))
    learned_sink = torch.randn(HQ, device=DEVICE, requires_grad=True)
    assert "gradients" in plans.why_not(make(Dense(), sink=learned_sink))
