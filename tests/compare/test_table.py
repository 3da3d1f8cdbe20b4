"""The console table."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from foveate.compare.table import comparison_table
from tests.compare.made_up import METHODS, made_up


def printed(results: dict[str, Any], width: int = 110) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(comparison_table(results["rows"], results["break_even"]))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_dense_comes_first_and_every_method_has_its_line() -> None:
    text = printed(made_up(lengths=(2048,)))
    lines = [line for line in text.splitlines() if line.strip()]
    first = next(place for place, line in enumerate(lines) if line.split()[:1] == ["dense"])
    assert [line.split()[0] for line in lines[first : first + 3]] == ["dense", "full", "streaming-llm:window=508"]
    dense = lines[first].split()
    assert dense[3:] == ["14.00", "1.00x", "1.00x", "45.0", "1.00", "1.000"]
    assert "MiB" in text


def test_ratios_are_dense_over_method_for_times() -> None:
    results = made_up(lengths=(2048,))
    snap = next(row for row in results["rows"] if row["method"] == "snapkv:budget=512")
    line = next(line for line in printed(results).splitlines() if line.startswith("snapkv"))
    decode = snap["decode_tokens_per_s"] / snap["dense_decode_tokens_per_s"]
    assert f"{snap['dense_ttft_s'] / snap['ttft_s']:.2f}x" in line
    assert f"{decode:.2f}x" in line
    assert decode > 1


def test_lengths_have_a_block_each_and_break_even_lines_follow() -> None:
    text = printed(made_up())
    assert re.findall(r"^([\d,]+) tokens\s*$", text, re.MULTILINE) == ["1,024", "2,048", "4,096"]
    assert "Break-even (prompt and 128 generated tokens):" in text
    assert all(f"  {method}: " in text for method in METHODS if method != "dense")


def test_refusals_are_told_below() -> None:
    text = printed(made_up(lengths=(2048,), refused="adakv:budget=512"), width=140)
    line = next(line for line in text.splitlines() if line.startswith("adakv"))
    assert line.count("refused") == 3
    assert "adakv:budget=512 refused: UnsupportedModelError: Tiny</script><b>Model</b> cannot be served" in text


@pytest.mark.parametrize("width", [80, 110])
def test_host_bytes_and_recall_have_a_column_where_some_method_has_them(width: int) -> None:
    results = made_up(lengths=(2048,))
    for row in results["rows"]:
        row["host_bytes"], row["recall"] = None, None
    without = printed(made_up(lengths=(2048,)), width)
    assert printed(results, width) == without
    assert not {"host", "call"} & set(without.split())
    for task, row in enumerate(each for each in results["rows"] if each["method"].startswith("quest")):
        row["host_bytes"], row["recall"] = (30 + task) * 2**20, (0.9, 0.95, None)[task]
    text = printed(results, width)
    # The means: of the tasks' 30, 31 and 32 MiB, and of what was measured.
    assert next(line for line in text.splitlines() if line.startswith("quest:")).split()[-4:] == [
        "31.0", "1.04", "0.900", "0.925",
    ]  # fmt: skip
    dense = next(line for line in text.splitlines() if line.startswith("dense")).split()
    assert (dense[-4], dense[-1]) == ("-", "-")
    for row in results["rows"]:
        row["host_bytes"] = None
    assert "host" not in printed(results, width).split()
    assert "call" in printed(results, width).split()


@pytest.mark.parametrize("width", [80, 200])
def test_it_fits_the_width_with_every_column(width: int) -> None:
    text = printed(made_up(), width=width)
    assert "density" in text
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
