"""The registry: one decorator at a class is all that a new mechanism needs.

Listing, command line, gallery, conformance tests and comparison find mechanisms here. Rooms are imported
on the first question, so `import foveate` stays cheap.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from foveate.errors import FoveateError, OptionError, UnknownNameError
from foveate.options import Option, check_names, nearest, options_of, parse_spec

ROOMS = (
    "foveate.methods",
    "foveate.mixers",
    "foveate.probes",
    "foveate.vision",
    "foveate.retrieval",
    "foveate.tasks",
)

KINDS: dict[str, str] = {
    "dense": "reads everything",
    "keep": "which keys stay in the cache",
    "select": "which stored keys a step reads",
    "prefill": "which blocks of a long prompt are computed",
    "reweigh": "how attention weights are changed",
    "quantize": "how stored keys and values are coded",
    "mixer": "a trainable token mixer",
    "adapter": "a trained memory or processor around a pretrained model",
    "finetune": "an attention pattern for fine-tuning",
    "probe": "a measurement of attention",
    "task": "makes prompts with known answers and scores outputs",
    "vision": "an image block or backbone",
    "ranker": "ranks or embeds texts",
    "model": "a cost model or another tool around attention",
}
METHOD_KINDS = ("dense", "keep", "select", "prefill", "reweigh", "quantize")


@dataclass(frozen=True)
class Card:
    """What is known about one mechanism; documentation, listing and tests read it.

    exact: options with which a method is dense attention (conformance compares the two).
    small: options that bite on a prompt of 64 tokens.
    known: conformance checks that are expected to fail, each with its reason.
    claim: the paper's claim in small, as it came out here (a sentence with numbers and the result file).
    """

    name: str
    kind: str
    paper: str
    year: int
    applies_to: str
    summary: str
    target: type
    arxiv: str | None = None
    options: tuple[Option, ...] = ()
    exact: Mapping[str, Any] | None = None
    small: Mapping[str, Any] | None = None
    known: Mapping[str, str] = field(default_factory=dict)
    calibration: str | None = None
    claim: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The card as plain data (JSON-ready)."""
        return {
            "name": self.name,
            "kind": self.kind,
            "paper": self.paper,
            "arxiv": self.arxiv,
            "year": self.year,
            "applies_to": self.applies_to,
            "summary": self.summary,
            "calibration": self.calibration,
            "claim": self.claim,
            "options": [
                {
                    "name": each.name,
                    "type": each.type,
                    "default": None if each.required else _plain(each.default),
                    "required": each.required,
                    "allowed": str(each.bounds),
                    "help": each.help,
                }
                for each in self.options
            ],
        }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


_CARDS: dict[str, Card] = {}
_discovered = False
T = TypeVar("T", bound=type)


