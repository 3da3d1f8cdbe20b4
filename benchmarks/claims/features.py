"""What the claims about feature maps share: small language models of bytes trained from scratch, and the result file.

Every script takes --device and --out and writes benchmarks/results/claims/<system>.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from foveate.compare.environment import device_name, now, versions
from foveate.lm.train import train
from foveate.lm.train_config import TrainConfig

RESULTS = Path(__file__).parents[1] / "results" / "claims"


def arguments(doc: str | None, name: str, **numbers: int) -> argparse.Namespace:
    """--device, --out, --text, and an option for each number with its default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--text", default="manual", help="a text file; default: Python's manual")
    for option, default in numbers.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=default)
    given = parser.parse_args()
    given.out = given.out / f"{name}.json"
    return given


def byte_lm(mixer: str, given: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss in nats per byte of a model of one mixer, after given.steps."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.from_dict(
            {
                "model": {"mixers": [mixer] * given.layers, "dim": given.dim, "heads": 4, "mlp_multiple": 32},
                "data": {"text": [given.text], "length": given.length},
                "run": {
                    "output": str(Path(folder) / "run"),
                    "steps": given.steps,
                    "batch": given.batch,
                    "warmup": max(1, given.steps // 20),
                    "device": "cpu" if given.device == "cpu" else "auto",
                    "evaluate_every": given.steps,
                    "save_every": given.steps,
                    "log_every": max(1, given.steps // 10),
                },
            }
        )
        started = time.perf_counter()
        logged: list[dict[str, Any]] = []
        result = train(config, logged.append)
    row = {
        "mixer": mixer,
        "loss": result.metrics["text"]["loss"],
        "training_losses": [each["loss"] for each in logged if "loss" in each],
        "parameters": result.parameters,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(row, flush=True)
    return row


def record(claim: str, given: argparse.Namespace, started: float, **rows: Any) -> None:
    """Write what came out, with what it was made on."""
    made = {
        "claim": claim,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()},
        "environment": {"device": device_name(torch.device(given.device)), "versions": versions(), "date": now()},
        "seconds": round(time.perf_counter() - started, 1),
        **rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(made, indent=2) + "\n")
    print(given.out)
