"""Models with something of their own: layers without rotary embedding, values used twice, recurrent layers, ..."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from foveate.errors import UnsupportedModelError
from foveate.hf import apply, compat, rope
from foveate.hf.modules import attention_modules, decoder_of
from foveate.methods import create
from tests.models import GREEDY, HYBRID, prompts, tiny

WINDOWS = {"sliding_window": 8, "layer_types": HYBRID}
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Configurations, and which layer foveate serves that has no rotary embedding.
UNTURNED: dict[str, tuple[dict[str, Any], int]] = {
    "smollm3": ({"no_rope_layers": [1, 0, 1]}, 1),
    "cohere2": (WINDOWS, 1),
    "exaone4": (WINDOWS, 1),
    "afmoe": (WINDOWS, 1),
}
PARTIAL: dict[str, dict[str, Any]] = {"phi": {}, "stablelm": {}, "persimmon": {}, "glm": {}, "gpt_neox": {}}


def unlike_at_start(model: Any) -> Any:
    """Norms start as ones, with which much commutes that otherwise does not; weights that differ are put in."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.dim() == 1 and name.endswith("weight"):
            parameter.data += 0.5 * torch.rand(parameter.shape, generator=generator)
    return model


def with_interface(family: str, **options: Any) -> Any:
    """The model, where the installed transformers has it on its attention interface."""
    model = tiny(family, **options)
    if not model._can_set_attn_implementation():
        pytest.skip(f"this transformers' {family} is not on the attention interface (and is refused by that reason)")
    return model


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, **{**GREEDY, **options})


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt_bigcode", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}),
        ("diffllama", {}),
        ("minimax", {**EXPERTS, "layer_types": LINEAR}),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}),
        ("phi", {}),
    ],
)
def test_full_is_the_untouched_model(family: str, options: dict[str, Any]) -> None:
    model = with_interface(family, **options)
    ids, mask = prompts(length=24, pads=(7, 3, 0))
    with torch.no_grad():
        expected = [model(ids).logits, model(ids, use_cache=False).logits]
    text = generate(model, ids, mask)
    with apply(model, "full") as run:
        with torch.no_grad():
            got = [model(ids).logits, model(ids, use_cache=False).logits]
        assert torch.equal(generate(model, ids, mask), text)
        assert run.stats.seen > 24
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt_neox", {}),
        ("gpt_bigcode", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}),
        ("minimax", {**EXPERTS, "layer_types": LINEAR}),
    ],
)
def test_the_method_is_really_applied(family: str, options: dict[str, Any]) -> None:
    model = tiny(family, **options)
    ids, mask = prompts(length=40, pads=(7, 3, 0))
    with apply(model, "snapkv:budget=24,window=8") as run:
        generate(model, ids, mask)
        held = run.stats.lengths
    assert held
    assert all(length <= 24 + 10 for row in held for length in row)


def test_a_cache_that_nobody_handed_over_is_refused() -> None:
    """Otherwise the model would run densely, and nobody would know."""
    model = tiny()
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, "snapkv:budget=24,window=8") as run:
        # As a model would whose layers take the cache under a name of their own.
        for handle in run._handles[: len(run.modules)]:
            handle.remove()
        with pytest.raises(UnsupportedModelError, match="layer 0 of LlamaForCausalLM stored keys"):
            generate(model, ids)


class Spy(type(create("full"))):  # type: ignore[misc]
    """Notes vectors before rotary embedding."""

    def attend(self, step: Any) -> torch.Tensor:
        FOUND[step.layer] = (*step.unrotated(), step.k.clone())
        return super().attend(step)


FOUND: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}


@pytest.mark.parametrize("family", [*UNTURNED, *PARTIAL])
def test_unrotated_keys_are_those_before_rotation(family: str) -> None:
    """Against what the layer makes of the same hidden states with tables that turn nothing."""
    options, layer = UNTURNED.get(family, (PARTIAL.get(family, {}), 0))
    model = unlike_at_start(tiny(family, **options))
    ids, _ = prompts(rows=2, length=20, pads=(0, 0))
    FOUND.clear()
    hidden: list[torch.Tensor] = []
    module = attention_modules(model)[layer]
    hook = module.register_forward_pre_hook(
        lambda _m, args, given: hidden.append(given.get("hidden_states", args[0] if args else None)), with_kwargs=True
    )
    with apply(model, Spy()), torch.no_grad():
        model(ids)
    hook.remove()
    at = torch.arange(20)[None]
    found = rope.find_rope(decoder_of(model), module)
    like = rope.find_rope(decoder_of(model), attention_modules(model)[0]) if found.rotary is None else found
    cos, sin = like.tables(hidden[0], at)
    none = (torch.ones_like(cos), torch.zeros_like(sin))
    with torch.no_grad():
        bare = rope.heard_key(module, hidden[0], at, none)
    _, k0, k = FOUND[layer]
    torch.testing.assert_close(k0, bare, rtol=1e-4, atol=1e-5)
    assert torch.equal(k0, k) == (family in UNTURNED)
    assert not hasattr(module, "_foveate_heard")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("method", ["streaming-llm:window=16,sinks=2", "expected-attention:budget=12", "tokenselect"])
@pytest.mark.parametrize("family", [*UNTURNED, *PARTIAL])
def test_methods_that_turn_vectors_serve_them(family: str, method: str) -> None:
    options, _ = UNTURNED.get(family, (PARTIAL.get(family, {}), 0))
    model = tiny(family, **options)
    ids, mask = prompts(length=40, pads=(7, 3, 0))
    small = {"tokenselect": "tokenselect:sinks=2,local=12,chunk=12,budget=8"}.get(method, method)
    with apply(model, small):
        batch = generate(model, ids, mask, min_new_tokens=10)[:, 40:]
        alone = [generate(model, ids[row : row + 1, mask[row] == 1], min_new_tokens=10)[:, -10:] for row in range(3)]
    assert torch.equal(batch, torch.cat(alone))


