"""Conversions into several mixers, experts and spikes: SpikingBrain's pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from foveate.errors import DataError, OptionError, ResultsError, UnknownNameError
from foveate.lm import HybridLM
from foveate.lm.convert_config import ConvertConfig, split_specs
from foveate.lm.data import PackedText
from foveate.lm.mlp import UpcycledMLP
from foveate.lm.pretrained import as_hybrid, mixer_at, replace_layers
from foveate.mixers.linear.spikes import SpikeLinear
from tests.lm.converting import VOCAB, biased, converted, llama, logits
from tests.models import tiny

pytest.importorskip("peft", reason="finetuning needs peft")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and runs away\n" * 30)
    return str(path)


def test_windows_as_wide_as_the_text_and_biases_change_nothing():
    """The converted model with its linear layers left out is the base model."""
    model = biased(tiny("qwen2", vocab_size=VOCAB, initializer_range=0.3))
    teacher = as_hybrid(model)
    student = replace_layers(teacher, [0, 1, 2], "spikingbrain-window:window=19")
    assert student.config.mixers[1].startswith("spikingbrain-window:heads=4,kv_heads=2,head_dim=16,rope_base=10000.0")
    assert torch.allclose(logits(student), logits(model), atol=1e-5)
    assert not torch.allclose(logits(replace_layers(teacher, [1], "spikingbrain-window:window=4")), logits(teacher))


@pytest.mark.parametrize("to", ["spikingbrain", "hedgehog"])
def test_biases_are_adopted_or_left_out_as_the_layer_has_them(to):
    teacher = as_hybrid(biased(tiny("qwen2")))
    mixer = mixer_at(replace_layers(teacher, [0], to), 0)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(getattr(mixer, name).bias, getattr(mixer_at(teacher, 0), name).bias)
    assert mixer_at(replace_layers(as_hybrid(llama()), [0], to), 0).q_proj.bias is None
    with pytest.raises(OptionError, match="gla: q_proj has no bias and the replaced layer's has one, allowed: mixers"):
        replace_layers(teacher, [0], "gla")


def names(model: HybridLM) -> list[str]:
    return [spec.partition(":")[0] for spec in model.config.mixers]


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("hedgehog", ["hedgehog"]),
        ("hedgehog:feature_dim=8,tied=true", ["hedgehog:feature_dim=8,tied=true"]),
        ("gla, softmax ,gla", ["gla", "softmax", "gla"]),
        (
            "gla:heads=4,gate_rank=8,softmax:window=9,spikingbrain",
            ["gla:heads=4,gate_rank=8", "softmax:window=9", "spikingbrain"],
        ),
    ],
)
def test_several_specs_in_one_text(text, specs):
    assert split_specs(text) == tuple(specs)


def test_layers_take_mixers_in_turn():
    teacher = as_hybrid(llama())
    made = replace_layers(teacher, [0, 1, 3], ("spikingbrain", "spikingbrain-window:window=4"))
    assert names(made) == ["spikingbrain", "spikingbrain-window", "softmax", "spikingbrain-window"]
    assert torch.equal(mixer_at(made, 3).q_proj.weight, mixer_at(teacher, 3).q_proj.weight)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({"to": "spikingbrain,spikingbrain-window"}, (0, 1, 2, 3, 4, 5)),
        ({"to": ("spikingbrain", "spikingbrain-window"), "ratio": 0.5}, (1, 3, 5)),
        ({"to": ("gla", "softmax", "hgrn2")}, (0, 2, 3, 5)),
        ({"to": ("softmax", "softmax", "softmax", "gla", "softmax", "linear")}, (3, 5)),
        ({"to": "gla,softmax", "layers": (1, 2)}, (2,)),
        ({"to": "softmax"}, (1, 3, 5)),
    ],
)
def test_which_layers_a_cycle_replaces(settings, chosen):
    assert ConvertConfig(**settings).chosen(6) == chosen


def test_cycles_that_do_not_fit_are_refused():
    with pytest.raises(OptionError, match="to names 3 mixers, allowed: at most 2, one per layer"):
        ConvertConfig(to=("gla", "gla", "linear")).chosen(2)
    with pytest.raises(OptionError, match=r"to='softmax,gla' leaves layers \[0, 2\] as they are, allowed: a new"):
        ConvertConfig(to="softmax,gla", layers=(0, 2)).chosen(4)
    with pytest.raises(UnknownNameError, match="there is no mixer 'glas'; did you mean gla"):
        ConvertConfig(to="gla,glas")
    for to in ("", (), ("gla", 3)):
        with pytest.raises(OptionError, match=r"to=.*, allowed: mixers' specs, at least one"):
            ConvertConfig(to=to)


def test_the_whole_of_spikingbrain(text, tmp_path):
    """Two kinds of layers, experts, a longer context and spikes, and it comes back."""
    model = biased(tiny("qwen2", vocab_size=VOCAB, num_hidden_layers=4, initializer_range=0.3))
    settings = {
        "to": "spikingbrain,spikingbrain-window:window=8",
        "distill_steps": 0,
        "finetune": "full",
        "finetune_steps": 12,
        "finetune_rate": 3e-3,
        "extend": (48, 64),
        "extend_steps": 3,
        "upcycle": 4,
        "router_noise": 0.1,
        "dense_layers": (0,),
        "spikes": 3.0,
        "spike_group": 32,
        "out": tmp_path / "run",
    }
    made = converted(text, model, **settings)
    assert names(made.model) == ["spikingbrain", "spikingbrain-window"] * 2
    assert [isinstance(block.mlp, UpcycledMLP) for block in made.model.layers] == [False, True, True, True]
    stages = ["base", "replaced", "upcycled", "finetuned", "extended-48", "extended-64", "spiking"]
    assert list(made.perplexity) == stages
    assert {name: len(each) for name, each in made.losses.items()} == {"finetune": 12, "extend-48": 3, "extend-64": 3}
    assert made.perplexity["finetuned"] < made.perplexity["replaced"]
    assert made.perplexity["spiking"] != made.perplexity["extended-64"]
    assert {each.name for each in (tmp_path / "run").iterdir()} == {"model", "distilled", "result.json"}
    assert str(made).startswith("4 of 4 layers are spikingbrain:heads=4,")
    assert " and spikingbrain-window:heads=4," in str(made)
    again = converted(text, model, **settings)
    assert isinstance(again.model.layers[2].mixer.q_proj, SpikeLinear)
    assert torch.equal(logits(again.model), logits(made.model))
    # A record from before a setting is one with its default.
    path = tmp_path / "run" / "result.json"
    record = json.loads(path.read_text())
    del record["config"]["upcycle_shared"]
    path.write_text(json.dumps(record))
    assert converted(text, model, **settings).perplexity == made.perplexity
    with pytest.raises(ResultsError, match="holds another conversion, with other upcycle_shared"):
        converted(text, model, **{**settings, "upcycle_shared": 2})


def test_further_stages_read_the_training_text_in_longer_blocks(text):
    data = PackedText(torch.arange(12).view(4, 3), torch.arange(1, 13).view(4, 3))
    longer = data.in_blocks(5)
    assert longer.tokens.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert longer.targets.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    with pytest.raises(DataError, match="12 tokens of text make no block of 13; give more text"):
        data.in_blocks(13)
    with pytest.raises(DataError, match="make no block of 100000"):
        converted(text, extend=(100000,))


def test_settings_of_experts_and_stages_are_checked(text):
    for settings, message in (
        ({"upcycle": 4}, "upcycle=4 with finetune='lora', allowed: finetune='full'"),
        ({"upcycle": 2, "upcycle_top": 3, "finetune": "full"}, "upcycle_top=3, allowed: <= upcycle = 2"),
        ({"upcycle_scale": "half"}, "upcycle_scale='half', allowed: "),
        ({"extend": (1,)}, r"extend=\[1\], allowed: different lengths >= 2"),
        ({"extend": (8, 8)}, r"extend=\[8, 8\], allowed: different lengths >= 2"),
        ({"router_noise": 0.1}, "router_noise=0.1 with upcycle=0, allowed: with upcycle >= 1"),
        ({"extend": ("64",)}, r"extend=\['64'\], allowed: values of type int"),
        ({"upcycle": 2, "finetune": "full", "dense_layers": (4,)}, r"dense_layers=\[4\], allowed: from 0 to 3"),
        ({"layers": (1.5,)}, r"layers=\[1.5\], allowed: values of type int"),
        ({"spikes": 0.0}, "spikes=0.0, allowed: > 0"),
        ({"to": "hedgehog,gla", "objective": "weights"}, "objective='weights' with 'gla', allowed: 'outputs'"),
    ):
        with pytest.raises(OptionError, match=message):
            converted(text, **settings)
