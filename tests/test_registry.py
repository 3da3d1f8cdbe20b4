"""Registry, options and the public names."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

import foveate
from foveate import registry
from foveate.errors import FoveateError, OptionError, UnknownNameError
from foveate.options import check_fields, format_spec, option, options_of, parse_spec

PUBLIC = {
    "FoveateError",
    "HybridConfig",
    "HybridLM",
    "Method",
    "Run",
    "apply",
    "attend",
    "calibrate",
    "card",
    "compare",
    "create",
    "default_model",
    "explain",
    "load_model",
    "names",
    "probe",
    "register",
}


def test_public_names() -> None:
    assert set(foveate.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(foveate, name) is not None
    with pytest.raises(AttributeError, match="it has: "):
        foveate.nonsense  # noqa: B018


def test_import_is_quick_and_light() -> None:
    """No heavy module is loaded by `import foveate`."""
    heavy = ("torch", "transformers", "triton", "ray", "plotly")
    code = f"import sys, foveate; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@dataclass(frozen=True, kw_only=True)
class Example:
    """An example."""

    count: int = option(3, "how many", at_least=1, at_most=9)
    share: float = option(0.5, "a share", above=0, below=1)
    kind: str = option("a", "a kind", one_of=("a", "b"))
    maybe: int | None = option(None, "perhaps", at_least=1)

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("given_options", "message"),
    [
        ({"count": 0}, "count=0, allowed: >= 1 and <= 9"),
        ({"count": 2.5}, "allowed: a value of type int"),
        ({"count": True}, "allowed: a value of type int"),
        ({"share": 1}, "share=1, allowed: > 0 and < 1"),
        ({"kind": "c"}, r"kind='c', allowed: \('a', 'b'\)"),
        ({"maybe": 0}, "maybe=0"),
        ({"count": "3"}, "allowed: a value of type int"),
    ],
)
def test_bad_options(given_options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Example(**given_options)  # type: ignore[arg-type]


def test_good_options() -> None:
    assert Example(share=0.25, maybe=2).maybe == 2
    assert [each.name for each in options_of(Example)] == ["count", "share", "kind", "maybe"]
    assert str(options_of(Example)[0].bounds) == ">= 1 and <= 9"


WORDS = ("true", "false", "none", "null", "nan", "inf", "infinity")
values = st.one_of(
    st.integers(-(10**6), 10**6),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.from_regex(r"[a-z][a-z-]{1,8}", fullmatch=True).filter(
        lambda s: s not in ("true", "false", "none", "null", "nan", "inf", "infinity")
    ),
)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), values, max_size=4))
def test_specs_round_trip(options: dict[str, object]) -> None:
    assert parse_spec(format_spec("name", options)) == ("name", options)


def test_registering_twice_and_unknown_kinds() -> None:
    registry.discover()

    def fields(kind: str = "model") -> dict[str, object]:
        return {"kind": kind, "paper": "none", "year": 2026, "applies_to": "tests"}

    with pytest.raises(FoveateError, match="allowed: "):
        registry.register("example-x", **fields("nonsense"))  # type: ignore[arg-type]
    with pytest.raises(FoveateError, match="already registered"):
        registry.register("snapkv", **fields("keep"))(Example)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="there is no kind 'keeps'; did you mean keep"):
        registry.names(kind="keeps")


def test_cards_are_plain_data() -> None:
    import json

    for name in registry.names():
        card = registry.card(name)
        assert json.dumps(card.as_dict())
        assert card.summary, name


def test_wildcards_and_kinds() -> None:
    assert "snapkv" in registry.names("*kv*")
    assert "snapkv" not in registry.names(kind="task")
    assert registry.create("snapkv:budget=99").budget == 99
