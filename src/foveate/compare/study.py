"""Mixers and hybrids of them, trained small on one task: how well they recall, and how many bytes of state that takes.

    study = run_study(["softmax", "linear", "gated-deltanet"], ratios=[3], layers=5, device="cuda", workers=8)
    study.save()                       # study.json and study.html

Every stack starts with a short convolution (Zoology pairs each mixer with one, for many cannot bind neighbours
without), and has the mixer in its other layers; a hybrid of ratio r has one layer of full attention after every r. A
stack is trained once per learning rate, and its best training counts.

Papers: Arora et al. 2023 (arXiv 2312.04927, the task); 2507.06457 (the hybrids). Differs: examples come in stages of
growing length, fewer of them, at a width of 64 and a smaller vocabulary, so that a study takes minutes.

Cells are files (`foveate.compare.cells`), so a study goes on where it was left, and several processes, on one machine
or on several that share a folder, work on one study: who trains a cell holds its lock, which ends with the process.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from foveate import registry
from foveate.compare.cells import CellStore
from foveate.compare.environment import command_line, device_name, load_average, now, versions
from foveate.compare.files import plain
from foveate.compare.progress import showing
from foveate.compare.study_fit import StudyConfig, model_config, study_data
from foveate.compare.study_report import Study
from foveate.compare.study_work import Entry, Job, forget_failures, work_alone, work_together
from foveate.errors import OptionError
from foveate.options import check_names, options_of, parse_spec

# Zoology's grid, logspace(-4, -2, 4), without its least; the likeliest first.
RATES = (2.15e-3, 1e-2, 4.64e-4)
# What the command line studies when no mixer is named: full attention, a window, and three generations of states.
SHOWN = ("softmax", "softmax:window=16", "linear", "retnet", "gla", "hgrn2", "gated-deltanet", "mamba2")


def causal_mixers() -> list[str]:
    """Names of the registry's mixers that are causal unless told otherwise, as a language model needs."""
    found = []
    for name in registry.names(kind="mixer"):
        card = registry.card(name)
        target: Any = card.target
        causal = {option.name: option.default for option in card.options}.get("causal", target.causal)
        if causal and "causal-self" in target.patterns:
            found.append(name)
    return found


def make_entries(mixers: Sequence[str], ratios: Sequence[int], config: StudyConfig) -> list[Entry]:
    """Each mixer alone, then its hybrids; raises OptionError or UnknownNameError for a stack that cannot be."""
    if isinstance(mixers, str) or not mixers:
        raise OptionError(f'mixers={mixers!r}, allowed: a list of specs such as ["gla", "softmax:window=64"]')
    first = () if config.first is None else (config.first,)
    inner = config.layers - len(first)
    if inner < 1:
        raise OptionError(f"layers={config.layers}, allowed: >= {len(first) + 1}, the first is {config.first!r}")
    entries = [Entry(name, (*first, *[name] * inner)) for name in dict.fromkeys(mixers)]
    for ratio in dict.fromkeys(ratios):
        if ratio < 1:
            raise OptionError(f"ratios: {ratio}, allowed: >= 1, layers of the mixer for one of full attention")
        if ratio >= inner:
            raise OptionError(
                f"ratios: {ratio} in stacks of {config.layers} layers, allowed: layers >= {len(first) + ratio + 1} for "
                f"it (set layers), or {f'ratios up to {inner - 1}' if inner > 1 else 'no ratios'}"
            )
        entries += [_hybrid(each.name, ratio, first, inner, config) for each in entries if _mixes(each, config)]
    for entry in entries:
        _check(entry, config)
    return entries


def _mixes(entry: Entry, config: StudyConfig) -> bool:
    return entry.ratio is None and entry.name != config.full


def _hybrid(mixer: str, ratio: int, first: tuple[str, ...], inner: int, config: StudyConfig) -> Entry:
    stack = [config.full if n % (ratio + 1) == ratio else mixer for n in range(inner)]
    return Entry(f"{mixer} {ratio}:1", (*first, *stack), ratio)


def _check(entry: Entry, config: StudyConfig) -> None:
    made = model_config(entry.mixers, config, max(config.vocab, config.length))
    with torch.device("meta"):
        for n, spec in enumerate(entry.mixers):
            if not made.make_mixer(n).causal:
                raise OptionError(f"the mixer {spec!r} is not causal, allowed in a study: {', '.join(causal_mixers())}")


