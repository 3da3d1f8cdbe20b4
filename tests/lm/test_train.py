"""Training runs: configs, what a run leaves behind, resuming, damaged checkpoints."""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import foveate
from foveate.errors import DataError, OptionError, ResultsError, UnknownNameError
from foveate.lm import HybridLM
from foveate.lm.train import make_data, recall_accuracy, train
from foveate.lm.train_config import DataConfig, TrainConfig

pytest.importorskip("accelerate", reason="training needs accelerate")

MODEL = {"mixers": ["baseconv", "lookups:lookups=2", "hgrn", "gla"], "dim": 16, "heads": 2, "mlp_ratio": 0}
TASK = {"task": "mqar", "length": 16, "train": 64, "test": 8, "task_options": {"pairs": 2, "vocab": 32}}


def config(output: Path, *, model: dict[str, Any] = MODEL, data: dict[str, Any] = TASK, **run: Any) -> TrainConfig:
    given = {"output": str(output), "steps": 4, "batch": 8, "warmup": 1, "device": "cpu", "save_every": 2, **run}
    return TrainConfig.from_dict({"model": model, "data": data, "run": given})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return HybridLM.from_pretrained(folder).state_dict()


def test_a_run_on_a_task(tmp_path):
    lines: list[dict[str, Any]] = []
    data = {**TASK, "slices": [{"pairs": 3, "length": 20}]}
    result = train(config(tmp_path / "run", data=data, log_every=1, evaluate_every=2), lines.append)
    assert result.steps == 4
    assert result.resumed_from is None
    plain = result.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["folder"], plain["resumed_from"], plain["steps"]) == (str(tmp_path / "run"), None, 4)
    assert set(result.metrics) == {"mqar", "mqar:pairs=3,length=20"}
    assert all(0 <= each["accuracy"] <= 1 and each["loss"] > 0 for each in result.metrics.values())
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"checkpoint-2", "checkpoint-4", "model"}
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert logged == lines
    assert [each["step"] for each in logged if "loss" in each] == [1, 2, 3, 4]
    assert any("eval_accuracy" in each for each in logged)
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["metrics"] == result.metrics
    model = HybridLM.from_pretrained(tmp_path / "run" / "model")
    assert record["state_bytes"] == result.state_bytes == model.state_bytes(1, 16)
    assert model.config.vocab_size == 32


def test_a_result_says_with_what_by_which_command_and_when_it_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/usr/bin/foveate", "train", "/home/me/run.toml"])
    before = datetime.now(UTC).replace(microsecond=0)
    train(config(tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["command"] == "foveate train run.toml"
    assert before <= datetime.fromisoformat(record["date"]) <= datetime.now(UTC)
    expected = {"python": platform.python_version(), "torch": torch.__version__, "foveate": foveate.__version__}
    assert record["versions"] == {**expected, "transformers": transformers.__version__}


def test_a_run_on_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    data = {"text": [str(path)], "length": 32, "isolate": True, "separator": "\n"}
    result = train(config(tmp_path / "run", data=data, learning_rate=1e-2, gradient_checkpointing=True))
    assert result.metrics["text"]["perplexity"] == pytest.approx(math.exp(result.metrics["text"]["loss"]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    model = HybridLM.from_pretrained(tmp_path / "run" / "model").eval()
    assert model.config.eos_token_id == tokenizer.eos_token_id
    made = model.generate(tokenizer("the ", return_tensors="pt").input_ids, max_new_tokens=3, do_sample=False)
    assert made.shape[1] <= 5 + 3


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = tmp_path / "whole"
    train(config(whole))
    expected = weights(whole / "model")
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    for name in ("checkpoint-4", "model"):
        shutil.rmtree(broken / name)
    result = train(config(broken, resume="auto"))
    assert result.resumed_from == broken / "checkpoint-2"
    assert result.as_dict()["resumed_from"] == str(broken / "checkpoint-2")
    assert result.steps == 4
    for name, value in weights(broken / "model").items():
        assert torch.allclose(value, expected[name], atol=1e-6), name
    named = train(config(tmp_path / "named", resume=str(whole / "checkpoint-2")))
    assert named.resumed_from == whole / "checkpoint-2"


def test_a_run_is_not_overwritten_and_auto_starts_fresh(tmp_path):
    result = train(config(tmp_path / "run", steps=2, resume="auto"))
    assert result.resumed_from is None
    with pytest.raises(ResultsError, match=r"holds a run already \(checkpoint-2\); set resume = 'auto'"):
        train(config(tmp_path / "run", steps=2))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-10]), "checkpoint is damaged"),
        ("model.safetensors", Path.unlink, "checkpoint is damaged"),
        ("optimizer.pt", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "is damaged"),
        ("scheduler.pt", Path.unlink, "checkpoint is damaged"),
        ("trainer_state.json", lambda path: path.write_text("{"), "checkpoint is damaged"),
        ("config.json", lambda path: path.write_text("[]"), "not a JSON object"),
    ],
)
def test_damaged_checkpoints_are_refused(run_once, tmp_path, file, damage, message):
    copy = tmp_path / "run"
    shutil.copytree(run_once, copy)
    damage(copy / "checkpoint-2" / file)
    with pytest.raises(DataError, match=message) as error:
        train(config(copy, resume="auto"))
    assert file in str(error.value)
    assert "resume from an earlier one" in str(error.value)


