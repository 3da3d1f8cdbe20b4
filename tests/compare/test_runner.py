"""The runner: all rows, resuming, refusals, and bad input before any work."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

import foveate
from foveate.compare import SCHEMA_VERSION, Comparison, compare, runner
from foveate.errors import (
    CompositionError,
    DataError,
    OptionError,
    ResultsError,
    UnknownNameError,
    UnsupportedModelError,
)
from tests.compare.small import byte_model

SNAP = "snapkv:budget=96,window=16"
FIGURES = ("score", "perplexity", "ttft_s", "decode_tokens_per_s", "peak_bytes", "cache_bytes", "density")
FIELDS = {
    "method", "task", "length", "seeds", "query_aware", *FIGURES, "prefill_density", "decode_density", "prompt_tokens",
    "host_bytes", "recall", "depths", "lengths_kept", "tokens_seen", "kept", "needles", "error",
    *(f"dense_{name}" for name in FIGURES),
}  # fmt: skip


def run(model: Any, tokenizer: Any, out: Path, **given: Any) -> Comparison:
    settings: dict[str, Any] = {"methods": [SNAP], "tasks": ["passkey"], "lengths": [256], "seeds": 2}
    return compare(model, tokenizer, out=out, progress=False, **{**settings, **given})


@pytest.fixture(scope="module")
def comparison(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("runner")
    (folder / "text.txt").write_text("Some words of no great weight follow one another here. " * 12)
    return run(
        model,
        tokenizer,
        folder / "out",
        methods=["full", SNAP],
        tasks=["passkey", "multi-turn:questions=2", f"perplexity:target=16,text={folder / 'text.txt'}"],
        lengths=[512, 384],
    )


def test_every_row_is_there_with_the_dense_model_first(comparison: Comparison) -> None:
    rows = comparison.rows
    assert [row["method"] for row in rows] == ["dense", "full", SNAP] * 6
    assert [row["length"] for row in rows[:6]] == [384] * 3 + [512] * 3
    assert all(set(row) == FIELDS for row in rows)
    assert all(row["error"] is None and row["seeds"] == [0, 1] for row in rows)
    for row in rows:
        assert (row["score"] is None) == row["task"].startswith("perplexity")
        assert (row["perplexity"] is None) == (row["score"] is not None)
        assert row["ttft_s"] > 0
        assert row["decode_tokens_per_s"] > 0
        assert row["peak_bytes"] >= 0
        assert row["prompt_tokens"] == row["length"] - (16 if row["score"] is None else 0)


def test_rows_carry_the_dense_figures_of_their_own_task_and_length(comparison: Comparison) -> None:
    dense: dict[str, Any] = {}
    for row in comparison.rows:
        if row["method"] == "dense":
            dense = row
        assert (row["task"], row["length"]) == (dense["task"], dense["length"])
        assert {name: row[f"dense_{name}"] for name in FIGURES} == {name: dense[name] for name in FIGURES}


def test_full_equals_dense_and_snapkv_holds_its_budget(comparison: Comparison) -> None:
    for dense, full, snap in zip(*[iter(comparison.rows)] * 3):
        assert full["score"] == dense["score"]
        assert full["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-4) if dense["perplexity"] else True
        assert full["lengths_kept"] == dense["lengths_kept"]
        assert (dense["kept"], full["kept"]) == (None, None)
        assert snap["cache_bytes"] < 0.5 * dense["cache_bytes"]
        assert snap["density"] < 1.0
        assert len(snap["kept"]) == 3


def test_host_bytes_and_recall_are_in_every_cell_and_row(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    cold = "retrieval-attention:index=flat,sinks=4,window=16,budget=16,recall=1"
    found = run(model, tokenizer, tmp_path, methods=[SNAP, cold])
    cells = [json.loads(path.read_text())["cell"]["figures"] for path in (tmp_path / "cells").iterdir()]
    assert len(cells) == 6
    assert all({"host_bytes", "recall"} <= set(cell) for cell in cells)
    dense, snap, searched = found.rows
    assert [(row["host_bytes"], row["recall"]) for row in (dense, snap)] == [(None, None)] * 2
    held = [cell["host_bytes"] for cell in cells if cell["host_bytes"] is not None]
    assert len(held) == 2
    assert searched["host_bytes"] == round(sum(held) / 2)
    assert searched["recall"] == 1.0
    again = run(model, tokenizer, tmp_path, methods=[SNAP, cold])
    assert again.settings["cells_computed"] == 0
    assert again.rows == found.rows


def test_results_from_before_host_bytes_and_recall_can_be_shown(comparison: Comparison, tmp_path: Path) -> None:
    data = json.loads(comparison.to_json(tmp_path / "results.json").read_text())
    for row in data["rows"]:
        del row["host_bytes"], row["recall"]
    (tmp_path / "results.json").write_text(json.dumps(data))
    older = Comparison.load(tmp_path / "results.json")
    shown = [[column.header for column in each.table().columns] for each in (older, comparison)]
    assert shown[0] == shown[1]
    assert older.report(tmp_path / "report.html").exists()


def test_needle_depths_are_told_per_seed(comparison: Comparison) -> None:
    passkey = next(row for row in comparison.rows if row["task"] == "passkey" and row["method"] == SNAP)
    assert [each["seed"] for each in passkey["depths"]] == [0, 1]
    assert passkey["depths"][0]["depth"] == pytest.approx(0.3)
    assert passkey["score"] == sum(each["score"] for each in passkey["depths"]) / 2
    assert 0 < passkey["needles"][0] < 0.3
    several = next(row for row in comparison.rows if row["task"].startswith("multi-turn"))
    assert len(several["needles"]) == 2
    assert all(each["depth"] is None for each in several["depths"])


def test_perplexity_is_that_of_all_seeds_together(comparison: Comparison) -> None:
    row = next(row for row in comparison.rows if row["perplexity"] is not None)
    each = [seed["perplexity"] for seed in row["depths"]]
    # Seeds have equally many tokens, so the whole is the geometric mean.
    assert row["perplexity"] == pytest.approx((each[0] * each[1]) ** 0.5)


def test_results_json_is_the_documented_schema(comparison: Comparison, tmp_path: Path) -> None:
    data = json.loads(comparison.to_json(tmp_path / "deep" / "results.json").read_text())
    assert data["schema_version"] == SCHEMA_VERSION == 1
    assert set(data) == {"schema_version", "environment", "model", "settings", "rows", "break_even"}
    where = data["environment"]
    assert set(where["versions"]) == {"python", "torch", "transformers", "foveate"}
    assert {"device", "command", "threads", "date", "loadavg", "platform", "peak_bytes_kind"} <= set(where)
    assert {"name", "parameters", "dtype", "layers", "kv_heads", "head_dim"} <= set(data["model"])
    assert (data["model"]["layers"], data["model"]["kv_heads"], data["model"]["dtype"]) == (3, 2, "float32")
    assert data["rows"] == comparison.rows
    assert [each["method"] for each in data["break_even"]] == ["full", SNAP]
    assert Comparison.load(tmp_path / "deep" / "results.json").as_dict() == data


def test_the_schema_document_names_every_field() -> None:
    document = (Path(__file__).parents[2] / "docs" / "results-schema.md").read_text()
    for name in FIELDS:
        assert f"`{name}`" in document or (name.startswith("dense_") and "`dense_*`" in document), name


def test_a_second_run_reuses_every_cell_and_says_so(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(model, tokenizer, tmp_path)
    assert first.notes == []
    monkeypatch.setattr(runner, "measure", None)
    second = run(model, tokenizer, tmp_path)
    assert second.rows == first.rows
    assert second.notes == [f"reused 4 of 4 finished cells from {tmp_path / 'cells'}"]
    assert second.settings["cells_reused"] == 4


@pytest.mark.parametrize(
    "changed",
    [
        {"seeds": [2]},
        {"lengths": [272]},
        {"query_aware": False},
        {"tasks": ["passkey:digits=6"]},
        {"min_decode_tokens": 3},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_settings_find_no_old_cells(model: Any, tokenizer: Any, tmp_path: Path, changed: dict[str, Any]) -> None:
    run(model, tokenizer, tmp_path, seeds=[0])
    assert run(model, tokenizer, tmp_path, **{"seeds": [0], **changed}).settings["cells_reused"] == 0


def test_another_model_finds_no_old_cells(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    run(model, tokenizer, tmp_path, seeds=[0])
    other = run(byte_model(seed=1), tokenizer, tmp_path, seeds=[0])
    assert other.settings["cells_reused"] == 0


def test_more_methods_reuse_what_is_there(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    run(model, tokenizer, tmp_path, seeds=[0])
    more = run(model, tokenizer, tmp_path, seeds=[0, 1], methods=["full", SNAP])
    assert (more.settings["cells_reused"], more.settings["cells_computed"]) == (2, 4)


def test_a_damaged_cell_is_computed_again_and_told(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    first = run(model, tokenizer, tmp_path, seeds=[0])
    cell = sorted((tmp_path / "cells").glob("*.json"))[0]
    cell.write_text(cell.read_text()[:100])
    again = run(model, tokenizer, tmp_path, seeds=[0])
    assert f"{cell.name} was damaged and was computed again" in again.notes
    assert again.settings["cells_computed"] == 1
    assert [row["score"] for row in again.rows] == [row["score"] for row in first.rows]
    assert run(model, tokenizer, tmp_path, seeds=[0]).settings["cells_computed"] == 0


def test_a_full_disk_stops_the_run_and_the_next_goes_on(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.replace, []

    def fills_up(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fills_up)
    with pytest.raises(ResultsError, match=r"No space left on device.*free some space and run the same command again"):
        run(model, tokenizer, tmp_path)
    monkeypatch.undo()
    assert len(list((tmp_path / "cells").iterdir())) == 2
    assert all(path.suffix == ".json" for path in (tmp_path / "cells").iterdir())
    assert model.config._attn_implementation == "sdpa"
    after = run(model, tokenizer, tmp_path)
    assert (after.settings["cells_reused"], after.settings["cells_computed"]) == (2, 2)


def test_a_full_disk_while_saving_leaves_the_old_results(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = comparison.save()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert set(before) == {"results.json", "report.html"}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultsError, match="No space left"):
        comparison.save()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_method_that_refuses_has_a_row_and_the_others_go_on(
    model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare(model, tokenizer, ["duo", SNAP], ["passkey"], lengths=256, seeds=1, out=tmp_path, progress=True)
    assert [row["method"] for row in found.rows] == ["dense", "duo", SNAP]
    refused = found.rows[1]
    assert set(refused) == FIELDS
    assert refused["error"].startswith("ProfileError: there is no 'duo' profile")
    assert refused["score"] is None
    assert refused["dense_score"] is not None
    assert found.rows[2]["error"] is None
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "duo refused: ProfileError" in captured.err
    # A refusal may be cured, so it is tried again.
    assert run(model, tokenizer, tmp_path, methods=["duo"], seeds=1).rows[1]["error"]


def test_training_mode_is_given_back(tokenizer: Any, tmp_path: Path) -> None:
    model = byte_model().train()
    run(model, tokenizer, tmp_path, seeds=1)
    assert model.training


def test_a_task_with_few_examples_runs_each_once(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text('{"context": "The sky is blue today.", "question": "Which colour?", "answers": ["blue"]}\n')
    found = run(model, tokenizer, tmp_path / "out", tasks=[f"data-file:path={data},max_new_tokens=4"], seeds=3)
    assert [row["seeds"] for row in found.rows] == [[0], [0]]
    data.write_text(data.read_text().replace("blue today", "grey today"))
    changed = run(model, tokenizer, tmp_path / "out", tasks=[f"data-file:path={data},max_new_tokens=4"], seeds=3)
    assert changed.settings["cells_reused"] == 0


def test_break_even_lengths_can_be_timed_apart(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    found = run(model, tokenizer, tmp_path, seeds=1, methods=["duo", SNAP], break_even_lengths=[64, 256])
    assert [(each["method"], each["measured"]) for each in found.break_even] == [("duo", None), (SNAP, (64, 256))]
    assert found.break_even[1]["verdict"] != "unknown"


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"methods": ["snapvk"]}, UnknownNameError, "snapvk.*did you mean snapkv"),
        ({"methods": ["snapkv:bugdet=3"]}, UnknownNameError, "bugdet"),
        ({"methods": ["snapkv:budget=0"]}, OptionError, "budget=0, allowed: >= 1"),
        ({"methods": ["passkey"]}, UnknownNameError, "'passkey' is a task, not a method"),
        ({"methods": ["nope"]}, UnknownNameError, "there is no method 'nope'; there are: adakv"),
        ({"methods": ["snapkv+"]}, UnknownNameError, "lacks the name of a method"),
        ({"methods": ["adakv+snapkv"]}, CompositionError, "both evict"),
        ({"methods": "full"}, OptionError, "methods='full', allowed: a list of specs"),
        ({"tasks": ["niah-singel"]}, UnknownNameError, "niah-singel.*niah-single"),
        ({"tasks": ["snapkv"]}, UnknownNameError, "'snapkv' is a keep, not a task; tasks are: .*passkey"),
        ({"tasks": ["nope"]}, UnknownNameError, "there is no task 'nope'; there are: common-words"),
        ({"tasks": []}, OptionError, "at least one of .*passkey"),
        ({"tasks": ["data-file:path=/nowhere/at-all.jsonl"]}, DataError, r"at-all\.jsonl: cannot be read"),
        ({"lengths": []}, OptionError, "lengths=.*at least one"),
        ({"lengths": [0]}, OptionError, "lengths=.*>= 1"),
        ({"lengths": [True]}, OptionError, "lengths="),
        ({"lengths": [16]}, OptionError, "passkey: length=16, allowed: >= "),
        ({"seeds": 0}, OptionError, "seeds=0, allowed: a number of seeds >= 1"),
        ({"seeds": []}, OptionError, "seeds="),
        ({"seeds": [1.5]}, OptionError, "seeds="),
        ({"query_aware": "no"}, OptionError, "query_aware='no', allowed: True or False"),
        ({"stride": 0}, OptionError, "stride=0, allowed: a whole number >= 1"),
        ({"min_decode_tokens": -1}, OptionError, "min_decode_tokens=-1"),
        ({"break_even_lengths": [-5]}, OptionError, "lengths="),
    ],
)
def test_bad_input_is_refused_before_any_work(
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(runner, "measure", None)
    with pytest.raises(error, match=message):
        run(model, tokenizer, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the tokenizer makes token \d+, and the model has 64.*from the same place"):
        run(byte_model(vocab_size=64), tokenizer, tmp_path / "out")


def test_no_tokenizer_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="compare: tokenizer=None, allowed: the model's own tokenizer"):
        run(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_something_that_is_no_model_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no transformers PreTrainedModel"):
        run(object(), tokenizer, tmp_path / "out")


def test_the_room_can_be_called_by_its_name(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    import foveate.compare as room

    found = room(model, tokenizer, [], ["passkey"], 256, 1, out=tmp_path, progress=False)  # type: ignore[operator]
    assert [row["method"] for row in found.rows] == ["dense"]
    assert callable(foveate.compare)


def test_results_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(ResultsError, match="cannot be read"):
        Comparison.load(path)
    path.write_text("{")
    with pytest.raises(ResultsError, match="is damaged"):
        Comparison.load(path)
    path.write_text('{"rows": []}')
    with pytest.raises(ResultsError, match="it lacks schema_version, environment"):
        Comparison.load(path)
    path.write_text(
        '{"schema_version": 99, "environment": {}, "model": {}, "settings": {}, "rows": [], "break_even": []}'
    )
    with pytest.raises(ResultsError, match="schema version 99, this foveate reads 1"):
        Comparison.load(path)