def run_study(
    mixers: Sequence[str],
    task: str = "mqar",
    *,
    ratios: Sequence[int] = (),
    rates: Sequence[float] = RATES,
    out: str | os.PathLike[str] = "foveate-study",
    workers: int = 1,
    minutes: float | None = None,
    progress: bool = True,
    **settings: Any,
) -> Study:
    """Train every mixer, and its hybrids, at every learning rate.

    Args:
        mixers: specs ("gla", "softmax:window=64").    task: "mqar" (recall) or "language".
        ratios: hybrids to add: layers of the mixer for one of full attention.
        rates: peak learning rates; all stacks are trained at the first, then at the second, and so on. One that
            reached `stop_at` is not trained again.
        out: folder; cells are kept in out/cells and reused by equal settings. Failed ones are tried again.
        workers: processes that share the device; 1 trains in this one. Times are of a shared device then.
        minutes: when to stop; what is unfinished then is missing in the results, and a rerun goes on.
        settings: options of StudyConfig (length, pairs, steps, dim, layers, device, ...).
    Raises:
        UnknownNameError, OptionError before any work, DataError for text that cannot be used; ResultsError when a cell
        cannot be written. A mixer that fails in training has a row with `error`, and the others go on.
    """
    check_names("a study", settings, options_of(StudyConfig))
    config = StudyConfig(task=task, **settings)
    entries = make_entries(mixers, ratios, config)
    _check_run(rates, workers, minutes)
    if task == "language":
        # Text that cannot be read is an error now, not in every cell.
        study_data(config)
    started = time.perf_counter()
    job = Job(config, tuple(entries), tuple(rates), Path(out), None if minutes is None else time.time() + 60 * minutes)
    store = job.store()
    forget_failures(job, store)
    with showing(progress, job.pending(store)) as bar:
        notes = work_alone(job, store, bar) if workers == 1 else work_together(job, store, bar, workers)
    notes += [f"the damaged cell {name} was trained again" for name in sorted(set(store.damaged))]
    environment = {
        "device": device_name(torch.device(config.device)),
        "versions": versions(),
        "command": command_line(),
        "threads": torch.get_num_threads(),
        "workers": workers,
        "date": now(),
        "loadavg": load_average(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return _collected(job, store, environment, notes)


def study_command(
    mixers: Sequence[str] = (),
    *,
    task: str = "mqar",
    ratios: Sequence[int] = (),
    rates: Sequence[float] = (),
    text: Sequence[str] = (),
    out: Path = Path("foveate-study"),
    workers: int = 1,
    minutes: float | None = None,
    device: str = "auto",
    settings: Sequence[str] = (),
) -> Study:
    """What `foveate study` does: train, and write study.json and study.html into `out`.

    mixers: specs; none: SHOWN.    rates: none: RATES.    device: "auto", "cpu" or "cuda".    settings: other options of
    StudyConfig as "name=value". Raises what `run_study` raises, and MissingPackageError without plotly.
    """
    given = parse_spec(f"study:{','.join(settings)}")[1]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if text:
        given["text"] = tuple(text)
    study = run_study(
        mixers or SHOWN,
        task,
        ratios=ratios,
        rates=rates or RATES,
        out=out,
        workers=workers,
        minutes=minutes,
        **{**given, "device": device},
    )
    study.save()
    return study


def _check_run(rates: Sequence[float], workers: int, minutes: float | None) -> None:
    if not rates or not all(0 < each < 1 for each in rates):
        raise OptionError(f"rates={list(rates)}, allowed: at least one, each above 0 and below 1")
    if workers < 1:
        raise OptionError(f"workers={workers}, allowed: >= 1")
    if minutes is not None and minutes <= 0:
        raise OptionError(f"minutes={minutes}, allowed: > 0, or None")


def _collected(job: Job, store: CellStore, environment: dict[str, Any], notes: list[str]) -> Study:
    rows, missing, best = [], [], []
    for entry in job.entries:
        found = {rate: store.load(job.key(entry, rate)) for rate in job.rates}
        own = [cell for cell in found.values() if cell is not None]
        reached = any(cell.get("reached_at") for cell in own)
        reason = "not needed: another rate reached stop_at" if reached else "not trained yet"
        missing += [{"entry": entry.name, "rate": rate, "why": reason} for rate in found if found[rate] is None]
        rows += own
        if own:
            best.append(min(own, key=_rank))
    settings = plain({**dataclasses.asdict(job.config), "rates": job.rates})
    return Study(environment, settings, sorted(best, key=_rank), rows, missing, notes, job.out)


def _rank(cell: dict[str, Any]) -> tuple[bool, float, float]:
    """Smaller is better: what finished first, then the accuracy of recall, or the loss on text."""
    if cell["status"] != "finished":
        return True, 0.0, 0.0
    return False, 0.0 if cell["perplexity"] is not None else -cell["accuracy"], cell["loss"]
