"""Break-even lengths from times whose crossing is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from foveate.compare.breakeven import Point, break_even, points_of

LENGTHS = (1024, 2048, 4096)


def points(
    ours: Callable[[int], float], dense: Callable[[int], float], lengths: tuple[int, ...] = LENGTHS
) -> list[Point]:
    return [Point(length, ours(length), dense(length)) for length in lengths]


@pytest.mark.parametrize("lengths", [(1024, 4096), LENGTHS])
def test_a_crossing_of_two_lines_is_found(lengths: tuple[int, ...]) -> None:
    # 2 + 0.001 N = 1 + 0.0015 N at N = 2000.
    found = break_even("m", points(lambda n: 2 + 0.001 * n, lambda n: 1 + 0.0015 * n, lengths))
    assert (found.verdict, found.tokens, found.extrapolated) == ("below", 2000, False)
    assert found.text == "dense is faster below 2,000 tokens"
    assert found.measured == (1024, 4096)
    assert found.fit_error == pytest.approx(0, abs=1e-6)


def test_a_crossing_of_two_parabolas_is_found() -> None:
    # 3 + 1e-7 N^2 = 1 + 6e-7 N^2 at N = 2000.
    found = break_even("m", points(lambda n: 3 + 1e-7 * n**2, lambda n: 1 + 6e-7 * n**2))
    assert (found.verdict, found.tokens) == ("below", 2000)


def test_the_other_way_round_dense_wins_above() -> None:
    found = break_even("m", points(lambda n: 1 + 0.0015 * n, lambda n: 2 + 0.001 * n))
    assert (found.verdict, found.tokens) == ("above", 2000)
    assert found.text == "dense is faster above 2,000 tokens"


def test_a_crossing_outside_the_measured_lengths_is_called_so() -> None:
    # At 10000, below four times 4096.
    found = break_even("m", points(lambda n: 6 + 0.001 * n, lambda n: 1 + 0.0015 * n))
    assert (found.verdict, found.tokens, found.extrapolated) == ("below", 10_000, True)
    assert found.text.endswith("(extrapolated)")


def test_nothing_is_said_beyond_four_times_the_measured_lengths() -> None:
    # At 20000, above four times 4096.
    found = break_even("m", points(lambda n: 11 + 0.001 * n, lambda n: 1 + 0.0015 * n))
    assert (found.verdict, found.tokens) == ("never", None)
    assert "never faster than dense in 1,024 to 4,096 tokens" in found.text
    # At 200, below a quarter of 1024.
    always = break_even("m", points(lambda n: 0.2 + 0.001 * n, lambda n: 0.1 + 0.0015 * n))
    assert (always.verdict, always.tokens) == ("always", None)


def test_no_difference_is_no_verdict() -> None:
    found = break_even("m", points(lambda n: 1 + 0.001 * n, lambda n: 1.02 * (1 + 0.001 * n)))
    assert (found.verdict, found.text) == ("same", "as fast as dense within 3% (1,024 to 4,096 tokens)")


def test_more_than_one_crossing_is_called_mixed() -> None:
    found = break_even("m", points(lambda n: 1 + 0.002 * n, lambda n: 3.2 + 2.5e-7 * n**2))
    assert found.verdict == "mixed"
    assert found.tokens is None


def test_a_parabola_that_bends_down_is_not_trusted() -> None:
    # Noise made the middle slow: a parabola would bend down and cross again; the lines do not.
    found = break_even("m", [Point(1000, 1.0, 2.0), Point(2000, 2.9, 4.0), Point(4000, 3.6, 8.0)])
    assert (found.verdict, found.tokens) == ("always", None)
    assert found.fit_error is not None
    assert found.fit_error > 0.1
    assert "rough: the fits miss by up to" in found.text


@pytest.mark.parametrize("lengths", [(), (2048,), (2048, 2048), (2048, 2200)])
def test_one_length_is_not_enough(lengths: tuple[int, ...]) -> None:
    found = break_even("m", points(lambda n: 1.0, lambda n: 2.0, lengths))
    assert (found.verdict, found.tokens, found.measured) == ("unknown", None, None)
    assert "two lengths" in found.text


def row(**changed: object) -> dict[str, object]:
    whole: dict[str, object] = {
        "method": "m",
        "prompt_tokens": 100,
        "ttft_s": 1.0,
        "decode_tokens_per_s": 10.0,
        "dense_ttft_s": 2.0,
        "dense_decode_tokens_per_s": 5.0,
    }
    return {**whole, **changed}


def test_points_add_the_first_token_and_the_generated_ones() -> None:
    assert points_of([row(), row(method="other")], "m", generated=20) == [Point(100, 3.0, 6.0)]


@pytest.mark.parametrize("missing", ["ttft_s", "decode_tokens_per_s", "dense_ttft_s", "dense_decode_tokens_per_s"])
def test_rows_without_all_speeds_give_no_point(missing: str) -> None:
    assert points_of([row(**{missing: None})], "m") == []
