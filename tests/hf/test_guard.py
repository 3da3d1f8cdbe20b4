"""Requests that break off, that take turns, that come from two threads, or whose inputs do not fit."""

from __future__ import annotations

import gc
import logging
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from foveate import registry
from foveate.errors import ShapeError, StateError, UnknownNameError, UnsupportedModelError
from foveate.hf import apply
from foveate.hf.compat import cache_keyword, cache_of
from foveate.hf.subject import ModelSubject
from foveate.methods import create
from tests.methods.bound import bind_profile
from tests.models import GREEDY, prompts, tiny

SNAP = "snapkv:budget=24,window=8"
CARDS = registry.cards(kind=registry.METHOD_KINDS)


class BrokenOffError(Exception):
    """A user's own."""


def forward(model: Any, ids: torch.Tensor, cache: Any = None, **options: Any) -> torch.Tensor:
    held = {} if cache is None else {cache_keyword(model): cache}
    with torch.no_grad():
        return model(ids, **held, use_cache=True, **options).logits


def break_off(module: torch.nn.Module, args: Any, given: Any) -> None:
    raise BrokenOffError


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_request_that_broke_off_does_not_go_on(card: Any, model: Any) -> None:
    """Some layers hold the token, others do not: the same cache would answer wrongly from then on."""
    ids, _ = prompts(rows=2, pads=(0, 0))
    method = bind_profile(create(card.name, **(card.small or {})), model)
    with apply(model, method) as run:
        cache = run.new_cache()
        forward(model, ids, cache)
        forward(model, torch.full((2, 1), 5), cache)
        hook = model.model.layers[1].self_attn.register_forward_pre_hook(break_off, with_kwargs=True)
        with pytest.raises(BrokenOffError):
            forward(model, torch.full((2, 1), 6), cache)
        hook.remove()
        with pytest.raises(StateError, match="interrupted .*start a new cache"):
            forward(model, torch.full((2, 1), 6), cache)
        first, second = run.new_cache(), run.new_cache()
        assert torch.equal(forward(model, ids, first), forward(model, ids, second))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_broken_prompt_or_a_broken_method(layer: int, model: Any) -> None:
    """Within the last layer all layers hold the same number of tokens; what stays was not decided there."""
    ids, _ = prompts(rows=1, pads=(0,))

    class Breaks(type(create("full"))):  # type: ignore[misc]
        def attend(self, step: Any) -> torch.Tensor:
            if step.layer == layer:
                raise BrokenOffError
            return super().attend(step)

    with apply(model, Breaks()) as run:
        cache = run.new_cache()
        for error in (BrokenOffError, StateError):
            with pytest.raises(error):
                forward(model, ids, cache)
        cache.reset()
        with pytest.raises(BrokenOffError):
            forward(model, ids, cache)


def test_chunked_requests_take_turns(model: Any) -> None:
    """The decode step of one request does not end the prompt of another."""
    ids, _ = prompts(rows=2, pads=(0, 0))
    one, two, token = ids[:1], ids[1:], torch.tensor([[5]])

    def alone(prompt: torch.Tensor, run: Any) -> tuple[torch.Tensor, list[list[float]]]:
        cache = run.new_cache()
        for start in range(0, 64, 16):
            forward(model, prompt[:, start : start + 16], cache)
        return forward(model, token, cache), run.stats.lengths

    with apply(model, SNAP, chunked=True) as run:
        expected = [alone(one, run), alone(two, run)]
        a, b = run.new_cache(), run.new_cache()
        for start in range(0, 64, 16):
            forward(model, one[:, start : start + 16], a)
        forward(model, two[:, :16], b)
        out_a, held_a = forward(model, token, a), run.stats.lengths
        for start in range(16, 64, 16):
            forward(model, two[:, start : start + 16], b)
        out_b, held_b = forward(model, token, b), run.stats.lengths
    assert torch.equal(out_a, expected[0][0])
    assert torch.equal(out_b, expected[1][0])
    assert [held_a, held_b] == [[[25.0, 25.0]] * 3] * 2 == [each[1] for each in expected]


def test_finish_prefill_of_a_cache_and_of_the_latest(model: Any) -> None:
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, SNAP, chunked=True) as run:
        run.finish_prefill()
        a, b = run.new_cache(), run.new_cache()
        for cache in (a, b):
            forward(model, ids[:, :32], cache)
            forward(model, ids[:, 32:], cache)
        run.finish_prefill(a)
        assert [cache.layers[0].store.stored for cache in (a, b)] == [24, 64]
        run.finish_prefill()
        assert b.layers[0].store.stored == 24


def test_a_prompt_in_pieces_is_reordered_whole(model: Any) -> None:
    ids, _ = prompts(rows=2, pads=(0, 0))
    token = torch.tensor([[5], [5]])
    with apply(model, SNAP, chunked=True) as run:
        outs = []
        for order in ([0, 1], [1, 0]):
            cache = run.new_cache()
            forward(model, ids[:, :32], cache)
            forward(model, ids[:, 32:], cache)
            cache.reorder_cache(torch.tensor(order))
            outs.append(forward(model, token, cache))
    torch.testing.assert_close(outs[1].flip(0), outs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_dropped_cache_is_freed(chunked: bool, model: Any) -> None:
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, SNAP, chunked=chunked) as run:
        cache = run.new_cache()
        forward(model, ids[:, :32], cache)
        held = weakref.ref(cache.layers[0].store)
        forward(model, ids[:, :32], run.new_cache())
        del cache
        gc.collect()
        assert held() is None


