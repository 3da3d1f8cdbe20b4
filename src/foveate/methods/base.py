"""A method: three questions, each with a default. What do I read, how do I weigh it, what stays?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from foveate import options, registry
from foveate.attention.plan import Dense, Plan
from foveate.errors import CompositionError, OptionError, UnknownNameError
from foveate.methods.cache import Change
from foveate.methods.step import Phase, Step


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training-free way of attending. Holds options only; state lives on the step's cache."""

    # Phases in which `plan` or `attend` does something other than dense attention.
    acts_in: ClassVar[frozenset[Phase]] = frozenset()
    # What the step must carry: "rope" (unrotated q and k), "hidden".
    needs: ClassVar[frozenset[str]] = frozenset()
    # Whether heads may end up with different numbers of stored tokens.
    ragged: ClassVar[bool] = False
    # Whether `keep` ever drops anything.
    evicts: ClassVar[bool] = False
    # Whether every decode step reads all that is stored and keeps it all, so that its work can be recorded once.
    steady: ClassVar[bool] = False
    # Whether the method must be alone: it stores or reads keys in its own way.
    alone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        options.check_fields(self)
        self.check()

    def check(self) -> None:
        """Rules between options; raise OptionError."""

    def plan(self, step: Step) -> Plan:
        """What do I read?"""
        return Dense()

    def attend(self, step: Step) -> Tensor:
        """How do I weigh it? o [B, Hq, M, Dv]."""
        return step.attend(self.plan(step))

    def keep(self, step: Step) -> Change | None:
        """What stays, after this step's output is known? None: everything."""
        return None

    def prompt_ends(self, step: Step) -> Change | None:
        """Called once when a chunked prompt is known to be over; `step` holds what `keep` noted."""
        return None

    @property
    def members(self) -> tuple[Method, ...]:
        return (self,)

    @property
    def acts(self) -> bool:
        """Whether any member ever does something other than dense attention over everything."""
        return any(part.acts_in or part.evicts for part in self.members)

    def for_model(self, identity: Any) -> Method:
        """Bind to a model (profiles are checked here); returns the method to run."""
        return self

    def refuse(self, option: str, allowed: str) -> OptionError:
        return OptionError(f"{type(self).__name__}: {option}={getattr(self, option)!r}, allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class Composed(Method):
    """Several methods at once: the first that acts in a phase reads for it, and every member keeps, in order."""

    parts: tuple[Method, ...]

    def check(self) -> None:
        if len(self.parts) < 2:
            raise CompositionError("a composition needs at least two members")
        for index, part in enumerate(self.parts):
            others = [type(each).__name__ for each in self.parts if each is not part]
            if part.alone:
                raise CompositionError(
                    f"{type(part).__name__} stores or reads keys in its own way and cannot be combined with {others}; "
                    "use it alone"
                )
            selects = [type(each).__name__ for each in self.parts if each.acts_in - {"prefill"} and each is not part]
            if part.ragged and selects:
                raise CompositionError(
                    f"{type(part).__name__} leaves heads with different numbers of keys, which {selects} cannot "
                    "select from; combine with a method that keeps the same number for every head (e.g. snapkv)"
                )
            for other in self.parts[:index]:
                if (part.ragged and other.evicts) or (other.ragged and part.evicts):
                    raise CompositionError(
                        f"{type(other).__name__} and {type(part).__name__} both evict, and one leaves ragged heads; "
                        "use one of them"
                    )
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Refuse members without any effect beside the ones before them."""
        taken: dict[Phase, str] = {}
        for index, part in enumerate(self.parts):
            name = _name(part)
            if any(type(part) is type(other) for other in self.parts[:index]):
                raise CompositionError(f"{name} is there twice; name it once, with the options that are meant")
            if part.acts_in and part.acts_in <= taken.keys() and not part.evicts:
                before = " and ".join(sorted({taken[phase] for phase in part.acts_in}))
                phases = " and ".join(sorted(part.acts_in))
                raise CompositionError(
                    f"{name} would do nothing: it acts in {phases} only, where {before}, named before it, decides what "
                    "is read; leave one of them out"
                )
            keeps = type(part).keep is not Method.keep or type(part).prompt_ends is not Method.prompt_ends
            if not (part.acts_in or part.evicts or keeps):
                raise CompositionError(f"{name} would do nothing in a composition; leave it out")
            taken = dict.fromkeys(part.acts_in, name) | taken

    @property
    def members(self) -> tuple[Method, ...]:
        return self.parts

    @property
    def steady(self) -> bool:  # type: ignore[override]
        return all(part.steady for part in self.parts)

    def attend(self, step: Step) -> Tensor:
        for index, part in enumerate(self.parts):
            if step.phase in part.acts_in:
                step.member = index
                return part.attend(step)
        return step.attend()

    def for_model(self, identity: Any) -> Method:
        return Composed(parts=tuple(part.for_model(identity) for part in self.parts))


def execute(method: Method, step: Step) -> Tensor:
    """One layer's step: read, weigh, then keep. The order of the three is the protocol."""
    out = method.attend(step)
    for index, part in enumerate(method.members):
        step.member = index
        change = part.keep(step)
        if change is not None:
            step.cache.apply(change)
    return out


def finish_prompt(method: Method, step: Step) -> None:
    """End a chunked prompt on one layer: prompt-end methods decide now what stays."""
    for index, part in enumerate(method.members):
        step.member = index
        change = part.prompt_ends(step)
        if change is not None:
            step.cache.apply(change)


def create(spec: str | Method, **given: Any) -> Method:
    """A method from `"snapkv:budget=1024"`, from `"a+b:x=1+c"` (a composition), or as it is.

    Raises UnknownNameError for a name that is no method's, and for an option it lacks; OptionError for a value;
    CompositionError for methods that do not go together.
    """
    if isinstance(spec, Method):
        if given:
            raise OptionError(f"options {sorted(given)} were given beside a method object; put them on the object")
        return spec
    names = spec.split("+")
    if not all(options.parse_spec(each)[0] for each in names):
        raise UnknownNameError(
            f"{spec!r} lacks the name of a method; write NAME:option=value, or NAME+NAME for several; methods are: "
            f"{', '.join(method_names())}"
        )
    if given and len(names) > 1:
        raise OptionError(f"options {sorted(given)} beside the composition {spec!r}; write them in the spec: a:x=1+b")
    made = [_one(each, given) for each in names]
    return made[0] if len(made) == 1 else Composed(parts=tuple(made))


def _one(spec: str, given: dict[str, Any]) -> Method:
    # Before its options: those of another kind may be required.
    registry.card(options.parse_spec(spec)[0], kind=registry.METHOD_KINDS)
    made: Method = registry.create(spec, **given)
    return made


def method_names() -> list[str]:
    return registry.names(kind=registry.METHOD_KINDS)


def describe(method: Method) -> str:
    """The spec a method was made from, with the options that differ from their defaults."""
    return "+".join(_describe(part) for part in method.members)


def _describe(part: Method) -> str:
    fields: Sequence[options.Option] = options.options_of(type(part))
    changed = {each.name: getattr(part, each.name) for each in fields if getattr(part, each.name) != each.default}
    return options.format_spec(_name(part), changed)


def _name(part: Method) -> str:
    """The name it is registered by, its class's otherwise."""
    return getattr(part, "registered_name", type(part).__name__)
