"""Putting methods on transformers models: the twelve smoke tests, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, StaticCache, T5Config, T5ForConditionalGeneration
from transformers.masking_utils import AttentionMaskInterface

from foveate.attention import attend
from foveate.errors import (
    CompositionError,
    OptionError,
    UnknownNameError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from foveate.hf import apply
from foveate.hf.compat import cache_keyword
from foveate.hf.layer import FoveateLayer
from foveate.methods import create, describe
from tests.models import FAMILIES, GREEDY, prompts, tiny

SNAP = "snapkv:budget=24,window=8"


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, **{**GREEDY, **options})


def forward(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **{cache_keyword(model): cache}, use_cache=True, **options).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_full_is_the_untouched_model(family: str) -> None:
    """1, 2, 9: logits, greedy with left padding, beams; hybrid windows, sinks, fused qkv, other rotary layouts, MLA."""
    model = tiny(family)
    ids, mask = prompts(length=24, pads=(7, 3, 0))
    beams = {"num_beams": 3, "num_return_sequences": 2}
    with torch.no_grad():
        expected = [model(ids).logits, model(ids, use_cache=False).logits]
    texts = [generate(model, ids, mask), generate(model, ids, mask, **beams)]
    with apply(model, "full"):
        with torch.no_grad():
            got = [model(ids).logits, model(ids, use_cache=False).logits]
        assert torch.equal(generate(model, ids, mask), texts[0])
        assert torch.equal(generate(model, ids, mask, **beams), texts[1])
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek_v3"])
def test_a_method_works_on_every_family(family: str) -> None:
    model = tiny(family)
    ids, mask = prompts(length=40, pads=(7, 3, 0))
    with apply(model, SNAP) as run:
        batch = generate(model, ids, mask)[:, 40:]
        held = run.stats.lengths
        alone = [generate(model, ids[row : row + 1, mask[row] == 1])[:, -batch.shape[1] :] for row in range(3)]
    assert torch.equal(batch, torch.cat(alone))
    assert all(length <= 24 + 10 for row in held for length in row)


def test_latent_attention_is_refused_by_name() -> None:
    """Newer transformers store DeepSeek's latent and expand it afterwards; older ones store what is attended to."""
    model = tiny("deepseek_v3")
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, "full") as run:
        generate(model, ids)
        latent = run.stats.stores[0].shape[1] == 1
    with apply(model, SNAP) as run:
        if latent:
            with pytest.raises(UnsupportedModelError, match="latent"):
                generate(model, ids)
        else:
            generate(model, ids)
            assert run.stats.lengths[0][0] < 40
    assert model.config._attn_implementation == "sdpa"


def test_both_interfaces_know_the_name() -> None:
    """3: an attention function without its mask function would drop padding silently."""
    model = tiny()
    with apply(model):
        assert "foveate" in AttentionInterface._global_mapping
        assert "foveate" in AttentionMaskInterface._global_mapping
        assert model.config._attn_implementation == "foveate"


@pytest.mark.parametrize("family", ["llama", "qwen3", "cohere", "glm", "gpt_oss", "yarn", "gemma3_text"])
def test_unrotated_vectors_are_the_projections(family: str) -> None:
    """4: rotary embedding undone exactly, interleaved, partial and scaled layouts included."""
    if family == "yarn":
        scaled = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
        model = tiny("llama", rope_parameters=scaled)
    else:
        model = tiny(family)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    rotated: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Spy(type(create("full"))):  # type: ignore[misc]
        def attend(self, step: Any) -> torch.Tensor:
            q0, k0 = step.unrotated()
            seen.append((q0, k0))
            at = step.query_positions()
            rotated.append((step.rope.rotate(q0, at) - step.q, step.rope.rotate(k0, at) - step.k))
            return super().attend(step)

    ids, _ = prompts(rows=1, length=20, pads=(0,))
    projected: list[torch.Tensor] = []
    with apply(model, Spy()) as run:
        module = run.modules[1]
        name = "q_norm" if hasattr(module, "q_norm") and family != "cohere" else "q_proj"
        target = getattr(module, name, None)
        assert target is not None
        hook = target.register_forward_hook(lambda _m, _i, out: projected.append(out))
        with torch.no_grad():
            model(ids)
        hook.remove()
    index = 1 if family not in ("gemma3_text", "gpt_oss") else 0
    q0, _ = seen[index]
    expected = projected[0].reshape(1, -1, 4, 16) if projected[0].shape[1] == 20 else projected[0].transpose(1, 2)
    torch.testing.assert_close(q0, expected.transpose(1, 2), rtol=1e-4, atol=2e-5)
    for dq, dk in rotated:
        assert dq.abs().max() < 1e-4
        assert dk.abs().max() < 1e-4


