"""Decode steps over flat rows with lengths on the device, run eagerly here; what they record on a GPU is the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from foveate.errors import UnsupportedModelError
from foveate.hf import apply
from foveate.hf import graph as graphs
from foveate.hf.compat import cache_keyword
from foveate.hf.graph import GraphedForward
from tests.models import GREEDY, prompts, tiny

STEADY = ["full", "snapkv:budget=16,window=4", "adakv:budget=16,window=4", "expected-attention:budget=12"]


@contextmanager
def flat(model: Any, method: str) -> Iterator[Any]:
    """`apply` whose decode steps run over flat layers, without a graph."""
    with apply(model, method) as run:
        run._graphed = GraphedForward(model.forward, run.method, lambda: run.runtime.request, record=False)
        model.forward = run._graphed
        yield run


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        return model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **options})


@pytest.mark.parametrize("method", STEADY)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_is_the_eager_decode(family: str, method: str) -> None:
    model = tiny(family)
    ids, _ = prompts(length=24, pads=(0, 0))
    with apply(model, method) as eager:
        expected = generate(model, ids, max_new_tokens=9)
    with flat(model, method) as run:
        assert torch.equal(generate(model, ids, max_new_tokens=9), expected)
        assert run._graphed.recording.left == graphs.ROOM - 8
    assert "forward" not in model.__dict__
    for layer in range(len(run.modules)):
        assert torch.equal(run.stats.positions(layer, 0, row=1), eager.stats.positions(layer, 0, row=1))
    assert run.stats.decode_density == eager.stats.decode_density


def test_room_that_is_used_up_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "ROOM", 3)
    model = tiny("llama")
    ids, _ = prompts(length=20, pads=(0,))
    with apply(model, "adakv:budget=12,window=4"):
        expected = generate(model, ids, max_new_tokens=12)
    with flat(model, "adakv:budget=12,window=4"):
        assert torch.equal(generate(model, ids, max_new_tokens=12), expected)


def test_beams_and_turns_between_recorded_steps() -> None:
    model = tiny("llama")
    ids, _ = prompts(length=20, pads=(0,))
    beams = {"num_beams": 3, "max_new_tokens": 7}
    with apply(model, "full"):
        expected = generate(model, ids, **beams)
    with flat(model, "full") as run:
        assert torch.equal(generate(model, ids, **beams), expected)
        cache = run.new_cache()
        with torch.no_grad():
            for part in (ids[:, :8], ids[:, 8:9], ids[:, 9:12], ids[:, 12:13], ids[:, 13:14]):
                logits = model(part, **{cache_keyword(model): cache}).logits
    with torch.no_grad():
        torch.testing.assert_close(logits[:, -1], model(ids[:, :14]).logits[:, -1], rtol=1e-5, atol=1e-5)


def test_a_method_that_acts_in_decode_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="decides at the end of the prompt"):
        apply(tiny("llama"), "quest", cuda_graph=True)


def test_what_cannot_be_recorded_runs_eagerly_and_says_why() -> None:
    model = tiny("llama")
    ids, mask = prompts(length=16, pads=(3, 0))
    with apply(model, "full"), torch.no_grad():
        expected = model.generate(ids, attention_mask=mask, **GREEDY)
    with flat(model, "full"), pytest.warns(UserWarning, match="padded"), torch.no_grad():
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    with apply(model, "full", cuda_graph=True), pytest.warns(UserWarning, match="needs a GPU"), torch.no_grad():
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
