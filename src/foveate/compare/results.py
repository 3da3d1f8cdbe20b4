"""A finished comparison: what `compare` returns, and what results.json holds (docs/results-schema.md)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.compare.files import document, write_atomic
from foveate.errors import ResultsError

SCHEMA_VERSION = 1
_PARTS = ("schema_version", "environment", "model", "settings", "rows", "break_even")


@dataclass(frozen=True)
class Comparison:
    """Methods against the dense model.

    rows: one dict per method, task and length, the fields of docs/results-schema.md; the dense model's own first.
    break_even: one dict per method: below or above which prompt length the dense model is faster.
    notes: what a reader should know about this run: reused and damaged cells, refusals.
    out: the folder that `save` writes to.
    """

    environment: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    break_even: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    out: Path = Path("foveate-report")

    def as_dict(self) -> dict[str, Any]:
        """Plain data in the documented schema."""
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": self.environment,
            "model": self.model,
            "settings": self.settings,
            "break_even": self.break_even,
            "rows": self.rows,
        }

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write results.json in one step; raises ResultsError when it cannot be written."""
        return write_atomic(Path(path), document(self.as_dict()))

    def report(self, path: str | os.PathLike[str] = "report.html") -> Path:
        """Write the HTML report, one file that needs no network; needs the package plotly."""
        from foveate.compare.report import report_html

        return write_atomic(Path(path), report_html(self.as_dict()))

    def save(self) -> Path:
        """Write results.json and report.html into `out`, and return that folder."""
        self.to_json(self.out / "results.json")
        self.report(self.out / "report.html")
        return self.out

    def table(self) -> Any:
        """A rich Table for the console: dense first."""
        from foveate.compare.table import comparison_table

        return comparison_table(self.rows, self.break_even)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """A comparison from its results.json, to print or report it again."""
        place = Path(path)
        try:
            data = json.loads(place.read_text(encoding="utf-8"))
        except OSError as error:
            raise ResultsError(f"{place} cannot be read ({error.strerror}); name a results.json") from error
        except ValueError as error:
            raise ResultsError(
                f"{place} is damaged ({error}); run the comparison again, it reuses its cells"
            ) from error
        missing = [part for part in _PARTS if part not in data] if isinstance(data, dict) else list(_PARTS)
        if missing:
            raise ResultsError(f"{place} is no results.json: it lacks {', '.join(missing)}")
        if data["schema_version"] != SCHEMA_VERSION:
            raise ResultsError(
                f"{place} has schema version {data['schema_version']}, this foveate reads {SCHEMA_VERSION}; "
                "run the comparison again"
            )
        return cls(
            data["environment"], data["model"], data["settings"], data["rows"], data["break_even"], [], place.parent
        )
