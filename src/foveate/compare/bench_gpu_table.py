"""The console tables of `foveate bench gpu`: one per case, the strongest baseline first, missed targets marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from foveate.compare.bench_gpu import Row


def tables(rows: Sequence[Row], absent: Sequence[str], stopped: str | None) -> Group:
    parts: list[RenderableType] = []
    for case in dict.fromkeys((row.part, row.case) for row in rows):
        parts += [_table([row for row in rows if (row.part, row.case) == case]), Text("")]
    told = [Text(f"not measured: {line}") for line in absent]
    if any(row.target_us is not None or row.target_speedup is not None for row in rows):
        told.append(Text("Targets were set for one NVIDIA H200. A speed-up is over the strongest baseline."))
    if stopped is not None:
        told.append(Text(f"stopped early: {stopped}", style="bold red"))
    return Group(*parts, *told)


def _table(rows: Sequence[Row]) -> Table:
    failures = [Text(f"{row.name}: {row.failed}") for row in rows if row.failed is not None]
    caption = Text("\n").join(failures) if failures else None
    table = Table(
        title=f"{rows[0].part}: {rows[0].case}", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
        pad_edge=False, padding=(0, 1), caption=caption, caption_justify="left",
    )  # fmt: skip
    table.add_column("", overflow="fold", min_width=12)
    for name in ("median", "20 to 80 %", "error", "target", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in ordered(rows):
        table.add_row(
            Text(row.name),
            "failed" if row.us is None else duration(row.us),
            "" if row.us20 is None or row.us80 is None else f"{duration(row.us20)} {duration(row.us80)}",
            _error(row),
            _target(row),
            "" if row.speedup is None else f"{row.speedup:.2f}x",
            style="bold" if row.strongest else "",
        )
    return table


def ordered(rows: Sequence[Row]) -> list[Row]:
    """The strongest baseline, the other baselines by their times, those that failed, ours as measured."""
    baselines = sorted(
        (row for row in rows if row.baseline), key=lambda row: (not row.counts, row.us if row.us is not None else 0.0)
    )
    return baselines + [row for row in rows if not row.baseline]


def duration(microseconds: float) -> str:
    """Three digits or more."""
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if microseconds >= size:
            return f"{microseconds / size:.2f} {unit}"
    return f"{microseconds:.1f} us"


def _error(row: Row) -> Text:
    if row.error is None:
        return Text("-")
    wrong = row.us is not None and row.failed is not None
    return Text(f"{row.error:.1e} wrong" if wrong else f"{row.error:.1e}", style="red" if wrong else "")


def _target(row: Row) -> Text:
    if row.target_us is not None:
        wanted = duration(row.target_us)
    elif row.target_speedup is not None:
        wanted = f"{row.target_speedup:.2f}x"
    else:
        return Text("")
    if row.met is None:
        return Text(f"{wanted} ?")
    return Text(f"{wanted} met", style="green") if row.met else Text(f"{wanted} missed", style="bold red")
