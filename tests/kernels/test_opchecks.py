"""Contracts of the operators with torch where sequences are split, packed or empty, and keys are pages or packed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from torch.library import opcheck

from foveate.attention.backends.triton import scan, scan_configs, scan_ops
from foveate.attention.backends.triton.gather_decode import gather_decode
from foveate.errors import BackendError
from tests.kernels.definitions import DEVICE
from tests.kernels.scans import HV, K, V, inputs, make
from tests.kernels.test_block_flash import draw, draw_plan
from tests.kernels.test_ops import NO_GRADIENTS, plan_arguments

# All but what follows gradients.
REFUSALS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.fixture
def _pieces(monkeypatch):
    """Sequences are cut into pieces of one chunk of 16 and more."""
    walk = scan_configs.ScanConfig(16, 16, 4, 1, sum_k=16, sum_v=16, shortest=1, per_sm=6)
    delta = scan_configs.DeltaConfig(16, 16, 4, 1, sum_v=16, back_v=16, shortest=1, per_sm=6, solve="ieee")
    vector = scan_configs.VectorConfig(16, 16, 4, 1, shortest=1, per_sm=6)
    for name, config in (("scan", walk), ("delta", delta), ("vector", vector)):
        monkeypatch.setattr(scan_configs, name, lambda *sizes, config=config: config)


CUTS = [
    pytest.param(None, id="whole"),
    pytest.param([0, 0, 17, 20, 20], id="packed", marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("offsets", CUTS)
@pytest.mark.parametrize("form", ["scalar", "vector", "scalar-delta"])
def test_scans_in_pieces(form, offsets):
    tensors = {name: x.requires_grad_() for name, x in inputs(form, 20).items()}
    q, k, v, beta, g = (tensors.get(name) for name in ("q", "k", "v", "beta", "g"))
    sequences = 1 if offsets is None else len(offsets) - 1
    start = torch.randn(sequences, HV, K, V, device=DEVICE, requires_grad=True)
    if beta is None:
        opcheck(scan_ops.linear_scan, (q, k, v, g, start, 0.25, offsets, g is not None, False))
    else:
        opcheck(scan_ops.delta_scan, (q, k, v, beta, g, start, 0.25, offsets, g is not None, True))


@pytest.mark.parametrize("form", ["none", "scalar-delta"])
def test_packed_scans_that_are_not_split_and_keep_nothing(form):
    tensors = inputs(form, 9)
    q, k, v, beta, g = (tensors.get(name) for name in ("q", "k", "v", "beta", "g"))
    options = (None, 0.25, [0, 4, 4, 9], False)
    if beta is None:
        opcheck(scan_ops.linear_scan, (q, k, v, g, *options, True), test_utils=NO_GRADIENTS)
    else:
        opcheck(scan_ops.delta_scan, (q, k, v, beta, g, *options, False), test_utils=NO_GRADIENTS)


@pytest.mark.parametrize(
    "form, normalize", [("none", True), ("fixed", False), ("vector", True), ("scalar-delta", False)]
)
def test_steps(form, normalize):
    tensors = inputs(form, 1, batch=2)
    q, k, v, g, beta = (tensors.get(name) for name in ("q", "k", "v", "g", "beta"))
    opcheck(scan_ops.linear_step, (q, k, v, g, beta, None, 0.25, normalize, 1e-6, False), test_utils=NO_GRADIENTS)


def test_a_step_refuses_gradients():
    q, k, v, g = (x.requires_grad_() for x in inputs("scalar", 1).values())
    arguments = (q, k, v, g, None, None, 0.25, False, 1e-6, True)
    opcheck(
        scan_ops.linear_step, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    o, state = scan_ops.linear_step(*arguments)
    for each in (o, state):
        with pytest.raises(BackendError, match="linear_step has no gradients; use backend='torch'"):
            each.sum().backward(retain_graph=True)
    # The public function, asked for gradients, takes the scan.
    scan.step(make({"q": q, "k": k, "v": v, "g": g}))[0].sum().backward()
    assert q.grad is not None


def decode(**options):
    names = (
        "index", "length", "page_size", "start", "scale", "causal", "window", "sinks", "sink", "softcap", "log_weight",
        "k_positions", "q_positions", "num_splits",
    )  # fmt: skip
    return tuple({"page_size": 1, "scale": 0.3, "causal": True, **options}.get(name) for name in names)


DECODES = {
    "split": lambda: (*draw(B=2, M=2, N=70), *decode(num_splits=3)),
    "pages": lambda: (
        *draw(B=2, M=1, N=64),
        *decode(index=torch.randint(-1, 16, (2, 2, 5), device=DEVICE), page_size=4),
    ),
    "pages in use": lambda: (
        *draw(B=2, M=1, N=64),
        *decode(
            index=torch.randint(-1, 16, (1, 2, 5), device=DEVICE),
            length=torch.tensor([[5, 0], [0, 3]], device=DEVICE),
            page_size=4,
        ),
    ),
    "packed": lambda: (
        torch.randn(2, 4, 1, 16, device=DEVICE), *torch.randn(2, 50, 16, device=DEVICE).unbind(),
        *decode(
            start=torch.tensor([0, 20, 20, 40], device=DEVICE),
            length=torch.tensor([[20, 0], [17, 10]], device=DEVICE),
            log_weight=torch.randn(50, device=DEVICE),
        ),
    ),
    "empty": lambda: (*draw(B=2, M=1, N=20), *decode(length=torch.zeros(2, 2, dtype=torch.int64, device=DEVICE))),
    "window": lambda: (*draw(M=3, N=70, DV=48), *decode(window=20, sinks=4, softcap=5.0)),
    "positions": lambda: (
        *draw(B=2, M=2, N=40),
        *decode(
            k_positions=torch.arange(40, device=DEVICE).expand(2, 2, 40) - 3,
            q_positions=torch.tensor([[36, 37], [-1, 5]], device=DEVICE),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODES)
def test_gather_decode(name):
    opcheck(torch.ops.foveate.gather_decode.default, DECODES[name](), test_utils=NO_GRADIENTS)


def test_lists_of_no_keys_give_nothing():
    q, k, v, _, length, *_ = DECODES["empty"]()
    o, lse = gather_decode(q, k, v, length=length)
    assert not o.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("bias", [None, -2.0])
def test_block_flash_of_rows_that_read_nothing_and_a_batch(bias):
    q, k, v = (x.requires_grad_() for x in draw(B=2, M=20, N=50, DV=16))
    plan, _ = draw_plan(20, 50, heads=2, batch=2, block_m=16, block_n=16, share=0.3)
    rows, lists = plan_arguments(plan, True)
    opcheck(
        torch.ops.foveate.block_flash.default,
        (q, k, v, *rows, *[None] * 4, *lists, None, 2, 2, 16, 16, 0.2, False, None, bias),
        test_utils=REFUSALS,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_topk_of_many_chunks_and_empty_rows(dtype):
    scores = torch.randn(2, 1, 1100, device=DEVICE).to(dtype)
    length = torch.tensor([[0], [900]], device=DEVICE)
    opcheck(torch.ops.foveate.topk.default, (scores, 5, length), test_utils=NO_GRADIENTS)
    opcheck(torch.ops.foveate.topk.default, (scores[:0], 5, None), test_utils=NO_GRADIENTS)


def test_merge_of_parts_that_read_nothing_and_of_nothing():
    lses = torch.randn(3, 2, 5, device=DEVICE)
    lses[:, 1] = -torch.inf
    parts = torch.randn(3, 2, 5, 16, device=DEVICE)
    opcheck(torch.ops.foveate.merge.default, (parts, lses), test_utils=NO_GRADIENTS)
    opcheck(torch.ops.foveate.merge.default, (parts[:, :0], lses[:, :0]), test_utils=NO_GRADIENTS)
