"""What a probe is: it listens to attention steps of a model that attends densely, and gives tables of heads.

A probe needs no model class. It is handed a `Subject` (foveate.hf.subject makes one from a transformers model), opens
a session with a function that hears every attention step, and feeds tokens. Nothing N x N is stored: what a probe
wants to know it computes from a step's q and k for the few rows it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from foveate import options
from foveate.errors import OptionError, UnknownNameError
from foveate.methods.base import Method
from foveate.methods.cache import Change
from foveate.methods.profile import ModelIdentity, Profile
from foveate.methods.step import Step
from foveate.options import nearest

Hear = Callable[[Step], None]


class Session(Protocol):
    """A model that attends densely while every step is heard."""

    def start(self) -> None:
        """Forget what was fed."""

    def feed(self, ids: Tensor) -> Tensor:
        """Feed ids [B, M] after what was fed before; logits [B, vocabulary] of the last token."""
        ...


class Subject(Protocol):
    """A model as probes see it. vocabulary: ids are below it."""

    identity: ModelIdentity
    vocabulary: int

    def session(self, hear: Hear) -> AbstractContextManager[Session]: ...


@dataclass(frozen=True, kw_only=True)
class Listener(Method):
    """Dense attention that tells each step to `hear`, after the step's output is known."""

    hear: Hear

    def keep(self, step: Step) -> Change | None:
        self.hear(step)
        return None


@dataclass(frozen=True)
class HeadTable:
    """A probe's result.

    tables: by name, each [layers, Hq] float32; NaN where a layer was not heard (it has a sliding window of its own).
    The first table is the probe's main one. facts: how it was measured, plain data.
    """

    probe: str
    model: ModelIdentity
    tables: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def scores(self, table: str | None = None) -> Tensor:
        """One table [layers, Hq], the main one by default."""
        name = table or next(iter(self.tables))
        if name not in self.tables:
            raise UnknownNameError(f"{self.probe} has no table {name!r}{nearest(name, self.tables)}")
        return self.tables[name]

    def top(self, count: int, table: str | None = None) -> list[tuple[int, int, float]]:
        """The heads with the highest scores: (layer, head, score), best first, ties in order of layer and head."""
        scores = self.scores(table)
        flat = scores.nan_to_num(-torch.inf).flatten()
        order = flat.argsort(descending=True, stable=True)[: min(count, int((~scores.isnan()).sum()))]
        width = scores.shape[1]
        return [(int(at) // width, int(at) % width, float(flat[at])) for at in order]

    def profile(self) -> Profile:
        """The tables as a profile of the probe's name."""
        return Profile(self.probe, self.model, self.tables, self.facts)

    def as_dict(self) -> dict[str, Any]:
        tables = {
            name: [[None if x != x else x for x in row] for row in each.tolist()] for name, each in self.tables.items()
        }
        return {"probe": self.probe, "model": vars(self.model), "tables": tables, "facts": self.facts}

    def __str__(self) -> str:
        lines = [f"{self.probe}: {self.model.layers} layers, {self.model.heads} query heads each"]
        for name in self.tables:
            best = ", ".join(f"{layer}-{head} {score:.3f}" for layer, head, score in self.top(10, name))
            lines.append(f"{name}: highest (layer-head score) {best}")
        return "\n".join(lines + [f"{name}: {value}" for name, value in self.facts.items()])


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A measurement of attention. Holds options only."""

    needs_tokenizer: ClassVar[bool] = False
    registered_name: ClassVar[str]

    def __post_init__(self) -> None:
        options.check_fields(self)
        self.check()

    def check(self) -> None:
        """Rules between options; raise OptionError."""

    def measure(self, subject: Subject, tokenizer: Any = None, text: Sequence[str] = ()) -> HeadTable:
        """Run the probe.

        Args:
            subject: the model.
            tokenizer: its tokenizer, for probes that read or write text.
            text: paragraphs of filler prose, for probes that need a long context.
        """
        raise NotImplementedError

    def refuse(self, name: str, allowed: str) -> OptionError:
        return OptionError(f"{type(self).__name__}: {name}={getattr(self, name)!r}, allowed: {allowed}")


def empty_table(model: ModelIdentity) -> Tensor:
    """NaN [layers, Hq]: nothing heard yet."""
    return torch.full((model.layers, model.heads), torch.nan)
