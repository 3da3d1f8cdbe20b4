"""Shifted attention for fine-tuning: the grouped computation against its mask, on a model, with LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.errors import OptionError, ShapeError, UnknownNameError, UnsupportedCacheError, UnsupportedModelError
from foveate.hf.finetune import finetune, interpolate, lora
from foveate.mixers.sparse.shifted import (
    S2Attention,
    SinkFixedAttention,
    group_of,
    shifted_attention,
    shifted_mask,
)
from tests.models import prompts, tiny


def qkv(tokens: int, heads: int = 4, kv: int = 2, width: int = 8) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, tokens, width, generator=random, dtype=torch.float64) for h in (heads, kv, kv)]


def by_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    share = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(share, 1) for each in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("tokens", [1, 3, 5, 8, 13, 16, 32, 37])
@pytest.mark.parametrize("shifted", [range(0), range(2, 4), range(2, 3), range(1, 2), range(4)])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_groups_compute_what_the_mask_says(tokens: int, shifted: range, sinks: int) -> None:
    mask = shifted_mask(tokens, 4, group=8, shifted=shifted, sinks=sinks)
    made = shifted_attention(*qkv(tokens), group=8, shifted=shifted, sinks=sinks)
    torch.testing.assert_close(made, by_mask(*qkv(tokens), mask))


@pytest.mark.parametrize("heads, kv, shifted", [(5, 1, range(2, 5)), (6, 2, range(3, 4)), (1, 1, range(0, 1))])
def test_heads_that_split_a_group_of_keys(heads: int, kv: int, shifted: range) -> None:
    mask = shifted_mask(20, heads, group=4, shifted=shifted, sinks=2)
    made = shifted_attention(*qkv(20, heads, kv), group=4, shifted=shifted, sinks=2)
    torch.testing.assert_close(made, by_mask(*qkv(20, heads, kv), mask))


def test_the_rolled_form_follows_its_mask_and_reads_the_future() -> None:
    mask = shifted_mask(16, 4, group=8, shifted=range(2, 4), variant="roll")
    made = S2Attention(group=8, variant="roll").attend(*qkv(16))
    torch.testing.assert_close(made, by_mask(*qkv(16), mask))
    assert mask[2, 0].nonzero().flatten().tolist() == [0, 12, 13, 14, 15]
    assert mask[0, 0].nonzero().flatten().tolist() == [0]


def test_gradients_are_the_masked_ones_and_never_come_from_later_queries() -> None:
    inputs = [each.requires_grad_() for each in qkv(21)]
    pattern = SinkFixedAttention(group=8)
    weight = torch.randn(2, 4, 21, 8, dtype=torch.float64)
    made = torch.autograd.grad((pattern.attend(*inputs) * weight).sum(), inputs)
    mask = shifted_mask(21, 4, group=8, shifted=range(2, 3), sinks=4)
    expected = torch.autograd.grad((by_mask(*inputs, mask) * weight).sum(), inputs)
    torch.testing.assert_close(made, expected)
    (past,) = torch.autograd.grad(pattern.attend(*inputs)[:, :, :10].sum(), inputs[2])
    assert past[:, :, 10:].abs().max() == 0
    assert past[:, :, :10].abs().min() > 0


def test_what_the_options_reduce_to() -> None:
    inputs = qkv(24)
    s2 = S2Attention(group=8).attend(*inputs)
    assert torch.equal(SinkFixedAttention(group=8, returned=0.0, sinks=0).attend(*inputs), s2)
    local = SinkFixedAttention(group=8, returned=1.0, sinks=0).attend(*inputs)
    blocks = torch.arange(24) // 8
    mask = (blocks[:, None] == blocks) & torch.ones(24, 24).tril().bool()
    torch.testing.assert_close(local, by_mask(*inputs, mask))
    full = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(S2Attention(group=48).attend(*inputs), full)
    # With one group, shifted heads still have a border in the middle.
    torch.testing.assert_close(S2Attention(group=24).attend(*inputs)[:, :2], full[:, :2])
    assert not torch.allclose(S2Attention(group=24).attend(*inputs)[:, 2:], full[:, 2:])


def test_which_heads_are_shifted() -> None:
    assert S2Attention().shifted(9) == range(4, 9)
    assert SinkFixedAttention().shifted(8) == range(4, 6)
    taking_turns = SinkFixedAttention(alternate=True)
    assert [taking_turns.shifted(8, layer) for layer in (0, 1)] == [range(4, 6), range(6, 8)]
    assert SinkFixedAttention(returned=1.0).shifted(8) == range(4, 4)


def test_a_group_is_a_share_of_the_text() -> None:
    assert [group_of(each, None, 0.25) for each in (16384, 100, 101, 3)] == [4096, 26, 26, 2]
    assert group_of(100, 8, 0.25) == 8


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"group": 7}, "group=7, allowed: an even number"),
        ({"group": 8, "sinks": 5}, "sinks=5, allowed: 0 to half a group, 4"),
        ({"group": 8, "shifted": range(3, 6)}, "allowed: a range within the 4 heads"),
        ({"group": 8, "shifted": range(0, 4, 2)}, "allowed: a range"),
        ({"group": 8, "variant": "roll"}, "allowed: whole groups and no sinks"),
    ],
)
def test_what_cannot_be_grouped_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        shifted_attention(*qkv(12), **{"shifted": range(2, 4), **wrong})
    q, k, v = qkv(12)
    with pytest.raises(ShapeError, match="q has 4 tokens and k 12"):
        shifted_attention(q[:, :, :4], k, v, group=8, shifted=range(2, 4))
    for made in ({"group": 7}, {"group": 4, "sinks": 3}, {"returned": 1.5}):
        with pytest.raises(OptionError):
            foveate.create("sinklora", **made)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_a_model_attends_in_groups_while_it_trains(family: str) -> None:
    model, (ids, _) = tiny(family), prompts(pads=(0, 0, 0))
    before = model(ids, use_cache=False).logits
    with finetune(model, "sinklora", group=16):
        torch.testing.assert_close(model(ids, use_cache=False).logits, before, rtol=1e-4, atol=2e-5)
        grouped = model.train()(ids, use_cache=False).logits
        assert not torch.allclose(grouped, before, atol=1e-3)
        # A token's group ends with it: nothing later matters.
        shorter = model(ids[:, :40], use_cache=False).logits
        torch.testing.assert_close(shorter, grouped[:, :40], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(model(ids, use_cache=False).logits, before)
    assert not any("_foveate" in name for module in model.modules() for name in vars(module))


def test_a_wide_group_trains_as_dense_attention_does() -> None:
    model, (ids, _) = tiny(), prompts(pads=(0, 0, 0))
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad()
    with finetune(model, "s2-attn:group=128"):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for name, each in model.named_parameters():
        torch.testing.assert_close(each.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_padding_on_the_right_changes_nothing_and_on_the_left_is_refused() -> None:
    model, (ids, _) = tiny().train(), prompts(pads=(0, 0, 0))
    mask = torch.ones_like(ids)
    mask[0, 50:] = 0
    with finetune(model, "sinklora", group=16):
        padded = model(ids, attention_mask=mask, use_cache=False).logits
        alone = model(ids[:1, :50], use_cache=False).logits
        torch.testing.assert_close(padded[:1, :50], alone, rtol=1e-4, atol=2e-5)
        with pytest.raises(ShapeError, match="padding on the right"):
            model(ids, attention_mask=mask.flip(1), use_cache=False)


def test_left_padding_and_generation_work_in_evaluation() -> None:
    model, (ids, mask) = tiny(), prompts()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    with finetune(model):
        made = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(made, expected)


def test_what_a_model_may_not_do_while_it_trains() -> None:
    model, (ids, _) = tiny().train(), prompts(pads=(0, 0, 0))
    with finetune(model, group=16, sinks=2):
        cache = model(ids[:, :32], use_cache=True).past_key_values
        with pytest.raises(UnsupportedCacheError, match="use_cache=False"):
            model(ids[:, 32:], past_key_values=cache)
        with pytest.raises(UnsupportedModelError, match="already on this model"):
            finetune(model).attach()
    with pytest.raises(UnknownNameError, match="kind 'keep'"):
        finetune(model, "snapkv")
    with pytest.raises(OptionError, match="beside a made pattern"):
        finetune(model, S2Attention(), group=8)
    windowed = tiny("gemma3_text").train()
    with finetune(windowed), pytest.raises(UnsupportedModelError, match="sliding_window"):
        windowed(ids, use_cache=False)


def test_lora_begins_as_the_model_and_trains_what_it_says() -> None:
    model, (ids, _) = tiny(), prompts(pads=(0, 0, 0))
    before = model(ids, use_cache=False).logits.detach()
    tuned = lora(model)
    assert torch.equal(tuned(input_ids=ids, use_cache=False).logits, before)
    trained = [name for name, each in tuned.named_parameters() if each.requires_grad]
    kinds = {kind for kind in ("lora_A", "lora_B", "embed", "norm") for name in trained if kind in name}
    assert kinds == {"lora_A", "lora_B", "embed", "norm"}
    assert all(any(kind in name for kind in kinds) for name in trained)
    assert sum("lora_A" in name for name in trained) == 3 * 4
    optimiser = torch.optim.AdamW([each for each in tuned.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    tuned.train()
    with finetune(tuned, "sinklora", group=16):
        for _ in range(4):
            loss = tuned(input_ids=ids, labels=ids, use_cache=False).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    merged = tuned.eval().merge_and_unload()
    assert not torch.allclose(merged(ids, use_cache=False).logits, before, atol=1e-3)
    with pytest.raises(OptionError, match="rank=0"):
        lora(tiny(), rank=0)


def test_interpolation_squeezes_positions(tmp_path: Any) -> None:
    model, (ids, mask) = tiny(), prompts(pads=(0, 0, 0))
    at = torch.arange(64)[None].expand(3, -1)
    plain = model(ids, use_cache=False).logits
    assert interpolate(model, 400) == 1
    assert interpolate(model, 1025) == 3
    # Without a mask, transformers would take positions with gaps for packed texts.
    spread = model(ids, attention_mask=mask, position_ids=3 * at, use_cache=False).logits
    torch.testing.assert_close(spread, plain, rtol=1e-4, atol=2e-5)
    assert model.config.max_position_embeddings == 1536
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    with pytest.raises(UnsupportedModelError, match="of type 'default'"):
        interpolate(model, 4000)
    with pytest.raises(OptionError, match="length=0"):
        interpolate(tiny(), 0)


def test_a_method_is_not_put_over_a_pattern() -> None:
    model = tiny("llama")
    with finetune(model, "s2-attn"), pytest.raises(UnsupportedModelError, match="leave its context"):
        foveate.apply(model, "full").attach()
