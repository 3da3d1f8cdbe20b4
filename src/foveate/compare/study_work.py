"""The work of a study: cells that several processes train, each once.

Who trains a cell holds a lock on a file, which the system takes back when the process ends, whatever ends it.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from foveate.compare.cells import CellStore
from foveate.compare.environment import device_name, source_digest, versions
from foveate.compare.files import make_folder
from foveate.compare.matrix import Group
from foveate.compare.progress import Silent
from foveate.compare.study_fit import StudyConfig, fit
from foveate.errors import ResultsError


@dataclass(frozen=True)
class Entry:
    """One stack: its name in tables, the mixer of each layer, and full attention's ratio (None: there is none)."""

    name: str
    mixers: tuple[str, ...]
    ratio: int | None = None


def study_source() -> str:
    """A hash of the code that decides a training's numbers."""
    return source_digest(("attention", "mixers", "lm", "compare/study_fit.py"))


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know.

    deadline: when to stop, in seconds of time.time().    source: the code of the process that began the study.
    """

    config: StudyConfig
    entries: tuple[Entry, ...]
    rates: tuple[float, ...]
    out: Path
    deadline: float | None = None
    source: str = field(default_factory=study_source)

    def store(self) -> CellStore:
        return CellStore(self.out / "cells")

    def cells(self) -> list[tuple[Entry, float]]:
        """In the order of work: every stack has a number before any has a second."""
        return [(entry, rate) for rate in self.rates for entry in self.entries]

    def key(self, entry: Entry, rate: float) -> dict[str, Any]:
        """Everything that decides a cell's numbers."""
        return {
            "study": dataclasses.asdict(self.config),
            "mixers": list(entry.mixers),
            "rate": rate,
            "device": device_name(torch.device(self.config.device)),
            "versions": versions(),
            "source": self.source,
        }

    def pending(self, store: CellStore) -> int:
        """How many cells have no number yet."""
        return sum(store.load(self.key(*cell)) is None for cell in self.cells())

    def reached(self, store: CellStore, entry: Entry) -> bool:
        """Whether a training of this stack came to `stop_at`, so that no other rate is needed."""
        return any((store.load(self.key(entry, rate)) or {}).get("reached_at") for rate in self.rates)


class TimeIsUpError(Exception):
    """The study's minutes are over; the cell in work is given up."""


def work(job: Job, store: CellStore, begun: Callable[[Entry], None] = lambda entry: None) -> Iterator[dict[str, Any]]:
    """Train what nobody else trains, and yield each finished cell; ends when all is done, taken, or time is up."""
    locks = make_folder(job.out / "locks")
    for entry, rate in job.cells():
        key = job.key(entry, rate)
        if store.load(key) is not None or job.reached(store, entry):
            continue
        lock = FileLock(locks / f"{store.path(key).stem}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            # Another process may have finished it before the lock was taken.
            if store.load(key) is None:
                begun(entry)
                cell = store.save(key, _cell(job, entry, rate))
                yield cell
                if cell.get("error", "").startswith("AcceleratorError"):
                    # After such an error, this process can use the device no more.
                    return
        except TimeIsUpError:
            return
        finally:
            lock.release()


def _cell(job: Job, entry: Entry, rate: float) -> dict[str, Any]:
    def proceed() -> None:
        if job.deadline is not None and time.time() > job.deadline:
            raise TimeIsUpError

    proceed()
    head = {"entry": entry.name, "mixers": list(entry.mixers), "ratio": entry.ratio, "rate": rate}
    try:
        return {**head, **fit(entry.mixers, rate, job.config, proceed)}
    except TimeIsUpError:
        raise
    except Exception as error:
        # A mixer that fails is a result, told in its row; the others must not be lost with it.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return {**head, "status": "failed", "error": reason[:500]}


def forget_failures(job: Job, store: CellStore) -> None:
    for entry, rate in job.cells():
        key = job.key(entry, rate)
        if (store.load(key) or {}).get("status") == "failed":
            store.path(key).unlink(missing_ok=True)


def work_alone(job: Job, store: CellStore, bar: Silent) -> list[str]:
    def begun(entry: Entry) -> None:
        bar.at(Group(entry.name, job.config.task, job.config.length), job.config.seed)

    for cell in work(job, store, begun):
        bar.step(1)
        bar.say(_line(cell))
    return []


def work_together(job: Job, store: CellStore, bar: Silent, workers: int) -> list[str]:
    """Run processes until each finds no more to do; ends them when this one is interrupted."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_worker, args=(job,), daemon=True) for _ in range(workers)]
    shown = {path for cell in job.cells() if (path := store.path(job.key(*cell))).exists()}
    bar.at(Group(f"{workers} workers", job.config.task, job.config.length), job.config.seed)
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(0.5)
            _show_new(job, store, bar, shown)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
    _show_new(job, store, bar, shown)
    died = [process.exitcode for process in processes if process.exitcode]
    if not died:
        return []
    return [f"{len(died)} of {workers} workers ended with exit codes {died} (see stderr); a rerun goes on"]


def _show_new(job: Job, store: CellStore, bar: Silent, shown: set[Path]) -> None:
    for cell in job.cells():
        path = store.path(job.key(*cell))
        if path not in shown and path.exists() and (found := store.load(job.key(*cell))) is not None:
            shown.add(path)
            bar.step(1)
            bar.say(_line(found))


def _worker(job: Job) -> None:
    # Workers share the cores; a tiny model's work is in launching.
    torch.set_num_threads(1)
    if study_source() != job.source:
        raise ResultsError(
            "foveate's code was changed while a study began; run it again, so that all cells are of one code"
        )
    for _ in work(job, job.store()):
        pass


def _line(cell: dict[str, Any]) -> str:
    """What a finished cell says above the bar."""
    head = f"{cell['entry']}  rate {cell['rate']:.3g}  "
    if cell["status"] == "failed":
        return head + f"failed: {cell['error']}"
    if cell["status"] == "diverged":
        return head + f"diverged by step {cell['diverged_at']}"
    score = f"perplexity {cell['perplexity']:.3f}" if cell["perplexity"] is not None else f"{cell['accuracy']:.3f}"
    return head + f"{score}  {cell['state_bytes']:,} B  {cell['steps']} steps  {cell['seconds']:.0f} s"
