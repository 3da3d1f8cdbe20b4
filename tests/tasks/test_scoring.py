"""Matching rules, on examples worked out by hand."""

from __future__ import annotations

import pytest

from foveate.tasks.scoring import any_found, found, mean_and_variance, numbered_pairs, set_overlap

PAIRS = [("k-1", "v-a"), ("k-2", "v-b")]


@pytest.mark.parametrize(
    ("output", "answers", "expected"),
    [
        ("The key is 12345.", ["12345"], 1.0),
        ("PARIS, and rome", ["Paris", "Rome", "Oslo"], 2 / 3),
        ("", ["x"], 0.0),
        ("anything", [], 0.0),
    ],
)
def test_found_is_the_fraction_in_either_case(output: str, answers: list[str], expected: float) -> None:
    assert found(output, answers) == pytest.approx(expected)
    assert any_found(output, answers) == float(expected > 0)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("1. The answer for k-1 is v-a.\n2. The answer for k-2 is v-b.", 1.0),
        ("1. The answer for k-1 is: V-A\n2. the ANSWER for k-2 is v-b", 1.0),
        ("1. The answer for k-2 is v-b.\n2. The answer for k-1 is v-a.", 0.0),
        ("1. The answer for K-1 is v-a.", 0.0),
        ("1. The answer for k-1 is v-x.\n1. The answer for k-1 is v-a.", 0.0),
        ("1. The answer for k-1 is v-a. <answer>2. The answer for k-2 is v-b.</answer>", 0.5),
        ("", 0.0),
    ],
)
def test_numbered_pairs(output: str, expected: float) -> None:
    assert numbered_pairs(output, PAIRS) == expected


@pytest.mark.parametrize(
    ("output", "gold", "expected"),
    [
        ("abcde FGHIJ", "ABCDE FGHIJ", 1.0),
        ("VAR ABCDE VAR KLMNO", "ABCDE FGHIJ", 1 / 3),
        ("noise <ANSWER>ABCDE</ANSWER> noise", "ABCDE", 1.0),
        ("ABCDE,", "ABCDE", 0.0),
        ("XXVAR ABCDE", "XXVAR ABCDE", 1.0),
        ("", "ABCDE", 0.0),
        ("", "", 1.0),
    ],
)
def test_set_overlap(output: str, gold: str, expected: float) -> None:
    assert set_overlap(output, gold) == pytest.approx(expected)


def test_mean_and_unbiased_variance() -> None:
    assert mean_and_variance([1.0, 3.0, 5.0]) == pytest.approx((3.0, 4.0))
    assert mean_and_variance([0.5]) == (0.5, 0.0)
    assert mean_and_variance([]) == (0.0, 0.0)
