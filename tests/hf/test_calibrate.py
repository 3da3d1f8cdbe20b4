"""Calibrations on tiny models: what is trained and measured, saving, resuming, and the model left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import foveate.hf.calibrations.duo as duo_module
from foveate.attention.plan import Plan
from foveate.errors import OptionError, ProfileError, UnknownNameError, UnsupportedModelError
from foveate.hf import apply
from foveate.hf.calibrate import calibrate, calibration_names
from foveate.hf.calibrations.compresskv import Meter, output_projection
from foveate.hf.calibrations.duo import DuoCalibration, Passes, TwoWay, lr_factor
from foveate.hf.calibrations.passkeys import PasskeyPrompts
from foveate.hf.identity import identify
from foveate.hf.modules import attention_modules, decoder_of
from foveate.hf.subject import ModelSubject
from foveate.methods import Method
from foveate.methods.calibrated import table_profile
from foveate.methods.keep.compresskv import CompressKV
from foveate.methods.keep.duo import streaming_plan
from foveate.methods.profile import Profile, load
from foveate.methods.step import Step
from tests.models import tiny
from tests.toy_tokenizer import ToyTokenizer

SMALL = {"sinks": 2, "window": 6, "passkeys": 2, "words": 2, "min_length": 48, "max_length": 64, "progress": False}


@pytest.fixture
def model() -> Any:
    return tiny("llama")


def gates_of(profile: Profile) -> torch.Tensor:
    return profile.tensors["alpha"]


def test_duo_trains_gates_and_nothing_else(model: Any, tmp_path: Path) -> None:
    model.train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    profile = calibrate("duo", model, ToyTokenizer(), out=tmp_path / "duo", steps=4, l1=1.0, lr=0.3, **SMALL)
    assert gates_of(profile).shape == (3, 2)
    assert bool((gates_of(profile) < 1).any())
    assert bool(((gates_of(profile) >= 0) & (gates_of(profile) <= 1)).all())
    assert profile.settings["steps"] == 4
    assert profile.settings["distances"][0] == 0.0
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert all(each.requires_grad for each in model.parameters())
    assert all(each.grad is None for each in model.parameters())
    assert model.training
    assert torch.equal(gates_of(load(tmp_path / "duo", "duo")), gates_of(profile))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["duo"]
    with apply(model.eval(), "duo", profile=str(tmp_path / "duo"), sinks=2, window=4) as run:
        model.generate(torch.randint(3, 128, (1, 30)), max_new_tokens=3, do_sample=False)
        held = {held for row in run.stats.lengths for held in row}
    assert held == {6, 32}


def test_an_interrupted_calibration_goes_on_where_it_stopped(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = ToyTokenizer()
    options = {"steps": 6, "save_every": 2, "l1": 1.0, **SMALL}
    whole = calibrate("duo", model, tokenizer, out=tmp_path / "whole", **options)
    step = duo_module.Training.step

    def interrupted(self: Any, *given: Any) -> float:
        if self.done == 4:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(duo_module.Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate("duo", model, tokenizer, out=tmp_path / "resumed", **options)
    assert not (tmp_path / "resumed").exists()
    assert all(each.requires_grad for each in model.parameters())
    calls = []

    def counted(self: Any, *given: Any) -> float:
        calls.append(self.done)
        return step(self, *given)

    monkeypatch.setattr(duo_module.Training, "step", counted)
    resumed = calibrate("duo", model, tokenizer, out=tmp_path / "resumed", **options)
    assert calls == [4, 5]
    torch.testing.assert_close(gates_of(resumed), gates_of(whole), rtol=1e-5, atol=1e-6)
    assert resumed.settings["distances"] == pytest.approx(whole.settings["distances"], rel=1e-4)
    assert not (tmp_path / "resumed.partial").exists()


def test_unfinished_work_of_other_settings_is_not_continued(model: Any, tmp_path: Path) -> None:
    Profile("duo.partial", identify(model), {"alpha": torch.zeros(3, 2)}, {"settings": {}, "done": 1}).save(
        tmp_path / "duo.partial"
    )
    assert calibrate("duo", model, ToyTokenizer(), out=tmp_path / "duo", steps=1, **SMALL).settings["distances"] == [
        0.0
    ]
    Profile("duo.partial", identify(tiny(seed=3)), {"alpha": torch.zeros(3, 2)}).save(tmp_path / "duo.partial")
    with pytest.raises(ProfileError, match="delete that folder"):
        calibrate("duo", model, ToyTokenizer(), out=tmp_path / "duo", steps=1, **SMALL)


class Streaming(Method):
    """A model in which every head streams."""

    acts_in = frozenset({"prefill"})

    def plan(self, step: Step) -> Plan:
        return streaming_plan(2, 6)


def test_gates_at_one_are_the_model_and_at_zero_a_streaming_model(model: Any) -> None:
    ids = torch.randint(3, 128, (1, 40))
    decoder = decoder_of(model)
    with torch.no_grad():
        plain = decoder(ids, use_cache=False).last_hidden_state
        with apply(model, Streaming()):
            streaming = decoder(ids, use_cache=False).last_hidden_state
        passes = Passes(torch.ones(3, 2))
        with apply(model, TwoWay(passes=passes, sinks=2, window=6)):
            first = decoder(ids, use_cache=False).last_hidden_state
            passes.gated = True
            ones = decoder(ids, use_cache=False).last_hidden_state
            passes.gates.zero_()
            zeros = decoder(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(first, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(ones, first)
    torch.testing.assert_close(zeros, streaming, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(zeros, plain, atol=1e-3)


def test_the_gates_gradient_equals_finite_differences(model: Any) -> None:
    ids = torch.randint(3, 128, (1, 30))
    decoder = decoder_of(model)
    passes = Passes(torch.full((3, 2), 0.5, requires_grad=True))

    def distance() -> torch.Tensor:
        return (decoder(ids, use_cache=False).last_hidden_state - target).square().mean()

    with apply(model, TwoWay(passes=passes, sinks=2, window=6)):
        with torch.no_grad():
            target = decoder(ids, use_cache=False).last_hidden_state
        passes.gated = True
        (grad,) = torch.autograd.grad(distance(), passes.gates)
        with torch.no_grad():
            for layer, head in ((0, 1), (2, 0)):
                shifted = []
                for shift in (0.02, -0.02):
                    passes.gates[layer, head] = 0.5 + shift
                    shifted.append(distance().item())
                passes.gates[layer, head] = 0.5
                assert grad[layer, head].item() == pytest.approx((shifted[0] - shifted[1]) / 0.04, rel=0.02)


def test_layers_with_a_window_of_their_own_get_no_gate(tmp_path: Path) -> None:
    profile = calibrate("duo", tiny("gemma3_text"), ToyTokenizer(), out=tmp_path / "duo", steps=1, **SMALL)
    assert gates_of(profile).isnan().tolist() == [[True, True], [False, False], [True, True]]


def test_learning_rate_rises_and_falls() -> None:
    factors = [lr_factor(step, 50) for step in range(50)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[4] == pytest.approx(0.5)
    assert factors[10:40] == [1.0] * 30
    assert factors[45] == pytest.approx(0.5)
    assert factors[49] == pytest.approx(0.1)


def test_prompts_hold_their_passkeys_and_mark_the_answers() -> None:
    tokenizer = ToyTokenizer(10**6)
    ids, asked = PasskeyPrompts(tokenizer, (200,), 3, 4).sample("seed")
    again, _ = PasskeyPrompts(tokenizer, (200,), 3, 4).sample("seed")
    assert torch.equal(ids, again)
    assert not torch.equal(ids, PasskeyPrompts(tokenizer, (200,), 3, 4).sample("other")[0])
    assert int((~asked).sum()) == 200
    assert not asked[0, :200].any()
    tail = tokenizer.decode(ids[0, 200:].tolist())
    context = ids[0, :200].tolist()
    for sentence in tail.split("Answer")[1:]:
        key = tokenizer(sentence.split(" . ")[0].strip(": "))["input_ids"][:4]
        assert any(context[at : at + 4] == key for at in range(200))


def test_razor_measures_heads_that_the_method_reads(model: Any, tmp_path: Path) -> None:
    profile = calibrate("razor", model, ToyTokenizer(), out=tmp_path / "razor", tokens=8, repeats=3, progress=False)
    assert {name: list(each.shape) for name, each in profile.tensors.items()} == {"induction": [3, 4], "echo": [3, 4]}
    ids = torch.randint(3, 128, (1, 40))
    with apply(model, "razor", profile=str(tmp_path / "razor"), least=4, sinks=2, compression=20.0) as run:
        model.generate(ids, max_new_tokens=3, do_sample=False)
        held = {held for row in run.stats.lengths for held in row}
    assert held == {7, 42}


def test_error_of_eviction_is_the_relative_change_of_the_layers_output(model: Any) -> None:
    identity = identify(model)
    flat = torch.full((3,), 1 / 3)
    profile = table_profile("compresskv", identity, semantic=torch.rand(3, 4), error=flat)
    method = CompressKV(budget=12, window=4, allocate=False, profile=profile).for_model(identity)
    meter = Meter(method, [output_projection(each) for each in attention_modules(model)])
    ids = torch.randint(3, 128, (1, 33))
    heard: dict[int, Step] = {}

    def hear(step: Step) -> None:
        meter.hear(step)
        heard[step.layer] = step

    with ModelSubject(model).session(hear) as session:
        session.feed(ids[:, :32])
        session.feed(ids[:, 32:])
    for layer, module in enumerate(attention_modules(model)):
        step = heard[layer]
        slots = meter.kept[layer]
        assert slots is not None
        kept = [*slots[0, 0].tolist(), 32]
        assert len(kept) == 13
        outs = []
        for keep in (kept, list(range(33))):
            k, v = (each[:, :, keep].repeat_interleave(2, 1) for each in (step.k, step.v))
            o = (step.q @ k.mT * step.scale).softmax(-1) @ v
            outs.append(module.o_proj(o.transpose(1, 2).flatten(2)))
        expected = (outs[0] - outs[1]).norm() / outs[1].norm()
        assert meter.errors[layer] == pytest.approx(expected.item(), rel=1e-4)


def test_refusals_come_before_any_work(model: Any, tmp_path: Path) -> None:
    assert calibration_names() == ["compresskv", "duo", "echoatt", "moa", "razor", "retrieval-heads", "tca"]
    with pytest.raises(UnknownNameError, match="no calibration 'due'; did you mean duo"):
        calibrate("due", model, ToyTokenizer())
    with pytest.raises(UnknownNameError, match="calibration 'duo' has no option 'step'; did you mean"):
        calibrate("duo", model, ToyTokenizer(), step=3)
    with pytest.raises(OptionError, match=r"steps=0, allowed: >= 1"):
        calibrate("duo", model, ToyTokenizer(), steps=0)
    with pytest.raises(OptionError, match="max_length=10, allowed: >= min_length=20"):
        DuoCalibration(min_length=20, max_length=10)
    with pytest.raises(OptionError, match="tokenizer=None"):
        calibrate("duo", model, None)
    with pytest.raises(OptionError, match="budget=900, allowed: < max_length=768"):
        calibrate("compresskv", model, ToyTokenizer(), budget=900)
    with pytest.raises(UnsupportedModelError, match="no transformers PreTrainedModel"):
        calibrate("duo", torch.nn.Linear(2, 2), ToyTokenizer())
    assert not list(tmp_path.iterdir())
