"""Masses of the last queries against full weights in float64, and lists of blocks against their masks."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention import Blocks, attend
from foveate.attention.backends.triton import block_lists, last_queries, ops
from foveate.attention.sparse_plan import SparsePlan
from foveate.errors import PlanError, ShapeError
from foveate.methods.prefill import flexprefill
from foveate.methods.prefill.flexprefill import FlexPrefill, sums_of_blocks
from tests.kernels.compiling import compiled
from tests.kernels.definitions import DEVICE, error


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Every buffer that the launchers ask for starts as garbage."""

    class Poisoned:
        def __getattr__(self, name):
            return empty if name == "empty" else getattr(torch, name)

    def empty(*size, **options):
        return torch.full(size if isinstance(size[0], int) else size[0], 99 if whole(options) else torch.nan, **options)

    def whole(options):
        return not options["dtype"].is_floating_point

    for module in (last_queries, block_lists):
        monkeypatch.setattr(module, "torch", Poisoned())


DTYPE, GATE = (torch.float16, 5e-3) if DEVICE == "cuda" else (torch.float32, 1e-4)


def draw(B=1, Hq=4, Hkv=2, m=16, N=50, D=16, dtype=DTYPE):
    return torch.randn(B, Hq, m, D, device=DEVICE).to(dtype), torch.randn(B, Hkv, N, D, device=DEVICE).to(dtype)


def definition(last, k, scale):
    """[2, B, Hq, N] in float64, diagonal by diagonal."""
    m, N = last.shape[2], k.shape[2]
    scores = last.double() @ k.double().repeat_interleave(last.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
    scores = scores.masked_fill(torch.ones(m, N, device=DEVICE, dtype=torch.bool).triu(N - m + 1), -torch.inf)
    weights = torch.softmax(scores, -1)
    diagonals = [weights.diagonal(c + 1 - m, -2, -1).sum(-1) / m for c in range(N)]
    return torch.stack((weights.mean(2), torch.stack(diagonals, -1)))


GATES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}


@pytest.mark.parametrize("dtype", GATES)
@pytest.mark.parametrize("m, N, D", [(16, 16, 16), (16, 50, 24), (32, 64, 32), (128, 200, 16)])
def test_masses(m, N, D, dtype):
    if DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("float32 is left to torch on a GPU")
    last, k = draw(B=2, m=m, N=N, D=D, dtype=dtype)
    want = definition(last, k, 0.4)
    for each, exact in zip(last_queries.column_and_diagonal_mass(last, k, scale=0.4), want):
        assert error(each, exact) <= GATES[dtype]
    for each, exact in zip(last_queries.column_and_diagonal_mass(last, k, scale=0.4, pooled=True), want):
        assert error(each, sums_of_blocks(exact, m)) <= GATES[dtype]


def test_masses_of_great_scores_strides_and_many_keys(monkeypatch):
    """Many tiles for each thread block; scores of a thousand; expanded keys and transposed queries."""
    monkeypatch.setattr(last_queries.runtime, "multiprocessors", lambda index: 1)
    last, k = draw(Hq=3, Hkv=3, N=230)
    last, k = 300 * last.transpose(1, 2).contiguous().transpose(1, 2), k[:, :1].expand(-1, 3, -1, -1)
    want = definition(last, k, 0.4)
    for pooled in (False, True):
        found = last_queries.column_and_diagonal_mass(last, k, scale=0.4, pooled=pooled)
        assert error(found, sums_of_blocks(want, 16) if pooled else want) <= GATE


def test_bad_input_is_named():
    last, k = draw()
    with pytest.raises(ShapeError, match="m = 24"):
        last_queries.column_and_diagonal_mass(draw(m=24)[0], k, scale=1.0)
    with pytest.raises(ShapeError, match="do not fit"):
        last_queries.column_and_diagonal_mass(last, k[..., :8], scale=1.0)
    with pytest.raises(ShapeError, match="float64"):
        last_queries.column_and_diagonal_mass(last.double(), k.double(), scale=1.0)
    with pytest.raises(ShapeError, match="pooled"):
        listed(torch.rand(2, 3, 5, device=DEVICE), 2, tokens=64)


def listed(pooled, counts, batch=1, tokens=None, block=16) -> SparsePlan:
    n = pooled.shape[-1]
    most = counts if isinstance(counts, int) else int(counts.max())
    tokens = n * block if tokens is None else tokens
    return block_lists.columns_and_diagonals(pooled, counts, most=most, batch=batch, tokens=tokens, block=block)


def check_lists(made: SparsePlan, mask: torch.Tensor) -> None:
    """Entry for entry what the mask [B, H, n, n] gives, and the spare entries never written to."""
    want = Blocks.from_mask(mask, block_m=made.block_m, block_n=made.block_n).lower(made.m, made.n)
    assert torch.equal(made.row_ptr, want.row_ptr)
    assert made.nnz == want.nnz
    assert torch.equal(made.col[: made.nnz], want.col)
    assert bool((made.col[made.nnz :] == 99).all())
    assert torch.equal(made.n_full, want.n_full)
    assert torch.equal(made.order, want.order)
    for ours, theirs in zip(vars(made.by_keys).values(), vars(want.by_keys).values()):
        assert torch.equal(ours, theirs)
    assert {**made.stats(), "bytes": 0} == {**want.stats(), "bytes": 0}