def test_positions_do_not_matter_without_rotary_embedding() -> None:
    """StreamingLLM turns queries to their place in the cache: without rotary embedding that is true positions."""
    model = tiny("smollm3", no_rope_layers=[0, 0, 0])
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, "streaming-llm:window=16,sinks=2"):
        turned = generate(model, ids)
    with apply(model, "streaming-llm:window=16,sinks=2,reindex=false"):
        assert torch.equal(generate(model, ids), turned)


def test_a_norm_after_the_rotation_is_refused() -> None:
    """Its keys cannot be turned elsewhere."""
    model = unlike_at_start(tiny("hunyuan_v1_dense"))
    ids, _ = prompts(rows=1, pads=(0,))
    with pytest.raises(UnsupportedModelError, match="does not turn its keys by `apply_rotary_pos_emb` alone"):
        apply(model, "streaming-llm:window=16,sinks=2")
    assert model.config._attn_implementation == "sdpa"
    with apply(model, "streaming-llm:window=16,sinks=2,reindex=false"):
        generate(model, ids)


def test_a_layer_that_cannot_be_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(model.model.rotary_emb, "forward", lambda x, position_ids: (x[0], x[0, 0, 0, 0]))
    with pytest.raises(UnsupportedModelError, match="could not be asked for its keys of two tokens .IndexError"):
        apply(model, "streaming-llm:window=16,sinks=2")
    assert model.config._attn_implementation == "sdpa"


def test_values_that_are_used_twice_are_served_densely_only() -> None:
    model = with_interface("diffllama")
    ids, _ = prompts(rows=1, pads=(0,))
    with (
        apply(model, "snapkv:budget=24,window=8"),
        pytest.raises(UnsupportedModelError, match="differential attention"),
    ):
        generate(model, ids)


def test_recurrent_layers_are_no_attention() -> None:
    model = tiny("minimax", **EXPERTS, layer_types=LINEAR)
    assert [module.layer_idx for module in attention_modules(model)] == [1]


def test_masks_of_the_model_are_refused_at_apply() -> None:
    with pytest.raises(UnsupportedModelError, match="makes a mask of its own"):
        apply(tiny("doge"), "full")


def test_shared_keys_are_refused_at_apply() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    options = {"layer_types": types, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 8}
    more = {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
    }
    model = tiny("gemma3n_text", **options, **more, intermediate_size=[96] * 4, activation_sparsity_pattern=[0.0] * 4)
    with pytest.raises(UnsupportedModelError, match=r"layers \[2, 3\] of .*shared KV"):
        apply(model, "full")


@pytest.mark.parametrize("method", ["full", "snapkv:budget=24,window=8"])
def test_recurrent_states_beside_keys_are_refused_at_apply(method: str) -> None:
    model = tiny("falcon_h1")
    # Newer versions have a layer for both, older ones a cache class of the model's own.
    why = r"falcon_h1 \(FalconH1ForCausalLM\) keeps its .*(Layer|Cache).*, which foveate cannot take over.*; allowed: "
    with pytest.raises(UnsupportedModelError, match=why):
        apply(model, method)
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_class_of_the_models_own_is_refused_at_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    """As hybrid models of older versions have it."""
    model = tiny()
    home = sys.modules[type(model).__module__]
    own = type("LlamaHybridDynamicCache", (), {"__module__": home.__name__, "get_seq_length": lambda self: 0})
    monkeypatch.setattr(home, own.__name__, own, raising=False)
    with pytest.raises(
        UnsupportedModelError, match=r"llama \(LlamaForCausalLM\) keeps its text in a LlamaHybridDynamic"
    ):
        apply(model, "full")
    served = type("LlamaDynamicCache", (DynamicCache,), {"__module__": home.__name__})
    monkeypatch.delattr(home, own.__name__)
    monkeypatch.setattr(home, served.__name__, served, raising=False)
    apply(model, "full")


class OwnLayer(DynamicLayer):
    """Storage that foveate does not know."""


@pytest.mark.parametrize(("strange", "told"), [([0, 1, 2], "every attention layer"), ([1, 2], r"layers \[1, 2\]")])
def test_layers_of_another_storage_are_refused_at_apply(
    strange: list[int], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cache(config: Any) -> DynamicCache:
        made = DynamicCache()
        made.layers += [OwnLayer() if index in strange else DynamicLayer() for index in range(3)]
        return made

    monkeypatch.setattr(compat, "new_dynamic_cache", cache)
    with pytest.raises(UnsupportedModelError, match=f"{told} of llama .* keeps its keys in a OwnLayer, which foveate"):
        apply(tiny(), "full")


def test_why_nothing_can_be_acted_on() -> None:
    experts = {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 64}
    with pytest.raises(UnsupportedModelError, match="a sliding window or chunk of its own"):
        apply(tiny("llama4_text", **experts), "snapkv:budget=24,window=8")


def test_a_long_mask_is_a_mask() -> None:
    """Some decoders hand their layers the mask as it was given, int64."""
    model = tiny()
    ids, mask = prompts(length=24, pads=(7, 3, 0))
    with apply(model, "full") as run, torch.no_grad():
        assert torch.equal(run.runtime.positions(mask, 24), run.runtime.positions(mask.bool(), 24))
        expected = model(ids, attention_mask=mask).logits
        assert torch.equal(model(ids, attention_mask=mask.bool()).logits, expected)
