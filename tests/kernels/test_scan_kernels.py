"""The kernels of linear attention against the recurrence in float64: outputs, states, gradients, steps, operators."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention.backends.triton import (
    recurrent_step,
    scan,
    scan_chunk,
    scan_chunk_backward,
    scan_configs,
    scan_launch,
    scan_ops,
    scan_split,
    scan_vector,
    scan_vector_backward,
)
from foveate.attention.linear import linear_step
from tests.kernels.definitions import DEVICE, GATES, error
from tests.kernels.scans import HV, K, V, gradient_errors, inputs, make, recurrence, run

FORMS = ["none", "fixed", "scalar", "vector"]


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Every buffer that a launcher asks for starts as NaN."""

    class Poisoned:
        def __getattr__(self, name):
            if name == "empty":
                return lambda *size, **options: torch.full(
                    size[0] if isinstance(size[0], tuple) else size, float("nan"), **options
                )
            return getattr(torch, name)

    for module in (recurrent_step, scan_chunk, scan_launch, scan_split, scan_vector, scan_vector_backward):
        monkeypatch.setattr(module, "torch", Poisoned())


@pytest.fixture
def _split(monkeypatch):
    """Sequences are cut into pieces of one chunk of 16 and more."""
    monkeypatch.setattr(
        scan_configs, "scan", lambda *a: scan_configs.ScanConfig(16, 16, 4, 1, sum_k=16, sum_v=16, shortest=1, per_sm=6)
    )
    monkeypatch.setattr(
        scan_configs, "vector", lambda *a: scan_configs.VectorConfig(16, 16, 4, 1, shortest=1, per_sm=6)
    )


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
    cut = scan_launch.Cut.fill(call.q, call.v, None, scan_configs.scan(K, V, 4))
    assert cut.split
    o, final = run(tensors, initial_state=start)
    want = recurrence(tensors, initial_state=start)
    assert error(o, want[0]) < 1e-5
    assert error(final, want[1]) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [(8, 8), (40, 16), (16, 80)])
def test_widths(form, width):
    tensors = inputs(form, 20, k=width[0], v=width[1], heads=(2, 2))
    assert error(run(tensors)[0], recurrence(tensors)[0]) < 1e-5


# The interpreter cuts bfloat16 off instead of rounding it, which alone costs more than the gate.
HALVES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(form, dtype):
    tensors = {name: x.to(dtype) if name in "qkv" else x for name, x in inputs(form, 70, decay=0.1).items()}
    o, final = run(tensors)
    want = recurrence(tensors)
    assert o.dtype == dtype
    assert error(o, want[0]) < GATES[dtype]
    assert final.dtype == torch.float32
    assert error(final, want[1]) < GATES[dtype]


OFFSETS = [0, 17, 17, 20, 48]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [False, True])
def test_packed_sequences(form, split, request):
    if split:
        request.getfixturevalue("_split")
    tensors = inputs(form, 48)
    start = torch.randn(4, HV, K, V, device=DEVICE)
    bounds = torch.tensor(OFFSETS, device=DEVICE)
    found = gradient_errors(tensors, start, cu_seqlens=bounds)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_gradients(form, split, with_state, request):
    if split:
        request.getfixturevalue("_split")
    tensors = inputs(form, 37)
    start = torch.randn(1, HV, K, V, device=DEVICE) if with_state else None
    found = gradient_errors(tensors, start)
    assert max(found.values()) < 2e-5, found


def test_gate_gradients_keep_pieces_short(monkeypatch):
    """A gate's gradient is summed over at most `LONGEST` tokens."""
    monkeypatch.setattr(scan_chunk_backward, "LONGEST", 16)
    found = gradient_errors(inputs("scalar", 40), None)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("form", ["fixed", "scalar", "vector"])
