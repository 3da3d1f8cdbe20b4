"""Whether the kernels serve a tensor, and how a tuned entry, a plan and a table are kept."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch
from filelock import FileLock

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention import VerticalSlash
from foveate.attention.backends.triton import availability, plans, scan_launch, tuned
from foveate.attention.sparse_plan import SparsePlan, csr_from_mask
from foveate.errors import BackendError


class Cuda:
    """What is asked of a tensor on a GPU."""

    def __init__(self, x: torch.Tensor, index: int = 0) -> None:
        self.dtype, self.shape, self.requires_grad = x.dtype, x.shape, x.requires_grad
        self.device, self.stride = torch.device("cuda", index), x.stride


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(availability, "_has_tensor_cores", lambda index: index == 0)


def test_why_not_device(monkeypatch, hopper):
    x = torch.zeros(2, 3)
    assert availability.why_not_device(x) == "q is on cpu; the Triton kernels need CUDA"
    assert availability.why_not_device(Cuda(x)) is None
    assert "capability 8.0" in availability.why_not_device(Cuda(x, 1))
    monkeypatch.setattr(availability, "INSTALLED", False)
    assert "not installed" in availability.why_not_device(Cuda(x))


def test_serves(hopper):
    x = torch.zeros(2, 3)
    assert availability.serves(Cuda(x), Cuda(x))
    assert not availability.serves(x)
    assert not availability.serves(Cuda(x.double()))
    assert not availability.serves(Cuda(x), Cuda(x.half()))
    assert not availability.serves(Cuda(x), Cuda(x, 1))
    assert not availability.serves(Cuda(x.t()))
    assert availability.serves(Cuda(torch.zeros(2, 1).t()))
    learned = Cuda(torch.zeros(2, 3, requires_grad=True))
    assert not availability.serves(Cuda(x), learned)
    assert availability.serves(Cuda(x), learned, gradients=True)
    with torch.no_grad():
        assert availability.serves(learned)


def entry(key, **versions):
    config = {"block": 64}
    return {"table": "scan", "key": key, "config": config, "error": 1e-3, "us": 2.0, "versions": versions}


def test_entries_of_other_compilers_are_left_out_with_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    path = tuned.file_of("Some GPU")
    tuned.keep(path, "Some GPU", [entry(64, python="3.12")])
    here = tuned.compilers()
    assert tuned.entries(path)[0]["versions"] == {"python": "3.12", **here}
    others = [entry(128, torch=here["torch"]), entry(256, **{**here, "triton": "0.1"})]
    tuned._replace(path, {"schema_version": tuned.SCHEMA, "entries": tuned.entries(path) + others})
    tuned._of_this_machine.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert [each["key"] for each in tuned._of_this_machine()] == [64]
            assert [each["key"] for each in tuned._of_this_machine()] == [64]
        (record,) = caplog.records
        assert "2 of 3 launch configurations" in record.getMessage()
        assert "foveate tune" in record.getMessage()
    finally:
        tuned._of_this_machine.cache_clear()


def test_writers_take_turns(tmp_path, monkeypatch):
    path = tmp_path / "tuned" / "gpu.json"
    threads = [threading.Thread(target=tuned.keep, args=(path, "GPU", [entry(key)])) for key in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(each["key"] for each in tuned.entries(path)) == list(range(8))
    monkeypatch.setattr(tuned, "PATIENCE", 0.05)
    began = time.monotonic()
    with FileLock(path.with_suffix(".lock")), pytest.raises(BackendError, match="written by another process"):
        tuned.keep(path, "GPU", [entry(9)])
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("n, block, offsets", [(75, 16, 4), (64, 16, 9), (5, 1, 3), (16, 16, 1), (40, 16, 0)])
@pytest.mark.parametrize("bound", [None, 0])
def test_diagonals_with_room_to_spare_are_the_same_lists(monkeypatch, n, block, offsets, bound):
    if bound is not None:
        monkeypatch.setattr("foveate.attention.sparse_plan.SPARE_ENTRIES", bound)
    rows = -(-n // block)
    slash = torch.randint(-1, rows + 1, (2, 3, offsets))
    exact = SparsePlan.from_diagonals(slash, n=n, block=block)
    made = SparsePlan.from_diagonals(slash, n=n, block=block, spare=True)
    r, c = torch.arange(rows)[:, None], torch.arange(rows)
    read = ((r - c)[..., None] == slash[:, :, None, None]).any(-1) & (c <= r)
    want = csr_from_mask(read, m=n, n=n, block_m=block, block_n=block)
    for ours in (exact, made):
        assert torch.equal(ours.row_ptr, want.row_ptr)
        assert torch.equal(ours.col[: ours.nnz], want.col)
        assert torch.equal(ours.n_full, want.n_full)
        assert torch.equal(ours.order, want.order)
    assert not exact.spare
    assert exact.col.numel() == want.nnz
    assert made.spare == (bound is None or not offsets)


def test_vertical_slash_is_lowered_without_waiting(monkeypatch):
    plan = VerticalSlash(torch.tensor([[[3, 40, -1]]]), torch.tensor([[[0, 2, 2]]]), block=16)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda x: pytest.fail("the host waited"))
    made = plans.lowered(plan, 75, 75)
    assert made.spare
    assert made.columns is not None


@pytest.mark.parametrize("m, n", [(1, 1), (128, 128), (129, 129), (300, 513), (100, 128), (17, 300)])
@pytest.mark.parametrize("causal", [True, False])
def test_every_block(m, n, causal):
    size = plans.DENSE_BLOCK
    first, rows = torch.arange(0, n, size), torch.arange(0, m, size)
    last = (rows + size).clamp(max=m) - 1 + (n - m)
    seen = first <= (last[:, None] if causal else torch.full_like(last, n)[:, None])
    want = csr_from_mask(seen[None, None], m=m, n=n, block_m=size, block_n=size)
    made = plans.every_block.__wrapped__(m, n, causal, torch.device("cpu"))
    for name in ("row_ptr", "col", "n_full", "order"):
        assert torch.equal(getattr(made, name), getattr(want, name))
        assert getattr(made, name).dtype == getattr(want, name).dtype


def test_tables_of_packed_sequences_are_made_once():
    scan_launch._tables.cache_clear()
    device = torch.device("cpu")
    cuts = [scan_launch.Cut.plan(1, 100, [0, 0, 70, 100], chunk=16, pieces=4, device=device) for _ in range(2)]
    assert cuts[0].table is cuts[1].table
    assert cuts[0].first is cuts[1].first
    assert cuts[0].table.shape == (cuts[0].pieces, 4)
    states, final = torch.arange(float(cuts[0].pieces)), torch.tensor([-1.0, -2.0, -3.0])
    following = cuts[0].after(states, final)
    ends = cuts[0].table[:, 3] >= 2
    assert torch.equal(following[ends], final[cuts[0].table[ends, 0]])
    assert torch.equal(following[:-1][~ends[:-1]], states[1:][~ends[:-1]])
    with torch.inference_mode():
        other = scan_launch.Cut.plan(1, 50, [0, 50], chunk=16, pieces=1, device=device).table
    assert not other.is_inference()
