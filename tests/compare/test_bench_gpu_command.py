"""What `foveate bench gpu` refuses, its command line, and the processes that compile kernels beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from foveate import cli
from foveate.compare import bench_gpu as room
from foveate.compare import bench_gpu_compile
from foveate.compare.bench_gpu import GpuBench, Row, bench_gpu
from foveate.errors import BackendError, OptionError, ResultsError
from tests.compare.small_gpu import CPU, TINY, contender, made

pytestmark = pytest.mark.usefixtures("no_compilers")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_refusals_come_before_work(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with pytest.raises(OptionError, match="allowed: prefill, decode, topk, models, scans, train"):
        bench_gpu(["prompts"], out=path)
    with pytest.raises(OptionError, match="at least 1"):
        bench_gpu(rounds=0, out=path)
    with pytest.raises(BackendError, match="needs an NVIDIA GPU"):
        bench_gpu(out=path)
    assert not path.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError):
        bench_gpu(out=tmp_path / "file" / "out.json", device="cpu", sizes=TINY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("gpu",), "needs an NVIDIA GPU"),
        (("gpu", "--only", "prefill,dense"), "parts ['dense']"),
        (("gpu", "--model", "x"), "no --model"),
        (("decode", "--only", "topk"), "--only names parts of bench gpu"),
        (("cpu",), "there is: decode, gpu"),
    ],
)
def test_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("sys.argv", ["foveate", "bench", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_command_line_prints_and_tells_of_a_broken_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {}

    def measured(only: Any, **options: Any) -> GpuBench:
        given.update(options, only=only)
        return GpuBench(
            CPU, ("topk",), 2, tmp_path / "x.json", "a GPU", [Row("topk", "case", "ours")], stopped="broken"
        )

    monkeypatch.setattr(room, "bench_gpu", measured)
    monkeypatch.setattr("sys.argv", ["foveate", "bench", "gpu", "--only", "topk,decode", "--rounds", "2"])
    with pytest.raises(SystemExit):
        cli.main()
    assert given == {"only": ["topk", "decode"], "rounds": 2, "out": Path("foveate-bench-gpu.json")}
    out, error = capsys.readouterr()
    assert "topk: case" in out
    assert "broken; the 1 rows until then are kept" in error


class Fake:
    """A process that takes so many looks to end."""

    def __init__(self, looks: float) -> None:
        self.looks, self.killed = looks, False

    def poll(self) -> int | None:
        self.looks -= 1
        return None if self.looks > 0 and not self.killed else 0

    def kill(self) -> None:
        self.killed = True

    def wait(self) -> int:
        return 0


def test_compiling_beforehand_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu_compile.os, "cpu_count", lambda: 2)
    started: list[Fake] = []
    most = 0

    def start(key: str) -> Any:
        nonlocal most
        started.append(Fake(float("inf") if key == "c" else 2))
        most = max(most, sum(each.looks > 0 for each in started))
        return started[-1]

    bench_gpu_compile.compile_jobs(["a", "b", "c", "d"], seconds=0.8, start=start)
    assert len(started) == 4
    assert most <= 2
    assert [each.killed for each in started] == [False, False, True, False]


def test_every_contender_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []

    def fails(i: int) -> None:
        raise ValueError("no such kernel")

    jobs = made(contender("a", called.append), contender("b", fails), contender("c", called.append))
    monkeypatch.setattr(room, "jobs", lambda *_: jobs)
    assert bench_gpu_compile.call_once("topk/made up", "cpu") == ["b: ValueError: no such kernel"]
    assert called == [0, 0]
