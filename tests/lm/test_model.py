"""HybridLM: the shell around mixers, as a transformers model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import foveate as fv
from foveate.errors import OptionError, ShapeError, StateError, UnsupportedCacheError
from foveate.lm import HybridCache, HybridConfig, HybridLM
from foveate.lm.cache import CACHE_NAME

KINDS = ["lightning", "softmax:window=5", "gated-deltanet", "softmax", "hgrn", "hgrn2", "hgrn", "baseconv", "lookups"]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def tiny(mixers: list[str] = KINDS, **options: Any) -> HybridLM:
    torch.manual_seed(0)
    given = {"dim": 32, "heads": 2, "vocab_size": 97, "mlp_multiple": 8, "pad_token_id": 0, **options}
    # Wide weights, so that greedy choices are not all of one token.
    return HybridLM(HybridConfig(mixers=mixers, initializer_range=0.2, **given)).eval()


def prompts(pads: tuple[int, ...] = (9, 2, 0), length: int = 16) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 97, (len(pads), length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return ids * mask, mask


def logits(model: HybridLM, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).logits


def test_works_with_only_mixers_and_dim():
    # The meta device saves drawing 60 million weights twice.
    with torch.device("meta"):
        lm = fv.HybridLM(fv.HybridConfig(mixers=["lightning", "lightning", "lightning", "softmax"] * 3, dim=512))
    assert lm.lm_head.weight is lm.embed_tokens.weight
    lm.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.fill_(0.01)
    found = logits(lm, torch.tensor([[1, 2, 3]]))
    assert found.shape == (1, 3, 49152)
    assert bool(found.isfinite().all())


def test_softmax_layers_are_llama():
    ours = tiny(["softmax:kv_heads=1"] * 2, tie_embeddings=False)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=2,
            intermediate_size=ours.config.mlp_width,
            vocab_size=97,
            rms_norm_eps=1e-6,
        )
    ).eval()
    renamed = {
        "mixer_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mixer.": "self_attn.",
    }
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = {}
    for name, value in ours.state_dict().items():
        for a, b in renamed.items():
            name = name.replace(a, b)
        weights[name if name.startswith("lm_head") else f"model.{name}"] = value
    theirs.load_state_dict(weights)
    ids, _ = prompts()
    assert torch.allclose(logits(ours, ids), logits(theirs, ids), atol=1e-4)
    assert torch.allclose(ours(ids, labels=ids).loss, theirs(ids, labels=ids).loss, atol=1e-5)


def test_generation_of_a_padded_batch_is_that_of_its_rows():
    model, (ids, mask) = tiny(), prompts()
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    chosen = set()
    for row, pads in enumerate((9, 2, 0)):
        alone = model.generate(ids[row : row + 1, pads:], attention_mask=mask[row : row + 1, pads:], **GREEDY)
        assert torch.equal(together[row, 16:], alone[0, 16 - pads :])
        chosen |= set(alone[0, 16 - pads :].tolist())
    assert len(chosen) > 3


def test_the_cache_changes_nothing():
    model, (ids, mask) = tiny(), prompts()
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=5, **GREEDY), expected)


def test_beams_and_several_answers_reorder_states():
    model, (ids, mask) = tiny(), prompts()
    options = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    together = model.generate(ids, attention_mask=mask, **options)
    without = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert together.shape[0] == 6
    assert torch.equal(together, without)
    sampled = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=True, num_return_sequences=4)
    assert sampled.shape == (12, 19)


def test_a_second_turn_continues_from_the_cache():
    model, (ids, _) = tiny(), prompts((0, 0, 0))
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    cache = first[CACHE_NAME]
    assert isinstance(cache, HybridCache)
    longer = torch.cat((first.sequences, ids[:, :4]), 1)
    fresh = model.generate(longer, **GREEDY)
    assert torch.equal(model.generate(longer, **{CACHE_NAME: cache}, **GREEDY), fresh)


def test_padding_between_turns_is_skipped():
    model, (ids, mask) = tiny(), prompts((9, 2, 0))
    more, later = prompts((0, 3, 1), 6)
    with torch.no_grad():
        start = model(ids, attention_mask=mask, use_cache=True)
        found = model(more, attention_mask=torch.cat((mask, later), 1), **{CACHE_NAME: start[CACHE_NAME]}).logits
    for row in range(3):
        alone = torch.cat((ids[row, mask[row] == 1], more[row, later[row] == 1]))[None]
        expected = logits(model, alone)[0, -int(later[row].sum()) :]
        assert torch.allclose(found[row, later[row] == 1], expected, atol=1e-4)


def test_packed_sequences_in_three_ways():
    model, (ids, _) = tiny(), prompts((0,), 20)
    lengths = [6, 3, 11]
    expected = torch.cat([logits(model, piece) for piece in ids.split(lengths, 1)], 1)
    by_offsets = logits(model, ids, cu_seqlens=torch.tensor([0, 6, 9, 20]))
    by_collator = logits(model, ids, cu_seq_lens_q=torch.tensor([0, 6, 9, 20], dtype=torch.int32))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    by_positions = logits(model, ids, position_ids=positions)
    for found in (by_offsets, by_collator, by_positions):
        assert torch.allclose(found, expected, atol=1e-4)
    rows = ids.view(2, 10)
    at = torch.tensor([[*range(6), *range(2), 0, 0], list(range(10))])
    twice = logits(model, rows, position_ids=at)
    alone = [logits(model, each)[0] for each in (rows[:1, :6], rows[:1, 6:8], rows[:1, 8:9], rows[:1, 9:], rows[1:])]
    assert torch.allclose(twice.flatten(0, 1), torch.cat(alone), atol=1e-4)


def test_spread_positions_are_one_sequence():
    model, (ids, _) = tiny(["softmax"]), prompts((0,), 8)
    found = logits(model, ids, position_ids=torch.arange(0, 16, 2)[None])
    assert not torch.allclose(found, logits(model, ids), atol=1e-3)
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 97
    assert not torch.allclose(logits(model, changed, position_ids=torch.arange(0, 16, 2)[None])[:, -1], found[:, -1])


def test_nan_in_one_packed_sequence_reaches_no_other():
    model, (ids, _) = tiny(), prompts((0,), 20)
    embeds = model.embed_tokens(ids).detach()
    embeds[:, 6:9] = torch.nan
    found = logits(model, inputs_embeds=embeds, cu_seqlens=torch.tensor([0, 6, 9, 20]))
    clean = logits(model, ids, cu_seqlens=torch.tensor([0, 6, 9, 20]))
    assert torch.equal(found[:, :6], clean[:, :6])
    assert torch.equal(found[:, 9:], clean[:, 9:])


def test_the_loss_never_asks_across_a_border():
    model, (ids, mask) = tiny(), prompts((4, 0), 10)
    losses = torch.nn.CrossEntropyLoss(reduction="none")

    def by_hand(tokens: Tensor) -> Tensor:
        return losses(logits(model, tokens)[0, :-1], tokens[0, 1:])

    padded = model(ids, attention_mask=mask, labels=ids).loss
    expected = torch.cat((by_hand(ids[:1, 4:]), by_hand(ids[1:]))).mean()
    assert torch.allclose(padded, expected, atol=1e-5)
    packed = model(ids[1:], labels=ids[1:], cu_seqlens=torch.tensor([0, 3, 3, 10])).loss
    expected = torch.cat((by_hand(ids[1:, :3]), by_hand(ids[1:, 3:])))
    assert torch.allclose(packed, expected.mean(), atol=1e-5)
    shifted = torch.full_like(ids, -100)
    shifted[1, 4] = 5
    one = model(ids, shift_labels=shifted, labels=ids, num_items_in_batch=2).loss
    assert torch.allclose(one, losses(logits(model, ids)[1, 4:5], torch.tensor([5])).sum() / 2, atol=1e-5)


def test_auxiliary_losses_are_added_in_training_only():
    model, (ids, _) = tiny(["lookups:lookups=1,penalty=10.0", "softmax"]), prompts()
    plain = model(ids, labels=ids).loss
    model.train()
    assert model(ids, labels=ids).loss > plain + 1


def test_logits_to_keep_and_hidden_states():
    model, (ids, mask) = tiny(), prompts()
    whole = logits(model, ids, attention_mask=mask)
    assert torch.allclose(logits(model, ids, attention_mask=mask, logits_to_keep=2), whole[:, -2:], atol=1e-5)
    third = logits(model, ids, attention_mask=mask, logits_to_keep=torch.tensor([3]))
    assert torch.allclose(third, whole[:, 3:4], atol=1e-5)
    states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(states) == len(KINDS) + 1
    assert all(each.shape == (3, 16, 32) for each in states)
    assert torch.equal(model.lm_head(states[-1]), whole)
    assert isinstance(model(ids, return_dict=False), tuple)


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, tied):
    model, (ids, _) = tiny(tie_embeddings=tied), prompts()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, HybridLM)
    assert AutoConfig.from_pretrained(tmp_path).mixers == KINDS
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied


def test_layers_share_what_their_mixer_shares(tmp_path):
    model = tiny()
    tables = [model.layers[n].mixer.lower_bounds for n in (4, 5, 6)]
    assert tables[0] is tables[2]
    assert tables[0] is not tables[1]
    model.save_pretrained(tmp_path)
    again = HybridLM.from_pretrained(tmp_path)
    assert again.layers[4].mixer.lower_bounds is again.layers[6].mixer.lower_bounds


def test_weights_start_as_the_mixers_say():
    model = tiny(["mamba2:state_dim=8", "gated-deltanet", "lookups:selection=two-way"])
    first = model.layers[0].mixer
    assert bool((first.D == 1).all())
    assert 0 <= float(first.A_log.detach().min()) <= float(first.A_log.detach().max()) <= 2.78
    steps = torch.nn.functional.softplus(first.dt_bias)
    assert bool(((steps > 0.9e-3) & (steps < 0.11)).all())
    assert 0.1 < float(model.embed_tokens.weight.detach().std()) < 0.3
    assert torch.allclose(model.layers[2].mixer.temperature, torch.tensor(0.3 * 32**0.5))


def test_gradient_checkpointing_runs_layers_again_for_the_same_gradients():
    model, (ids, mask) = tiny().train(), prompts()
    calls = []
    model.layers[0].mixer.register_forward_hook(lambda *_: calls.append(1))
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    plain = {name: each.grad.clone() for name, each in model.named_parameters()}
    assert len(calls) == 1
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    output = model(ids, attention_mask=mask, labels=ids, use_cache=True)
    output.loss.backward()
    assert len(calls) == 3
    assert output.get(CACHE_NAME) is None
    for name, each in model.named_parameters():
        assert torch.allclose(each.grad, plain[name], atol=1e-6), name


def test_state_bytes_are_the_caches():
    model, (ids, _) = tiny(), prompts()
    cache = HybridCache(len(KINDS))
    with torch.no_grad():
        model(ids, **{CACHE_NAME: cache})
    assert cache.bytes() == model.state_bytes(3, 16)
    assert cache.get_seq_length() == 16


def test_what_generation_cannot_do_is_refused():
    model, (ids, mask) = tiny(), prompts()
    with pytest.raises(UnsupportedCacheError, match="cannot do assisted generation"):
        model.generate(ids[:1], assistant_model=tiny(), **GREEDY)
    with pytest.raises(UnsupportedCacheError, match="cache_implementation='static'"):
        model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)
    with pytest.raises(UnsupportedCacheError, match=r"given a DynamicCache, allowed: a foveate\.lm\.HybridCache"):
        model(ids, **{CACHE_NAME: DynamicCache()})
    with pytest.raises(UnsupportedCacheError, match="the cache has 2 layers, allowed: 9"):
        model(ids, **{CACHE_NAME: HybridCache(2)})


def test_bad_input():
    model, (ids, mask) = tiny(), prompts()
    with pytest.raises(OptionError, match="exactly one of them"):
        model()
    with pytest.raises(ShapeError, match="takes no 4-D masks"):
        model(ids, attention_mask=mask[:, None, None])
    with pytest.raises(ShapeError, match="needs packed sequences with B = 1, not B = 3"):
        model(ids, cu_seqlens=torch.tensor([0, 48]))
    with pytest.raises(ShapeError, match="cu_seqlens with padding"):
        model(ids[:1], attention_mask=mask[:1], cu_seqlens=torch.tensor([0, 16]))
    with pytest.raises(ShapeError, match="goes from 0 to 15, allowed: from 0 to T = 16"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 15]))
    with pytest.raises(ShapeError, match=r"HybridLM: input_ids \[3, 0\] has N = 0, allowed: at least one token"):
        model(ids[:, :0])
    with pytest.raises(ShapeError, match=r"HybridLM: inputs_embeds \[3, 0, 32\] has N = 0"):
        model(inputs_embeds=torch.zeros(3, 0, 32))
    with pytest.raises(ShapeError, match=r"input_ids \[16\] torch.int64, allowed: \[B, N\] of int64 or int32"):
        model(ids[0])
    with pytest.raises(ShapeError, match=r"input_ids \[3, 16\] torch.float32, allowed"):
        model(ids.float())
    with pytest.raises(ShapeError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(3, 16, 31))


def test_tokens_beyond_the_vocabulary_are_refused():
    model, (ids, _) = tiny(["hgrn"]), prompts()
    assert logits(model, ids.clamp(min=96).int()).shape == (3, 16, 97)
    for wrong in (97, -1):
        ids[1, 3] = wrong
        with pytest.raises(OptionError, match=f"input_ids has {wrong}, allowed: 0 to 96, the vocabulary's; use"):
            model(ids)
        labels = torch.zeros_like(ids)
        labels[0] = -100
        assert model(labels.clamp(min=0), labels=labels).loss.isfinite()
        labels[1, 3] = wrong
        for name in ("labels", "shift_labels"):
            with pytest.raises(OptionError, match=f"{name} has {wrong}, allowed: 0 to 96, .*, or -100 for none"):
                model(labels.clamp(min=0, max=96), **{name: labels})


class CancelledError(Exception):
    pass


@pytest.mark.parametrize("layer", [0, 1, 8])
def test_an_interrupted_forward_leaves_a_cache_that_is_refused(layer, monkeypatch):
    model, (ids, _) = tiny(), prompts((0, 0))
    cache = model(ids[:, :8], use_cache=True)[CACHE_NAME]
    run = type(model.layers[layer]).forward

    def cancel(self, *args, **kwargs):
        if self is model.layers[layer]:
            raise CancelledError
        return run(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.layers[layer]), "forward", cancel)
        with pytest.raises(CancelledError):
            model(ids[:, 8:9], **{CACHE_NAME: cache})
    if layer == 0:
        # Nothing was read, so it goes on.
        found = logits(model, ids[:, 8:9], **{CACHE_NAME: cache})
        assert torch.allclose(found, logits(model, ids[:, :9])[:, 8:], atol=1e-5)
        return
    message = "a forward was interrupted: .* have read 9 tokens and the others 8, .*; start a new cache"
    with pytest.raises(StateError, match=message):
        model(ids[:, 9:10], **{CACHE_NAME: cache})
    with pytest.raises(StateError, match=message):
        model.generate(ids, **{CACHE_NAME: cache}, **GREEDY)
    cache.reset()
    assert torch.allclose(logits(model, ids, **{CACHE_NAME: cache}), logits(model, ids), atol=1e-5)
