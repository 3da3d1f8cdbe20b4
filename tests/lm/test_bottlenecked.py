"""The cache processor: what it rewrites and when, on its own and in models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.errors import DataError, OptionError, ShapeError, StateError, UnsupportedModelError
from foveate.lm.bottlenecked import Bottlenecked, Solutions, encode, fit, newline_tokens, processor_for
from foveate.lm.data import load_tokenizer
from foveate.mixers.memory.bottlenecked import CacheProcessor
from tests.models import tiny

SMALL: dict[str, Any] = {"width": 16, "heads": 2, "recall": 3, "sinks": 1}
NEWLINE = 10
NEWLINES = torch.arange(128) == NEWLINE


def awake(processor: CacheProcessor) -> CacheProcessor:
    """With weights that rewrite."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in processor.layers:
            each.leave.weight.copy_(0.3 * torch.randn(each.leave.weight.shape, generator=random))
    return processor


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two texts whose steps end at different places, and their prompts' lengths; a newline in a prompt is no end."""
    ids = torch.randint(11, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    ids[0, [2, 9, 15, 16]] = NEWLINE
    ids[1, [12, 20, 23]] = NEWLINE
    return ids, torch.tensor([5, 4])


def running(family: str = "llama", wake: bool = True, **options: Any) -> Bottlenecked:
    model = tiny(family)
    processor = processor_for(model, **{**SMALL, **options})
    return Bottlenecked(model, awake(processor) if wake else processor, NEWLINES)


@torch.no_grad()
def token_by_token(run: Bottlenecked, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Scores [T, V] of one text, read as decoding does."""
    scores, stream = run.read(ids[None, :prompt], run.start(1))
    if run.processor.prompt:
        stream = run.consolidate(stream, torch.tensor([True]))
    found = [scores[0]]
    for token in ids[prompt:]:
        scores, stream = run.read(token.view(1, 1), stream)
        found.append(scores[0])
        if token == NEWLINE:
            stream = run.consolidate(stream, torch.tensor([True]))
    return torch.cat(found)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "glm"])
def test_whole_texts_are_read_as_they_are_decoded(family: str, prompt: bool) -> None:
    ids, prompts = texts()
    with running(family, prompt=prompt) as run, torch.no_grad():
        whole, stream = run(ids, prompts)
        for row in range(2):
            alone = token_by_token(run, ids[row], int(prompts[row]))
            torch.testing.assert_close(whole[row], alone, rtol=1e-3, atol=1e-4)
        assert int(stream.real.sum()) == ids.numel()
    plain = run.model(ids, use_cache=False).logits
    end = 5 if prompt else 10
    torch.testing.assert_close(whole[0, :end], plain[0, :end], rtol=1e-4, atol=2e-5)
    assert not torch.allclose(whole[0, end:], plain[0, end:], atol=1e-2)


def test_before_training_nothing_changes_to_the_bit() -> None:
    ids, prompts = texts()
    with running(wake=False) as run, torch.no_grad():
        whole, _ = run(ids, prompts)
        _, stream = run.read(ids, run.start(2))
        before = [(layer.keys, layer.values) for layer in stream.cache.layers]
        after = run.consolidate(stream, torch.tensor([True, True]))
        for (keys, values), layer in zip(before, after.cache.layers):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
    torch.testing.assert_close(whole, run.model(ids, use_cache=False).logits, rtol=1e-4, atol=2e-5)


def test_what_is_rewritten() -> None:
    """The step, and the older entries that a second route finds the most attended to."""
    ids, _ = texts()
    with running(prompt=False) as run, torch.no_grad():
        _, stream = run.read(ids[:, :12], run.start(2))
        stream = run.consolidate(stream, torch.tensor([True, True]))
        first = [layer.keys.clone() for layer in stream.cache.layers]
        for part in ids[:, 12:20].split([3, 1, 4], 1):
            _, stream = run.read(part, stream)
        keys = [(layer.keys, layer.values) for layer in stream.cache.layers]
        mass = [each[1, 1:12] for each in stream.mass]
        stream = run.consolidate(stream, torch.tensor([False, True]))
    for index, layer in enumerate(stream.cache.layers):
        assert torch.equal(keys[index][0][:, :, :12], first[index])
        assert torch.equal(layer.keys[0], keys[index][0][0])
        changed = (layer.keys[1] != keys[index][0][1]).any(-1).any(0)
        recalled = {1 + int(each) for each in mass[index].topk(3).indices}
        assert set(changed.nonzero().flatten().tolist()) == recalled | set(range(12, 20))
        assert torch.equal(changed, (layer.values[1] != keys[index][1][1]).any(-1).any(0))
    assert stream.step.sum(1).tolist() == [8, 0]
    assert all(each[1].sum() == 0 and each[0].sum() > 0 for each in stream.mass)


def test_attention_mass_is_the_models_own() -> None:
    """With all weights asked for from transformers."""
    ids, _ = texts()
    with running(wake=False) as run, torch.no_grad():
        _, stream = run.read(ids[:, :12], run.start(2))
        stream = run.consolidate(stream, torch.tensor([True, True]))
        for part in ids[:, 12:].split([3, 9], 1):
            _, stream = run.read(part, stream)
    run.model.set_attn_implementation("eager")
    weights = run.model(ids, output_attentions=True, use_cache=False).attentions
    for found, own in zip(stream.mass, weights):
        torch.testing.assert_close(found, own.mean(1)[:, 12:].sum(1), rtol=1e-4, atol=1e-5)


def test_a_second_rewrite_without_a_step_does_nothing() -> None:
    ids, _ = texts()
    with running() as run, torch.no_grad():
        _, stream = run.read(ids, run.start(2))
        stream = run.consolidate(stream, torch.tensor([True, True]))
        before = [layer.keys for layer in stream.cache.layers]
        stream = run.consolidate(stream, torch.tensor([True, True]))
        assert all(layer.keys is keys for layer, keys in zip(stream.cache.layers, before))


def test_no_token_sees_a_rewrite_of_later_ones() -> None:
    ids, prompts = texts()
    changed = ids.clone()
    changed[:, 14:] = torch.where(ids[:, 14:] == NEWLINE, NEWLINE, 50)
    with running() as run, torch.no_grad():
        made, other = run(ids, prompts)[0], run(changed, prompts)[0]
    torch.testing.assert_close(other[:, :14], made[:, :14], rtol=1e-4, atol=2e-5)


def test_padding_changes_nothing() -> None:
    ids, prompts = texts()
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, 18:] = False
    with running() as run, torch.no_grad():
        padded, _ = run(ids, prompts, real)
        alone, _ = run(ids[:1, :18], prompts[:1])
        torch.testing.assert_close(padded[:1, :18], alone, rtol=1e-4, atol=2e-5)
        assert padded[0, 18:].abs().max() == 0


def test_generation_follows_the_whole_text() -> None:
    ids, _ = texts()
    model = tiny()
    model.generation_config.eos_token_id = None
    # Ends steps often enough.
    newlines = torch.arange(128) % 2 == 0
    with Bottlenecked(model, awake(processor_for(model, **SMALL)), newlines) as run:
        made = run.generate(ids[:, :6], 12)
        assert newlines[made[:, 6:]].any(1).all()
        with torch.no_grad():
            scores, _ = run(made, torch.tensor([6, 6]))
        assert torch.equal(made[:, 6:], scores[:, 5:-1].argmax(-1))
        left = torch.cat((torch.zeros(2, 3, dtype=torch.int64), ids[:, :6]), 1)
        padded = run.generate(left, 12, torch.arange(9)[None].expand(2, -1) >= 3)
        assert torch.equal(padded[:, 3:], made)
        model.generation_config.eos_token_id = int(made[0, 9])
        stopped = run.generate(ids[:1, :6], 12)
    assert stopped.tolist() == made[:1, :10].tolist()


def test_gradients_reach_the_processor_alone() -> None:
    ids, prompts = texts()
    with running(wake=False) as run:
        run.model.requires_grad_(False)
        scores, _ = run(ids, prompts)
        F.cross_entropy(scores[:, 6:-1].flatten(0, 1), ids[:, 7:].flatten()).backward()
        assert all(each.grad is None for each in run.model.parameters())
        assert all(each.leave.weight.grad.abs().sum() > 0 for each in run.processor.layers)


def test_gradients_go_back_through_all_rewrites() -> None:
    """Along one direction, against differences, whose noise comes from the model's norms, which are float32."""
    ids, prompts = texts()
    model = tiny().double().requires_grad_(False)
    processor = awake(processor_for(model, **SMALL)).double()
    torch.manual_seed(0)
    values = [each.detach().clone() for each in processor.parameters()]
    ways = [torch.randn_like(each) for each in values]

    def loss(step: float) -> torch.Tensor:
        with torch.no_grad():
            for each, value, way in zip(processor.parameters(), values, ways):
                each.copy_(value + step * way)
        scores, _ = run(ids, prompts)
        # Of the last step alone: all that the rewrites before it do to it.
        return F.cross_entropy(scores[0, 18:-1], ids[0, 19:])

    with Bottlenecked(model, processor, NEWLINES) as run:
        made = torch.autograd.grad(loss(0.0), list(processor.parameters()))
        slope = sum(float((each * way).sum()) for each, way in zip(made, ways))
        with torch.no_grad():
            difference = float(loss(3e-4) - loss(-3e-4)) / 6e-4
    assert slope == pytest.approx(difference, rel=1e-3)


@pytest.mark.parametrize("horizon", [1, 4])
def test_training_lowers_the_loss(horizon: int) -> None:
    ids, prompts = texts()
    data = Solutions(ids, prompts, torch.tensor([24, 19]))
    with running(wake=False) as run:
        losses = fit(run, data, steps=12, batch=2, rate=1e-2, horizon=horizon)
        assert all(torch.tensor(losses).isfinite())
        assert losses[-1] < losses[0] - 0.02
        assert all(each.requires_grad and each.grad is None for each in run.model.parameters())
        with pytest.raises(OptionError, match="horizon=0"):
            fit(run, data, steps=1, horizon=0)
    with pytest.raises(StateError, match="not on the model"):
        fit(run, data, steps=1)


def test_the_loss_is_of_what_follows_a_rewrite() -> None:
    ids, prompts = texts()
    with running() as run:
        loss = fit(run, Solutions(ids[:1], prompts[:1], torch.tensor([20])), steps=1, batch=1)[0]
        again = running()
        with again, torch.no_grad():
            scores, _ = again(ids[:1, :20], prompts[:1])
    expected = F.cross_entropy(scores[0, 5:19], ids[0, 6:20])
    assert loss == pytest.approx(float(expected), rel=1e-4)


def test_the_processor_reads_its_entries_and_no_padding() -> None:
    processor = awake(CacheProcessor(layers=1, kv_heads=2, head_dim=4, **SMALL))
    k, v = torch.randn(2, 1, 2, 6, 4).unbind()
    at, new = torch.arange(6)[None], torch.arange(6)[None] > 2
    real = torch.arange(6)[None] < 5
    dk, dv = processor(0, k, v, at, new, real)
    assert dk.shape == k.shape
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 5], v2[:, :, 5] = 9.0, 9.0
    again, _ = processor(0, k2, v2, at, new, real)
    torch.testing.assert_close(again[:, :, :5], dk[:, :, :5])
    # In both directions, and by kind and distance.
    k2[:, :, 4] = 9.0
    assert not torch.allclose(processor(0, k2, v2, at, new, real)[0][:, :, 0], dk[:, :, 0])
    assert not torch.allclose(processor(0, k, v, at, ~new, real)[0][:, :, 0], dk[:, :, 0])
    assert not torch.allclose(processor(0, k, v, 2 * at, new, real)[0][:, :, 0], dk[:, :, 0], atol=1e-6)
    torch.testing.assert_close(processor(0, k, v, 7 + at, new, real), (dk, dv))
    with torch.no_grad():
        processor.layers[0].gate.zero_()
    assert processor(0, k, v, at, new, real)[0].abs().max() == 0


def test_newlines_and_solutions_of_a_tokenizer() -> None:
    tokenizer = load_tokenizer("bytes")
    found = newline_tokens(tokenizer)
    assert found.nonzero().flatten().tolist() == tokenizer("\n", add_special_tokens=False).input_ids
    data = encode(tokenizer, [("2+3?", "5\nok"), ("a", "b\n")])
    assert data.prompt.tolist() == [4, 1]
    assert data.length.tolist() == [9, 4]
    assert data.tokens.shape == (2, 9)
    with pytest.raises(DataError, match="both with text"):
        encode(tokenizer, [("a", "")])
    with pytest.raises(DataError, match="at least one"):
        encode(tokenizer, [])


def test_what_is_refused() -> None:
    for wrong in ({"width": 10}, {"recall": -1}, {"blocks": 0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            foveate.create("bottlenecked", layers=1, kv_heads=2, head_dim=4, **{**SMALL, **wrong})
    model, ids = tiny(), texts()[0]
    with pytest.raises(OptionError, match="has 1 layers, allowed: 3"):
        Bottlenecked(model, CacheProcessor(layers=1, kv_heads=2, head_dim=16), NEWLINES)
    with pytest.raises(ShapeError, match="bool"):
        Bottlenecked(model, processor_for(model, **SMALL), torch.tensor([10]))
    run = running()
    with pytest.raises(StateError, match="not on the model"):
        run(ids, torch.tensor([1, 1]))
    with run, pytest.raises(ShapeError, match="as the stream|allowed: both"):
        run.read(ids[:1], run.start(2))
    with run, pytest.raises(ShapeError, match="at least 1 for each"):
        run(ids, torch.tensor([0, 3]))
    for family in ("gpt_oss", "gemma3_text"):
        other = tiny(family)
        with Bottlenecked(other, processor_for(other, **SMALL), NEWLINES) as run, pytest.raises(UnsupportedModelError):
            run.read(ids, run.start(2))
