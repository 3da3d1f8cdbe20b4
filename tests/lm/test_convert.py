"""Conversion of pretrained models, on tiny random ones."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from foveate.errors import (
    MissingPackageError,
    OptionError,
    ResultsError,
    UnknownNameError,
    UnsupportedModelError,
)
from foveate.hf.calibrations.base import Work
from foveate.lm import HybridLM
from foveate.lm.convert import run_convert
from foveate.lm.convert_config import ConvertConfig
from foveate.lm.data import PackedText, load_tokenizer
from foveate.lm.distill import distill, learned, overhearing, student_loss
from foveate.lm.pretrained import as_hybrid, mixer_at, replace_layers
from foveate.lm.stages import batch_rows, rate_factor
from tests.lm.converting import IDS, biased, converted, llama, logits
from tests.models import tiny

pytest.importorskip("peft", reason="finetuning needs peft")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and runs away\n" * 30)
    return str(path)


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 24}),
        ("qwen3", {}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
    ids=["llama", "tied", "wide-heads", "qwen3", "qwen2", "qwen2-tied"],
)
def test_a_llama_like_model_becomes_a_hybrid_that_computes_the_same(family, options):
    model = biased(tiny(family, **options))
    made = as_hybrid(model)
    assert torch.allclose(logits(made), logits(model), atol=1e-5)
    assert made.config.tie_embeddings == model.config.tie_word_embeddings
    assert not {each.data_ptr() for each in made.parameters()} & {each.data_ptr() for each in model.parameters()}


@pytest.mark.parametrize(
    "family, options, message",
    [
        ("phi3", {}, "weights '.*qkv_proj.weight' that Llama's layout lacks"),
        ("llama", {"attention_bias": True}, "weights '.*o_proj.bias' that Llama's layout lacks"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "with a sliding window"),
        ("mistral", {"sliding_window": 8}, "layers with a sliding window"),
        ("gemma3_text", {}, "allowed for conversion: rope_type 'default' with one rope_theta"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rotary parameters .*'linear'",
        ),
        ("llama", {"hidden_act": "gelu"}, "computes something else with them: its logits differ by .*, allowed: 0.001"),
    ],
)
def test_models_of_another_layout_are_refused(family, options, message):
    with pytest.raises(UnsupportedModelError, match=message):
        as_hybrid(tiny(family, **options))


@pytest.mark.parametrize(
    "settings, layers, chosen",
    [
        ({}, 6, (1, 3, 5)),
        ({"ratio": 0.75}, 8, (1, 2, 3, 5, 6, 7)),
        ({"ratio": 1.0}, 3, (0, 1, 2)),
        ({"ratio": 0.25}, 8, (3, 7)),
        ({"layers": (4, 0)}, 6, (0, 4)),
    ],
)
def test_which_layers_are_replaced(settings, layers, chosen):
    assert ConvertConfig(**settings).chosen(layers) == chosen


def test_layers_that_cannot_be_replaced_are_refused():
    for layers in ((), (6,), (-1,), (1, 1)):
        with pytest.raises(OptionError, match=r"allowed: different layers from 0 to 5, at least one"):
            ConvertConfig(layers=layers).chosen(6)
    with pytest.raises(OptionError, match=r"ratio=0.1 of 6 layers replaces none, allowed: >= 0.167"):
        ConvertConfig(ratio=0.1).chosen(6)


def test_new_mixers_start_from_the_projections_of_the_old():
    teacher = as_hybrid(llama())
    old = mixer_at(teacher, 1)
    same = mixer_at(replace_layers(teacher, [1], "hedgehog:feature_dim=8"), 1)
    assert same.q_map.weight.shape == (4, 16, 8)
    assert (same.kv_heads, same.rope.base) == (2, 10000.0)
    wider = mixer_at(replace_layers(teacher, [1], "lightning"), 1)
    for mixer in (same, wider):
        assert torch.equal(mixer.q_proj.weight, old.q_proj.weight)
        assert torch.equal(mixer.o_proj.weight, old.o_proj.weight)
    assert torch.equal(same.k_proj.weight, old.k_proj.weight)
    # Query heads 0 and 1 read the first head of k and v.
    per_head = wider.v_proj.weight.unflatten(0, (4, 16))
    assert torch.equal(per_head[0], old.v_proj.weight[:16])
    assert torch.equal(per_head[1], old.v_proj.weight[:16])
    assert torch.equal(per_head[2], old.v_proj.weight[16:])
    assert not {each.data_ptr() for each in wider.parameters()} & {each.data_ptr() for each in old.parameters()}


def test_a_softmax_layer_in_place_of_a_softmax_layer_changes_nothing():
    teacher = as_hybrid(llama())
    assert torch.equal(logits(replace_layers(teacher, [0, 2], "softmax")), logits(teacher))


@pytest.mark.parametrize(
    "to, message",
    [
        ("mamba2", "mamba2: has no q_proj, allowed: mixers with q_proj, k_proj, v_proj, o_proj"),
        ("linear:causal=false", "linear: is not causal, allowed: causal mixers"),
        ("gla:expand_k=0.5", r"gla: q_proj.weight is \[32, 64\], allowed: \[64, 64\], the replaced layer's"),
    ],
)
def test_mixers_that_do_not_fit_are_refused(to, message):
    with pytest.raises(OptionError, match=message):
        replace_layers(as_hybrid(llama()), [1], to)


def test_distillation_is_teacher_forced_layer_by_layer():
    teacher = as_hybrid(llama())
    student = replace_layers(teacher, [1, 3], "hedgehog")
    mixers = {index: mixer_at(student, index) for index in (1, 3)}
    heard: dict[int, Tensor] = {}
    pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def learn(index: int, x: Tensor, y: Tensor) -> None:
        pairs[index] = x, y
        heard[index] = student_loss(mixers[index], x, y, "weights")
        heard[index].backward()

    with overhearing(teacher, mixers, learn), torch.no_grad():
        found = teacher(IDS).logits
    assert torch.equal(found, logits(teacher))
    assert all(torch.allclose(mixer_at(teacher, index)(x)[0], y) for index, (x, y) in pairs.items())
    # The third layer's input comes of softmax in the first, not of its student.
    hidden = teacher(IDS, output_hidden_states=True).hidden_states[3]
    expected = mixers[3].mimicry(teacher.layers[3].mixer_norm(hidden))
    assert heard[3].item() == pytest.approx(expected.item(), rel=1e-6)
    moved = [name for name, each in student.named_parameters() if each.grad is not None and bool(each.grad.any())]
    assert moved == [f"layers.{index}.mixer.{side}_map.weight" for index in (1, 3) for side in "qk"]


@pytest.mark.parametrize("to", ["hedgehog", "hedgehog:feature_map=exp", "lightning", "gla", "linear"])
def test_distillation_brings_students_closer(to, text):
    teacher = as_hybrid(llama())
    student = replace_layers(teacher, [1], to)
    mixers = {1: mixer_at(student, 1)}
    data = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(1))
    config = ConvertConfig(distill_steps=12, batch=2, accumulate=1)
    before = {name: each.clone() for name, each in teacher.state_dict().items()}
    losses = distill(teacher, mixers, PackedText(data, data), config, Work(None))
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert all(torch.equal(each, before[name]) for name, each in teacher.state_dict().items())
    if to.startswith("hedgehog"):
        assert sorted(learned(mixers[1], "weights")) == ["k_map.weight", "q_map.weight"]


def test_a_conversion_trains_saves_and_comes_back(text, tmp_path):
    model = llama()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    made = converted(text, model, out=tmp_path / "run", finetune_rate=1e-2, finetune_steps=8)
    assert made.layers == (1, 3)
    assert list(made.perplexity) == ["base", "replaced", "distilled", "finetuned"]
    assert made.perplexity["finetuned"] < made.perplexity["distilled"]
    assert {name: len(each) for name, each in made.losses.items()} == {"distill": 4, "finetune": 8}
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert {each.name for each in (tmp_path / "run").iterdir()} == {"model", "distilled", "result.json"}
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["perplexity"] == made.perplexity
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert isinstance(loaded, HybridLM)
    assert torch.allclose(logits(loaded), logits(made.model), atol=1e-6)
    again = converted(text, model, out=tmp_path / "run", finetune_rate=1e-2, finetune_steps=8)
    assert again.perplexity == made.perplexity
    assert again.layers == made.layers
    assert torch.equal(logits(again.model), logits(loaded))
    with pytest.raises(ResultsError, match="holds another conversion, with other seed; name another folder"):
        converted(text, model, out=tmp_path / "run", finetune_rate=1e-2, finetune_steps=8, seed=1)
    with pytest.raises(ResultsError, match="holds another conversion, with other fingerprint"):
        converted(text, llama(seed=1), out=tmp_path / "run", finetune_rate=1e-2, finetune_steps=8)


def test_a_converted_model_generates_with_a_constant_state(text):
    model = converted(text, ratio=1.0).model
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    both = model.generate(IDS, attention_mask=mask, **options)
    alone = model.generate(IDS[:1, 7:], **options)
    assert both[0, 20:].tolist() == alone[0, 13:].tolist()
    sizes = []
    for length in (8, 20):
        with torch.no_grad():
            sizes.append(model(IDS[:1, :length], use_cache=True).past_key_values.bytes())
    assert sizes[0] == sizes[1] == model.state_bytes(1, 10**6)
    # Without a cache, the same tokens.
    plain = model.generate(IDS[:1, 7:], use_cache=False, **options)
    assert torch.equal(plain, alone)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    "after, finetune",
    [(3, "lora"), (5, "full"), (9, "lora"), (9, "full"), (12, "lora"), (12, "full")],
    ids=["distilling", "between", "low-rank", "full", "longer-low-rank", "longer-full"],
)
def test_an_interrupted_conversion_ends_where_a_whole_one_does(text, tmp_path, monkeypatch, after, finetune):
    settings = {"save_every": 2, "finetune": finetune, "finetune_steps": 6, "to": "hedgehog"}
    if after > 10:
        settings |= {"extend": (48,), "extend_steps": 4}
    whole = converted(text, out=tmp_path / "whole", **settings)
    notes: list[str] = []
    stopped: list[bool] = []

    def note(self: Work, message: str) -> None:
        notes.append(message)
        if len(notes) == after and not stopped:
            stopped.append(True)
            raise StoppedError

    monkeypatch.setattr(Work, "note", note)
    with pytest.raises(StoppedError):
        converted(text, out=tmp_path / "broken", **settings)
    assert not (tmp_path / "broken" / "result.json").exists()
    notes.clear()
    resumed = converted(text, out=tmp_path / "broken", **settings)
    assert len(notes) < 10
    for stage, losses in whole.losses.items():
        assert resumed.losses[stage] == pytest.approx(losses, rel=1e-6)
    assert resumed.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert torch.allclose(logits(resumed.model), logits(whole.model), atol=1e-5)


@pytest.mark.parametrize("to", ["lightning", "gla"])
def test_mixers_without_maps_learn_outputs(to, text):
    made = converted(text, to=to, layers=(2,), distill_steps=8)
    assert made.layers == (2,)
    assert made.losses["distill"][-1] < made.losses["distill"][0]
    assert made.perplexity["finetuned"] > 1
    with pytest.raises(OptionError, match="objective='weights' with '.*', allowed: 'outputs'"):
        converted(text, to=to, objective="weights")


def test_low_rank_updates_and_new_parameters_are_all_that_lora_moves(text):
    model = llama()
    made = converted(text, model, to="gla", layers=(1,), distill_steps=0, finetune_steps=3)
    start = replace_layers(as_hybrid(model), [1], "gla").state_dict()
    after = made.model.state_dict()
    moved = {name for name, each in after.items() if not torch.equal(each, start[name])}
    assert all(".mixer." in name for name in moved)
    assert {name.split(".")[3] for name in moved if name.startswith("layers.1.")} >= {"g_proj", "decay_proj", "o_norm"}
    for index in range(4):
        change = after[f"layers.{index}.mixer.q_proj.weight"] - start[f"layers.{index}.mixer.q_proj.weight"]
        assert 1 <= int(torch.linalg.matrix_rank(change, rtol=1e-3)) <= 8


def test_stages_may_be_left_out_and_a_model_keeps_its_dtype(text, tmp_path):
    llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    made = converted(text, model, distill_steps=0, finetune_steps=0)
    assert made.model.dtype == torch.bfloat16
    assert list(made.perplexity) == ["base", "replaced"]
    assert made.losses == {}
    assert logits(made.model).dtype == torch.bfloat16


def test_a_stage_ends_with_its_time(text):
    made = converted(text, distill_minutes=1e-9, finetune_steps=0)
    assert made.losses["distill"] == []
    assert made.perplexity["distilled"] == made.perplexity["replaced"]


def test_bfloat16_computation_trains_float32_weights(text):
    made = converted(text, precision="bfloat16", objective="outputs")
    assert made.model.dtype == torch.float32
    assert all(math.isfinite(each) for stage in made.losses.values() for each in stage)
    assert made.losses["distill"][-1] < made.losses["distill"][0]


def test_the_command_loads_a_folder_and_keeps_the_result(text, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    load_tokenizer().save_pretrained(tmp_path / "base")
    settings = ("length=32", "distill_steps=1", "finetune_steps=1", "finetune=full")
    made = run_convert(
        model=str(tmp_path / "base"),
        layers="0,2",
        text=[text],
        out=tmp_path / "run",
        settings=settings,
        device="cpu",
        progress=False,
    )
    assert made.layers == (0, 2)
    assert str(made).startswith("2 of 4 layers are hedgehog:heads=4,")
    assert str(tmp_path / "run" / "model") in str(made)
    longer = run_convert(
        model=str(tmp_path / "base"),
        to="gla,softmax",
        text=[text],
        out=tmp_path / "longer",
        settings=("length=32", "distill_steps=0", "finetune_steps=0", "extend_steps=1", "finetune=full", "upcycle=2"),
        extend="48,64",
        dense_layers="0,1",
        device="cpu",
        progress=False,
    )
    assert list(longer.losses) == ["extend-48", "extend-64"]
    assert (longer.layers, longer.model.config.dense_layers) == ((0, 2), [0, 1])
    for name in ("layers", "extend", "dense_layers"):
        with pytest.raises(OptionError, match=f"{name}='one', allowed: whole numbers separated by commas"):
            run_convert(**{name: "one"}, out=tmp_path / "other")
    with pytest.raises(OptionError, match="dense_layers among the settings, allowed: its own argument, --dense-layers"):
        run_convert(out=tmp_path / "other", settings=["dense_layers=3"])
    with pytest.raises(OptionError, match="text among the settings, allowed: its own argument, --text"):
        run_convert(out=tmp_path / "other", settings=["text=book.txt"])


def test_mistakes_are_refused_before_any_work(text, tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match="there is no mixer 'hedgehgo'; did you mean hedgehog"):
        converted(text, to="hedgehgo")
    with pytest.raises(UnknownNameError, match="convert has no option 'rato'; did you mean ratio"):
        converted(text, rato=0.5)
    with pytest.raises(OptionError, match="finetune='adapter', allowed: "):
        converted(text, finetune="adapter")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot be made"):
        converted(text, out=tmp_path / "file" / "run")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"finetuning with LoRA needs the package 'peft'"):
        converted(text)


def test_every_pass_over_the_examples_has_an_order_of_its_own():
    rows = torch.cat([batch_rows(5, 3, number, seed=0) for number in range(10)]).view(6, 5)
    assert all(sorted(each) == list(range(5)) for each in rows.tolist())
    assert len({tuple(each) for each in rows.tolist()}) > 1
    assert not torch.equal(batch_rows(100, 10, 0, seed=0), batch_rows(100, 10, 0, seed=1))


def test_the_rate_rises_and_falls():
    rates = [rate_factor(step / 100, 0.1) for step in range(101)]
    assert rates[10] == max(rates)
    assert rates[0] == pytest.approx(0.01)
    assert rates[100] == pytest.approx(0.1)
    assert rate_factor(0.0, 0.0) == 1.0
    assert dataclasses.replace(ConvertConfig(), seed=3).as_dict()["seed"] == 3
