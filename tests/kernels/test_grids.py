"""More rows and heads than a grid's second and third axis hold: the same results from several launches."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention import Rope
from foveate.attention.backends.triton import block_lists, configs, runtime, scan_launch, score_reduce
from foveate.attention.backends.triton.gather_decode import gather_decode
from foveate.attention.backends.triton.kv_compact import kv_compact
from foveate.attention.backends.triton.last_queries import column_and_diagonal_mass
from foveate.attention.backends.triton.recurrent_step import recurrent_step
from foveate.attention.backends.triton.scan_ops import linear_scan
from foveate.attention.backends.triton.topk import topk_select
from foveate.errors import ShapeError
from tests.kernels.definitions import DEVICE

B = 3


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


def positions():
    return torch.arange(15, 20, device=DEVICE).expand(B, 5) - torch.arange(B, device=DEVICE)[:, None]


def top(scores, length):
    return topk_select(scores, 9, length=length, config=configs.TopkConfig(128, 4, 4, least_block=128, width=128))


def step(q, v, g, beta, state):
    return recurrent_step(q, q, v, g, beta, state, 0.3, False, 1e-6, True)


def step_of_fixed_decay(q, v, g):
    return recurrent_step(q, q, v, g, None, None, 0.3, True, 1e-6, False)


def packed(q, k, start, length, weight):
    return gather_decode(q, k, k, start=start, length=length, log_weight=weight)


def listed(q, k, index, length, q_at):
    return gather_decode(q, k, k, index=index, length=length, q_positions=q_at)


def dense(q, k, weight, k_at):
    return gather_decode(q, k, k, log_weight=weight, k_positions=k_at, num_splits=1)


def moved(k, index, pos, at):
    return kv_compact(k, k, index, pos=pos, at=at, rope=Rope(16))


def sums(q, k, at):
    lse = score_reduce.log_sum_exp(q, k, scale=0.3, q_positions=at)
    return (
        lse,
        score_reduce.column_mass(q, k, scale=0.3, q_positions=at, lse=lse),
        score_reduce.block_mass(q, k, block_m=2, block_n=16, scale=0.3, q_positions=at, window=9),
    )


def last(q, k):
    return column_and_diagonal_mass(q, k, scale=0.3), column_and_diagonal_mass(q, k, scale=0.3, pooled=True)


def lengths(*shape, most=20):
    return torch.randint(0, most, shape, device=DEVICE)


CALLS = {
    "topk": lambda: (top, draw(5, 300), lengths(5, most=300)),
    "sums": lambda: (sums, draw(B, 4, 5, 16), draw(B, 2, 20, 16), None),
    "sums of positions": lambda: (sums, draw(B, 4, 5, 16), draw(B, 2, 20, 16), positions()),
    "sums of the same positions": lambda: (sums, draw(B, 4, 5, 16), draw(B, 2, 20, 16), positions()[:1]),
    "last queries": lambda: (last, draw(B, 4, 16, 16), draw(B, 2, 20, 16)),
    "compaction": lambda: (moved, draw(B, 2, 20, 16), lengths(B, 2, 7), lengths(B, 7), lengths(B, 2, 20)),
    "compaction alike": lambda: (moved, draw(B, 2, 20, 16), lengths(1, 2, 7), lengths(1, 7), None),
    "decode lists": lambda: (
        listed, draw(B, 4, 5, 16), draw(B, 2, 20, 16), lengths(B, 2, 7), lengths(B, 2, most=7), positions(),
    ),
    "decode all": lambda: (
        dense, draw(B, 4, 1, 16), draw(B, 2, 20, 16), draw(1, 2, 20), torch.arange(20).expand(B, 1, 20).to(DEVICE),
    ),
    "decode packed": lambda: (
        packed, draw(B, 4, 1, 16), draw(90, 16), torch.arange(6).to(DEVICE) * 15, lengths(B, 2, most=16), draw(90),
    ),
    "step": lambda: (step, draw(B, 1, 2, 16), draw(B, 1, 2, 8), -draw(B, 1, 2).abs(), draw(B, 1, 2), draw(B, 2, 16, 8)),
    "step of fixed decay": lambda: (step_of_fixed_decay, draw(B, 1, 2, 16), draw(B, 1, 2, 8), -draw(2).abs()),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_several_launches_are_one(monkeypatch, name):
    call, *arguments = CALLS[name]()
    want = call(*arguments)
    monkeypatch.setattr(runtime, "GRID_AXIS", 5)
    found = call(*arguments)
    for ours, theirs in [(found, want)] if isinstance(want, torch.Tensor) else zip(found, want):
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not runtime.INTERPRET, reason="grids are read from Triton's interpreter")
def test_no_axis_but_the_first_is_longer_than_its_limit(monkeypatch):
    """Every grid that these calls ask for, by the kernels' own launchers."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(runtime, "GRID_AXIS", 4)
    grids = []
    run = GridExecutor.__call__

    def record(self, *args, **options):
        grids.append(self.grid)
        return run(self, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", record)
    for make in CALLS.values():
        call, *arguments = make()
        call(*arguments)
    assert len(grids) >= len(CALLS)
    assert max(axis for grid in grids for axis in grid[1:]) <= 4


def test_what_cannot_be_cut_is_named(monkeypatch):
    monkeypatch.setattr(runtime, "GRID_AXIS", 3)
    with pytest.raises(ShapeError, match="4 heads of a sequence, allowed: at most 3"):
        kv_compact(draw(1, 4, 5, 16), draw(1, 4, 5, 16), lengths(1, 4, 5))
    with pytest.raises(ShapeError, match="pooled has 2 heads of all sequences, allowed: at most 1"):
        block_lists.columns_and_diagonals(torch.rand(2, 2, 2), 1, most=1, batch=1, tokens=32, block=16)
    for batch, tokens, offsets in ((4, 8, None), (1, 8, (0, 2, 4, 6, 8)), (1, 8, (0, 0, 0, 0, 8))):
        with pytest.raises(ShapeError, match="4 sequences in . pieces, allowed: at most 3 of both"):
            scan_launch.Cut.plan(batch, tokens, offsets, chunk=16, pieces=1, device=torch.device(DEVICE))


@pytest.mark.parametrize(("batch", "offsets"), [(1, None), (3, None), (0, None), (1, (0, 0)), (1, (0, 0, 0))])
def test_no_token_at_all_is_refused(batch, offsets):
    with pytest.raises(ShapeError, match="T = 0, allowed: at least one token"):
        scan_launch.Cut.plan(batch, 0, offsets, chunk=16, pieces=1, device=torch.device(DEVICE))


def test_an_empty_batch_has_no_pieces():
    cut = scan_launch.Cut.plan(0, 40, None, chunk=16, pieces=0, device=torch.device(DEVICE))
    assert (cut.sequences, cut.total, cut.pieces, cut.split) == (0, 0, 0, False)
    q = draw(0, 40, 2, 16)
    o, final, _ = linear_scan(q, q, q, None, None, 1.0, None, False, False)
    assert (o.shape, final.shape) == (q.shape, (0, 2, 16, 16))