@pytest.mark.parametrize("decay", [1e-6, 20.0, 200.0])
def test_extreme_decays(form, decay):
    tensors = inputs(form, 40, decay=decay)
    if form != "fixed":
        tensors["g"][:, 1::2] *= 1e-3
    # The gradient of a fixed decay sums float32 roundings over all tokens, and is itself next to nothing.
    found = gradient_errors(tensors, None, floor=1.0 if form == "fixed" else 1e-2)
    assert max(found.values()) < 2e-5, found


@pytest.mark.parametrize("form", ["fixed", "scalar", "vector"])
def test_minus_infinity_wipes_the_state(form):
    tensors = inputs(form, 24)
    g = tensors["g"]
    (g if form == "fixed" else g[:, 10]).fill_(-torch.inf)
    start = torch.randn(1, HV, K, V, device=DEVICE)
    o, final = run(tensors, initial_state=start)
    want = recurrence(tensors, initial_state=start)
    assert error(o, want[0]) < 1e-5
    assert error(final, want[1]) < 1e-5


def test_normalised():
    tensors = inputs("scalar", 30)
    tensors["q"], tensors["k"] = tensors["q"].exp(), tensors["k"].exp()
    start = torch.rand(1, HV, K, V + 1, device=DEVICE)
    found = gradient_errors(tensors, start, normalize=True, eps=1e-6)
    assert max(found.values()) < 1e-5, found


def test_l2_norms():
    found = gradient_errors(inputs("none", 30), None, qk_l2norm=True)
    assert max(found.values()) < 1e-5, found


def test_strided_views():
    """Heads of one projection, as layers cut them."""
    fused = torch.randn(2, 20, 3 * 2 * 16, device=DEVICE)
    q, k, v = (x.unflatten(-1, (2, 16)) for x in fused.chunk(3, -1))
    tensors = {"q": q, "k": k, "v": v}
    assert error(run(tensors)[0], recurrence(tensors)[0]) < 1e-5
    moved = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tensors.items()}
    assert error(run(moved)[0], recurrence(tensors)[0]) < 1e-5


@pytest.mark.usefixtures("_split")
def test_runs_are_bit_equal():
    tensors = inputs("scalar", 48)
    first, second = run(tensors), run(tensors)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


DELTAS = ["none-delta", "fixed-delta", "scalar-delta", "vector-delta"]
STEPS = [
    *((form, options) for form in [*FORMS, *DELTAS] for options in ({}, {"qk_l2norm": True})),
    *((form, {"normalize": True}) for form in FORMS),
]


@pytest.mark.parametrize("form, options", STEPS)
def test_steps(form, options):
    tensors = inputs(form, 1, batch=2)
    columns = V + bool(options.get("normalize"))
    for start in (None, torch.rand(2, HV, K, columns, device=DEVICE)):
        o, after = scan.step(make(tensors, initial_state=start, **options))
        double = {name: x.double() for name, x in tensors.items()}
        want = linear_step(**double, state=None if start is None else start.double(), backend="reference", **options)
        assert error(o, want[0]) < 1e-5
        assert error(after, want[1]) < 1e-5


def test_a_step_that_trains_has_gradients():
    found = gradient_errors(inputs("scalar", 1), torch.randn(1, HV, K, V, device=DEVICE))
    assert max(found.values()) < 1e-5, found


def test_what_the_kernels_refuse():
    wide = inputs("none", 4, k=257)
    assert "K = 257" in scan.why_not(make(wide))
    wide = inputs("none", 4, v=300)
    assert "V = 300" in scan.why_not(make(wide))
    assert "per key channel" in scan.why_not(make(inputs("vector-delta", 4)))
    double = {name: x.double() for name, x in inputs("none", 4).items()}
    assert "float64" in scan.why_not(make(double))
    assert "scale = 0" in scan.why_not(make(inputs("none", 4), scale=0.0))
    assert scan.why_not(make(inputs("scalar-delta", 4))) is None


@pytest.mark.parametrize("form", FORMS)
def test_operators_pass_opcheck(form):
    tensors = {name: x.requires_grad_() for name, x in inputs(form, 6).items()}
    q, k, v, g = (tensors.get(name) for name in "qkvg")
    start = torch.randn(1, HV, K, V, device=DEVICE, requires_grad=True)
    torch.library.opcheck(scan_ops.linear_scan, (q, k, v, g, start, 0.25, None, g is not None, False))


