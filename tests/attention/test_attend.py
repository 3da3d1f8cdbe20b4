"""The torch backend against the reference in float64, for every plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from foveate.attention import (
    Blocks,
    Dense,
    PerHead,
    Plan,
    Positions,
    Tokens,
    VerticalSlash,
    Window,
    attend,
    explain,
    merge,
    subtract,
)
from foveate.errors import BackendError, PlanError, ShapeError

B, H = 2, 2


def qkv(group: int, m: int, n: int, d: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(B, H * group, m, d), torch.randn(B, H, n, d), torch.randn(B, H, n, d)


def lists(rows: int, n: int, count: int = 9) -> torch.Tensor:
    return torch.stack([torch.randperm(n)[:count] - 1 for _ in range(rows)])


def plans(group: int, m: int, n: int) -> Iterator[Plan]:
    yield Dense()
    yield Window(10, 2)
    yield Window(40)
    yield Tokens(lists(B * H, n).view(B, H, -1))
    yield Tokens(lists(B * H * group, n).view(B, H * group, -1))
    yield Tokens(lists(B * H * m, n).view(B, H, m, -1))
    yield Tokens(lists(B * H, n).view(B, H, -1), torch.tensor([[3, 9], [0, 5]]))
    for block in (16, 64):
        rows, cols = -(-m // block), -(-n // block)
        yield Blocks.from_mask(torch.rand(B, H * group, rows, cols) > 0.5, block_m=block, block_n=block)
        yield Blocks.from_mask(torch.rand(1, H, rows, cols) > 0.5, block_m=block, block_n=block)
        if m == n:
            columns = torch.randint(0, n, (B, H * group, 5))
            yield VerticalSlash(columns, torch.randint(0, cols, (B, H * group, 2)), block)
    yield PerHead([Window(5, 1), Dense()])


def padded(m: int, n: int) -> Positions:
    at = torch.arange(n).expand(B, 1, n).clone()
    at[0, :, : min(5, n - 1)] = -1
    return Positions(torch.arange(n - m, n).expand(B, m), at, holes=True)


SHAPES = [(1, 1), (1, 15), (1, 50), (7, 50), (50, 50), (63, 63), (65, 127), (130, 300)]
EXTRAS: list[dict[str, Any]] = [{}, {"window": 20}, {"sink": True}, {"softcap": 5.0}, {"log_weight": True}]


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: "-".join(extra) or "plain")
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_equals_reference(shape: tuple[int, int], group: int, extra: dict[str, Any]) -> None:
    m, n = shape
    if n < 10 and "window" in extra:
        extra = {}
    q, k, v = qkv(group, m, n)
    options: dict[str, Any] = dict(extra)
    if "sink" in options:
        options["sink"] = torch.randn(H * group)
    if "log_weight" in options:
        options["log_weight"] = torch.randn(B, H, n)
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    for plan in plans(group, m, n):
        for positions in (None, padded(m, n)):
            if explain(q, k, v, plan, positions=positions, **options).name != "torch":
                continue
            o, lse = attend(q, k, v, plan, positions=positions, return_lse=True, **options)
            ref, ref_lse = attend(
                q.double(),
                k.double(),
                v.double(),
                plan,
                positions=positions,
                return_lse=True,
                backend="reference",
                **exact,
            )
            assert (o - ref).norm() <= 1e-5 * ref.norm() + 1e-12, plan
            finite = ref_lse > -torch.inf
            assert torch.equal(finite, lse > -torch.inf), plan
            torch.testing.assert_close(lse[finite].double(), ref_lse[finite], rtol=0, atol=2e-4)
            plain = attend(q, k, v, plan, positions=positions, **options)
            assert (plain - ref).norm() <= 1e-5 * ref.norm() + 1e-12, plan


@pytest.mark.parametrize("d", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_eager(d: int, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(3, 65, 127, d))
    ref = attend(q.double(), k.double(), v.double(), backend="reference")
    mask = torch.ones(65, 127, dtype=torch.bool).tril(127 - 65)
    kk, vv = (x.repeat_interleave(3, 1) for x in (k, v))
    scores = (q @ kk.transpose(-1, -2)) * d**-0.5
    eager = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ vv
    error = (attend(q, k, v).double() - ref).norm() / ref.norm()
    assert error <= max(5e-3, 2 * float((eager.double() - ref).norm() / ref.norm()))


def test_large_logits_and_non_contiguous_inputs() -> None:
    q, k, v = qkv(3, 33, 33)
    q = q * 40
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    ref = attend(q.double(), k.double(), v.double(), backend="reference")
    out = attend(*strided)
    assert (out - ref).norm() <= 1e-5 * ref.norm()
    index = torch.randint(0, 33, (B, H, 4)).sort(-1).values
    torch.testing.assert_close(attend(*strided, Tokens(index)), attend(q, k, v, Tokens(index)), rtol=1e-5, atol=1e-6)


def test_a_query_that_reads_nothing_gives_zero() -> None:
    q, k, v = qkv(1, 4, 4)
    empty = Blocks.from_mask(torch.zeros(1, 1, 1, 1, dtype=torch.bool), block_m=16, block_n=16)
    for plan in (Tokens(torch.full((B, H, 3), -1)), empty):
        o, lse = attend(q, k, v, plan, return_lse=True)
        assert bool((o == 0).all())
        assert bool((lse == -torch.inf).all())


def test_masks_of_plans_are_their_brute_force() -> None:
    n = 40
    mask = Window(6, 3).to_mask(n, n)[0, 0]
    for i in range(n):
        for j in range(n):
            assert bool(mask[i, j]) == (j <= i and (i - j <= 6 or j < 3))
    index = torch.tensor([[[3, 7, -1, 99]]])
    read = Tokens(index).to_mask(1, n)[0, 0, 0].nonzero()[:, 0].tolist()
    assert read == [3, 7]
    slash = VerticalSlash(torch.tensor([[[5]]]), torch.tensor([[[1]]]), block=8).to_mask(n, n)[0, 0]
    for i in range(n):
        for j in range(n):
            assert bool(slash[i, j]) == (j <= i and (j == 5 or i // 8 - j // 8 == 1))


@pytest.mark.parametrize("n", [64, 70])
def test_density_and_lowering_agree_with_masks(n: int) -> None:
    for plan in plans(1, n, n):
        visible = Dense().to_mask(n, n)
        mask = plan.to_mask(n, n)
        share = mask.double().mean() / visible.double().mean()
        assert plan.density(n, n) == pytest.approx(float(share), rel=1e-6)
        if isinstance(plan, Dense | Window | Blocks):
            lowered = plan.lower(n, n, block=16)
            tiles = Blocks(
                lowered.row_ptr, lowered.col, lowered.batch, lowered.heads, lowered.block_m, lowered.block_n
            ).to_mask(n, n)
            assert bool((tiles | ~mask).all())
            assert bool((lowered.n_full <= lowered.row_ptr.diff()).all())


def test_merge_and_subtract() -> None:
    q, k, v = qkv(3, 5, 60)
    whole, lse = attend(q, k, v, causal=False, return_lse=True)
    a, la = attend(q, k[:, :, :20], v[:, :, :20], causal=False, return_lse=True)
    b, lb = attend(q, k[:, :, 20:], v[:, :, 20:], causal=False, return_lse=True)
    o, total = merge([a, b], [la, lb])
    torch.testing.assert_close(o, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, lse, rtol=1e-5, atol=1e-5)
    rest, lrest = subtract(whole, lse, a, la)
    torch.testing.assert_close(rest, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lrest, lb, rtol=1e-4, atol=1e-4)
    gone, lgone = subtract(a, la, a, la)
    assert bool((gone == 0).all())
    assert bool((lgone == -torch.inf).all())


def test_errors_say_what_fits() -> None:
    q, k, v = qkv(3, 5, 60)
    with pytest.raises(ShapeError, match="D is 16 in q"):
        attend(q, k[..., :8], v)
    with pytest.raises(ShapeError, match="multiple of Hkv"):
        attend(q[:, :5], k, v)
    with pytest.raises(ShapeError, match="one dtype"):
        attend(q.bfloat16(), k, v)
    with pytest.raises(BackendError, match="backend='nonsense'"):
        attend(q, k, v, backend="nonsense")
    with pytest.raises(BackendError, match="flex runs self-contained prompts"):
        attend(q, k, v, backend="flex")
    with pytest.raises(PlanError, match="allowed: int32 or int64"):
        Tokens(torch.zeros(2, 2))
    with pytest.raises(PlanError, match="allowed: a Plan"):
        attend(q, k, v, "dense")  # type: ignore[arg-type]
    assert "torch" in str(explain(q, k, v))


def test_gradients_flow_through_tokens_and_blocks() -> None:
    q, k, v = (x.double().requires_grad_() for x in qkv(2, 8, 8, 4))
    index = lists(B * H, 8, 5).view(B, H, -1)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, Tokens(index)), (q, k, v), atol=1e-6)


@pytest.mark.parametrize("sink", [False, True])
def test_the_log_sum_exp_has_gradients(sink: bool) -> None:
    """Through what is merged by it, and through learned sinks."""
    torch.manual_seed(0)
    given = [torch.randn(1, h, 6, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    logit = torch.randn(4, dtype=torch.float64, requires_grad=True) if sink else None
    wanted = [*given, logit] if sink else given
    made = []
    for backend in ("reference", "torch"):
        o, lse = attend(*given, sink=logit, backend=backend, return_lse=True)
        made.append(torch.autograd.grad((o.sin().sum() + lse.cos().sum()), wanted))
    for ours, exact in zip(made[1], made[0]):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("n, block", [(100, 16), (64, 64), (57, 32), (5, 8)])
def test_density_of_vertical_slash_counts_every_pair_once(n: int, block: int) -> None:
    # Columns and diagonals that repeat, are absent, lie beyond the end and cover each other.
    vertical = torch.randint(-2, n + 3, (2, 3, 9))
    slash = torch.randint(-2, -(-n // block) + 2, (2, 3, 4))
    plan = VerticalSlash(vertical, slash, block)
    assert plan.density(n, n) == pytest.approx(Plan.density(plan, n, n), rel=1e-9)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("turned", ["q", "k", "v"])
def test_features_may_lie_apart_and_queries_may_be_more_than_keys(
    turned: str, causal: bool, softcap: float | None
) -> None:
    shapes = {"q": (1, 2, 7, 16), "k": (1, 2, 5, 16), "v": (1, 2, 5, 16)}
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    given[turned] = given[turned].transpose(2, 3).contiguous().transpose(2, 3)
    options: dict[str, Any] = {"causal": causal, "softcap": softcap, "return_lse": True}
    o, lse = attend(**given, **options, backend="torch")
    want, want_lse = attend(**{name: x.double() for name, x in given.items()}, **options, backend="reference")
    torch.testing.assert_close(o, want.float())
    torch.testing.assert_close(lse, want_lse.float())


def test_without_causality_every_query_sees_every_key() -> None:
    q, k, v = torch.randn(1, 1, 7, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 8)
    want = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1) @ v
    for backend in ("reference", "torch"):
        torch.testing.assert_close(attend(q, k, v, causal=False, softcap=None, backend=backend), want)
