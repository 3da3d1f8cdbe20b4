"""What `foveate bench gpu` keeps and shows: its file, wrong and failed contenders, runs that end early."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from foveate.compare import bench_gpu as room
from foveate.compare.bench_gpu import Row, Sizes
from foveate.compare.bench_gpu_table import duration, ordered
from foveate.compare.bench_gpu_timing import Case, Job, quantiles
from tests.compare.small_gpu import CPU, contender, made, printed, run

pytestmark = pytest.mark.usefixtures("no_compilers")


def test_the_file_holds_what_was_measured(tmp_path: Path) -> None:
    result = run(tmp_path, "topk")
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["schema_version"] == 1
    assert data["finished"] is True
    assert data["stopped"] is None
    assert data["parts"] == ["topk"]
    assert {"python", "torch", "transformers", "foveate", "cuda", "cudnn", "fla"} <= set(data["versions"])
    assert [row["name"] for row in data["rows"]] == [row.name for row in result.rows]
    assert data["rows"][0]["strongest"] is True
    assert data["rows"][1]["speedup"] == pytest.approx(data["rows"][0]["us"] / data["rows"][1]["us"])
    assert set(data["rows"][0]) == set(Row.__dataclass_fields__)


def test_a_wrong_result_is_marked_and_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(i: int) -> None:
        torch.randn(200_000).sort()

    jobs = made(
        contender("right", slow, baseline=True),
        contender("wrong", error=0.1, gate={"error": 5e-3}, baseline=True),
        contender("nowhere", error=float("nan"), gate={"error": 5e-3}, target_us=1e9),
        contender("ours", target_speedup=1.0),
        contender("late", slow, target_us=1e-3),
        absent=["another is not installed"],
    )
    monkeypatch.setattr(room, "jobs", lambda *_: jobs)
    result = run(tmp_path)
    wrong, nowhere, ours = result.rows[1:4]
    assert wrong.us is not None
    assert wrong.failed == "incorrect: error 0.1 > 0.005"
    assert not wrong.strongest
    assert result.rows[0].strongest
    assert nowhere.met is False
    assert json.loads((tmp_path / "out.json").read_text())["rows"][2]["error"] is None
    assert ours.met
    text = printed(result)
    assert text.index("right") < text.index("wrong") < text.index("ours")
    assert "1.0e-01 wrong" in text
    assert "1.00x met" in text
    assert "missed" in text
    assert "not measured: another is not installed" in text


def test_a_case_that_cannot_be_made_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Case:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(room, "jobs", lambda *_: [Job("topk", "large", fails), *made(contender("ours"))])
    rows = run(tmp_path).rows
    assert rows[0].failed == "OutOfMemoryError: no room"
    assert rows[1].failed is None


def test_a_broken_device_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = itertools.count()

    def synchronize(device: torch.device) -> None:
        if next(looks) >= 1:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(room, "synchronize", synchronize)
    monkeypatch.setattr(room, "jobs", lambda *_: made(*(contender(name) for name in "abc")))
    result = run(tmp_path)
    data = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in data["rows"]] == ["a", "b"]
    assert data["finished"] is False
    assert "broken after made up, b" in data["stopped"]
    assert "stopped early" in printed(result)


def test_an_interrupted_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(i: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "jobs", lambda *_: made(contender("a"), contender("b", stop)))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    data = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in data["rows"]] == ["a"]
    assert data["finished"] is False


def test_jobs_of_the_full_sizes() -> None:
    every = room.jobs(Sizes(), CPU)
    assert len({job.key for job in every}) == len(every) == 21
    assert list(dict.fromkeys(job.part for job in every)) == list(room.PARTS)
    assert {job.part for job in room.jobs(Sizes(), CPU, ("topk", "decode"))} == {"decode", "topk"}


def test_figures() -> None:
    assert quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert quantiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)
    assert [duration(each) for each in (9.96, 999.0, 31_000.0, 11_576_000.0)] == ["10.0 us", "999.0 us", "31.00 ms",
                                                                                "11.58 s"]  # fmt: skip
    rows = [Row("p", "c", name, baseline=name != "ours", us=us) for name, us in (("ours", 1.0), ("b", 3.0), ("a", 2.0))]
    rows.append(Row("p", "c", "failed", baseline=True, failed="x"))
    assert [row.name for row in ordered(rows)] == ["a", "b", "failed", "ours"]
