"""What the claims about feature maps share: small language models of bytes trained from scratch.

Every script takes --device, --text, numbers of its own, and --out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

from claim import parser

from foveate.lm.train import train
from foveate.lm.train_config import TrainConfig


def arguments(doc: str | None, **numbers: Any) -> argparse.Namespace:
    """An option for each number, and --text."""
    made = parser(doc, **numbers)
    made.add_argument("--text", default="manual", help="a text file; default: Python's manual")
    return made.parse_args()


def byte_lm(mixer: str, given: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss in nats per byte of a model of one mixer, after given.steps."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.from_dict(
            {
                "model": {"mixers": [mixer] * given.layers, "dim": given.dim, "heads": 4, "mlp_multiple": 32},
                "data": {"text": [given.text], "length": given.length},
                "run": {
                    "output": f"{folder}/run",
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
