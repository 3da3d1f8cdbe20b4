"""Studies of mixers: softmax learns recall, cells are trained once, and what goes wrong is told."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from foveate.compare import study_fit, study_work
from foveate.compare.study import Study, causal_mixers, make_entries, run_study, study_command
from foveate.compare.study_fit import StudyConfig, fit, study_data
from foveate.compare.study_report import study_html
from foveate.compare.study_work import Job
from foveate.errors import DataError, OptionError, ResultsError, UnknownNameError
from foveate.lm.model import IGNORED, HybridLM

CHROMIUM = shutil.which("chromium")
SMALL: dict[str, Any] = {"length": 32, "pairs": 8, "vocab": 64, "stages": 2, "pool": 512, "test": 64, "batch": 32}
# Too short to learn anything; for what is not about learning.
SHORT: dict[str, Any] = {**SMALL, "dim": 16, "pool": 16, "test": 8, "batch": 2, "steps": 2}


def short(mixers: list[str], out: Path, **more: Any) -> Study:
    return run_study(mixers, out=out, progress=False, **{**SHORT, "rates": [1e-2], **more})


def test_softmax_learns_recall_and_a_short_window_cannot(tmp_path: Path) -> None:
    options = {**SMALL, "steps": 120, "evaluate_every": 20}
    study = run_study(["softmax:window=2", "softmax"], rates=[1e-2], out=tmp_path, progress=False, **options)
    best, worst = study.best
    assert best["entry"] == "softmax"
    assert best["accuracy"] > 0.95
    assert best["reached_at"] == best["steps"] < 120
    assert worst["accuracy"] < 0.5
    assert worst["state_bytes"] < best["state_bytes"]
    assert list(best["accuracies"]) == ["8 pairs, 32 tokens", "4 pairs, 16 tokens"]


def test_a_state_is_as_many_bytes_as_decoding_holds(tmp_path: Path) -> None:
    (row,) = short(["gla"], tmp_path).rows
    model = HybridLM(study_fit.model_config(("baseconv", "gla"), StudyConfig(**SHORT), 64)).eval()
    cache = model(torch.zeros(1, 32, dtype=torch.int64), use_cache=True).past_key_values
    assert row["state_bytes"] == sum(cache.state(layer).bytes() for layer in range(2))
    assert row["constant_state"]


def test_finished_cells_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = short(["linear", "softmax"], tmp_path)
    monkeypatch.setattr(study_work, "fit", lambda *given: pytest.fail("trained again"))
    assert short(["linear", "softmax"], tmp_path).rows == first.rows
    with pytest.raises(pytest.fail.Exception):
        short(["linear"], tmp_path, steps=3)


def test_an_aim_reached_spares_the_other_rates(tmp_path: Path) -> None:
    study = short(["softmax"], tmp_path, rates=[1e-2, 1e-3], stop_at=1e-9, steps=40, evaluate_every=1, batch=32)
    assert [row["rate"] for row in study.rows] == [1e-2]
    assert study.missing == [{"entry": "softmax", "rate": 1e-3, "why": "not needed: another rate reached stop_at"}]


def test_a_cell_that_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    config = StudyConfig(**SHORT)
    job = Job(config, tuple(make_entries(["linear", "gla"], [], config)), (1e-2,), tmp_path)
    held = job.store().path(job.key(job.entries[0], 1e-2))
    (tmp_path / "locks").mkdir()
    with FileLock(tmp_path / "locks" / f"{held.stem}.lock"):
        study = short(["linear", "gla"], tmp_path)
        assert [row["entry"] for row in study.rows] == ["gla"]
        assert [each["entry"] for each in study.missing] == ["linear"]
    assert len(short(["linear", "gla"], tmp_path).rows) == 2


@pytest.mark.slow
def test_two_workers_train_each_cell_once(tmp_path: Path) -> None:
    study = short(["linear", "gla", "softmax"], tmp_path, workers=2, rates=[1e-2, 1e-3])
    assert sorted((row["entry"], row["rate"]) for row in study.rows) == [
        (name, rate) for name in ("gla", "linear", "softmax") for rate in (1e-3, 1e-2)
    ]
    assert study.missing == study.notes == []


def test_a_worker_of_other_code_refuses(tmp_path: Path) -> None:
    config = StudyConfig(**SHORT)
    with pytest.raises(ResultsError, match="code was changed"):
        study_work._worker(Job(config, tuple(make_entries(["gla"], [], config)), (1e-2,), tmp_path, source="other"))


def test_when_time_is_up_nothing_half_trained_is_kept(tmp_path: Path) -> None:
    study = short(["linear"], tmp_path, minutes=1e-9)
    assert study.rows == []
    assert study.missing == [{"entry": "linear", "rate": 1e-2, "why": "not trained yet"}]
    assert not list((tmp_path / "cells").iterdir())


def test_a_mixer_that_fails_has_a_row_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(mixers: tuple[str, ...], *given: Any) -> dict[str, Any]:
        if "gla" in mixers:
            raise RuntimeError("out of\nmemory")
        return fit(mixers, *given)

    with monkeypatch.context() as patched:
        patched.setattr(study_work, "fit", failing)
        study = short(["gla", "linear"], tmp_path)
    assert [row["status"] for row in study.best] == ["finished", "failed"]
    assert study.best[1]["error"] == "RuntimeError: out of memory"
    assert "failed" in json.dumps(study.as_dict())
    assert [row["status"] for row in short(["gla", "linear"], tmp_path).best] == ["finished", "finished"]


class Diverging(HybridLM):
    """A model whose loss is not finite once its weights have moved."""

    def forward(self, *given: Any, **named: Any) -> Any:
        output = super().forward(*given, **named)
        if output.loss is not None and self.training:
            output.loss = output.loss * (math.nan if float(self.embed_tokens.weight.detach().abs().max()) > 0.2 else 1)
        return output


def test_a_divergence_ends_the_training_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_fit, "HybridLM", Diverging)
    study = short(["linear"], tmp_path, rates=[0.9], steps=30, evaluate_every=5)
    (row,) = study.rows
    assert row["status"] == "diverged"
    assert row["accuracy"] is None
    assert 0 < row["diverged_at"] == row["steps"] < 30
    assert f"diverged by step {row['diverged_at']}" in study_work._line(row)


def test_stages_have_equal_batches_and_the_last_has_half_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    config = StudyConfig(**{**SMALL, "stages": 3, "steps": 9, "evaluate_every": 9})
    seen: list[tuple[int, ...]] = []

    class Watched(HybridLM):
        def forward(self, *given: Any, **named: Any) -> Any:
            seen.extend([tuple(named["input_ids"].shape)] if self.training else [])
            return super().forward(*given, **named)

    monkeypatch.setattr(study_fit, "HybridLM", Watched)
    fit(("linear",), 1e-3, config)
    assert seen == [(128, 8)] * 2 + [(64, 16)] * 2 + [(32, 32)] * 5


def test_every_answer_stands_in_its_example_and_no_test_example_is_trained_on() -> None:
    data = study_data(StudyConfig(**SMALL))
    (whole, *_), (inputs, targets) = data.tests.values(), data.stages[-1]
    for x, y in ((inputs, targets), whole, data.validation):
        rows, places = (y != IGNORED).nonzero(as_tuple=True)
        assert (x[rows] == y[rows, places][:, None]).any(1).all()
        assert len(rows) == 8 * len(x)
    sets = [{tuple(row) for row in x.tolist()} for x in (inputs, whole[0], data.validation[0])]
    assert sum(map(len, sets)) == len(set.union(*sets))


def test_language_is_learned_beyond_the_uniform_guess(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("the eye resolves sharply only where it looks. " * 60)
    options: dict[str, Any] = {"text": (str(book),), "length": 32, "dim": 16, "steps": 20, "batch": 8, "stop_at": None}
    study = run_study(["linear"], "language", rates=[1e-2], out=tmp_path / "study", progress=False, **options)
    assert study.best[0]["perplexity"] < 100
    with pytest.raises(DataError, match="cannot be read"):
        run_study(["linear"], "language", out=tmp_path, text=(str(tmp_path / "none.txt"),))


def test_hybrids_have_full_attention_after_every_so_many_layers() -> None:
    config = StudyConfig(layers=7)
    entries = {each.name: each.mixers for each in make_entries(["gla", "softmax"], [2, 5], config)}
    assert entries["gla"] == ("baseconv", *["gla"] * 6)
    assert entries["gla 2:1"] == ("baseconv", "gla", "gla", "softmax", "gla", "gla", "softmax")
    assert entries["gla 5:1"] == ("baseconv", *["gla"] * 5, "softmax")
    assert len(entries) == 4


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"mixers": ["glaa"]}, UnknownNameError, "no mixer 'glaa'.*gla"),
        ({"mixers": ["performer"]}, OptionError, "'performer' is not causal, allowed in a study: .*gla"),
        ({"mixers": []}, OptionError, "allowed: a list of specs"),
        ({"ratios": [3]}, OptionError, "ratios: 3 in stacks of 2 layers, allowed: layers >= 5 for it .*, or no ratios"),
        ({"ratios": [3], "layers": 4}, OptionError, "ratios: 3 in stacks of 4 layers, .* layers >= 5 .* up to 2"),
        ({"ratios": [0]}, OptionError, "ratios: 0, allowed: >= 1, layers of the mixer for one of full attention"),
        ({"rates": [2.0]}, OptionError, r"rates=\[2.0\]"),
        ({"workers": 0}, OptionError, "workers=0"),
        ({"minutes": 0}, OptionError, "minutes=0"),
        ({"lenght": 64}, UnknownNameError, "no option 'lenght'.*length"),
        ({"stages": 5}, OptionError, "stages=5 with pairs=8, length=32"),
        ({"vocab": 32}, OptionError, "vocab=32, allowed: more than length"),
        ({"task": "parity"}, OptionError, "task='parity'"),
        ({"layers": 1}, OptionError, "layers=1, allowed: >= 2"),
    ],
)
def test_a_study_that_cannot_be_is_refused_before_any_work(
    given: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run_study(**{"mixers": ["gla"], "out": tmp_path / "study", **SHORT, **given})
    assert not (tmp_path / "study").exists()


def test_causal_mixers_are_those_that_a_language_model_can_have() -> None:
    found = causal_mixers()
    assert {"softmax", "gla", "mamba2", "titans-mac"} <= set(found)
    assert not {"performer", "nystromformer", "agent"} & set(found)


def test_a_study_survives_its_file(tmp_path: Path) -> None:
    study = short(["linear"], tmp_path)
    assert Study.load(study.to_json(tmp_path / "study.json")).as_dict() == study.as_dict()
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(ResultsError, match="no study of schema version"):
        Study.load(tmp_path / "study.json")


def test_the_command_writes_numbers_and_a_page_that_holds_them(tmp_path: Path) -> None:
    settings = [f"{name}={value}" for name, value in SHORT.items()]
    study = study_command(["linear", "softmax"], rates=[1e-2], out=tmp_path, device="cpu", settings=settings)
    page = (tmp_path / "study.html").read_text(encoding="utf-8")
    embedded = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert embedded is not None
    assert json.loads(embedded[1]) == json.loads((tmp_path / "study.json").read_text()) == study.as_dict()
    assert not re.search(r'(src|href)="http', page.split("<script>")[0])
    assert study.table().row_count == 2
    assert {"command", "versions", "device", "date"} <= set(study.environment)


@pytest.mark.browser
def test_the_page_draws_every_finished_stack(tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    rows = short(["linear", "softmax"], tmp_path, layers=3, ratios=[1]).as_dict()
    rows["best"].append({"entry": "<b>lost</b>", "ratio": None, "rate": 0.1, "status": "failed", "error": "no memory"})
    (tmp_path / "study.html").write_text(study_html(rows), encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 900})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto((tmp_path / "study.html").as_uri())
        page.wait_for_selector("#chart .main-svg")
        assert page.locator("#chart .scatterlayer .point").count() == 3
        assert page.locator("#table tbody tr").count() == 4
        assert page.locator("#table th", has_text="<b>lost</b>").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert problems == []
        browser.close()
