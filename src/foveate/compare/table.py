"""The console tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    of a length; bytes, densities and recall are means over them. Bytes in host memory and recall have a column where
    some method has them.
    """
    tasks, lengths = _unique(rows, "task"), _unique(rows, "length")
    table = _table(_caption(rows, break_even))
    for task in tasks:
        perplexity = any(row["perplexity"] is not None for row in rows if row["task"] == task)
        table.add_column(_heading(task, perplexity), justify="right", no_wrap=True)
    power = _power(max((row["cache_bytes"] or 0 for row in rows), default=0))
    costs = [each for each in _COSTS if not each.rare or any(row.get(each.rare) is not None for row in rows)]
    for each in costs:
        table.add_column(each.heading.format(unit=_UNITS[power]), justify="right", no_wrap=True)
    for length in lengths:
        at_length = [row for row in rows if row["length"] == length]
        if len(lengths) > 1:
            table.add_row(Text(f"{length:,} tokens", style="italic"))
        for method in _unique(at_length, "method"):
            own = [row for row in at_length if row["method"] == method]
            table.add_row(
                Text(method), *_scores(own, tasks), *(each.shown(own, power) for each in costs), style=_style(method)
            )
        table.add_section()
    return table


def _table(caption: Text | None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0, caption=caption, caption_justify="left"
    )
    table.add_column("\nmethod", overflow="fold", min_width=6)
    return table


def _style(method: str) -> str:
    return "bold" if method == DENSE else ""


def _heading(task: str, perplexity: bool) -> str:
    """A task's name in two short lines: options and "perplexity" below, a long name broken at its dash."""
    name, _, options = task.partition(":")
    below = "(perplexity)" if perplexity and name != "perplexity" else options
    if not below and name == "perplexity":
        return "perplex-\nity"
    if not below and "-" in name:
        name, below = name.split("-", 1)
        name += "-"
    return f"{name}\n{below}" if below else f"\n{name}"


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


def ratio(rows: Iterable[Row], above: str, below: str) -> float | None:
    """The median over rows of one figure over another."""
    found = [row[above] / row[below] for row in rows if row.get(above) is not None and row.get(below)]
    return median(found) if found else None


@dataclass(frozen=True)
class _Cost:
    """A column after the scores. shown: its text, from a method's rows and the power of 1024 of the unit.

    rare: the field of rows without which it is left out, None: never.
    """

    heading: str
    shown: Callable[[Sequence[Row], int], str]
    rare: str | None = None


def _speedup(above: str, below: str) -> Callable[[Sequence[Row], int], str]:
    return lambda own, power: _number(ratio(own, above, below), "{:.2f}x")


def _share(above: str, below: str) -> Callable[[Sequence[Row], int], str]:
    return lambda own, power: _number(ratio(own, above, below), "{:.2f}")


def _bytes(name: str) -> Callable[[Sequence[Row], int], str]:
    return lambda own, power: _number(_mean(row.get(name) for row in own), "{:.1f}", 1024**power)


def _part(name: str) -> Callable[[Sequence[Row], int], str]:
    return lambda own, power: _number(_mean(row.get(name) for row in own), "{:.3f}")


def _power(count: float) -> int:
    """The unit that fits: 2 for MiB."""
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return power


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


def _number(value: float | None, form: str, unit: int = 1) -> str:
    return "-" if value is None else form.format(value / unit)


_COSTS = (
    _Cost("first\ntoken", _speedup("dense_ttft_s", "ttft_s")),
    _Cost("\ndecode", _speedup("decode_tokens_per_s", "dense_decode_tokens_per_s")),
    _Cost("cache\n{unit}", _bytes("cache_bytes")),
    _Cost("host\n{unit}", _bytes("host_bytes"), rare="host_bytes"),
    _Cost("of\ndense", _share("cache_bytes", "dense_cache_bytes")),
    _Cost("\ndensity", _part("density")),
    _Cost("re-\ncall", _part("recall"), rare="recall"),
)
