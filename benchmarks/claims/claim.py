"""What all claims share: options of the command line, and the result file."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from foveate.compare.environment import environment, model_facts
from foveate.compare.files import plain, write_atomic

# What does not change a row.
APART = ("out", "only", "workers")
RESULTS = Path(__file__).parents[1] / "results" / "claims"


def parser(doc: str | None, *, devices: Sequence[str] | None = None, **defaults: Any) -> argparse.ArgumentParser:
    """--device (of `devices`; default: a GPU if there is one), an option for each default, of its type, and --out."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = defaults.pop("device", "cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--device", default=device, choices=devices)
    for name, default in defaults.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    made.add_argument("--out", type=Path, default=RESULTS, help="the folder that <system>.json is written to")
    return made


def earlier(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """What `record` wrote to <out>/<name>.json under the same settings (but for `APART`) on the same kind of device;
    {} without such a file. A script that skips the rows it finds there goes on where it was stopped."""
    path = given.out / f"{name}.json"
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    now = json.loads(json.dumps(plain(_settings(given))))
    then = {key: value for key, value in found["settings"].items() if key not in APART}
    device = environment(torch.device(given.device))["device"]
    return found if then == now and found["environment"]["device"] == device else {}


def _said(given: argparse.Namespace) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in _said(given).items() if key not in APART}


def each_done(work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """work(*job) of every job as it is finished, by so many processes that share the device."""
    if workers == 1:
        for job in jobs:
            yield work(*job)
        return
    context = multiprocessing.get_context("spawn")
    # A tiny model's work is in launching, and the workers share the cores.
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        for each in as_completed([pool.submit(work, *job) for job in jobs]):
            yield each.result()


def in_order(rows: list[dict[str, Any]], key: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows sorted as `values` lists what stands under `key`; others first."""
    places = {str(value): place for place, value in enumerate(values)}
    return sorted(rows, key=lambda row: places.get(str(row[key]), -1))


def record(name: str, claim: str, given: argparse.Namespace, started: float, *, model: Any = None, **rows: Any) -> None:
    """Write what came out to <out>/<name>.json, with what it was made on and when; the file is whole or absent.

    started: `time.perf_counter()` at the start. model: one whose name and shape are noted.
    """
    made = {
        "claim": claim,
        "settings": {key: value for key, value in _said(given).items() if key != "out"},
        "environment": environment(torch.device(given.device)),
        **({} if model is None else {"model": model_facts(model)}),
        "seconds": round(time.perf_counter() - started, 1),
        **rows,
    }
    print(write_atomic(given.out / f"{name}.json", json.dumps(plain(made), indent=2) + "\n"))