def test_positions_follow_the_logical_length() -> None:
    """5: after eviction the next token stands where it would have stood."""
    model = tiny()
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, SNAP) as run:
        cache = run.new_cache()
        forward(model, ids, cache)
        assert cache.get_seq_length() == 64
        forward(model, ids[:, :1], cache)
        assert run.stats.positions(0, 0)[-1] == 64
        assert run.stats.lengths[0][0] == 25


def test_a_budget_above_the_context_is_dense() -> None:
    """6."""
    model = tiny()
    ids, _ = prompts(rows=1, pads=(0,))
    expected = generate(model, ids)
    with apply(model, "snapkv", budget=1000):
        assert torch.equal(generate(model, ids), expected)


def test_chunked_prefill_is_one_shot() -> None:
    """7: identity, and a prompt-end method when told that the prompt comes in pieces."""
    model = tiny()
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model):
        assert torch.equal(generate(model, ids, prefill_chunk_size=10), generate(model, ids))
    with apply(model, SNAP):
        expected = generate(model, ids)
    with apply(model, SNAP, chunked=True) as run:
        assert torch.equal(generate(model, ids, prefill_chunk_size=10), expected)
        assert run.stats.lengths[0][0] < 40


def test_second_turn_equals_a_masked_dense_model() -> None:
    """8: extending a kept cache attends to what was kept, with true positions and causality."""
    model = tiny()
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, SNAP) as run:
        cache = run.new_cache()
        forward(model, ids[:, :50], cache)
        turned = forward(model, ids[:, 50:], cache)
        keep = [[run.stats.positions(layer, head) for head in range(2)] for layer in range(3)]
    assert torch.isfinite(turned).all()
    assert all(len(each) == 24 + 14 for row in keep for each in row)


def test_copies_of_a_cache_are_independent() -> None:
    model = tiny()
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, SNAP) as run:
        cache = run.new_cache()
        forward(model, ids[:, :50], cache)
        other = copy.deepcopy(cache)
        first = forward(model, ids[:, 50:], cache)
        second = forward(model, ids[:, 50:], other)
    assert torch.equal(first, second)


def test_a_cache_filled_before_is_taken_over() -> None:
    model = tiny()
    ids, _ = prompts(rows=1, pads=(0,))
    with torch.no_grad():
        expected = model(ids).logits[:, 40:]
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    forward(model, ids[:, :40], cache)
    with apply(model):
        out = forward(model, ids[:, 40:], cache)
    assert isinstance(cache.layers[0], FoveateLayer)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_static_cache_is_refused() -> None:
    """11."""
    model = tiny()
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, SNAP):
        with pytest.raises(UnsupportedCacheError, match="do not set cache_implementation|2-D padding mask"):
            generate(model, ids, cache_implementation="static")
        with pytest.raises(UnsupportedCacheError, match="StaticLayer"):
            forward(model, ids, StaticCache(config=model.config, max_cache_len=80))


def test_encoder_decoders_and_strangers_are_refused() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        apply(T5ForConditionalGeneration(config), SNAP)
    with pytest.raises(UnsupportedModelError, match="PreTrainedModel"):
        apply(torch.nn.Linear(2, 2), SNAP)


def test_a_model_without_the_attention_interface_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match="attention interface"):
        apply(model, SNAP)