def test_step_operator_passes_opcheck():
    q, k, v, g = inputs("scalar", 1).values()
    state = torch.randn(1, HV, K, V, device=DEVICE)
    torch.library.opcheck(scan_ops.linear_step, (q, k, v, g, None, state, 0.25, False, 1e-6, True))


@pytest.mark.parametrize("form", FORMS)
def test_compiled_without_graph_breaks(form):
    tensors = inputs(form, 18)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(tensors):
        return scan.scan(make(tensors))[0].square().sum()

    mine = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    layer(mine).backward()
    theirs = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    scan.scan(make(theirs))[0].square().sum().backward()
    for name, x in mine.items():
        assert error(x.grad, theirs[name].grad.double()) < 1e-6, name


def test_half_precision_products_are_never_narrow():
    assert scan_configs.columns(16, 64, 64, 2) == scan_configs.columns(128, 32, 64, 2) == 64
    assert scan_configs.columns(128, 128, 64, 2) == 128
    assert scan_configs.columns(24, 64, 16, 4) == 32
    assert scan_configs.columns(128, 32, 32, 2) == 32


def test_tuned_entries_extend_the_tables(monkeypatch):
    mine = {"table": "scan", "key": 128, "config": {"chunk": 128, "block_v": 64, "num_warps": 8, "num_stages": 1}}
    monkeypatch.setattr(scan_configs.tuned, "_of_this_machine", lambda: (mine,))
    scan_configs.scan.cache_clear()
    try:
        assert scan_configs.scan(128, 128, 2) == scan_configs.ScanConfig(128, 64, 8, 1)
        assert scan_configs.scan(64, 64, 2) == scan_configs.SCAN[64]
    finally:
        scan_configs.scan.cache_clear()


def test_cuts_fill_the_device():
    q = torch.empty(1, 4096, 2, 16)
    config = scan_configs.ScanConfig(64, 16, 4, 2, per_sm=8)
    cut = scan_launch.Cut.fill(q, q, None, config)
    # 2 heads over 4 multiprocessors that want 8 blocks each.
    assert (cut.pieces, cut.per_sequence, cut.length) == (8, 8, 512)
    short = scan_launch.Cut.fill(q[:, :1000], q[:, :1000], None, config)
    assert not short.split
    packed = scan_launch.Cut.fill(q, q, [0, 0, 4000, 4096], config)
    assert packed.table[:, 0].tolist() == [1] * 8 + [2]
    assert packed.table[:, 3].tolist() == [1] + [0] * 6 + [2, 3]
    assert packed.first.tolist() == [0, 0, 8, 9]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", ["none", "none-delta"])
def test_offsets_beyond_two_to_the_31(form):
    """The last head's last tokens, alone, are what they are at the end of 2.3e9 numbers: earlier ones are zeros."""
    T, heads, tail = 140_032, 128, 200
    shape = (1, T, heads, 128)
    tensors = {name: torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for name in "qkv"}
    small = {name: torch.randn(1, tail, 1, 128, device="cuda", dtype=torch.bfloat16) for name in "qkv"}
    small["k"] = torch.nn.functional.normalize(small["k"], dim=-1)
    for name, x in tensors.items():
        x[:, -tail:, -1:] = small[name]
    if form.endswith("delta"):
        small["beta"] = torch.rand(1, tail, 1, device="cuda")
        tensors["beta"] = torch.zeros(1, T, heads, device="cuda")
        tensors["beta"][:, -tail:, -1:] = small["beta"]
    o, final = scan.scan(make(tensors))
    want = recurrence(small)
    assert error(o[:, -tail:, -1:], want[0]) < GATES[torch.bfloat16]
    assert error(final[:, -1:], want[1]) < GATES[torch.bfloat16]
    assert not o[:, :-tail].any()
