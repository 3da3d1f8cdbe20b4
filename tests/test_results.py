"""Recorded results say where and when they were made, and name no place that exists on one machine only."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from foveate import registry

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_where_and_when_it_was_made(path: Path) -> None:
    text = path.read_text()
    assert "/tmp" not in text
    assert "/work" not in text
    data = json.loads(text)
    facts = data.get("environment", data)
    assert facts.get("device") or facts.get("cpu")
    assert re.match(r"\d{4}-\d{2}-\d{2}", facts["date"])


def test_results_that_cards_name_exist() -> None:
    missing = []
    for name in registry.names():
        claim = registry.card(name).claim or ""
        for file in re.findall(r"[\w./-]+\.json", claim):
            places = (ROOT / file, ROOT / "benchmarks" / "results" / file)
            if not any(place.exists() for place in places):
                missing.append((name, file))
    assert not missing
