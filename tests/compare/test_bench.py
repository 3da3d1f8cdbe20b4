"""`foveate bench`: rows against the stock model of the same run, and what its file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate.compare.bench import bench

pytestmark = pytest.mark.usefixtures("no_compilers")


def test_rows_are_ratios_of_one_run(model: Any, tmp_path: Path) -> None:
    result = bench(
        model, methods=["full", "snapkv:budget=64,window=16"], length=256, rounds=1, tokens=2, progress=False
    )
    stock, full, snap = result.rows
    assert [each.method for each in result.rows] == ["stock", "full", "snapkv:budget=64,window=16"]
    assert (stock.ttft_ratio, stock.decode_speedup) == (1.0, 1.0)
    assert full.cache_bytes >= stock.cache_bytes
    assert snap.ttft_ratio == pytest.approx(snap.ttft_s / stock.ttft_s)
    assert snap.decode_speedup_over_full == pytest.approx(full.decode_s_per_token / snap.decode_s_per_token)
    assert snap.cache_bytes < full.cache_bytes / 2
    assert snap.bytes_ratio_to_full == pytest.approx(snap.cache_bytes / full.cache_bytes)
    result.to_json(tmp_path / "bench.json")
    data = json.loads((tmp_path / "bench.json").read_text())
    assert [row["method"] for row in data["rows"]] == [each.method for each in result.rows]
    where = data["environment"]
    assert {"device", "dtype", "threads", "rounds", "loadavg", "platform", "versions", "command", "date"} == set(where)
    assert set(where["versions"]) == {"python", "torch", "transformers", "foveate"}
