"""Time to first token, decoding and bytes of methods against the stock model, interleaved in one run.

Machines are noisy: every round times the stock model and every method once, and what is reported are medians over
rounds and ratios within the run.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from foveate.compare.environment import command_line, device_name, load_average, now, versions
from foveate.compare.files import write_atomic
from foveate.hf import apply
from foveate.hf.compat import cache_keyword, new_dynamic_cache
from foveate.hf.modules import text_config


@dataclass
class Timing:
    """One method: medians over rounds. Ratios are against the stock model of the same run."""

    method: str
    ttft_s: float
    decode_s_per_token: float
    cache_bytes: int
    ttft_ratio: float = 1.0
    decode_speedup: float = 1.0
    decode_speedup_over_full: float | None = None
    bytes_ratio_to_full: float | None = None


@dataclass
class Bench:
    """A benchmark's rows and what it ran on."""

    length: int
    environment: dict[str, Any]
    rows: list[Timing] = field(default_factory=list)

    def table(self) -> Any:
        from rich.table import Table

        table = Table(
            title=f"{self.length} tokens, {self.environment['dtype']}, {self.environment['device']}", box=None
        )
        for column in ("method", "first token s", "x stock", "ms/token", "speed-up", "cache MiB"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in self.rows:
            table.add_row(
                row.method,
                f"{row.ttft_s:.2f}",
                f"{row.ttft_ratio:.2f}",
                f"{row.decode_s_per_token * 1e3:.1f}",
                f"{row.decode_speedup:.2f}",
                f"{row.cache_bytes / 2**20:.1f}",
            )
        return table

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write atomically."""
        data = {"length": self.length, "environment": self.environment, "rows": [asdict(row) for row in self.rows]}
        write_atomic(Path(path), json.dumps(data, indent=2) + "\n")


def bench(
    model: Any, *, methods: list[str], length: int = 8192, rounds: int = 3, tokens: int = 8, progress: bool = True
) -> Bench:
    """Time `methods` and the stock model on a random prompt of `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, text_config(model).vocab_size, (1, length), generator=generator).to(model.device)
    names = ["stock", *methods]
    samples: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("timing", total=rounds * len(names))
        for _ in range(rounds):
            for name in names:
                samples[name].append(
                    _stock(model, ids, tokens) if name == "stock" else _method(model, name, ids, tokens)
                )
                bar.advance(task)
    result = Bench(length, environment(model, rounds))
    for name in names:
        first, decode, size = zip(*samples[name])
        result.rows.append(Timing(name, statistics.median(first), statistics.median(decode), size[-1]))
    _ratios(result.rows)
    return result


def _ratios(rows: list[Timing]) -> None:
    stock = rows[0]
    full = next((row for row in rows if row.method == "full"), None)
    for row in rows:
        row.ttft_ratio = row.ttft_s / stock.ttft_s
        row.decode_speedup = stock.decode_s_per_token / row.decode_s_per_token
        if full is not None:
            row.decode_speedup_over_full = full.decode_s_per_token / row.decode_s_per_token
            row.bytes_ratio_to_full = row.cache_bytes / full.cache_bytes


def _stock(model: Any, ids: torch.Tensor, tokens: int) -> tuple[float, float, int]:
    cache: Any = new_dynamic_cache(text_config(model))
    first, decode = _time(model, ids, cache, tokens)
    return first, decode, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _method(model: Any, method: str, ids: torch.Tensor, tokens: int) -> tuple[float, float, int]:
    with apply(model, method) as run:
        first, decode = _time(model, ids, run.new_cache(), tokens)
        return first, decode, run.stats.cache_bytes


def _time(model: Any, ids: torch.Tensor, cache: Any, tokens: int) -> tuple[float, float]:
    given = {cache_keyword(model): cache, "use_cache": True, "logits_to_keep": 1}
    with torch.inference_mode():
        begin = _now()
        token = model(ids, **given).logits[:, -1:].argmax(-1)
        first = _now() - begin
        steps = []
        for _ in range(tokens):
            begin = _now()
            token = model(token, **given).logits[:, -1:].argmax(-1)
            steps.append(_now() - begin)
    return first, statistics.median(steps)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def environment(model: Any, rounds: int) -> dict[str, Any]:
    """Device, versions, command, threads, load and date of a benchmark."""
    return {
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "loadavg": load_average(),
        "platform": platform.platform(),
        "versions": versions(),
        "command": command_line(),
        "date": now(),
    }
