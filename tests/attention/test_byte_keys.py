"""Keys in 8 bits against their definition in float64, and the C++ kernel against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.attention.backends import cpp_votes
from foveate.attention.backends.cpp import build
from foveate.attention.byte_keys import ByteKeys, Coding
from foveate.attention.scoring import softmax_votes, top_slots, voted_slots
from foveate.errors import ShapeError


def coded(k: Tensor, sample: int | None = None) -> ByteKeys:
    coding = Coding.of(k[:, :, :sample])
    return ByteKeys(*coding.encode(k), coding.spread)


def draw(B: int = 2, H: int = 2, G: int = 3, N: int = 300, D: int = 32) -> tuple[Tensor, Tensor]:
    """Keys with channels of very different means and spreads."""
    k = torch.randn(B, H, N, D) * torch.logspace(-2, 2, D) + 50 * torch.randn(1, H, 1, D)
    return torch.randn(B, H * G, D), k


def test_codes_are_the_definition() -> None:
    _, k = draw()
    made = Coding.of(k[:, :, :100])
    sample = k[:, :, :100].double()
    torch.testing.assert_close(made.mean.double(), sample.mean(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.spread.double(), sample.std(2, correction=0), rtol=1e-5, atol=0)
    codes, step = made.encode(k)
    x = (k.double() - made.mean.double()[:, :, None]) / made.spread.double()[:, :, None]
    torch.testing.assert_close(step.double(), x.abs().amax(-1) / 127, rtol=1e-4, atol=0)
    assert codes.dtype == torch.int8
    assert int(codes.abs().amax()) == 127
    assert float((x / step.double()[..., None] - codes).abs().amax()) <= 0.501


def test_scores_are_near_those_of_the_keys_whatever_the_channels() -> None:
    q, k = draw()
    exact = (q.unflatten(1, (2, 3)).double() @ k.double().transpose(-1, -2)).flatten(1, 2)
    exact -= exact.mean(-1, keepdim=True)
    found = coded(k).scores(q).double()
    found -= found.mean(-1, keepdim=True)
    error = (found - exact).std(-1) / exact.std(-1)
    assert float(error.amax()) < 0.02


def test_a_constant_channel_and_equal_keys() -> None:
    q, k = draw()
    k[..., 3] = 7.0
    k[:, :, :5] = k[:, :, :1]
    found = coded(k).scores(q)
    assert bool(found.isfinite().all())
    assert torch.equal(found[..., :5], found[..., :1].expand(-1, -1, 5))
    alike = coded(k[:, :, :1].expand(-1, -1, 9, -1))
    assert int(alike.codes.abs().amax()) == 0
    assert int(alike.scores(q).abs().amax()) == 0


def test_a_lost_key_spoils_no_other_code() -> None:
    _, k = draw()
    made = Coding.of(k[:, :, :100])
    sound = made.encode(k)
    k[0, 0, 200, 5], k[1, 1, 250, 0] = torch.nan, torch.inf
    codes, step = made.encode(k)
    lost = step.isnan()
    assert lost.sum() == 2
    assert bool((codes[lost] == 0).all())
    assert torch.equal(codes[~lost], sound[0][~lost])
    assert torch.equal(step[~lost], sound[1][~lost])


@pytest.mark.parametrize("G", [1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize("D", [16, 48, 64])
def test_the_kernel_chooses_as_torch_does(G: int, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if build.why_unavailable() is not None:
        pytest.skip(f"the C++ kernel is not available: {build.why_unavailable()}")
    q, k = torch.randn(2, 2 * G, D), torch.randn(2, 2, 3001, D)
    keys = coded(k, 500)
    options = {"first": 5, "last": 9, "count": 200}
    assert cpp_votes.why_not(q, keys.codes) is None
    found = voted_slots(q, keys, 0.5, **options)
    monkeypatch.setenv("FOVEATE_CPP", "0")
    expected = voted_slots(q, keys, 0.5, **options)
    # The exponentials differ in the last bit, so the last of the best may.
    common = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, expected)]
    assert min(common) >= 204
    assert torch.equal(found, found.sort(-1).values)


def test_choices_are_those_of_keys_that_the_codes_stand_for() -> None:
    q, k = torch.randn(1, 6, 32), torch.randn(1, 2, 2000, 32)
    coding = Coding.of(k)
    codes, step = coding.encode(k)
    stand = coding.mean[:, :, None] + coding.spread[:, :, None] * step[..., None] * codes
    keys = ByteKeys(codes, step, coding.spread)
    found = voted_slots(q, keys, 0.3, first=2, last=3, count=100)
    expected = top_slots(softmax_votes(q, stand[:, :, 2:-3], 0.3), 100)[:, 0] + 2
    assert len(set(found[0].tolist()) & set(expected[0].tolist())) >= 99
    pooled = voted_slots(q, keys, 0.3, first=2, last=3, count=100, kernel=3)
    assert pooled.shape == found.shape
    assert not torch.equal(pooled, found)


def test_a_large_head_is_left_to_torch() -> None:
    q, k = torch.randn(1, 2, 528), torch.randn(1, 1, 50, 528)
    keys = coded(k)
    reason = cpp_votes.why_not(q, keys.codes)
    assert reason is not None
    assert "at most 512" in reason
    assert voted_slots(q, keys, 0.1, first=1, last=1, count=4).shape == (1, 5)


def test_shapes_are_checked() -> None:
    codes, step = Coding.of(torch.randn(1, 2, 9, 16)).encode(torch.randn(1, 2, 9, 16))
    with pytest.raises(ShapeError):
        ByteKeys(codes, step[:, :, 1:], torch.ones(1, 2, 16))
