"""What a calibration is: settings that can run on a model and give tables, and the table of all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from foveate import options
from foveate.errors import OptionError, ProfileError
from foveate.methods.profile import ModelIdentity, Profile, load

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The settings of one calibration, each made by `options.option`; `run` does the work."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        options.check_fields(self)
        self.check()

    def check(self) -> None:
        """Rules between settings; raise OptionError."""

    def run(self, model: Any, tokenizer: Any, work: Work) -> Found:
        """Measure; the model must be as it was afterwards, also after an exception."""
        raise NotImplementedError

    def refuse(self, setting: str, allowed: str) -> OptionError:
        return OptionError(f"calibration {self.name!r}: {setting}={getattr(self, setting)!r}, allowed: {allowed}")


@dataclass(frozen=True)
class Found:
    """A calibration's outcome. tensors: the profile's tables. facts: plain data to be kept beside the settings."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Work:
    """Where a running calibration notes how far it is.

    identity: the model's. partial: folder of unfinished work, or None. shown: whether progress is drawn on stderr.
    """

    identity: ModelIdentity
    partial: Path | None = None
    shown: bool = False
    _update: Callable[[str], None] | None = None

    def track(self, items: Iterable[T], title: str, total: int, done: int = 0) -> Iterator[T]:
        """The items, with a progress bar that ends at `total`."""
        if not self.shown:
            yield from items
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, completed=done, note="")
            self._update = lambda note: bar.update(task, note=note)
            try:
                for item in items:
                    yield item
                    bar.advance(task)
            finally:
                self._update = None

    def note(self, text: str) -> None:
        """A word beside the progress bar."""
        if self._update is not None:
            self._update(text)

    def save_partial(self, kind: str, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        if self.partial is not None:
            Profile(f"{kind}.partial", self.identity, tensors, settings).save(self.partial)

    def load_partial(self, kind: str) -> Profile | None:
        """Unfinished work of this model, None when there is none."""
        if self.partial is None or not (self.partial / "profile.json").exists():
            return None
        try:
            found = load(self.partial, f"{kind}.partial")
            found.check(f"{kind}.partial", self.identity)
        except ProfileError as error:
            raise ProfileError(
                f"the unfinished calibration at {self.partial} cannot be continued ({error}); delete that folder to "
                "start again"
            ) from error
        return found

    def forget_partial(self) -> None:
        import shutil

        if self.partial is not None:
            shutil.rmtree(self.partial, ignore_errors=True)


CALIBRATIONS: dict[str, type[Calibration]] = {}
C = TypeVar("C", bound=type[Calibration])


def calibration(name: str) -> Callable[[C], C]:
    """Put a calibration in the table under the name of the profiles it makes."""

    def decorate(target: C) -> C:
        if name in CALIBRATIONS:
            raise ValueError(f"two calibrations are called {name!r}")
        target.name = name
        CALIBRATIONS[name] = target
        return target

    return decorate


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No parameter of the model takes gradients, and it is in evaluation mode, until the block ends."""
    before = [(each, each.requires_grad) for each in model.parameters()]
    training = model.training
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
        model.train(training)
