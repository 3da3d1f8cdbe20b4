"""Options: one declaration feeds the check, the card, the command line's help and the tests.

A method's options are the fields of its frozen, keyword-only dataclass, each made by `option(...)`:

    budget: int = option(1024, "keys kept per KV head", at_least=1)

A mixer's options are the keyword-only arguments of its constructor. Bounds stand beside the type, and hold for an
argument of the same name in derived classes too:

    heads: Annotated[int, Bounds(at_least=1)] = 4
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from foveate.errors import OptionError, UnknownNameError

_MISSING: Any = dataclasses.MISSING


@dataclass(frozen=True)
class Bounds:
    """What an option's value may be. `None` bounds nothing."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    one_of: tuple[Any, ...] | None = None

    def refuses(self, value: Any) -> bool:
        if self.one_of is not None:
            return value not in self.one_of
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return not (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.one_of is not None:
            return repr(self.one_of)
        parts = [
            f"{sign} {bound:g}"
            for sign, bound in (
                (">=", self.at_least),
                (">", self.above),
                ("<=", self.at_most),
                ("<", self.below),
            )
            if bound is not None
        ]
        return " and ".join(parts) or "any value of its type"


@dataclass(frozen=True)
class Option:
    """One option of a mechanism, as its card shows it."""

    name: str
    type: str
    default: Any
    help: str
    bounds: Bounds = Bounds()
    accepts: tuple[Any, ...] = ()

    @property
    def required(self) -> bool:
        return self.default is _MISSING

    def check(self, owner: str, value: Any) -> Any:
        """The value as it is to be kept: numbers of other libraries (numpy) as Python's own.

        Raises OptionError unless it has the option's type, lies within its bounds and, if a number, is finite.
        """
        if value is None and type(None) in self.accepts:
            return None
        value = _plain(value)
        fits = not self.accepts or isinstance(value, self.accepts)
        if bool not in self.accepts and isinstance(value, bool) and self.accepts:
            fits = False
        if not fits and float in self.accepts and isinstance(value, int) and not isinstance(value, bool):
            fits = True
        if not fits:
            raise OptionError(f"{owner}: {self.name}={value!r}, allowed: a value of type {self.type}")
        if isinstance(value, float) and not math.isfinite(value):
            limits = "" if self.bounds == Bounds() else f" {self.bounds}"
            raise OptionError(f"{owner}: {self.name}={value!r}, allowed: a finite number{limits}")
        if value is not None and self.bounds.refuses(value):
            raise OptionError(f"{owner}: {self.name}={value!r}, allowed: {self.bounds}")
        return value


def _plain(value: Any) -> Any:
    if isinstance(value, Integral):
        return value if isinstance(value, bool) else int(value)
    return float(value) if isinstance(value, Real) else value


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    one_of: tuple[Any, ...] | None = None,
) -> Any:
    """A dataclass field that carries its help and its bounds; `default=...` (Ellipsis) makes it required."""
    bounds = Bounds(at_least, at_most, above, below, one_of)
    metadata = {"help": help, "bounds": bounds}
    if default is ...:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _accepted(annotation: Any) -> tuple[type, ...]:
    if annotation is Any:
        return ()
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(annotation) for kind in _accepted(part))
    if origin is not None:
        return (origin,) if isinstance(origin, type) else ()
    return (annotation,) if isinstance(annotation, type) else ()


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def options_of(target: type) -> tuple[Option, ...]:
    """The options of a dataclass (its fields) or of any other class (its keyword-only arguments)."""
    if dataclasses.is_dataclass(target):
        hints = typing.get_type_hints(target)
        return tuple(
            Option(
                field.name,
                _type_name(hints[field.name]),
                field.default,
                field.metadata.get("help", ""),
                field.metadata.get("bounds", Bounds()),
                _accepted(hints[field.name]),
            )
            for field in dataclasses.fields(target)
            if field.init
        )
    constructor: Any = inspect.getattr_static(target, "__init__")
    hints = typing.get_type_hints(constructor)
    bounds = _bounds_of(target)
    return tuple(
        Option(
            parameter.name,
            _type_name(hints.get(parameter.name, Any)),
            _MISSING if parameter.default is inspect.Parameter.empty else parameter.default,
            "",
            bounds.get(parameter.name, Bounds()),
            _accepted(hints.get(parameter.name, Any)),
        )
        for parameter in inspect.signature(constructor).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    )


def _bounds_of(target: type) -> dict[str, Bounds]:
    """Bounds of constructor arguments by name, those of the class itself before those of its bases."""
    found: dict[str, Bounds] = {}
    for base in reversed(target.__mro__):
        constructor = vars(base).get("__init__")
        if isinstance(constructor, types.FunctionType):
            for name, hint in typing.get_type_hints(constructor, include_extras=True).items():
                found.update((name, each) for each in getattr(hint, "__metadata__", ()) if isinstance(each, Bounds))
    return found


def check_fields(instance: Any) -> None:
    """Check every option of a dataclass instance; called by `Method.__post_init__` and its like."""
    for each in options_of(type(instance)):
        given = getattr(instance, each.name)
        kept = each.check(type(instance).__name__, given)
        if kept is not given:
            object.__setattr__(instance, each.name, kept)


def check_names(owner: str, given: Iterable[str], options: Iterable[Option]) -> None:
    """Raise UnknownNameError for an option that `owner` lacks, naming the nearest ones."""
    known = [each.name for each in options]
    for name in given:
        if name not in known:
            raise UnknownNameError(f"{owner} has no option {name!r}{nearest(name, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: the closest known names, or all of them when few."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    if not known:
        return "; there are none"
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"; there are: {shown}"


def parse_value(text: str) -> Any:
    """`"8"` -> 8, `"0.5"` -> 0.5, `"true"` -> True, `"none"` -> None, anything else stays text."""
    lowered = text.strip().lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "null"):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """`"snapkv:budget=1024,window=32"` -> `("snapkv", {"budget": 1024, "window": 32})`."""
    name, _, rest = spec.strip().partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise OptionError(f"{spec!r}: {part!r} is not an option; write NAME:option=value,option=value")
        if key.strip() in options:
            raise OptionError(f"{spec!r}: option {key.strip()!r} is given twice; give it once")
        options[key.strip()] = parse_value(value)
    return name.strip(), options


def format_spec(name: str, options: Mapping[str, Any]) -> str:
    """The inverse of `parse_spec`."""
    if not options:
        return name
    return name + ":" + ",".join(f"{key}={value}" for key, value in options.items())
