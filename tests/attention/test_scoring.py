"""Votes, rotary tables and chosen rows, by the C++ kernel and by torch, against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.attention import Rope, attend
from foveate.attention.backends import cpp_scoring
from foveate.attention.merge import merge
from foveate.attention.scoring import (
    RotaryTable,
    Rows,
    attend_rows,
    reads_in_place,
    slots_of,
    softmax_votes,
    take_rows,
    top_mask,
    top_slots,
    voted_slots,
)
from foveate.errors import OptionError, ShapeError

GATES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture(params=["cpp", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setenv("FOVEATE_CPP", "0")
    elif cpp_scoring.why_unavailable() is not None:
        pytest.skip(f"the C++ kernel is not available: {cpp_scoring.why_unavailable()}")
    return str(request.param)


def exact_scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhd,bhnd->bhn", q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1))


def by_definition(q: Tensor, k: Tensor, scale: float, groups: int, reduce: str) -> Tensor:
    parts = (scale * exact_scores(q, k)).softmax(-1).chunk(groups, 1)
    return torch.stack([part.sum(1) if reduce == "sum" else part.amax(1) for part in parts], 1)


@pytest.mark.parametrize("dtype", GATES)
@pytest.mark.parametrize("group", [1, 3, 8, 11])
@pytest.mark.parametrize("size", [16, 24, 64])
def test_votes_are_reduced_softmax_weights(dtype: torch.dtype, group: int, size: int) -> None:
    q = torch.randn(2, 2 * group, size).to(dtype)
    k = torch.randn(2, 1070, 2, size).to(dtype).transpose(1, 2)
    for tokens, groups, reduce in ((1, 1, "sum"), (33, 2, "sum"), (1024, 2, "max"), (1063, 1, "sum"), (1063, 1, "max")):
        keys = k[:, :, 5 : 5 + tokens]
        votes = softmax_votes(q, keys, 0.5, groups=groups, reduce=reduce)
        assert votes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = by_definition(q, keys, 0.5, groups, reduce)
        # Torch rounds scores to the keys' type, and an exponential's relative error is its exponent's absolute one.
        half = torch.finfo(dtype).bits == 16
        gate = torch.finfo(dtype).eps * exact_scores(q, keys).abs().max() if half else GATES[dtype]
        assert (votes - expected).norm() <= gate * expected.norm()


def test_votes_of_scores_far_apart() -> None:
    """Stretches of keys whose weights vanish beside others', and weights that vanish beside their neighbours'."""
    q, k = torch.ones(1, 1, 16), torch.zeros(1, 1, 5000, 16)
    k[..., 0] = torch.linspace(-400, 30, 5000)
    k[..., 1024:2048, :] = -1e4
    votes, expected = softmax_votes(q, k, 1.0), by_definition(q, k, 1.0, 1, "sum")
    torch.testing.assert_close(votes.double(), expected, rtol=1e-4, atol=1e-37)
    assert bool((votes[0, 0, 1024:2048] == 0).all())
    # Where weights are 0, the earlier slots are taken.
    assert torch.equal(top_slots(votes, 3000), slots_of(top_mask(votes, 3000)))


def test_a_key_that_is_not_a_number_spoils_all_votes() -> None:
    for value in (torch.nan, torch.inf):
        k = torch.randn(1, 2, 1500, 16)
        k[0, 0, 1200, 3] = value
        q = torch.ones(1, 4, 16)
        assert bool(softmax_votes(q, k, 1.0, reduce="sum").isnan().all())
        assert bool(softmax_votes(q, k, 1.0, groups=2, reduce="max")[0, 0].isnan().all())
        assert not bool(softmax_votes(q, k, 1.0, groups=2)[0, 1].isnan().any())


def test_a_key_of_minus_infinity_has_no_vote() -> None:
    q, k = torch.ones(1, 3, 16), torch.randn(1, 1, 1500, 16)
    k[..., 1024:, 0] = -torch.inf
    votes = softmax_votes(q, k, 1.0)[0, 0]
    assert bool((votes[1024:] == 0).all())
    torch.testing.assert_close(votes[:1024], softmax_votes(q, k[:, :, :1024], 1.0)[0, 0])


def test_votes_have_a_gradient() -> None:
    q = torch.randn(1, 2, 16, requires_grad=True)
    softmax_votes(q, torch.randn(1, 1, 9, 16), 1.0)[..., 0].sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("given", [{"scale": 0.0}, {"groups": 4}, {"groups": 0}, {"reduce": "mean"}])
def test_bad_votes(given: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="allowed: scale > 0, 'sum' or 'max', a number of groups that divides 6"):
        softmax_votes(torch.randn(1, 6, 16), torch.randn(1, 2, 9, 16), **{"scale": 1.0, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [15, 16, 17, 1000, 4099])
def test_the_best_of_many_scores(tokens: int) -> None:
    scores = torch.randn(2, 2, tokens) * torch.logspace(-30, 30, tokens)[torch.randperm(tokens)]
    scores[0] = scores[0].bfloat16().float()
    scores[1, 1, ::2] = -torch.inf
    for count in (0, 1, tokens // 8, tokens - 1, tokens + 1):
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
        found = torch.where(scores.gather(-1, best) > -torch.inf, best, tokens).sort(-1).values
        width = int((found < tokens).sum(-1).max())
        assert torch.equal(top_slots(scores, count), torch.where(found < tokens, found, -1)[..., :width])


def scaled(x: Tensor, positions: Tensor) -> Tensor:
    """A rotary embedding of YaRN's kind on half of the features."""
    return torch.cat((1.3 * Rope(8).rotate(x[..., :8], positions), x[..., 8:]), -1)


