"""A finished study: what `run_study` returns, its table, and its page with the plot of quality against bytes of state.

The page is one file that opens from disk and asks the network for nothing; it shares style and layout with the report
of a comparison.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.compare.files import compact, document, write_atomic
from foveate.compare.report import asset, fill, plotly_js, script_safe
from foveate.errors import ResultsError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Study:
    """What came out.

    best: a row per entry, its best training.    rows: all trainings.    missing: cells without a number, and why.
    notes: what a reader should know.    out: the folder that `save` writes to.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    best: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    missing: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    out: Path = Path("foveate-study")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as study.json holds it."""
        own = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "out"}
        return {"schema_version": SCHEMA_VERSION, **own}

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the numbers in one step; raises ResultsError when they cannot be written."""
        return write_atomic(Path(path), document(self.as_dict()))

    def report(self, path: str | os.PathLike[str] = "study.html") -> Path:
        """Write the plot, one file that needs no network; needs the package plotly."""
        from foveate.compare.study_report import study_html

        return write_atomic(Path(path), study_html(self.as_dict()))

    def save(self) -> Path:
        """Write study.json and study.html into `out`, and return that folder."""
        self.to_json(self.out / "study.json")
        self.report(self.out / "study.html")
        return self.out

    def table(self) -> Any:
        """A rich Table for the console, the best entry first."""
        from foveate.compare.study_report import study_table

        return study_table(self.best)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Study:
        """A study from its JSON; raises ResultsError for a file that is none."""
        place = Path(path)
        try:
            data = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ResultsError(f"{place} cannot be read as a study ({error}); name a study.json") from error
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            raise ResultsError(f"{place} is no study of schema version {SCHEMA_VERSION}; run the study again")
        return cls(**{name: each for name, each in data.items() if name != "schema_version"}, out=place.parent)


def study_table(best: Sequence[Mapping[str, Any]]) -> Any:
    """A rich Table of the best training of each stack, in the order given."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    text = any(row.get("perplexity") is not None for row in best)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("stack", overflow="fold", min_width=8)
    for name in ("perplexity" if text else "accuracy", "state bytes", "parameters", "rate", "steps", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in best:
        if row["status"] != "finished":
            table.add_row(Text(row["entry"]), row["status"], "", "", f"{row['rate']:.3g}")
            continue
        score = f"{row['perplexity']:.3f}" if text else f"{row['accuracy']:.3f}"
        sizes = (f"{row['state_bytes']:,}", f"{row['parameters']:,}")
        table.add_row(
            Text(row["entry"]), score, *sizes, f"{row['rate']:.3g}", str(row["steps"]), f"{row['seconds']:.0f}"
        )
    return table


def study_html(study: Mapping[str, Any]) -> str:
    """The page of a study's plain data; needs the package plotly for its plotly.js."""
    parts = {
        "title": f"foveate study: {study['settings']['task']}",
        "css": asset("report.css"),
        "data": script_safe(compact(dict(study))),
        "plotly": plotly_js(),
        "js": asset("report_charts.js") + asset("study.js"),
    }
    return fill(asset("study.html"), parts)
