"""Sigmoid weights: the reference against the paper's rules, the torch backend against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from foveate.attention import Blocks, Dense, Plan, Positions, Tokens, VerticalSlash, Window, attend, explain
from foveate.attention.backends import torch_dense
from foveate.errors import BackendError, OptionError
from tests.attention.test_attend import SHAPES, B, H, padded, plans, qkv


def sines(count: int, step: float) -> torch.Tensor:
    return torch.sin(step * torch.arange(1, count + 1, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_published_numbers(backend: str) -> None:
    q, k, v = (sines(12, step).view(1, 1, 4, 3) for step in (0.5, 0.9, 1.3))
    expected = [
        [0.375120, 0.200689, -0.267752],
        [0.237075, 0.207432, -0.126099],
        [-0.222853, 0.058946, 0.254389],
        [-0.085819, 0.229261, 0.208473],
    ]
    o = attend(q, k, v, score="sigmoid", bias=-math.log(4), backend=backend)
    torch.testing.assert_close(o[0, 0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(o, attend(q, k, v, score="sigmoid", backend=backend))


def test_weights_of_zero_scores_add_up_to_nearly_one() -> None:
    n = 20
    o = attend(torch.zeros(1, 1, 1, 8), torch.randn(1, 1, n, 8), torch.ones(1, 1, n, 2), score="sigmoid")
    torch.testing.assert_close(o, torch.full_like(o, n / (n + 1)))


EXTRAS: list[dict[str, Any]] = [{}, {"window": 20}, {"softcap": 5.0}, {"log_weight": True}, {"causal": False}]


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: "-".join(extra) or "plain")
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_equals_reference(shape: tuple[int, int], group: int, extra: dict[str, Any]) -> None:
    m, n = shape
    q, k, v = qkv(group, m, n)
    options: dict[str, Any] = {"score": "sigmoid", "bias": -2.0, **extra}
    if "log_weight" in extra:
        options["log_weight"] = torch.randn(B, H, n)
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    ran = 0
    for plan in plans(group, m, n):
        for positions in (None, padded(m, n)):
            if explain(q, k, v, plan, positions=positions, **options).name != "torch":
                continue
            o = attend(q, k, v, plan, positions=positions, **options)
            ref = attend(q.double(), k.double(), v.double(), plan, positions=positions, backend="reference", **exact)
            assert (o - ref).norm() <= 1e-5 * ref.norm() + 1e-12, plan
            ran += 1
    assert ran >= 10


def test_outputs_over_disjoint_keys_add_up() -> None:
    q, k, v = qkv(3, 5, 60)
    given: dict[str, Any] = {"score": "sigmoid", "bias": -3.0, "causal": False}
    whole = attend(q, k, v, **given)
    parts = attend(q, k[:, :, :20], v[:, :, :20], **given) + attend(q, k[:, :, 20:], v[:, :, 20:], **given)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_a_decode_step_is_the_last_row_of_its_prompt() -> None:
    q, k, v = qkv(3, 40, 40)
    whole = attend(q, k, v, score="sigmoid")
    torch.testing.assert_close(attend(q[:, :, -1:], k, v, score="sigmoid"), whole[:, :, -1:], rtol=1e-5, atol=1e-6)


def test_a_query_that_reads_nothing_gives_zero() -> None:
    q, k, v = qkv(1, 4, 4)
    empty = Blocks.from_mask(torch.zeros(1, 1, 1, 1, dtype=torch.bool), block_m=16, block_n=16)
    padding = Positions(None, torch.full((B, 1, 4), -1), holes=True)
    for plan, positions in ((Tokens(torch.full((B, H, 3), -1)), None), (empty, None), (Dense(), padding)):
        for backend in ("reference", "torch"):
            assert attend(q, k, v, plan, positions=positions, score="sigmoid", backend=backend).eq(0).all()


def test_large_scores_saturate() -> None:
    q, k, v = qkv(3, 33, 33)
    q = q * 100
    ref = attend(q.double(), k.double(), v.double(), score="sigmoid", backend="reference")
    assert (attend(q, k, v, score="sigmoid") - ref).norm() <= 1e-5 * ref.norm()


def test_pieces_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(3, 50, 50)
    calls: list[dict[str, Any]] = [{}, {"causal": False}, {"positions": padded(50, 50)}]
    whole = [attend(q, k, v, score="sigmoid", **options) for options in calls]
    monkeypatch.setattr(torch_dense, "MASK_ENTRIES", 1)
    monkeypatch.setattr(torch_dense, "LEAST_ROWS", 7)
    for options, want in zip(calls, whole):
        torch.testing.assert_close(attend(q, k, v, score="sigmoid", **options), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_eager(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(3, 65, 127, 64))
    ref = attend(q.double(), k.double(), v.double(), score="sigmoid", backend="reference")
    mask = torch.ones(65, 127, dtype=torch.bool).tril(127 - 65)
    kk, vv = (x.repeat_interleave(3, 1) for x in (k, v))
    scores = (q @ kk.transpose(-1, -2)) / 8 - math.log(127)
    eager = scores.masked_fill(~mask, -torch.inf).sigmoid() @ vv
    error = (attend(q, k, v, score="sigmoid").double() - ref).norm() / ref.norm()
    assert error <= max(5e-3, 2 * float((eager.double() - ref).norm() / ref.norm()))


def small_plans() -> list[Plan]:
    mask = torch.tensor([[[[True, False], [True, True]]]])
    return [
        Dense(),
        Window(4, 1),
        Tokens(torch.tensor([[[0, 3, 17, -1], [2, 5, 9, 19]]])),
        Tokens(torch.randint(0, 20, (1, 2, 20, 1))),
        Blocks.from_mask(mask, block_m=16, block_n=16),
        VerticalSlash(torch.tensor([[[3, 18]]]), torch.tensor([[[0]]]), 16),
    ]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients(backend: str) -> None:
    q, k, v = (torch.randn(1, h, 20, 2, dtype=torch.float64, requires_grad=True) for h in (2, 2, 2))
    for plan in small_plans():

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan = plan) -> torch.Tensor:
            return attend(q, k, v, plan, score="sigmoid", backend=backend)

        assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)


def test_gradients_of_few_queries_and_a_cap() -> None:
    q = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(1, 2, 9, dtype=torch.float64, requires_grad=True)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, score="sigmoid", softcap=2.0, log_weight=weight, backend="torch")

    assert torch.autograd.gradcheck(run, (q, k, v, weight))


def test_what_does_not_go_together_is_named() -> None:
    q, k, v = qkv(3, 5, 60)
    with pytest.raises(OptionError, match="score='relu', allowed: .*softmax.*sigmoid"):
        attend(q, k, v, score="relu")
    with pytest.raises(OptionError, match="bias=-2.0 with score='softmax'"):
        attend(q, k, v, bias=-2.0)
    with pytest.raises(OptionError, match="bias=nan, allowed: a finite number"):
        attend(q, k, v, score="sigmoid", bias=float("nan"))
    with pytest.raises(OptionError, match="return_lse with score='sigmoid'.*add up"):
        attend(q, k, v, score="sigmoid", return_lse=True)
    with pytest.raises(OptionError, match="sink with score='sigmoid'"):
        attend(q, k, v, score="sigmoid", sink=torch.zeros(6))


@pytest.mark.parametrize("backend", ["cpp", "flex"])
def test_backends_of_softmax_alone_refuse_by_name(backend: str) -> None:
    q, k, v = qkv(1, 1, 60)
    with pytest.raises(BackendError, match=f"'{backend}' cannot run this call: .*softmax"):
        attend(q, k, v, score="sigmoid", backend=backend)


def test_explain_tells_who_runs_sigmoid_and_why_not_others() -> None:
    q, k, v = qkv(1, 1, 60)
    choice = explain(q, k, v, score="sigmoid", bias=-4.0)
    assert choice.name == "torch"
    assert "sigmoid weights go to torch" in str(choice)
