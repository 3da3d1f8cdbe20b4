"""The report: one file that opens from disk in a real browser, on a desk and on a phone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foveate.compare.report import report_html
from foveate.errors import MissingPackageError
from tests.compare.made_up import METHODS, made_up

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
CHARTS = ("bytes", "speed", "length", "depth", "kept", "heads")
REFUSED = "adakv:budget=512"


def test_the_data_survive_and_cannot_end_their_element() -> None:
    results = made_up(layers=2, lengths=(512,), refused=REFUSED)
    page = report_html(results)
    embedded = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert embedded is not None
    assert json.loads(embedded[1]) == results
    assert "Tiny</script>" not in page
    assert "{{" not in page.split('<script id="data"')[0]


def test_the_name_in_the_title_is_escaped() -> None:
    results = made_up(layers=1, lengths=(512,))
    results["model"]["name"] = "<i>{{data}}</i>"
    assert "<title>foveate: &lt;i&gt;{{data}}&lt;/i&gt;</title>" in report_html(results)


def test_without_plotly_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(MissingPackageError, match=r"plotly.*pip install 'foveate\[report\]'"):
        report_html(made_up(layers=1, lengths=(512,)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not Path(CHROMIUM).exists():
        pytest.skip("there is no chromium here (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    made = {
        "several lengths": made_up(layers=6, lengths=(1024, 2048)),
        "one length": made_up(layers=6, lengths=(2048,), refused=REFUSED),
    }
    for name, results in made.items():
        (folder / f"{name}.html").write_text(report_html(results), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


class Opened:
    """A page and everything that went wrong on it."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("console", lambda message: self.problems.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", self._request)
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#chart-heads .main-svg")

    def _request(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.problems.append(f"asked the network for {request.url}")

    def hover(self, chart: str, place: int = 0) -> str:
        """Hover over the place-th marker of a chart and read what appears."""
        marker = self.page.locator(f"#chart-{chart} .scatterlayer .point").nth(place)
        marker.scroll_into_view_if_needed()
        box = marker.bounding_box()
        return self.hover_at(chart, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def hover_middle(self, chart: str, across: float = 0.5, down: float = 0.5) -> str:
        plot = self.page.locator(f"#chart-{chart} .nsewdrag").first
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        return self.hover_at(chart, box["x"] + box["width"] * across, box["y"] + box["height"] * down)

    def hover_at(self, chart: str, x: float, y: float) -> str:
        self.page.mouse.move(x - 3, y)
        self.page.mouse.move(x, y)
        shown = self.page.locator(f"#chart-{chart} .hoverlayer .hovertext").first
        shown.wait_for(timeout=5000)
        return shown.text_content()

    def close(self) -> None:
        self.context.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["several lengths", "one length"])
def test_it_opens_without_errors_and_fits(
    browser: Any, reports: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    opened = Opened(browser, reports[name], width, scheme)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for chart in CHARTS:
        assert page.locator(f"#chart-{chart} .main-svg").count() >= 1, chart
        box = page.locator(f"#chart-{chart} .main-svg").first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    assert page.locator("h1").inner_text() == "smollm2-135m-instruct: 6 methods against dense attention"
    small = page.evaluate(
        "[...document.querySelectorAll('p, td, th, dd, dt, label, button, svg text')]"
        ".filter(e => e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 11).length"
    )
    assert small == 0
    spilled = page.evaluate(
        "[...document.querySelectorAll('th, td, button, label, select, h1, h2')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"
    )
    assert spilled == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(16, 21, 27)")
    assert opened.problems == []
    opened.close()


@pytest.mark.browser
def test_charts_answer_to_hover(browser: Any, reports: dict[str, Path]) -> None:
    opened = Opened(browser, reports["several lengths"], 1280)
    assert "MiB (1.00× dense)" in opened.hover("bytes")
    assert "tokens/s" in opened.hover("speed", 3)
    assert "score" in opened.hover("length", 1)
    assert "depth 30 to 40 %" in opened.hover_middle("depth", across=0.35)
    assert re.search(r"layer \d+, tokens [\d,]+ to [\d,]+.*% kept", opened.hover_middle("kept", down=0.6))
    assert "KV head" in opened.hover("heads", 4)
    assert opened.problems == []
    opened.close()


@pytest.mark.browser
@pytest.mark.parametrize("name", ["several lengths", "one length"])
def test_the_dense_model_is_in_every_chart(browser: Any, reports: dict[str, Path], name: str) -> None:
    opened = Opened(browser, reports[name], 1280)
    for chart in ("bytes", "speed", "length", "kept", "heads"):
        traces = f"document.getElementById('chart-{chart}').data"
        assert opened.page.evaluate(f"{traces}.some(t => t.line && t.line.dash === 'dash')"), chart
    assert "dense" in opened.page.locator("#chart-depth").text_content()
    opened.close()


@pytest.mark.browser
def test_choices_change_what_is_drawn(browser: Any, reports: dict[str, Path]) -> None:
    opened = Opened(browser, reports["several lengths"], 390)
    page = opened.page
    drawn = "document.getElementById('chart-bytes').data.map(t => t.name)"
    assert set(page.evaluate(drawn)) == set(METHODS)
    page.get_by_role("button", name="full", exact=True).click()
    assert "full" not in page.evaluate(drawn)

    page.select_option("#task", "perplexity:target=128")
    assert "lower is better" in page.locator("#chart-bytes").text_content()
    assert "asks for nothing at one depth" in page.locator("#chart-depth").text_content()
    page.select_option("#task", "niah-single")
    assert page.locator("#chart-depth .main-svg").count() >= 1

    before = page.evaluate("document.getElementById('chart-kept').data[0].z")
    page.select_option("#head", "1")
    assert page.evaluate("document.getElementById('chart-kept').data[0].z") != before
    page.select_option("#method", "full")
    assert "drops nothing here" in page.locator("#how-kept").text_content()

    page.select_option("#length", "1024")
    seen = page.evaluate("document.getElementById('chart-heads').data[0].y[0]")
    assert seen == 1036
    assert opened.problems == []
    opened.close()


@pytest.mark.browser
def test_a_refusal_is_told_as_text(browser: Any, reports: dict[str, Path]) -> None:
    opened = Opened(browser, reports["one length"], 1280)
    told = opened.page.locator(".refused").inner_text()
    assert told == f"{REFUSED} refused: UnsupportedModelError: Tiny</script><b>Model</b> cannot be served"
    assert opened.page.locator("#rows tbody tr").count() == 3 * len(METHODS)
    assert "need two measured lengths" in opened.page.locator("#how-break-even").inner_text()
    opened.close()


@pytest.mark.browser
def test_the_page_follows_width_and_colour_scheme(browser: Any, reports: dict[str, Path]) -> None:
    opened = Opened(browser, reports["several lengths"], 1280)
    page = opened.page
    ink = "document.getElementById('chart-bytes').layout.font.color"
    light = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{ink} !== '{light}'")
    page.set_viewport_size({"width": 390, "height": 900})
    page.wait_for_function("document.querySelector('#chart-bytes .main-svg').getBoundingClientRect().width <= 390")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert opened.problems == []
    opened.close()


@pytest.mark.browser
def test_host_bytes_and_recall_have_columns_where_some_method_has_them(
    browser: Any, reports: dict[str, Path], tmp_path: Path
) -> None:
    results = made_up(layers=6, lengths=(2048,), refused=REFUSED)
    for row in results["rows"]:
        searched = row["method"].startswith("quest")
        row["host_bytes"], row["recall"] = (30 * 2**20, 0.931) if searched else (None, None)
    (tmp_path / "cold.html").write_text(report_html(results), encoding="utf-8")
    for path, has in ((tmp_path / "cold.html", True), (reports["one length"], False)):
        opened = Opened(browser, path, 390)
        for table in ("glance", "rows"):
            heads = opened.page.locator(f"#{table} thead th").all_inner_texts()
            assert ("on host" in heads, "recall" in heads) == (has, has)
            lines = opened.page.evaluate(
                f"[...document.querySelectorAll('#{table} tbody tr')].map(r => [...r.cells].map(e => e.textContent))"
            )
            assert {len(line) for line in lines} == {len(heads)}
            if has:
                at = heads.index("on host"), heads.index("recall")
                told = {(line[at[0]], line[at[1]]) for line in lines if line[0].startswith("quest")}
                assert told == {("30.0 MiB", "0.931")}
                assert {line[at[0]] for line in lines if not line[0].startswith("quest")} == {"–"}
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert opened.problems == []
        opened.close()
