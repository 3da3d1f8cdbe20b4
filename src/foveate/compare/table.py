"""The console tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from foveate.compare.subject import DENSE

Row = Mapping[str, Any]
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def comparison_table(rows: Sequence[Row], break_even: Sequence[Mapping[str, Any]]) -> Table:
    """Dense first, then the methods: a score (or perplexity) per task, speed against dense, bytes, density.

    Speed-ups are the dense model's time over the method's (above 1: the method is faster), the median over the tasks
    of a length; bytes and densities are means over them.
    """
    tasks, lengths = _unique(rows, "task"), _unique(rows, "length")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=_caption(rows, break_even), caption_justify="left")
    table.add_column("method", overflow="fold", min_width=12)
    if len(lengths) > 1:
        table.add_column("length", justify="right")
    for task in tasks:
        perplexity = any(row["perplexity"] is not None for row in rows if row["task"] == task)
        table.add_column(f"{task}\n(perplexity)" if perplexity else task, justify="right", overflow="fold")
    for name in ("first token\nspeed-up", "decode\nspeed-up", "cache", "cache\n/ dense", "density"):
        table.add_column(name, justify="right", no_wrap=True)
    for length in lengths:
        at_length = [row for row in rows if row["length"] == length]
        for method in _unique(at_length, "method"):
            own = [row for row in at_length if row["method"] == method]
            cells = [Text(method, style="bold" if method == DENSE else "")]
            cells += [Text(f"{length:,}")] if len(lengths) > 1 else []
            table.add_row(*cells, *_scores(own, tasks), *_costs(own))
        table.add_section()
    return table


def _scores(own: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    by_task = {row["task"]: row for row in own}
    shown = []
    for task in tasks:
        row = by_task.get(task, {})
        if row.get("error"):
            shown.append("refused")
        elif row.get("perplexity") is not None:
            shown.append(f"{row['perplexity']:.2f}")
        else:
            shown.append("-" if row.get("score") is None else f"{row['score']:.2f}")
    return shown


def _costs(own: Sequence[Row]) -> list[str]:
    first = ratio(own, "dense_ttft_s", "ttft_s")
    decode = ratio(own, "decode_tokens_per_s", "dense_decode_tokens_per_s")
    share = ratio(own, "cache_bytes", "dense_cache_bytes")
    density = _mean(row["density"] for row in own)
    return [
        _number(first, "{:.2f} x"),
        _number(decode, "{:.2f} x"),
        size(_mean(row["cache_bytes"] for row in own)),
        _number(share, "{:.2f}"),
        _number(density, "{:.3f}"),
    ]


def ratio(rows: Iterable[Row], above: str, below: str) -> float | None:
    """The median over rows of one figure over another."""
    found = [row[above] / row[below] for row in rows if row.get(above) is not None and row.get(below)]
    return median(found) if found else None


def size(count: float | None) -> str:
    """Bytes in the unit that fits: 12.3 MiB."""
    if count is None:
        return "-"
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} {_UNITS[power]}" if power == 0 else f"{count:.1f} {_UNITS[power]}"


def _caption(rows: Sequence[Row], break_even: Sequence[Mapping[str, Any]]) -> Text | None:
    lines = []
    told = [each for each in break_even if each["verdict"] != "unknown"]
    if told:
        lines.append(f"Break-even (prompt and {told[0]['generated']} generated tokens):")
        lines += [f"  {each['method']}: {each['text']}" for each in told]
    refusals = {(row["method"], row["error"]): None for row in rows if row["error"]}
    lines += [f"{method} refused: {error}" for method, error in refusals]
    return Text("\n".join(lines)) if lines else None


def _unique(rows: Iterable[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [each for each in values if each is not None]
    return fmean(known) if known else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def bench_table(rows: Sequence[Row], break_even: Sequence[Mapping[str, Any]]) -> Table:
    """Seconds and speeds of the microbenchmark, per length and method."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=_caption((), break_even), caption_justify="left")
    table.add_column("method", overflow="fold", min_width=12)
    for name in ("length", "first token", "speed-up", "decode", "speed-up", "cache", "cache\n/ dense", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(row["method"], style="bold" if row["method"] == DENSE else ""),
            f"{row['length']:,}",
            _number(row["ttft_s"], "{:.2f} s"),
            _number(ratio([row], "dense_ttft_s", "ttft_s"), "{:.2f} x"),
            _number(row["decode_tokens_per_s"], "{:.1f} tok/s"),
            _number(ratio([row], "decode_tokens_per_s", "dense_decode_tokens_per_s"), "{:.2f} x"),
            size(row["cache_bytes"]),
            _number(ratio([row], "cache_bytes", "dense_cache_bytes"), "{:.2f}"),
            size(row["peak_bytes"]),
            end_section=row is rows[-1] or rows[rows.index(row) + 1]["length"] != row["length"],
        )
    return table