def register(
    name: str,
    *,
    kind: str,
    paper: str,
    year: int,
    applies_to: str,
    arxiv: str | None = None,
    exact: Mapping[str, Any] | None = None,
    small: Mapping[str, Any] | None = None,
    known: Mapping[str, str] | None = None,
    calibration: str | None = None,
    claim: str | None = None,
) -> Callable[[T], T]:
    """Put a class in the registry under `name`. A second registration of a name is an error."""
    if kind not in KINDS:
        raise FoveateError(f"register({name!r}): kind={kind!r}, allowed: {tuple(KINDS)}")

    def decorate(target: T) -> T:
        present = _CARDS.get(name)
        if present is not None and present.target.__qualname__ != target.__qualname__:
            raise FoveateError(f"{name!r} is already registered by {present.target.__module__}")
        summary = (target.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        _CARDS[name] = Card(
            name=name,
            kind=kind,
            paper=paper,
            year=year,
            applies_to=applies_to,
            summary=" ".join(summary.split()),
            target=target,
            arxiv=arxiv,
            options=_documented(target),
            exact=exact,
            small=small,
            known=dict(known or {}),
            calibration=calibration,
            claim=claim,
        )
        target.registered_name = name  # type: ignore[attr-defined]
        return target

    return decorate


# An option in a class's docstring: "expand_k, expand_v: total widths over dim.", after a gap or a line's end.
_TOLD = re.compile(r"(?:^|\s{2,})(?P<names>\w+(?:,\s+\w+)*):\s")


def _documented(target: type) -> tuple[Option, ...]:
    """The options of a class; help that a declaration lacks is read from its docstring, or that of a base class."""
    told: dict[str, str] = {}
    for base in reversed(target.__mro__):
        told.update(_told(base.__dict__.get("__doc__") or ""))
    return tuple(
        each if each.help or each.name not in told else dataclasses.replace(each, help=told[each.name])
        for each in options_of(target)
    )


def _told(doc: str) -> dict[str, str]:
    """What a docstring says of each name after its summary."""
    found = {}
    for paragraph in doc.split("\n\n")[1:]:
        entries = [*_TOLD.finditer(paragraph)]
        for entry, following in zip(entries, [*entries[1:], None]):
            end = None if following is None else following.start()
            for name in re.split(r",\s+", entry["names"]):
                found[name] = " ".join(paragraph[entry.end() : end].split())
    return found


def discover() -> None:
    """Import every module of every room, so that all decorators have run."""
    global _discovered
    if _discovered:
        return
    for room in ROOMS:
        try:
            package = importlib.import_module(room)
        except ModuleNotFoundError as error:
            if error.name == room:
                continue
            raise
        for module in pkgutil.walk_packages(package.__path__, prefix=f"{room}."):
            importlib.import_module(module.name)
    _discovered = True


def names(pattern: str = "*", *, kind: str | tuple[str, ...] | None = None) -> list[str]:
    """Registered names that match `pattern` (shell wildcards), sorted; `kind` narrows them."""
    discover()
    kinds = (kind,) if isinstance(kind, str) else kind
    for each in kinds or ():
        if each not in KINDS:
            raise UnknownNameError(f"there is no kind {each!r}{nearest(each, KINDS)}")
    return sorted(
        name
        for name, each in _CARDS.items()
        if fnmatch.fnmatch(name, pattern) and (kinds is None or each.kind in kinds)
    )


def cards(*, kind: str | tuple[str, ...] | None = None) -> list[Card]:
    """The cards of `names(kind=kind)`."""
    return [_CARDS[name] for name in names(kind=kind)]


def card(name: str, *, kind: str | tuple[str, ...] | None = None) -> Card:
    """The card of one mechanism.

    kind: what it must be, METHOD_KINDS for a method. Raises UnknownNameError for an unknown name, and for one of
    another kind, with the nearest names of the kind asked for.
    """
    known = names(kind=kind)
    if name in known:
        return _CARDS[name]
    wanted = _noun(kind)
    if name in _CARDS:
        own = _CARDS[name].kind
        article = "an" if own[0] in "aeiou" else "a"
        raise UnknownNameError(f"{name!r} is {article} {own}, not a {wanted}; {wanted}s are: {', '.join(known)}")
    raise UnknownNameError(f"there is no {wanted} {name!r}{nearest(name, known)}")


def _noun(kind: str | tuple[str, ...] | None) -> str:
    if kind is None or kind == METHOD_KINDS:
        return "mechanism" if kind is None else "method"
    return kind if isinstance(kind, str) else " or ".join(kind)


def create(name: str, **options: Any) -> Any:
    """Make a mechanism by name; `name` may be a spec such as `"snapkv:budget=1024"`.

    Raises UnknownNameError for an unknown name or option, OptionError for a bad value or a missing option.
    """
    name, parsed = parse_spec(name)
    found = card(name)
    options = {**parsed, **options}
    check_names(name, options, found.options)
    missing = [each for each in found.options if each.required and each.name not in options]
    if missing:
        needed = ", ".join(f"{each.name} ({each.type})" for each in missing)
        raise OptionError(f"{name} needs the options {needed}; give them as {missing[0].name}=VALUE")
    for each in found.options:
        if each.name in options:
            options[each.name] = each.check(name, options[each.name])
    return found.target(**options)