def rewrite(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    """Damage that leaves a valid file of tensors."""

    def damage(path: Path) -> None:
        held = load_file(path)
        change(held)
        save_file(held, path, {"format": "pt"})

    return damage


def without(name: str) -> Callable[[Path], Any]:
    def damage(path: Path) -> None:
        state = json.loads(path.read_text())
        del state[name]
        path.write_text(json.dumps(state))

    return damage


GATE = "layers.3.mixer.q_proj.weight"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", rewrite(lambda held: held.pop(GATE)), rf"it lacks the tensor {GATE} \[8, 16\]\)"),
        (
            "model.safetensors",
            rewrite(lambda held: [held.pop(name) for name in sorted(held)[:3]]),
            r"it lacks the tensor embed_tokens.weight \[32, 16\] and 2 more",
        ),
        (
            "model.safetensors",
            rewrite(lambda held: held.update({GATE: torch.zeros(4, 16)})),
            rf"the tensor {GATE} is \[4, 16\], allowed: \[8, 16\]",
        ),
        (
            "model.safetensors",
            rewrite(lambda held: held.update(other=torch.zeros(2))),
            r"the tensor other is \[2\], and the model has none of that name",
        ),
        (
            "model.safetensors",
            rewrite(lambda held: held[GATE].fill_(math.nan)),
            f"the tensor {GATE} has values that are not finite",
        ),
        (
            "model.safetensors",
            rewrite(lambda held: held[GATE][3, 5].fill_(math.inf)),
            f"the tensor {GATE} has values that are not finite",
        ),
        ("trainer_state.json", lambda path: path.write_text("{}"), "it has no global_step, allowed: a whole number"),
        ("trainer_state.json", without("train_batch_size"), "it has no train_batch_size"),
        (
            "trainer_state.json",
            lambda path: path.write_text('{"global_step": "2"}'),
            "it has global_step='2', allowed: a whole number",
        ),
    ],
    ids=["lacking", "lacking-three", "shape", "foreign", "nan", "one-inf", "empty-state", "no-batch", "text-step"],
)
def test_readable_checkpoints_of_something_else_are_refused(run_once, tmp_path, file, damage, message):
    copy = tmp_path / "run"
    shutil.copytree(run_once, copy)
    damage(copy / "checkpoint-2" / file)
    with pytest.raises(DataError, match=message) as error:
        train(config(copy, resume="auto", steps=3))
    assert str(error.value).startswith(str(copy / "checkpoint-2" / file))
    assert "resume from an earlier one" in str(error.value)


def test_checkpoints_from_before_an_option_are_taken(run_once, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_once, copy)
    without("experts")(copy / "checkpoint-2" / "config.json")
    without("spike_k")(copy / "checkpoint-2" / "config.json")
    assert train(config(copy, resume="auto", steps=3)).steps == 3
    with pytest.raises(DataError, match="a checkpoint of a model with shared_experts=1, but the run says 2"):
        train(config(copy, resume="auto", steps=4, model={**MODEL, "shared_experts": 2}))


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(config(folder, steps=2))
    return folder


def test_a_checkpoint_of_another_model_or_none_is_refused(run_once, tmp_path):
    checkpoint = str(run_once / "checkpoint-2")
    with pytest.raises(DataError, match="a checkpoint of a model with dim=16, but the run says 32"):
        train(config(tmp_path / "a", model={**MODEL, "dim": 32}, resume=checkpoint))
    with pytest.raises(DataError, match="no such checkpoint"):
        train(config(tmp_path / "b", resume=str(tmp_path / "nowhere")))


def test_stopping_at_an_accuracy(tmp_path):
    result = train(config(tmp_path / "run", steps=50, evaluate_every=1, save_every=50, stop_at=1e-9, batch=32))
    assert result.steps < 50