LAYOUTS = {
    "halves": Rope(16).rotate,
    "partial halves": Rope(6).rotate,
    "neighbours": Rope(16, style="interleaved").rotate,
    "partial neighbours": Rope(6, style="interleaved").rotate,
    "scaled": scaled,
    "backwards": lambda x, at: Rope(16).rotate(x.flip(-1), at).flip(-1),
    "none": lambda x, at: x,
}


@pytest.mark.parametrize("rotate", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", GATES)
def test_chosen_rows_are_turned(dtype: torch.dtype, rotate: object) -> None:
    assert callable(rotate)
    x = torch.randn(2, 50, 3, 16).to(dtype).transpose(1, 2)[:, :, 2:]
    index, at = torch.randint(0, 48, (2, 37)), torch.arange(100, 137)
    table = RotaryTable.of(rotate, at, x)
    assert table is not None
    rows = torch.stack([torch.stack([x[b, h, index[b]] for h in range(3)]) for b in range(2)])
    expected = rotate(rows.double(), at[None])
    out = torch.full((4, 3, 40, 16), torch.nan, dtype=dtype)
    for made in (take_rows(x, index, table), take_rows(x, index, table, out=out[1:3, :, 1:38])):
        assert made.dtype == dtype
        assert (made - expected).norm() <= GATES[dtype] * expected.norm() * (1 if dtype != torch.float64 else 1e3)
    assert bool(out[[0, 3]].isnan().all() and out[:, :, [0, 38, 39]].isnan().all())
    assert torch.equal(take_rows(x, index), rows)


@pytest.mark.parametrize("rotate", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", GATES)
def test_rows_of_a_compact_list_are_turned_by_how_far_they_move(dtype: torch.dtype, rotate: object) -> None:
    assert callable(rotate)
    x, order = torch.randn(2, 3, 400, 16).to(dtype), torch.arange(410)
    index = torch.stack([torch.randperm(400)[:150].sort().values for _ in range(2)])
    table = RotaryTable.of(rotate, order, x)
    assert table is not None
    moves = index - torch.arange(150)
    rows = x.gather(2, index[:, None, :, None].expand(-1, 3, -1, 16))
    expected = torch.cat([rotate(rows[b : b + 1].double(), moves[b : b + 1]) for b in range(2)])
    made = take_rows(x, index, table, compact=True)
    gate = GATES[dtype] * (1 if dtype != torch.float64 else 1e3)
    assert (made - expected).norm() <= gate * expected.norm()
    q, v = torch.randn(2, 6, 1, 16).to(dtype), torch.randn(2, 3, 400, 16).to(dtype)
    listed = Rows(q, x, v, index, table, compact=True)
    found = attend_rows(listed, Rows(q, x[:, :, -20:], v[:, :, -20:]), scale=0.25)[0]
    keys = torch.cat((expected, x[:, :, -20:].double()), 2)
    values = torch.cat((take_rows(v, index), v[:, :, -20:]), 2).double()
    dense = attend(q.double(), keys, values, scale=0.25, causal=False)
    assert (found - dense).norm() <= max(gate, 1e-6) * 4 * dense.norm()


def test_a_table_knows_its_rotary_embedding() -> None:
    at = torch.arange(300)
    table = RotaryTable.of(Rope(16).rotate, at, torch.randn(16))
    assert table is not None
    assert table.agrees(Rope(16).rotate, at)
    for other in (Rope(16, base=20000.0), Rope(16, style="interleaved"), Rope(14)):
        assert not table.agrees(other.rotate, at)
    torch.testing.assert_close(table.rows(7, 9).turn(torch.ones(2, 16)), table.turn(torch.ones(300, 16))[7:9])


@pytest.mark.parametrize("rotate", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("wanted", [0, 3, 700])
def test_what_was_turned_is_turned_elsewhere(rotate: object, wanted: int) -> None:
    assert callable(rotate)
    x, at = torch.randn(2, 3, 1, 16, dtype=torch.float64), torch.tensor([500])
    here, there = (RotaryTable.of(rotate, each, x) for each in (at, torch.tensor([wanted])))
    assert here is not None
    assert there is not None
    made = there.undoing(here).turn(rotate(x, at[None]))
    torch.testing.assert_close(made, rotate(x, torch.tensor([[wanted]])), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rotate", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", GATES)
@pytest.mark.parametrize(("group", "queries"), [(1, 1), (3, 1), (11, 1), (2, 60)])
def test_attention_over_chosen_rows(
    dtype: torch.dtype, rotate: object, group: int, queries: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(rotate)
    q = torch.randn(2, 3 * group, queries, 16).to(dtype)
    k, v = (torch.randn(2, 160, 3, size).to(dtype).transpose(1, 2)[:, :, 2:] for size in (16, 32))
    index, at = torch.stack([torch.randperm(158)[:37] for _ in range(2)]), torch.arange(100, 137)
    table = RotaryTable.of(rotate, at, k)
    assert table is not None
    assert reads_in_place(q, k, v) == (backend == "cpp" and queries == 1 and dtype in (torch.float32, torch.bfloat16))
    rows = [torch.stack([x[b, :, index[b]] for b in range(2)]).double() for x in (k, v)]
    for turned, softcap in ((True, None), (False, None), (True, 1.5)):
        keys = rotate(rows[0], at[None]) if turned else rows[0]
        scores = q.double() @ keys.repeat_interleave(group, 1).transpose(-1, -2) / 4
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        expected = scores.softmax(-1) @ rows[1].repeat_interleave(group, 1)
        o, lse = attend_rows(Rows(q, k, v, index, table if turned else None), scale=0.25, softcap=softcap)
        assert o.dtype == dtype
        gate = GATES[dtype] * (1 if dtype != torch.float64 else 1e3)
        assert (o - expected).norm() <= gate * expected.norm()
        assert (lse - scores.logsumexp(-1)).norm() <= gate * scores.logsumexp(-1).norm()


def test_attention_over_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(1, 6, 1, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
    every = torch.arange(50)[None]
    found = attend_rows(Rows(q, k, v), scale=0.25)
    torch.testing.assert_close(found, attend_rows(Rows(q, k, v, every), scale=0.25))
    monkeypatch.setenv("FOVEATE_BACKEND", "torch")
    assert not reads_in_place(q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("same_strides", [True, False])
def test_parts_make_one_softmax(dtype: torch.dtype, same_strides: bool, backend: str) -> None:
    q = torch.randn(2, 6, 1, 16).to(dtype)
    k, v = (torch.randn(2, 3, 800, size).to(dtype) for size in (16, 32))
    index = torch.stack([torch.randperm(700)[:600].sort().values for _ in range(2)])
    table = RotaryTable.of(Rope(16).rotate, torch.arange(600), k)
    near = k[:, :, 700:] if same_strides else k[:, :, 700:].transpose(1, 2).contiguous().transpose(1, 2)
    parts = Rows(q.flip(1), k, v, index, table), Rows(q, near, v[:, :, 700:])
    o, lse = attend_rows(*parts, scale=0.25)
    pairs = [attend_rows(part, scale=0.25) for part in parts]
    expected, total = merge([o.double() for o, _ in pairs], [lse.double() for _, lse in pairs])
    assert o.dtype == dtype
    assert (o - expected).norm() <= GATES[dtype] * expected.norm()
    torch.testing.assert_close(lse.double(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "last", "kernel"), [(0, 0, 1), (4, 9, 1), (4, 9, 3)])
def test_slots_that_heads_vote_for(dtype: torch.dtype, first: int, last: int, kernel: int, backend: str) -> None:
    q, k = torch.randn(2, 6, 16).to(dtype), torch.randn(2, 3, 130, 16).to(dtype)
    k[0, :, 20] = k[0, :, 50]
    found = voted_slots(q, k, 0.5, first=first, last=last, count=40, kernel=kernel)
    votes = softmax_votes(q, k[:, :, first : 130 - last], 0.5)[:, 0]
    votes = torch.nn.functional.max_pool1d(votes, kernel, stride=1, padding=kernel // 2)
    order = votes.argsort(dim=-1, descending=True, stable=True)[:, :40].sort(-1).values
    assert torch.equal(found, torch.cat((torch.arange(first).expand(2, -1), order + first), 1))


def test_votes_that_are_no_numbers_choose_the_lowest_slots(backend: str) -> None:
    q, k = torch.randn(2, 6, 16), torch.randn(2, 3, 30, 16)
    whole = voted_slots(q, k, 0.5, first=2, last=3, count=5)
    k[0, 1, 17] = torch.nan
    found = voted_slots(q, k, 0.5, first=2, last=3, count=5)
    assert found[0].tolist() == list(range(7))
    assert torch.equal(found[1], whole[1])


def test_bad_votes_for_slots() -> None:
    q, k = torch.randn(1, 6, 16), torch.randn(1, 3, 30, 16)
    for given in ({"count": 29}, {"first": -1}, {"scale": 0.0}):
        with pytest.raises(OptionError, match="numbers >= 0 of 30 keys together"):
            voted_slots(q, k, **{"scale": 0.5, "first": 1, "last": 1, "count": 4, **given})  # type: ignore[arg-type]


def test_bad_attention_over_rows() -> None:
    q, k, index = torch.randn(1, 6, 1, 16), torch.randn(1, 2, 9, 16), torch.zeros(1, 4, dtype=torch.int64)
    table = RotaryTable.of(Rope(16).rotate, torch.arange(5), k)
    with pytest.raises(ShapeError, match="a table of 5 positions, allowed: 4, one per row"):
        Rows(q, k, k, index, table)
    with pytest.raises(ShapeError, match="a table of 5 positions, allowed: 9 or more, one per slot"):
        Rows(q, k, k, index, table, compact=True)
    with pytest.raises(ShapeError, match="a table of 5 positions, allowed: one with an index"):
        Rows(q, k, k, None, table)
    with pytest.raises(ShapeError):
        Rows(q, k, k, index.expand(2, -1))


def test_other_layouts_have_no_table() -> None:
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        return Rope(8).rotate(x[..., order], positions)[..., order.argsort()]

    assert RotaryTable.of(rotate, torch.arange(9), torch.randn(8)) is None


def test_bad_rows() -> None:
    x, index = torch.randn(1, 2, 9, 16), torch.zeros(1, 4, dtype=torch.int64)
    table = RotaryTable.of(Rope(16).rotate, torch.arange(5), x)
    with pytest.raises(ShapeError, match="a table of 5 positions, allowed: 4"):
        take_rows(x, index, table)
    with pytest.raises(ShapeError, match=r"out \[1, 2, 5, 16\] torch.float32, allowed: \[1, 2, 4, 16\]"):
        take_rows(x, index, out=torch.empty(1, 2, 5, 16))
    with pytest.raises(ShapeError):
        take_rows(x, index[0])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("levels", [3, 500, 10**6])
def test_the_best_of_a_long_row_are_found_by_several_threads(rows: int, levels: int) -> None:
    scores = torch.randint(-levels, levels, (1, rows, 20_011)).float() / 7
    scores[0, 0, 17_000:] = -torch.inf
    order = scores.sort(dim=-1, descending=True, stable=True)
    for count in (1, 700, 12_000, 20_011):
        found = top_slots(scores, count)
        for r in range(rows):
            expected = order.indices[0, r, :count][order.values[0, r, :count] > -torch.inf].sort().values
            assert torch.equal(found[0, r][found[0, r] >= 0], expected)
