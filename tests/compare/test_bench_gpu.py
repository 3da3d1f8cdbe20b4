"""`foveate bench gpu` without a GPU: its cases at tiny sizes on the CPU, its records, and what it refuses."""

from __future__ import annotations

import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from foveate import cli
from foveate.attention import VerticalSlash
from foveate.compare import bench_gpu as room
from foveate.compare import bench_gpu_attention, bench_gpu_compile, bench_gpu_scans
from foveate.compare.bench_gpu import GpuBench, Row, Sizes, bench_gpu
from foveate.compare.bench_gpu_attention import AttentionSizes, on_samples, random_prompt, vertical_slash
from foveate.compare.bench_gpu_decode import DecodeSizes
from foveate.compare.bench_gpu_models import ModelSizes
from foveate.compare.bench_gpu_scans import ScanSize
from foveate.compare.bench_gpu_table import duration, ordered
from foveate.compare.bench_gpu_timing import Case, Contender, Job, always, over_the_gate, quantiles
from foveate.errors import BackendError, OptionError, ResultsError

CPU = torch.device("cpu")
TINY = Sizes(
    attention=AttentionSizes(
        heads=4, kv_heads=2, head_dim=16, block=32, dtype=torch.float32, prompt=256, columns=16, learned=128,
        learned_density=0.4, densities=((0.5, 1e9), (0.2, 1e-3)),
    ),
    decode=DecodeSizes(
        heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, cached=256, dense=1e9, lists=((32, 3, 1e9),),
        scores=(2, 300, 20),
    ),
    scans=tuple(
        ScanSize(kind=kind, heads=6, length=150, width=16, dtype=torch.float32, learned=learned)
        for kind, learned in (
            ("linear", False), ("retention", False), ("delta", False), ("gated delta", False), ("gated", True),
            ("gated delta", True),
        )
    ),
    models=ModelSizes(
        shapes={"tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "num_key_value_heads": 1, "vocab_size": 64}},
        prompts=(("tiny", 512, 1e-9),), decodes=(("tiny", 1024, None),), dtype=torch.float32, steps=2,
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compilers: torch's own paths, and no FlexAttention, which then is a baseline that fails."""
    monkeypatch.setenv("FOVEATE_BACKEND", "torch")

    def no_flex() -> Any:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(bench_gpu_attention, "compiled_flex", no_flex)


def run(tmp_path: Path, *only: str) -> GpuBench:
    return bench_gpu(only, rounds=1, out=tmp_path / "out.json", progress=False, sizes=TINY, device="cpu")


def printed(result: GpuBench) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(result.table())
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_prompts_and_gradients(tmp_path: Path) -> None:
    result = run(tmp_path, "prefill")
    first, second = ([row for row in result.rows if row.case == case] for case in {r.case: 0 for r in result.rows})
    assert [row.name for row in first] == [
        "dense: SDPA, FlashAttention",
        "FlexAttention, same blocks",
        "foveate, random blocks",
        "foveate, vertical-slash",
    ]
    for row in (*first, *second):
        if row.name.startswith("Flex"):
            assert row.failed == "RuntimeError: no compiler here"
            assert row.us is None
        else:
            assert row.error is not None
            assert row.error < 1e-5
            assert row.us
    dense, blocks, slash = first[0], first[2], first[3]
    assert dense.strongest
    assert dense.speedup == 1.0
    assert blocks.met
    assert blocks.facts["backend"] == "torch"
    assert slash.target_us == pytest.approx(1.15 * blocks.us * slash.facts["tflop_s"] * slash.us
                                            / (blocks.facts["tflop_s"] * blocks.us))  # fmt: skip
    # Measured once, shown twice.
    assert second[0].us == dense.us
    assert second[0].facts["measured_in"] == first[0].case
    assert second[2].met is False
    learned = run(tmp_path, "train").rows[:2]
    assert learned[0].failed is not None
    assert learned[1].error is not None
    assert learned[1].error < 1e-5
    assert {"dq", "dk", "dv"} <= set(learned[1].facts)


def test_a_wrong_block_is_seen() -> None:
    prompt = random_prompt(TINY.attention, 256, 0.3, CPU)
    judge = on_samples(prompt, prompt.keys_of)
    mask = prompt.plan().to_mask(256, 256)
    keys, values = (x.repeat_interleave(2, 1) for x in (prompt.k, prompt.v))
    scores = (prompt.q @ keys.transpose(-1, -2) * 16**-0.5).masked_fill(~mask, -torch.inf)
    o, lse = scores.softmax(-1) @ values, scores.logsumexp(-1)
    found = judge((o, lse))
    assert max(found.values()) < 1e-5
    assert judge((o.roll(32, 2), lse.roll(32, 2)))["error"] > 0.1
    o[0, 2, 100, 0] = float("nan")
    assert judge((o, lse))["error"] == float("inf")


def test_vertical_slash_counts_its_pairs() -> None:
    prompt = random_prompt(TINY.attention, 256, 0.5, CPU)
    contender = vertical_slash(prompt, 16, "blocks")
    with contender.open() as (call, _):
        plan = next(cell.cell_contents for cell in call.__closure__ if isinstance(cell.cell_contents, VerticalSlash))
    pairs, rows = 0, 256 // 32
    for h, row in itertools.product(range(4), range(rows)):
        offsets, columns = plan.slash[0, h].tolist(), plan.vertical[0, h].tolist()
        listed = {row - offset for offset in offsets if offset <= row}
        extra = [at for at in columns if at // 32 <= row and at // 32 not in listed]
        pairs += len(listed) * 32 * 32 + len(extra) * 32
    assert contender.flop == 4 * 16 * pairs
    assert contender.within == ("blocks", pytest.approx(1.15 * contender.flop / prompt.flop))


def test_decoding_and_topk(tmp_path: Path) -> None:
    result = run(tmp_path, "decode", "topk")
    assert len(result.rows) == 6
    for row in result.rows:
        assert row.failed is None
        assert row.error is not None
        assert row.error < 1e-5
    assert [row.met for row in result.rows if not row.baseline][:2] == [True, True]
    assert "FlashAttention-3" in result.absent[0]


def test_scans_with_and_without_the_other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench_gpu_scans._fla_module.cache_clear()
    monkeypatch.setitem(sys.modules, "fla", None)
    result = run(tmp_path, "scans")
    assert [row.name for row in result.rows] == ["foveate"] * 4
    assert [line for line in result.absent if "fla" in line] == result.absent
    assert all(row.error is not None and row.error < 1e-5 and row.speedup is None for row in result.rows)
    monkeypatch.delitem(sys.modules, "fla")

    # A package of the same form: it brings its layers along, and refuses gradients.
    package = tmp_path / "fla"
    (package / "ops" / "linear_attn").mkdir(parents=True)
    (package / "ops" / "__init__.py").write_text("")
    (package / "__init__.py").write_text(
        "import importlib\n__version__ = '0'\nlayers = 'there'\n"
        "try:\n    importlib.import_module('fla.layers')\n"
        "except ModuleNotFoundError as error:\n    layers = error.name\n"
    )
    (package / "layers.py").write_text("raise AssertionError('not to be imported')\n")
    (package / "ops" / "linear_attn" / "__init__.py").write_text(
        "import torch\n"
        "def chunk_linear_attn(q, k, v, normalize=True):\n"
        "    assert not normalize\n"
        "    scores = torch.einsum('bthk,bshk->bhts', q, k).tril() * q.shape[-1] ** -0.5\n"
        "    if q.requires_grad:\n        raise RuntimeError('no gradients on this machine')\n"
        "    return torch.einsum('bhts,bshv->bthv', scores, v), None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    bench_gpu_scans._fla_module.cache_clear()
    try:
        case = bench_gpu_scans.forward_case(TINY.scans[0], CPU)
        assert [each.name for each in case.contenders] == [bench_gpu_scans.FLA, "foveate"]
        with case.contenders[0].open() as (call, judge):
            assert judge(call(0))["error"] < 1e-5
        assert sys.modules["fla"].layers == "fla.layers"
        assert "fla.layers" not in sys.modules
        assert bench_gpu_scans.fla_version() == "0"
        size = ScanSize(kind="linear", heads=2, length=70, width=16, dtype=torch.float32, learned=True)
        jobs = bench_gpu_scans.scan_jobs([size], CPU)
        monkeypatch.setattr(room, "jobs", lambda *_: jobs)
        rows = run(tmp_path, "train").rows
        assert rows[0].failed == "RuntimeError: no gradients on this machine"
        assert rows[1].failed is None
        assert bench_gpu_scans.fla_operator("delta")[1] == [
            "flash-linear-attention is not installed (ModuleNotFoundError: No module named 'fla.ops.delta_rule')"
        ]
    finally:
        bench_gpu_scans._fla_module.cache_clear()
        for name in [each for each in sys.modules if each == "fla" or each.startswith("fla.")]:
            del sys.modules[name]


def test_learned_scans(tmp_path: Path) -> None:
    rows = [row for row in run(tmp_path, "train").rows if "scan" in row.case]
    assert len(rows) == 2
    assert {"o", "dq", "dk", "dv", "dbeta", "dg"} <= set(rows[1].facts)
    assert all(row.error is not None and row.error < 1e-5 for row in rows)


@pytest.mark.parametrize("size", [TINY.scans[3], TINY.scans[5]], ids=["forward", "learned"])
def test_a_head_that_is_no_number_is_seen(size: ScanSize) -> None:
    [job] = bench_gpu_scans.scan_jobs([size], CPU)
    ours = job.build().contenders[-1]
    with ours.open() as (call, judge):
        got = call(0)
        assert judge(got)["error"] < 1e-5
        # Not among the heads that are compared with float64.
        (got["dbeta"] if size.learned else got)[0, 3, 1] = float("nan")
        found = judge(got)
    assert found["error"] == float("inf")
    assert over_the_gate(found, ours.gate) == f"incorrect: error inf > {ours.gate['error']:g}"


def test_models(tmp_path: Path) -> None:
    rows = {row.name: row for row in run(tmp_path, "models").rows}
    sparse = rows["foveate, block-sparse"]
    assert 0 < sparse.facts["density"] < 1
    assert sparse.error is not None
    assert sparse.met
    recorded = rows["foveate, an eighth of the keys, CUDA graph"]
    # On a CPU both are eager.
    assert recorded.error == 0.0
    assert recorded.facts["cache_bytes"] < rows["dense: foveate, every key, CUDA graph"].facts["cache_bytes"] / 3
    assert len(rows) == 7
    assert all(row.failed is None for row in rows.values())


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


def made(*contenders: Contender, absent: list[str] | None = None) -> list[Job]:
    return [Job("topk", "made up", lambda: Case("made up", list(contenders), absent or []))]


def contender(name: str, call: Any = lambda i: None, error: float = 0.0, **more: Any) -> Contender:
    return Contender(name=name, open=always(call, lambda got: {"error": error}), judged="made up", **more)


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


def test_figures() -> None:
    assert quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert quantiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)
    assert [duration(each) for each in (9.96, 999.0, 31_000.0, 11_576_000.0)] == ["10.0 us", "999.0 us", "31.00 ms",
                                                                                "11.58 s"]  # fmt: skip
    rows = [Row("p", "c", name, baseline=name != "ours", us=us) for name, us in (("ours", 1.0), ("b", 3.0), ("a", 2.0))]
    rows.append(Row("p", "c", "failed", baseline=True, failed="x"))
    assert [row.name for row in ordered(rows)] == ["a", "b", "failed", "ours"]
