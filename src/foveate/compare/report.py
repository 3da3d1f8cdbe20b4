"""The HTML report: one file that opens from disk and asks the network for nothing.

The page, its style and its script are in assets/; the data are embedded as JSON and drawn with plotly.js.
"""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

from foveate.compare.files import plain
from foveate.errors import MissingPackageError


def report_html(results: dict[str, Any]) -> str:
    """The page for results in the schema of docs/results-schema.md; needs the package plotly for its plotly.js."""
    parts = {
        "title": html.escape(f"foveate: {results['model']['name']}"),
        "css": _asset("report.css"),
        "data": _script_safe(json.dumps(plain(results), ensure_ascii=False, allow_nan=False, separators=(",", ":"))),
        "plotly": _plotly_js(),
        "js": _asset("report_data.js") + _asset("report_charts.js") + _asset("report.js"),
    }
    # Piece by piece, so that nothing in the data can be taken for a placeholder.
    pieces = _asset("report.html").split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)


def _asset(name: str) -> str:
    return resources.files("foveate.compare").joinpath("assets", name).read_text(encoding="utf-8")


def _script_safe(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingPackageError("plotly", "the HTML report", "pip install 'foveate[report]'") from error
    return get_plotlyjs()
