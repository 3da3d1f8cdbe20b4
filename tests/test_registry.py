"""Registry, options and the public names."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

import foveate
from foveate import registry
from foveate.errors import FoveateError, OptionError, UnknownNameError
from foveate.options import Bounds, check_fields, format_spec, option, options_of, parse_spec

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


class Base:
    def __init__(self, *, count: Annotated[int, Bounds(at_least=1)], share: Annotated[float, Bounds(above=0)] = 0.5):
        self.count, self.share = count, share


class Derived(Base):
    def __init__(
        self, *, count: int = 3, share: Annotated[float | None, Bounds(above=0, below=1)] = 0.5, other: int = 0
    ):
        super().__init__(count=count, share=share or 1.0)


class Same(Derived):
    pass


@pytest.mark.parametrize(
    ("target", "bounds"),
    [
        (Base, {"count": ">= 1", "share": "> 0"}),
        (Derived, {"count": ">= 1", "share": "> 0 and < 1", "other": "any value of its type"}),
        (Same, {"count": ">= 1", "share": "> 0 and < 1", "other": "any value of its type"}),
    ],
)
def test_bounds_of_arguments_hold_in_derived_classes(target: type, bounds: dict[str, str]) -> None:
    found = {each.name: each for each in options_of(target)}
    assert {name: str(each.bounds) for name, each in found.items()} == bounds
    assert found["count"].type == "int"
    with pytest.raises(OptionError, match="Thing: count=0, allowed: >= 1"):
        found["count"].check("Thing", 0)


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


@pytest.mark.parametrize(
    ("spec", "given_options", "error", "message"),
    [
        ("softmax", {}, OptionError, r"softmax needs the options dim \(int\); give them as dim=VALUE"),
        ("softmax", {"dim": "a"}, OptionError, "softmax: dim='a', allowed: a value of type int"),
        ("softmax:dim=8,window=wide", {}, OptionError, r"softmax: window='wide', allowed: a value of type int \| None"),
        ("softmax:dim=8", {"widnow": 4}, UnknownNameError, "softmax has no option 'widnow'; did you mean window"),
        ("snapkv", {"budget": 0}, OptionError, "snapkv: budget=0, allowed: >= 1"),
        ("data-file", {}, OptionError, r"data-file needs the options path \(str\)"),
        ("", {}, UnknownNameError, "there is no mechanism ''"),
    ],
)
def test_what_cannot_be_made_is_refused(
    spec: str, given_options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        registry.create(spec, **given_options)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("nope", registry.METHOD_KINDS, "there is no method 'nope'; there are: adakv, .*"),
        ("nprff", "task", "there is no task 'nprff'; there are: common-words, .*"),
        ("nprff", ("mixer", "probe"), r"there is no mixer or probe 'nprff'; did you mean nprf\?"),
        ("passkey", registry.METHOD_KINDS, "'passkey' is a task, not a method; methods are: adakv, .*"),
    ],
)
def test_suggestions_are_of_the_kind_asked_for(name: str, kind: str | tuple[str, ...], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        registry.card(name, kind=kind)


class Told:
    """A base.

    Options start with:
        dim: channels C, no more
            than 8.
        heads: heads.    eps: added, as `dim: x` is.

    Class attributes:
        causal: not an option's help, but it is named like one.
    """


class Telling(Told):
    """Options in one paragraph: summary: no option.

    heads: not used.    first, second,
    third: three that
    share a line.    The last word: none.    kind: "a" or "b".
    """

    def __init__(
        self, *, dim: int, heads: int = 1, eps: float = 0.1, first: int = 1, second: int = 2, third: int = 3,
        kind: str = "a", summary: str = "", silent: bool = False,
    ) -> None: ...  # fmt: skip


def test_help_is_read_from_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CARDS", {})
    registry.register("telling", kind="mixer", paper="none", year=2026, applies_to="tests")(Telling)
    shared = "three that share a line. The last word: none."
    assert {each.name: each.help for each in registry._CARDS["telling"].options} == {
        "dim": "channels C, no more than 8.",
        "heads": "not used.",
        "eps": "added, as `dim: x` is.",
        "first": shared,
        "second": shared,
        "third": shared,
        "kind": '"a" or "b".',
        "summary": "",
        "silent": "",
    }


def test_mixers_say_what_their_options_are() -> None:
    silent = [
        (card.name, option.name) for card in registry.cards(kind="mixer") for option in card.options if not option.help
    ]
    assert silent == []


def test_wildcards_and_kinds() -> None:
    assert "snapkv" in registry.names("*kv*")
    assert "snapkv" not in registry.names(kind="task")
    assert registry.create("snapkv:budget=99").budget == 99