def test_a_second_thread_is_refused_and_the_first_unharmed(model: Any) -> None:
    ids, _ = prompts(rows=2, pads=(0, 0))
    errors: list[BaseException | None] = []

    def other() -> None:
        try:
            forward(model, ids[1:])
        except StateError as error:
            errors.append(error)

    def meanwhile(module: torch.nn.Module, args: Any, given: Any) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with apply(model, SNAP) as run:
        expected = forward(model, ids[:1])
        hook = model.model.layers[1].self_attn.register_forward_pre_hook(meanwhile, with_kwargs=True)
        assert torch.equal(forward(model, ids[:1]), expected)
        hook.remove()
        assert len(errors) == 1
        assert "one thread at a time" in str(errors[0])
        # Taking turns is allowed, also after a forward that raised.
        hook = model.model.layers[1].self_attn.register_forward_pre_hook(break_off, with_kwargs=True)
        with pytest.raises(BrokenOffError):
            forward(model, ids[:1])
        hook.remove()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(errors) == 1
        assert run.stats.seen == 64


def test_inputs_that_do_not_fit(model: Any) -> None:
    ids, mask = prompts(length=24, pads=(7, 3, 0))
    with apply(model, SNAP) as run:
        with pytest.raises(ShapeError, match=r"\[3, 20\], allowed: \[3, 24\]"):
            forward(model, ids, attention_mask=mask[:, :20])
        with pytest.raises(ShapeError, match=r"\[3, 24\], allowed: \[3, 20\]"):
            forward(model, ids[:, :20], attention_mask=mask)
        with pytest.raises(ShapeError, match=r"\[2, 24\], allowed: \[3, 24\]"):
            forward(model, ids, attention_mask=mask[:2])
        with pytest.raises(ShapeError, match="no token"):
            forward(model, ids[:, :0])
        cache = run.new_cache()
        forward(model, ids, cache, attention_mask=mask)
        with pytest.raises(ShapeError, match="24 tokens in the cache and 1 of the input"):
            forward(model, ids[:, :1], cache, attention_mask=mask)
        with pytest.raises(ShapeError, match=r"allowed: \[3, 25\]"):
            forward(model, ids[:, :1], cache, attention_mask=torch.ones(3, 26))
        longer = torch.cat((mask, torch.ones(3, 1, dtype=mask.dtype)), 1)
        assert torch.isfinite(forward(model, ids[:, 1:2], cache, attention_mask=longer)).all()


def test_an_empty_prompt_of_generate(model: Any) -> None:
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, SNAP), pytest.raises(ShapeError, match="no token"):
        model.generate(ids[:, :0], **GREEDY)


@pytest.mark.parametrize("method", [None, 5])
def test_what_is_no_method(method: Any, model: Any) -> None:
    with pytest.raises(TypeError, match="allowed: a name or spec"):
        apply(model, method)


@pytest.mark.parametrize("name", ["landmark", "softmax"])
def test_mixers_are_no_methods(name: str, model: Any) -> None:
    """Even those whose options are required."""
    with pytest.raises(UnknownNameError, match=f"'{name}' is a mixer, not a method; methods are: "):
        apply(model, name)


def test_attaching_over_another(model: Any) -> None:
    first, second = apply(model, SNAP), apply(model, "quest")
    first.attach()
    for run in (second, first):
        with pytest.raises(UnsupportedModelError, match="already applied"):
            run.attach()
    second.detach()
    ids, _ = prompts(rows=1, pads=(0,))
    forward(model, ids)
    assert first.stats.lengths[0][0] == 24
    first.detach()
    assert model.config._attn_implementation == "sdpa"
    with second:
        forward(model, ids)
    assert not model._forward_pre_hooks
    assert not model.model._forward_hooks


def test_caches_are_named_as_transformers_does_now(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer versions warn of the old name, an output's too when it is asked for by it."""
    ids, _ = prompts(rows=1, pads=(0,))
    said: list[str] = []
    logger = logging.getLogger("transformers.utils.generic")
    monkeypatch.setattr(logger, "warning_once", lambda message, *args, **options: said.append(message), raising=False)
    subject = ModelSubject(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        with apply(model, SNAP) as run, torch.no_grad():
            model(ids, use_cache=False)
            forward(model, ids, run.new_cache())
            model.generate(ids, **GREEDY)
            model.generate(ids, use_cache=False, **GREEDY)
        with subject.session(lambda step: None) as session:
            session.feed(ids)
    assert said == []


def test_an_output_without_a_cache_has_none() -> None:
    held = object()
    assert cache_of({"past_key_values": None, "logits": torch.zeros(1)}) is None
    assert cache_of({"logits": torch.zeros(1), "past_key_values": held}) is held
    assert cache_of({"layer_past": held, "cache": None}) is held
    assert cache_of(CausalLMOutputWithPast(logits=torch.zeros(1))) is None
