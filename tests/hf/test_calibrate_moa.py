"""MoA's calibration on a tiny model: gradients at attention outputs, the search, and the profile in use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foveate.errors import OptionError
from foveate.hf import apply
from foveate.hf.calibrate import calibrate
from foveate.hf.calibrations.base import frozen
from foveate.hf.calibrations.moa import Listen, MoACalibration
from foveate.methods.profile import load
from tests.models import tiny
from tests.toy_tokenizer import ToyTokenizer

SMALL = {"length": 96, "block": 16, "samples": 2, "passkeys": 2, "words": 2, "progress": False}


def test_a_profile_is_made_saved_and_used(tmp_path: Path) -> None:
    model = tiny("llama")
    profile = calibrate("moa", model, ToyTokenizer(), out=tmp_path / "moa", **SMALL)
    alpha, beta = profile.tensors["alpha"], profile.tensors["beta"]
    assert alpha.shape == beta.shape == (3, 2)
    assert profile.settings["stored_share"] <= 0.5
    assert 0 < profile.settings["masked_influence"] < profile.settings["whole_influence"]
    assert torch.equal(load(tmp_path / "moa", "moa").tensors["beta"], beta)
    assert all(each.requires_grad and each.grad is None for each in model.parameters())
    options = {"sinks": 4, "minimum": 8, "multiple": 4, "new_tokens": 4}
    with apply(model, "moa", profile=str(tmp_path / "moa"), **options) as run:
        model.generate(torch.randint(3, 128, (1, 60)), max_new_tokens=4, do_sample=False)
        held = [held for row in run.stats.lengths for held in row]
    assert min(held) < 63


def test_a_greater_bound_masks_less(tmp_path: Path) -> None:
    model, masked = tiny("llama"), []
    for bound in (0.4, 0.7, 1.0):
        profile = calibrate("moa", model, ToyTokenizer(), out=tmp_path / str(bound), bound=bound, **SMALL)
        masked.append(profile.settings["masked_influence"])
    assert masked[0] > masked[1] > masked[2]
    assert masked[2] == pytest.approx(0, abs=1e-12)


def test_gradients_flow_through_later_layers() -> None:
    """The gradient at the first layer's output is that of the whole model: checked by a small step along it."""
    model, listen = tiny("llama"), Listen()
    ids = torch.randint(3, 128, (1, 12))
    with frozen(model), apply(model, listen):
        loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
        outputs = [listen.heard[layer].o for layer in range(3)]
        grads = torch.autograd.grad(loss, outputs)
    nudge = torch.randn_like(grads[0])
    changed = []
    for sign in (1.0, -1.0):
        hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda module, given, sign=sign: (given[0] + sign * 1e-2 * nudge.transpose(1, 2).flatten(2),)
        )
        with torch.no_grad():
            changed.append(model(input_ids=ids).logits.double().square().mean())
        hook.remove()
    slope = float(changed[0] - changed[1]) / 2e-2
    assert slope == pytest.approx(float((grads[0] * nudge).sum()), rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": 100}, "multiple of block=64"), ({"length": 64}, "at least two"), ({"target": 128}, ">= length=768")],
)
def test_bad_settings(options: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MoACalibration(**options)