def test_a_model_of_windows_only_is_refused() -> None:
    model = tiny("mistral", sliding_window=8)
    with pytest.raises(UnsupportedModelError, match="sliding window or chunk of its own"):
        apply(model, SNAP)
    ids, _ = prompts(rows=1, pads=(0,))
    expected = generate(model, ids)
    with apply(model):
        assert torch.equal(generate(model, ids), expected)


def test_continuous_batching_is_refused() -> None:
    class PagedAttentionCache:
        layers: tuple[Any, ...] = ()

    model = tiny()
    with apply(model, SNAP) as run, pytest.raises(UnsupportedCacheError, match="continuous batching"):
        module = run.modules[0]
        module(hidden_states=torch.zeros(1, 2, 64), **{_cache_argument(module): PagedAttentionCache()})


def _cache_argument(module: torch.nn.Module) -> str:
    return cache_keyword(module)


def test_training_dropout_attentions_and_masks_are_refused() -> None:
    model = tiny("llama", attention_dropout=0.1)
    ids, _ = prompts(rows=1, length=8, pads=(0,))
    with apply(model):
        model.train()
        with pytest.raises(UnsupportedModelError, match="model.eval"):
            model(ids)
        model.eval()
        with pytest.raises(UnsupportedModelError, match="output_attentions"):
            model(ids, output_attentions=True)
        with pytest.raises(UnsupportedCacheError, match="2-D padding mask"):
            model(ids, attention_mask=torch.zeros(1, 1, 8, 8))
        packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
        with pytest.raises(UnsupportedModelError, match="packed"):
            model(ids, position_ids=packed, use_cache=False)
    assert model.config._attn_implementation == "sdpa"


def test_unknown_names_options_and_budgets() -> None:
    model = tiny()
    with pytest.raises(UnknownNameError, match="did you mean snapkv"):
        apply(model, "snapvk")
    with pytest.raises(UnknownNameError, match="has no option 'budgte'"):
        apply(model, "snapkv", budgte=3)
    for budget in (0, -5):
        with pytest.raises(OptionError, match="budget"):
            apply(model, "snapkv", budget=budget)
    with pytest.raises(OptionError, match="NAME:option=value"):
        apply(model, "snapkv:32")
    with pytest.raises(UnknownNameError, match="'passkey' is a task, not a method; methods are: "):
        apply(model, "full+passkey")
    with pytest.raises(UnsupportedModelError, match="already applied"), apply(model):
        apply(model, SNAP)


def test_specs_round_trip() -> None:
    spec = "flexprefill:gamma=0.8+snapkv:budget=512"
    assert describe(create(spec)) == spec


def test_stats_read_well() -> None:
    model = tiny()
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, SNAP) as run:
        assert str(run.stats) == "no request has run yet"
        generate(model, ids)
    stats = run.stats
    assert "73 tokens seen" in str(stats)
    assert 0 < stats.decode_density < 1 == stats.prefill_density
    assert stats.as_dict()["cache_bytes"] == stats.cache_bytes


def test_sampling_under_a_method() -> None:
    model = tiny()
    ids, mask = prompts()
    with apply(model, SNAP):
        torch.manual_seed(3)
        a = generate(model, ids, mask, do_sample=True, num_return_sequences=2)
        torch.manual_seed(3)
        b = generate(model, ids, mask, do_sample=True, num_return_sequences=2)
    assert a.shape[0] == 6
    assert torch.equal(a, b)


def test_sliding_window_boundary_key() -> None:
    """A Hugging Face window W counts the query: W - 1 earlier keys are seen, no more."""
    q, k = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4)
    v = torch.eye(8)[None, None]
    weights = attend(q, k, v, window=3 - 1)
    assert bool((weights[0, 0, 7] > 0).tolist() == [False] * 5 + [True] * 3)


def test_a_choice_per_query_head_cannot_be_selected_from() -> None:
    with pytest.raises(CompositionError, match="different numbers of keys"):
        create("snapkv:per_query_head=true+quest")
    create("snapkv+quest")