@pytest.mark.parametrize("n, count", [(1, 1), (5, 1), (5, 2), (37, 4), (130, 3), (6, 6)])
@pytest.mark.parametrize("ties", [False, True])
def test_lists(n, count, ties):
    pooled = torch.rand(2, 2, n, device=DEVICE)
    pooled = (3 * pooled).floor() if ties else pooled
    check_lists(listed(pooled, count), flexprefill.columns_and_diagonals(pooled, count)[None])


@pytest.mark.parametrize("spare", [True, False])
def test_lists_of_own_counts(monkeypatch, spare):
    if not spare:
        monkeypatch.setattr(block_lists, "SPARE_ENTRIES", 0)
    pooled = torch.rand(2, 6, 20, device=DEVICE)
    counts = torch.randint(1, 9, (2, 6), device=DEVICE)
    made = listed(pooled, counts, batch=2, tokens=311)
    assert (made.col.numel() > made.nnz) == spare
    check_lists(made, flexprefill.columns_and_diagonals(pooled, counts).unflatten(0, (2, 3)))


@pytest.mark.parametrize("tokens", [16, 80, 75])
def test_blocks_with_room_to_spare(tokens):
    n = -(-tokens // 16)
    pooled = torch.rand(2, 4, n, device=DEVICE)
    made = listed(pooled, 2, batch=2, tokens=tokens)
    plan = Blocks.from_lowered(made, own_last=True)
    mask = flexprefill.columns_and_diagonals(pooled, 2).unflatten(0, (2, 2))
    plain = Blocks.from_mask(mask, block_m=16, block_n=16)
    assert plan.lowered(tokens, tokens) is made
    assert torch.equal(plan.block_mask(n), mask)
    assert torch.equal(plan.to_mask(tokens, tokens), plain.to_mask(tokens, tokens))
    for each in (plan, Blocks.from_lowered(made), plain):
        assert float(each.share(tokens, tokens)) == pytest.approx(super(Blocks, plain).density(tokens, tokens))
        assert float(each.share(tokens, tokens + 9)) == pytest.approx(float(plain.share(tokens, tokens + 9)))
    relowered = Blocks.from_lowered(made).lower(tokens, tokens)
    assert torch.equal(relowered.n_full, made.n_full)
    assert relowered.nnz == made.nnz == relowered.col.numel()
    with pytest.raises(PlanError, match="columns"):
        Blocks.from_lowered(made.with_columns(torch.zeros(2, 2, 1, device=DEVICE)))
    with pytest.raises(PlanError, match="square"):
        Blocks.from_mask(mask, block_m=16, block_n=32, own_last=True)


def test_attention_reads_no_spare_entries():
    pooled = torch.rand(2, 4, 5, device=DEVICE)
    made = listed(pooled, 2, batch=2, tokens=75)
    mask = flexprefill.columns_and_diagonals(pooled, 2).unflatten(0, (2, 2))
    plain = Blocks.from_mask(mask, block_m=16, block_n=16)
    q, k, v = (torch.randn(2, 2, 75, 16, device=DEVICE) for _ in range(3))
    assert made.nnz < made.col.numel()
    assert torch.equal(ops.block_flash(q, k, v, made)[0], ops.block_flash(q, k, v, plain.lowered(75, 75))[0])
    for backend in ("torch", "reference"):
        found, want = (attend(q, k, v, plan, backend=backend) for plan in (Blocks.from_lowered(made), plain))
        assert torch.equal(found, want)


OPTIONS = {
    "fixed": {"tau": 0.0, "min_budget": 32, "max_budget": 32},
    "by mass": {"tau": 0.0, "min_budget": 16},
    "some heads aware": {"tau": 0.25, "min_budget": 16, "max_budget": 48},
    "all heads aware": {"tau": 2.0, "min_budget": 16, "max_budget": 16},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("tokens", [128, 121])
def test_flexprefill_chooses_what_its_definition_chooses(monkeypatch, options, tokens):
    method = FlexPrefill(gamma=0.7, block=16, **options)
    q, k = torch.randn(2, 4, tokens, 16, device=DEVICE), torch.randn(2, 2, tokens, 16, device=DEVICE)
    monkeypatch.setattr(flexprefill, "has_triton", lambda x: False)
    want = method.block_map(q, k, 0.5)
    aware = method._choice(q, k, 0.5).maps
    assert len(aware) == {0.0: 0, 2.0: 8}.get(method.tau, len(aware))
    monkeypatch.setattr(flexprefill, "has_triton", lambda x: True)
    plan = method.block_plan(q, k, 0.5)
    assert torch.equal(plan.block_mask(-(-tokens // 16)), want)
    assert plan.spare == (not aware)
    exact = Blocks.from_mask(want, block_m=16, block_n=16)
    assert float(plan.share(tokens, tokens)) == pytest.approx(float(exact.share(tokens, tokens)))


@pytest.mark.parametrize("case", ["last queries", "last queries D64", "last queries by token"])
def test_masses_compile_to_tensor_cores_and_spill_nothing(case):
    for kernel in compiled(case):
        assert kernel["spills"] == 0
        assert kernel["wgmma"] > 0
        assert kernel["cp_async"] > 0
        assert kernel["shared"] <= 227 * 1024


def test_lists_are_three_kernels_that_spill_nothing():
    kernels = compiled("block lists")
    assert [each["kernel"] for each in kernels] == ["choose_kernel", "count_kernel", "fill_kernel"]
    assert not any(each["spills"] for each in kernels)
