"""The HTML report: one file that opens from disk and asks the network for nothing.

The page, its style and its script are in assets/; the data are embedded as JSON and drawn with plotly.js.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from foveate.compare.files import plain
from foveate.errors import MissingPackageError


def report_html(results: dict[str, Any]) -> str:
    """The page for results in the schema of docs/results-schema.md; needs the package plotly for its plotly.js."""
    parts = {
        "title": html.escape(f"foveate: {results['model']['name']}"),
        "css": asset("report.css"),
        "data": script_safe(json.dumps(plain(results), ensure_ascii=False, allow_nan=False, separators=(",", ":"))),
        "plotly": plotly_js(),
        "js": asset("report_data.js") + asset("report_charts.js") + asset("report.js"),
    }
    return fill(asset("report.html"), parts)


def fill(page: str, parts: Mapping[str, str]) -> str:
    """A page with its {{placeholders}} filled, piece by piece: nothing in the data can be taken for one."""
    first, *pieces = page.split("{{")
    return first + "".join(parts[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces))


def asset(name: str) -> str:
    return resources.files("foveate.compare").joinpath("assets", name).read_text(encoding="utf-8")


def script_safe(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingPackageError("plotly", "the HTML report", "pip install 'foveate[report]'") from error
    return get_plotlyjs()
