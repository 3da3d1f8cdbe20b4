"""RazorAttention: the compensation token against its definition, at the end of a prompt and while decoding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.errors import OptionError, ProfileError
from foveate.methods import SingleLayer, create
from foveate.methods.budgets import top_share
from foveate.methods.calibrated import table_profile
from foveate.methods.keep.razor import Razor, alibi_reach
from foveate.methods.profile import ModelIdentity

IDENTITY = ModelIdentity("toy", 1, 4, 2, 8, "none")
SCORES = torch.tensor([[0.9, 0.1, 0.2, 0.3]])
HALF = {"induction": 0.5, "echo": 0.0}


def bound(**options: object) -> Razor:
    profile = table_profile("razor", IDENTITY, induction=SCORES, echo=SCORES)
    return Razor(profile=profile, **{**HALF, **options}).for_model(IDENTITY)  # type: ignore[arg-type]


def qkv(N: int, B: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, 4, N, 8), torch.randn(B, 2, N, 8), torch.randn(B, 2, N, 8)


def run(layer: SingleLayer, q: Tensor, k: Tensor, v: Tensor, chunks: list[int]) -> Tensor:
    parts = [each.split(chunks, dim=2) for each in (q, k, v)]
    return torch.cat([layer(*piece) for piece in zip(*parts)], 2)


def compressed_row(q: Tensor, k: Tensor, v: Tensor, last: int, sinks: int, compensate: bool, now: int) -> Tensor:
    """o [D] of one query q [D] over what a compressed head holds of k, v [N, D], where `now` tokens made the means."""
    N = k.shape[0]
    gone = range(sinks, max(sinks, now - last))
    keep = [j for j in range(N) if j not in gone]
    keys, values, weight = k[keep], v[keep], torch.zeros(len(keep))
    if compensate and len(gone):
        keys = torch.cat((keys, k[gone].mean(0, keepdim=True)))
        values = torch.cat((values, v[gone].mean(0, keepdim=True)))
        weight = torch.cat((weight, torch.tensor([math.log(len(gone))])))
    return (keys @ q * q.shape[0] ** -0.5 + weight).softmax(0) @ values


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize(("prompt", "last"), [(30, 8), (9, 6), (6, 6), (3, 6), (40, 10)])
def test_decoding_equals_the_definition(prompt: int, last: int, compensate: bool) -> None:
    N = prompt + 14
    q, k, v = qkv(N)
    layer = SingleLayer(bound(least=6, compression=4.0, sinks=2, compensate=compensate))
    out = run(layer, q, k, v, [prompt, *[1] * 14])
    for i in range(prompt, N):
        for h in range(4):
            keys, values = k[1, h // 2, : i + 1], v[1, h // 2, : i + 1]
            if h < 2:
                expected = (keys @ q[1, h, i] * 8**-0.5).softmax(0) @ values
            else:
                expected = compressed_row(q[1, h, i], keys, values, last, 2, compensate, i)
            torch.testing.assert_close(out[1, h, i], expected, rtol=1e-4, atol=1e-5)
    assert layer.cache.lengths().tolist() == [[N, min(N, 2 + last + compensate)]] * 2


def test_a_second_turn_folds_several_tokens_at_once() -> None:
    q, k, v = qkv(52)
    layer = SingleLayer(bound(least=6, compression=8.0, sinks=2))
    out = run(layer, q, k, v, [30, 1, 1, 8, 1, 3, 1, 1, 1, 1, 1, 1, 1, 1])
    for i, now in ((31, 31), (35, 32), (40, 40), (42, 41), (51, 51)):
        keys, values = k[0, 1, : i + 1], v[0, 1, : i + 1]
        expected = compressed_row(q[0, 3, i], keys, values, 6, 2, True, now)
        torch.testing.assert_close(out[0, 3, i], expected, rtol=1e-4, atol=1e-5)
    assert layer.cache.kept_positions(0, 1).tolist() == [0, 1, 2, *range(46, 52)]
    assert layer.cache.stored == 52


def test_a_chunked_prompt_is_compressed_at_its_end() -> None:
    q, k, v = qkv(41)
    whole, pieces = (SingleLayer(bound(least=6, sinks=2), chunked=chunked) for chunked in (False, True))
    run(whole, q[:, :, :40], k[:, :, :40], v[:, :, :40], [40])
    run(pieces, q[:, :, :40], k[:, :, :40], v[:, :, :40], [13, 20, 7])
    assert not pieces.cache.ragged
    last = [layer(q[:, :, 40:], k[:, :, 40:], v[:, :, 40:]) for layer in (whole, pieces)]
    assert pieces.cache.ragged
    torch.testing.assert_close(last[0], last[1], rtol=1e-5, atol=1e-6)


def test_left_padding() -> None:
    q, k, v = qkv(46)
    positions = torch.stack((torch.arange(46), torch.arange(46) - 20)).clamp_min(-1)
    layer = SingleLayer(bound(least=6, compression=4.0, sinks=2))
    padded = [layer(q[:, :, :40], k[:, :, :40], v[:, :, :40], positions=positions[:, :40])]
    padded += [
        layer(*(each[:, :, t : t + 1] for each in (q, k, v)), positions=positions[:, t : t + 1]) for t in range(40, 46)
    ]
    alone = run(SingleLayer(layer.method), *(each[1:, :, 20:] for each in (q, k, v)), [20, *[1] * 6])
    torch.testing.assert_close(torch.cat(padded, 2)[1:, :, 20:], alone, rtol=1e-5, atol=1e-6)
    assert layer.cache.lengths()[:, 1].tolist() == [13, 9]


def test_equal_dropped_keys_are_compensated_exactly() -> None:
    q, k, v = qkv(40, B=1)
    k[:, 1, 2:31] = k[:, 1, 2:3]
    layer = SingleLayer(bound(least=6, sinks=2))
    run(layer, q[:, :, :39], k[:, :, :39], v[:, :, :39], [39])
    out = layer(q[:, :, 39:], k[:, :, 39:], v[:, :, 39:])
    exact = (k[0, 1] @ q[0, 3, 39] * 8**-0.5).softmax(0) @ v[0, 1]
    torch.testing.assert_close(out[0, 3, 0], exact, rtol=1e-5, atol=1e-6)


def test_the_error_of_compensation_is_second_order_in_the_spread_of_keys() -> None:
    q, k, v = (each.double() for each in qkv(40, B=1))
    # Equal values: then only the denominator can be wrong, which is second order.
    v[:, 1, 2:32] = v[:, 1, 2:3]
    base = k.clone()
    errors = []
    for spread in (0.02, 0.01):
        k[:, 1, 2:32] = base[:, 1, 2:3] + spread * base[:, 1, 2:32]
        layer = SingleLayer(bound(least=6, sinks=2))
        run(layer, q[:, :, :39], k[:, :, :39], v[:, :, :39], [39])
        out = layer(q[:, :, 39:], k[:, :, 39:], v[:, :, 39:])
        exact = (k[0, 1] @ q[0, 3, 39] * 8**-0.5).softmax(0) @ v[0, 1]
        errors.append((out[0, 3, 0] - exact).norm().item())
    assert 3.5 < errors[0] / errors[1] < 4.5


@pytest.mark.parametrize("options", [{"induction": 1.0}, {"least": 60}])
def test_with_nothing_to_compress_it_is_dense(options: dict[str, float]) -> None:
    q, k, v = qkv(50)
    out = run(SingleLayer(bound(**{"least": 4, **options})), q, k, v, [40, *[1] * 10])
    mask = torch.ones(50, 50, dtype=torch.bool).tril()
    keys, values = (each.repeat_interleave(2, 1) for each in (k, v))
    expected = (q @ keys.mT * 8**-0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ values
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_which_heads_are_kept_whole() -> None:
    identity = ModelIdentity("toy", 2, 4, 2, 8, "none")
    induction = torch.tensor([[0.1, 0.9, 0.3, 0.3], [0.5, 0.4, 0.0, torch.nan]])
    echo = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.8, torch.nan]])
    profile = table_profile("razor", identity, induction=induction, echo=echo)

    def full(**options: object) -> list[list[bool]]:
        return Razor(profile=profile, **options).for_model(identity).full_heads.tolist()  # type: ignore[arg-type]

    # The last KV head has no scores of its own: it is left as it is.
    assert full(induction=0.3, echo=0.0) == [[True, False], [False, True]]
    assert full(induction=0.67, echo=0.0) == [[True, False], [True, True]]
    assert full(induction=0.0, echo=0.01) == [[True, False], [False, True]]
    assert top_share(torch.tensor([[0.1, 0.3], [0.3, 0.2]]), 0.25).tolist() == [[False, True], [False, False]]
    assert not top_share(torch.rand(2, 3), 0.0).any()


def test_reach_of_an_alibi_head() -> None:
    wq, wk = torch.eye(4) * 2, torch.eye(4) * 3
    reach = alibi_reach(wq, wk, 0.5, weight=torch.ones(4), bias=torch.zeros(4), scale=0.5, epsilon=math.exp(-3))
    # 2 * 0.5 * 6 * 4 = 24, and 3 for epsilon, over the slope.
    assert reach == pytest.approx(54.0)
    with pytest.raises(OptionError, match="slope > 0"):
        alibi_reach(wq, wk, 0.0, weight=torch.ones(4), bias=torch.zeros(4), scale=0.5)


def test_bad_input() -> None:
    with pytest.raises(OptionError, match=r"induction=1\.5, allowed: >= 0 and <= 1"):
        create("razor", induction=1.5)
    with pytest.raises(OptionError, match=r"compression=0\.5, allowed: >= 1"):
        create("razor", compression=0.5)
    with pytest.raises(ProfileError, match="foveate calibrate razor"):
        SingleLayer(Razor())(*qkv(20))
    with pytest.raises(ProfileError, match="'echo' is missing"):
        Razor(profile=table_profile("razor", IDENTITY, induction=SCORES)).for_model(IDENTITY)
