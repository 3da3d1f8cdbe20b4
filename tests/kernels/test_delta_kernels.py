"""The kernels of the delta rule against the recurrence in float64: outputs, states, gradients, operators."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")
import triton
import triton.language as tl

from foveate.attention.backends.triton import (
    delta_chunk,
    delta_chunk_backward,
    delta_launch,
    scan,
    scan_chunk,
    scan_configs,
    scan_launch,
    scan_ops,
)
from tests.kernels.definitions import DEVICE, GATES, error
from tests.kernels.scans import HV, K, V, gradient_errors, inputs, make, recurrence, run

FORMS = ["none-delta", "fixed-delta", "scalar-delta"]


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Every buffer that a launcher asks for starts as NaN."""

    class Poisoned:
        def __getattr__(self, name):
            if name == "empty":
                return lambda *size, **options: torch.full(size, float("nan"), **options)
            return getattr(torch, name)

    for module in (delta_chunk, delta_chunk_backward, delta_launch, scan_chunk):
        monkeypatch.setattr(module, "torch", Poisoned())


@pytest.fixture
def _split(monkeypatch):
    """Sequences are cut into pieces of one chunk of 16 and more."""
    delta = scan_configs.DeltaConfig(16, 16, 4, 1, sum_v=16, back_v=16, shortest=1, per_sm=6, solve="ieee")
    walk = scan_configs.ScanConfig(16, 16, 4, 1, sum_k=16, sum_v=16, shortest=1, per_sm=6)
    monkeypatch.setattr(scan_configs, "delta", lambda *a: delta)
    monkeypatch.setattr(scan_configs, "scan", lambda *a: walk)


@triton.jit
def inverse_kernel(A, X, C: tl.constexpr):
    i = tl.arange(0, C)
    at = i[:, None] * C + i[None, :]
    tl.store(X + at, delta_chunk.triangle_inverse(tl.load(A + at), i, C, "ieee"))


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("entries", ["random", "ones"])
def test_inverse_of_a_triangle(size, upper, entries):
    """All ones is where a sum of powers would lose every digit: its terms reach 10^17."""
    A = torch.randn(size, size, device=DEVICE) * 0.3 if entries == "random" else torch.ones(size, size, device=DEVICE)
    A = A.triu(1) if upper else A.tril(-1)
    X = torch.full_like(A, float("nan"))
    inverse_kernel[(1,)](A, X, size)
    want = torch.linalg.inv(torch.eye(size, dtype=torch.float64, device=DEVICE) + A.double())
    assert error(X, want) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 15, 16, 33, 50])
def test_lengths(form, T):
    tensors = inputs(form, T, batch=2)
    start = torch.randn(2, HV, K, V, device=DEVICE)
    o, final = run(tensors, initial_state=start)
    want = recurrence(tensors, initial_state=start)
    assert error(o, want[0]) < 1e-5
    assert error(final, want[1]) < 1e-5


@pytest.mark.usefixtures("_split")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_state", [False, True])
def test_pieces_of_one_sequence(form, with_state):
    tensors = inputs(form, 55)
    start = torch.randn(1, HV, K, V, device=DEVICE) if with_state else None
    call = make(tensors, initial_state=start)
    assert scan_launch.Cut.fill(call.q, call.v, None, scan_configs.delta(K, V, 4)).split
    o, final = run(tensors, initial_state=start)
    want = recurrence(tensors, initial_state=start)
    assert error(o, want[0]) < 1e-5
    assert error(final, want[1]) < 1e-5


@pytest.mark.parametrize("width", [(8, 8), (40, 16), (16, 80)])
def test_widths(width):
    tensors = inputs("scalar-delta", 20, k=width[0], v=width[1], heads=(2, 2))
    assert error(run(tensors)[0], recurrence(tensors)[0]) < 1e-5


@pytest.mark.usefixtures("_split")
def test_pieces_of_the_widest_head():
    """A map of 256 x 256 is applied in two parts."""
    found = gradient_errors(inputs("scalar-delta", 40, k=200, v=16, heads=(1, 1)), None, floor=1e-2)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("form", FORMS)
# The interpreter cuts bfloat16 off instead of rounding it, which alone costs more than the gate.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16])
def test_half_precision(form, dtype):
    tensors = {name: x.to(dtype) if name in "qkv" else x for name, x in inputs(form, 70, decay=0.1).items()}
    o, final = run(tensors)
    want = recurrence(tensors)
    assert o.dtype == dtype
    assert error(o, want[0]) < GATES[dtype]
    assert error(final, want[1]) < GATES[dtype]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [False, True])
def test_packed_sequences(form, split, request):
    if split:
        request.getfixturevalue("_split")
    tensors = inputs(form, 48)
    start = torch.randn(4, HV, K, V, device=DEVICE)
    found = gradient_errors(tensors, start, cu_seqlens=torch.tensor([0, 17, 17, 20, 48], device=DEVICE))
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_gradients(form, split, with_state, request):
    if split:
        request.getfixturevalue("_split")
    tensors = inputs(form, 37)
    start = torch.randn(1, HV, K, V, device=DEVICE) if with_state else None
    found = gradient_errors(tensors, start, floor=1e-2)
    assert max(found.values()) < 1e-5, found


def test_gradients_of_a_batch_with_shared_keys():
    found = gradient_errors(inputs("scalar-delta", 20, batch=2, heads=(1, 3)), None)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_extreme_strengths(beta):
    """beta = 0 writes nothing yet has a gradient; beta = 1 with one repeated key overwrites."""
    tensors = inputs("none-delta", 20)
    tensors["beta"].fill_(beta)
    if beta:
        tensors["k"][:] = tensors["k"][:, :1]
    start = torch.randn(1, HV, K, V, device=DEVICE)
    found = gradient_errors(tensors, start, floor=1e-2)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("decay", [1e-6, 20.0, 200.0])
def test_extreme_decays(decay):
    tensors = inputs("scalar-delta", 40, decay=decay)
    tensors["g"][:, 1::2] *= 1e-3
    found = gradient_errors(tensors, None, floor=1e-2)
    assert max(found.values()) < 2e-5, found


def test_l2_norms():
    found = gradient_errors(inputs("scalar-delta", 20), None, qk_l2norm=True)
    assert max(found.values()) < 1e-5, found


@pytest.mark.usefixtures("_split")
def test_runs_are_bit_equal():
    tensors = inputs("scalar-delta", 48)
    first, second = run(tensors), run(tensors)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("form", FORMS)
def test_operators_pass_opcheck(form):
    tensors = {name: x.requires_grad_() for name, x in inputs(form, 6).items()}
    q, k, v, beta, g = (tensors.get(name) for name in ("q", "k", "v", "beta", "g"))
    start = torch.randn(1, HV, K, V, device=DEVICE, requires_grad=True)
    torch.library.opcheck(scan_ops.delta_scan, (q, k, v, beta, g, start, 0.25, None, g is not None, True))


@pytest.mark.usefixtures("_split")
def test_compiled_without_graph_breaks():
    tensors = inputs("scalar-delta", 34)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(tensors):
        return scan.scan(make(tensors))[0].square().sum()

    mine = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    layer(mine).backward()
    theirs = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    scan.scan(make(theirs))[0].square().sum().backward()
    for name, x in mine.items():
        assert error(x.grad, theirs[name].grad.double()) < 1e-6, name
