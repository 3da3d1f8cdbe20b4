"""Progress and notes on stderr; stdout stays free for data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from foveate.compare.matrix import Group


class Silent:
    """Shows nothing."""

    def at(self, group: Group, seed: int) -> None: ...

    def now(self, what: str) -> None: ...

    def step(self, count: int) -> None: ...

    def say(self, text: str) -> None: ...


class Bar(Silent):
    """A rich progress bar with what runs now, and notes above it."""

    def __init__(self, progress: Any, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("preparing", total=total)

    def at(self, group: Group, seed: int) -> None:
        self._progress.update(self._task, description=f"{group.task} {group.length:,}  {group.method}  seed {seed}")

    def now(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def step(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)


@contextlib.contextmanager
def showing(wanted: bool, total: int) -> Iterator[Silent]:
    """A bar on stderr while the work goes on, or nothing."""
    if not wanted:
        yield Silent()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bar(progress, total)
