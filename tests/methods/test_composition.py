"""Specs of methods and compositions: what is refused before anything runs, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from foveate.compare.matrix import Matrix
from foveate.errors import CompositionError, OptionError, UnknownNameError
from foveate.methods import Method, create
from foveate.methods.base import Composed
from foveate.methods.keep.snapkv import SnapKV
from foveate.methods.select.squeezed import Squeezed
from foveate.options import parse_spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("quest+recycled", "recycled would do nothing: it acts in decode only, where quest, named before it, decides"),
        ("squeezed+snapkv+quest", "quest would do nothing: it acts in decode only, where squeezed"),
        ("h2o+h2o", "h2o is there twice"),
        ("snapkv:budget=70+quest+snapkv:budget=80", "snapkv is there twice"),
        ("snapkv+full", "full would do nothing"),
        ("full+quest", "full would do nothing"),
    ],
)
def test_members_without_effect_are_refused(spec: str, message: str) -> None:
    with pytest.raises(CompositionError, match=message):
        create(spec)


@pytest.mark.parametrize(
    "spec", ["flexprefill+snapkv+quest", "quest+squeezed", "snapkv+tova", "h2o+observed-attention", "quest+snapkv"]
)
def test_members_with_an_effect_are_accepted(spec: str) -> None:
    """Squeezed after Quest still reads for later pieces of text."""
    assert len(create(spec).members) == spec.count("+") + 1


def test_nested_compositions_are_refused() -> None:
    with pytest.raises(CompositionError, match="Composed would do nothing"):
        Composed(parts=(Composed(parts=(create("snapkv"), create("quest"))), create("tova")))


def test_a_member_that_only_watches_is_accepted() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Watcher(Method):
        def keep(self, step: Any) -> None:
            return None

    assert Composed(parts=(Watcher(), create("snapkv"))).parts[1] == create("snapkv")


@pytest.mark.parametrize("spec", ["", " ", "snapkv+", "+snapkv", "snapkv++quest", ":budget=3"])
def test_a_missing_name_is_said_to_be_one(spec: str) -> None:
    with pytest.raises(UnknownNameError, match=r"lacks the name of a method; .*methods are: .*snapkv"):
        create(spec)


def test_an_option_given_twice_is_refused() -> None:
    with pytest.raises(OptionError, match="option 'budget' is given twice"):
        create("snapkv:budget=70,budget=80")
    with pytest.raises(OptionError, match="given twice"):
        parse_spec("snapkv:budget=70, budget =70")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_numbers_that_are_not_finite_are_refused(value: Any) -> None:
    with pytest.raises(OptionError, match="threshold=.*, allowed: a finite number$"):
        Squeezed(threshold=value)
    with pytest.raises(OptionError, match="sparsity=.*, allowed: a finite number >= 0 and <= 1$"):
        Squeezed(sparsity=value)
    with pytest.raises(OptionError, match="threshold=nan, allowed: a finite number"):
        create("squeezed:threshold=nan")


def test_numbers_of_numpy_are_numbers() -> None:
    made = SnapKV(budget=np.int64(70), ratio=np.float32(0.5))
    assert (made.budget, type(made.budget), made.ratio, type(made.ratio)) == (70, int, 0.5, float)
    assert made == SnapKV(budget=70, ratio=0.5)
    with pytest.raises(OptionError, match="budget=0, allowed: >= 1"):
        SnapKV(budget=np.int32(0))
    with pytest.raises(OptionError, match="budget=70.0, allowed: a value of type int"):
        SnapKV(budget=np.float64(70))
    with pytest.raises(OptionError, match="allowed: a value of type int"):
        SnapKV(budget=np.bool_(True))  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["passkey", "landmark", "snapkv+softmax", "snapvk", "snapkv+nope"])
def test_a_name_that_is_no_methods_is_refused_in_one_way(spec: str) -> None:
    """Also where the options of what it names are required."""
    errors = []
    for make in (create, lambda each: Matrix.of([each], ["passkey"], 64, 1)):
        with pytest.raises(UnknownNameError, match="method") as caught:
            make(spec)
        errors.append(str(caught.value))
    assert len(set(errors)) == 1
