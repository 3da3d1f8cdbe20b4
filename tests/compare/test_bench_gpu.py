"""The cases of `foveate bench gpu` without a GPU: what they measure, at tiny sizes on the CPU, and what they judge."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

from foveate.attention import VerticalSlash
from foveate.compare import bench_gpu as room
from foveate.compare import bench_gpu_scans
from foveate.compare.bench_gpu_attention import on_samples, random_prompt, vertical_slash
from foveate.compare.bench_gpu_scans import ScanSize
from foveate.compare.bench_gpu_timing import over_the_gate
from tests.compare.small_gpu import CPU, TINY, run

pytestmark = pytest.mark.usefixtures("no_compilers")


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
