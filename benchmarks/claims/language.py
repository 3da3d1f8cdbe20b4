"""What the claims about mixers of language share: small models trained by `foveate.lm.train`, and decoding.

Text is Python's own manual, read as bytes; recall is Zoology's MQAR. Nothing is downloaded.

Every script takes --device, --steps, --dim, --length, --layers, --batch, --seed and --out.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from claim import parser

from foveate.lm.train import TrainResult, train
from foveate.lm.train_config import DataConfig, RunConfig, TrainConfig
from foveate.mixers.base import create_mixer


def options(
    doc: str | None, *, steps: int = 400, dim: int = 128, length: int = 512, layers: int = 4
) -> argparse.ArgumentParser:
    sizes = {"steps": steps, "dim": dim, "length": length, "layers": layers, "batch": 16, "seed": 0}
    return parser(doc, devices=("cpu", "cuda"), **sizes)


def arguments(doc: str | None, **sizes: int) -> argparse.Namespace:
    return options(doc, **sizes).parse_args()


def on_text(mixers: Sequence[str], given: argparse.Namespace, **run: Any) -> dict[str, Any]:
    """Train on the manual; perplexity per byte on the part held out (None where the loss is not finite)."""
    data = DataConfig(text=("manual",), length=given.length, held_out=0.03)
    result, seconds = _trained(mixers, data, given, run)
    loss = result.metrics["text"]["loss"]
    perplexity = round(result.metrics["text"]["perplexity"], 4) if math.isfinite(loss) else None
    return _row(mixers, result, seconds, perplexity=perplexity)


def on_task(
    mixers: Sequence[str], task: str, given: argparse.Namespace, *, options: dict[str, Any], **run: Any
) -> dict[str, Any]:
    """Train on a synthetic task; the share of test answers that are right."""
    size = {"train": given.batch * given.steps, "test": 256}
    data = DataConfig(task=task, task_options=options, length=given.length, **size)
    result, seconds = _trained(mixers, data, given, run)
    return _row(mixers, result, seconds, task=task, accuracy=round(result.metrics[task]["accuracy"], 4))


def _trained(
    mixers: Sequence[str], data: DataConfig, given: argparse.Namespace, run: dict[str, Any]
) -> tuple[TrainResult, float]:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "steps": given.steps,
            "batch": given.batch,
            "warmup": max(1, given.steps // 10),
            "evaluate_every": given.steps,
            "save_every": given.steps,
            "log_every": max(1, given.steps // 4),
            "device": "cpu" if given.device == "cpu" else "auto",
            "seed": given.seed,
            **run,
        }
        model = {"mixers": list(mixers), "dim": given.dim, "heads": 4, "mlp_multiple": 32}
        result = train(TrainConfig(model=model, data=data, run=RunConfig(output=f"{folder}/run", **settings)))
    return result, time.perf_counter() - started


def _row(mixers: Sequence[str], result: TrainResult, seconds: float, **measured: Any) -> dict[str, Any]:
    shared = {"parameters": result.parameters, "state_bytes": result.state_bytes, "seconds": round(seconds, 1)}
    row = {"mixers": list(mixers), **measured, **shared}
    print(row, flush=True)
    return row


@torch.no_grad()
def decoding(specs: Sequence[str], lengths: Sequence[int], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Median seconds of a token after so many, and bytes of the state, of one layer in float32."""
    rows = []
    for spec in specs:
        mixer = create_mixer(spec, dim=1024, heads=16).to(given.device).eval()
        for length in lengths:
            _, state = mixer(torch.randn(1, length, 1024, device=given.device))
            stored, token, times = state.bytes(), torch.randn(1, 1, 1024, device=given.device), []
            for _ in range(15):
                _wait(given)
                started = time.perf_counter()
                mixer(token, state=state)
                _wait(given)
                times.append(time.perf_counter() - started)
            median = sorted(times[5:])[5]
            rows.append({"mixer": spec, "tokens": length, "seconds": round(median, 6), "state_bytes": stored})
            print(rows[-1], flush=True)
    return rows


def _wait(given: argparse.Namespace) -> None:
    if given.device == "cuda":
        torch.cuda.synchronize()
