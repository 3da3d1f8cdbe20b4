"""StreamingLLM against a cache of unrotated keys, as the paper has it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.attention import Rope
from foveate.errors import CompositionError, OptionError, UnsupportedModelError
from foveate.hf import apply
from foveate.methods import SingleLayer, create
from foveate.methods.keep.streaming_llm import StreamingLLM
from tests.models import tiny

ROPE = Rope(16)


def draw(tokens: int, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Unrotated q [B, 4, T, 16], k, v [B, 2, T, 16]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, tokens, 16, generator=generator, dtype=dtype) for heads in (4, 2, 2))


def stream(method: StreamingLLM, qkv: tuple[Tensor, ...], chunks: list[int]) -> tuple[Tensor, SingleLayer]:
    layer = SingleLayer(method, rope=ROPE)
    outputs, start = [], 0
    for count in chunks:
        q, k, v = (each[:, :, start : start + count] for each in qkv)
        at = torch.arange(start, start + count)[None]
        outputs.append(layer(ROPE.rotate(q, at), ROPE.rotate(k, at), v))
        start += count
    return torch.cat(outputs, 2), layer


def official(
    qkv: tuple[Tensor, ...], chunks: list[int], sinks: int, window: int, before: bool, reindex: bool = True
) -> tuple[Tensor, list[int]]:
    """One sequence, by the definition: a list of held positions, keys rotated to their rank when read."""
    q, k, v = (each.double() for each in qkv)
    held: list[int] = []
    outputs, start = [], 0
    for count in chunks:
        if before and held and len(held) + count > sinks + window:
            held = held[:sinks] + held[max(sinks, len(held) - max(window - count, 0)) :]
        held += range(start, start + count)
        index = torch.arange(len(held))[None] if reindex else torch.tensor(held)[None]
        keys = ROPE.rotate(k[:, :, held], index).repeat_interleave(2, 1)
        queries = ROPE.rotate(q[:, :, start : start + count], index[:, -count:])
        scores = queries @ keys.transpose(-1, -2) / 4
        seen = torch.arange(len(held))[None] <= torch.arange(len(held))[-count:, None]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(weights @ v[:, :, held].repeat_interleave(2, 1))
        start += count
        if len(held) > sinks + window:
            held = held[:sinks] + held[-window:]
    return torch.cat(outputs, 2), held


CHUNKS = {
    "token by token": [1] * 40,
    "prompt, then tokens": [25] + [1] * 15,
    "short prompt": [5] + [1] * 35,
    "pieces": [9, 4, 1, 1, 7, 1, 3, 1, 1, 5, 7],
    "pieces longer than the window": [3, 20, 1, 1, 15],
    "fewer than the sinks": [2, 1, 1, 1, 30, 1, 4],
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("schedule", ["before", "after"])
@pytest.mark.parametrize("reindex", [True, False])
def test_equals_a_cache_of_unrotated_keys(chunks: list[int], schedule: str, reindex: bool) -> None:
    qkv = draw(sum(chunks))
    method = StreamingLLM(sinks=4, window=8, schedule=schedule, reindex=reindex)
    o, layer = stream(method, qkv, chunks)
    expected, held = official(qkv, chunks, 4, 8, schedule == "before", reindex)
    torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=2e-6)
    assert layer.cache.kept_positions(0, 1).tolist() == held


def test_without_sinks_it_is_a_plain_window() -> None:
    qkv = draw(30)
    o, layer = stream(StreamingLLM(sinks=0, window=6), qkv, [1] * 30)
    expected, held = official(qkv, [1] * 30, 0, 6, True)
    torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=2e-6)
    assert held == layer.cache.kept_positions(0, 0).tolist() == list(range(24, 30))


def test_distances_stay_in_the_cache_far_into_the_stream() -> None:
    """The same last tokens, 300 or 3000 tokens into the text, give the same output."""
    tail = draw(13, seed=1)
    outputs = []
    for before in (300, 3000):
        layer = SingleLayer(StreamingLLM(sinks=3, window=10), rope=ROPE)
        head = draw(3, seed=2)
        q, k, v = (torch.cat((a, b), 2) for a, b in zip(head, tail))
        spots = torch.cat((torch.arange(3), torch.arange(before, before + 13)))[None]
        for t in range(16):
            one = [each[:, :, t : t + 1] for each in (q, k, v)]
            at = spots[:, t : t + 1]
            out = layer(ROPE.rotate(one[0], at), ROPE.rotate(one[1], at), one[2], positions=at)
        outputs.append(out)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_learned_sinks_and_softcap_of_the_model_apply_once() -> None:
    method, qkv = StreamingLLM(sinks=3, window=9, schedule="after"), draw(31, dtype=torch.float64)
    _, layer = stream(method, tuple(each[:, :, :30] for each in qkv), [30])
    at = torch.tensor([[30]])
    step = layer.step(ROPE.rotate(qkv[0][:, :, 30:], at), ROPE.rotate(qkv[1][:, :, 30:], at), qkv[2][:, :, 30:])
    logit = torch.randn(4, dtype=torch.float64)
    out = method.attend(dataclasses.replace(step, sink=logit, softcap=1.5))
    held = [0, 1, 2, *range(21, 31)]
    ranks = torch.arange(13)[None]
    keys = ROPE.rotate(qkv[1][:, :, held], ranks).repeat_interleave(2, 1)
    scores = ROPE.rotate(qkv[0][:, :, 30:], ranks[:, -1:]) @ keys.transpose(-1, -2) / 4
    scores = 1.5 * torch.tanh(scores / 1.5)
    weights = torch.cat((scores, logit.view(1, 4, 1, 1)), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(out, weights @ qkv[2][:, :, held].repeat_interleave(2, 1), rtol=1e-5, atol=1e-6)


def test_decoding_overwrites_in_place() -> None:
    """The buffer of keys is neither copied nor grown by a steady decode step."""
    _, layer = stream(StreamingLLM(sinks=4, window=12), draw(40), [20] + [1] * 20)
    place, held = layer.cache.keys.data_ptr(), layer.cache.bytes()
    q, k, v = draw(60, seed=3)
    for t in range(40, 60):
        at = torch.tensor([[t]])
        layer(ROPE.rotate(q[:, :, t : t + 1], at), ROPE.rotate(k[:, :, t : t + 1], at), v[:, :, t : t + 1])
    assert layer.cache.keys.data_ptr() == place
    assert layer.cache.bytes() == held
    assert layer.cache.stored == 16


def test_padded_rows_stream_like_single_ones() -> None:
    """Rows with 0, 2, 9 and 18 tokens of padding, some shorter than the sinks when the longest is cut."""
    pads, prompt, steps = [0, 2, 9, 18], 20, 25
    for schedule in ("before", "after"):
        method = StreamingLLM(sinks=4, window=7, schedule=schedule)
        qkv = draw(prompt + steps, batch=4)
        layer = SingleLayer(method, rope=ROPE)
        at = torch.arange(prompt + steps)[None] - torch.tensor(pads)[:, None]
        at = at.clamp_min(-1)
        q, k = (ROPE.rotate(each, at.clamp_min(0)) for each in qkv[:2])
        outputs = []
        for span in [slice(0, prompt), *(slice(t, t + 1) for t in range(prompt, prompt + steps))]:
            outputs.append(layer(q[:, :, span], k[:, :, span], qkv[2][:, :, span], positions=at[:, span]))
        batch = torch.cat(outputs, 2)
        for row, pad in enumerate(pads):
            own = tuple(each[row : row + 1, :, pad:] for each in qkv)
            alone, single = stream(method, own, [prompt - pad] + [1] * steps)
            torch.testing.assert_close(batch[row : row + 1, :, pad:], alone, rtol=1e-4, atol=1e-6)
            assert torch.equal(layer.cache.kept_positions(row, 0), single.cache.kept_positions(0, 0))


def test_prompt_schedule_keeps_the_share_and_grows() -> None:
    method = StreamingLLM(sinks=4, ratio=0.5, schedule="prompt")
    _, layer = stream(method, draw(43), [41, 1, 1])
    assert layer.cache.kept_positions(0, 0).tolist() == [*range(4), *range(25, 43)]
    assert method.score(SingleLayer(method).step(*draw(41))).sum(-1).eq(20).all()


def test_prompt_schedule_waits_for_the_end_of_a_chunked_prompt() -> None:
    layer = SingleLayer(StreamingLLM(sinks=2, window=6, schedule="prompt"), rope=ROPE, chunked=True)
    q, k, v = draw(24)
    for start in range(0, 24, 8):
        layer(*(each[:, :, start : start + 8] for each in (q, k, v)))
    assert layer.cache.stored == 24
    layer.finish_prefill()
    assert layer.cache.kept_positions(0, 0).tolist() == [0, 1, *range(18, 24)]


def test_prompt_schedule_never_keeps_fewer_than_the_sinks_and_one() -> None:
    _, layer = stream(StreamingLLM(sinks=4, ratio=0.9, schedule="prompt"), draw(12), [10, 1, 1])
    assert layer.cache.kept_positions(0, 0).tolist() == [0, 1, 2, 3, 9, 10, 11]


def test_true_positions_combine_with_other_methods() -> None:
    assert create("snapkv:budget=24,window=8+streaming-llm:reindex=false,schedule=after")
    for spec in ("streaming-llm", "streaming-llm:reindex=false", "streaming-llm:schedule=after"):
        with pytest.raises(CompositionError, match="StreamingLLM"):
            create(f"snapkv+{spec}")


def test_a_share_needs_the_prompt_schedule() -> None:
    with pytest.raises(OptionError, match="it needs schedule='prompt'"):
        StreamingLLM(ratio=0.5)


def test_an_unknown_rotary_embedding_is_refused() -> None:
    layer = SingleLayer(StreamingLLM(sinks=1, window=2))
    layer(*draw(4))
    with pytest.raises(UnsupportedModelError, match="use reindex=False"):
        layer(*draw(1))


def test_a_rotary_embedding_that_changes_with_the_length_is_refused() -> None:
    scaled: Any = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    model = tiny("llama", **scaled)
    with pytest.raises(UnsupportedModelError, match="changes with"):
        apply(model, "streaming-llm")
    apply(model, "streaming-llm", reindex=False)
