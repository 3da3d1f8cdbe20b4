"""What all claims share: options of the command line, and the result file."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from foveate.compare.environment import environment, model_facts
from foveate.compare.files import plain, write_atomic

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


def record(name: str, claim: str, given: argparse.Namespace, started: float, *, model: Any = None, **rows: Any) -> None:
    """Write what came out to <out>/<name>.json, with what it was made on and when; the file is whole or absent.

    started: `time.perf_counter()` at the start. model: one whose name and shape are noted.
    """
    made = {
        "claim": claim,
        "settings": {key: value for key, value in vars(given).items() if key != "out"},
        "environment": environment(torch.device(given.device)),
        **({} if model is None else {"model": model_facts(model)}),
        "seconds": round(time.perf_counter() - started, 1),
        **rows,
    }
    print(write_atomic(given.out / f"{name}.json", json.dumps(plain(made), indent=2) + "\n"))