def test_only_matrices_decay(tmp_path, monkeypatch):
    from transformers import Trainer

    seen: list[str] = []
    monkeypatch.setattr(Trainer, "train", lambda self, **_: seen.extend(self.get_decay_parameter_names(self.model)))
    train(config(tmp_path / "run"))
    assert "layers.2.mixer.lower_bounds" in seen
    assert not [name for name in seen if "norm" in name or ("bias" in name and "lower" not in name)]


def test_reading_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nmixers = ["softmax", "gla:heads=4"]\ndim = 64\n\n'
        '[data]\ntask = "recall"\nlength = 32\ntask_options = { pairs = 3 }\nslices = [{ pairs = 2 }]\n\n'
        '[run]\noutput = "out"\nlearning_rate = 1\n'
    )
    read = TrainConfig.read(path)
    assert read.model == {"mixers": ["softmax", "gla:heads=4"], "dim": 64}
    assert read.data.slices == ({"pairs": 2},)
    assert (read.run.output, read.run.learning_rate, read.run.steps) == ("out", 1, 1000)


@pytest.mark.parametrize(
    ("tables", "error", "message"),
    [
        ({"runs": {}}, UnknownNameError, "no table 'runs'; did you mean run"),
        ({"data": TASK}, OptionError, r"without a table \[run\]"),
        ({"data": {"tsak": "mqar"}, "run": {}}, UnknownNameError, "DataConfig has no option 'tsak'; did you mean task"),
        ({"data": TASK, "run": {}}, OptionError, "RunConfig: output is missing"),
        ({"data": {}, "run": {"output": "x"}}, OptionError, "exactly one of a task and text files"),
        ({"data": {**TASK, "text": ["a"]}, "run": {"output": "x"}}, OptionError, "exactly one of a task and text"),
        ({"data": {"task": "copy"}, "run": {"output": "x"}}, OptionError, "task='copy', allowed: "),
        ({"data": TASK, "run": {"output": "x", "steps": 0}}, OptionError, "steps=0, allowed: >= 1"),
        ({"data": TASK, "run": {"output": "x", "precision": "int8"}}, OptionError, "precision='int8', allowed"),
        ({"data": TASK, "run": {"output": "x", "steps": "9"}}, OptionError, "steps='9', allowed: a value of type int"),
        ({"data": TASK, "run": {"output": 3}}, OptionError, "output=3, allowed: a value of type str"),
        ({"data": TASK, "run": "x"}, OptionError, r"run='x', allowed: a table \[run\]"),
        ({"data": TASK, "run": {"output": "x"}, "model": "gla"}, OptionError, r"model='gla', allowed: a table"),
        ({"data": {"text": [3]}, "run": {"output": "x"}}, OptionError, r"text=\[3\], allowed: files' names"),
        ({"data": {**TASK, "slices": ["a"]}, "run": {"output": "x"}}, OptionError, r"slices=\['a'\], allowed: tables"),
        (
            {"data": {**TASK, "task_options": {"vocab": "x"}}, "run": {"output": "x"}},
            OptionError,
            "mqar: vocab='x', allowed: a value of type int",
        ),
        (
            {"data": {**TASK, "slices": [{"pair": 3}]}, "run": {"output": "x"}},
            UnknownNameError,
            "'mqar' has no option 'pair'; did you mean pairs",
        ),
    ],
)
def test_bad_configs(tables, error, message):
    with pytest.raises(error, match=message):
        TrainConfig.from_dict(tables)


def test_bad_files_and_models(tmp_path):
    with pytest.raises(DataError, match="not a readable TOML file"):
        TrainConfig.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model")
    with pytest.raises(DataError, match="not a readable TOML file"):
        TrainConfig.read(tmp_path / "bad.toml")
    with pytest.raises(OptionError, match="vocab_size=10, allowed: >= 32"):
        train(config(tmp_path / "run", model={**MODEL, "vocab_size": 10}))
    with pytest.raises(OptionError, match="spike_k=3.0 in training, allowed: None"):
        train(config(tmp_path / "run", model={**MODEL, "spike_k": 3.0}))
    with pytest.raises(UnknownNameError, match="there is no mixer 'glas'"):
        train(config(tmp_path / "run", model={**MODEL, "mixers": ["glas"]}))
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot be made"):
        train(config(tmp_path / "file" / "run"))


def test_accuracy_counts_what_is_asked():
    assert recall_accuracy([[1, 2, 3]], [[-100, 2, 4]]) == 0.5
    assert math.isnan(recall_accuracy([[1]], [[-100]]))


def test_training_and_test_examples_differ():
    data = make_data(DataConfig(**TASK))
    assert not torch.equal(data.train.inputs[:8], data.tests["mqar"].inputs)
    assert data.vocab == 32
