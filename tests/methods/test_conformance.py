"""What every registered method must do. A new method is tested the moment it is registered."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from foveate import registry
from foveate.errors import CompositionError, OptionError
from foveate.hf import apply
from foveate.methods import Method, SingleLayer, create
from foveate.registry import Card
from tests.methods.bound import bind_profile
from tests.models import GREEDY, prompts, tiny

CARDS = registry.cards(kind=registry.METHOD_KINDS)


def cards(check: str, having: str | None = None) -> Any:
    """Parametrise over all methods; a card's `known` failures become strict xfails."""
    chosen = [card for card in CARDS if having is None or getattr(card, having) is not None]
    marked = [
        pytest.param(card, marks=pytest.mark.xfail(strict=True, reason=card.known[check]))
        if check in card.known
        else card
        for card in chosen
    ]
    return pytest.mark.parametrize("card", marked, ids=lambda card: card.name)


def small(card: Card, model: Any = None) -> Method:
    return bind_profile(create(card.name, **(card.small or {})), model)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, **{**GREEDY, **options})[:, ids.shape[1] :]


def logits(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    from foveate.hf.compat import cache_keyword

    with torch.no_grad():
        return model(ids, **{cache_keyword(model): cache}, use_cache=True).logits


@cards("complete_card")
def test_card_is_complete(card: Card) -> None:
    assert card.summary
    assert card.paper
    assert card.year > 1990
    assert card.applies_to
    assert card.exact is not None, "say with which options the method is dense attention"
    assert card.small is not None, "say which options bite at 64 tokens"
    assert all(option.help for option in card.options), "every option needs its help"


@cards("exact", having="exact")
def test_exact_options_are_dense_attention(card: Card, model: Any) -> None:
    ids, _ = prompts(pads=(0, 0, 0))
    method = bind_profile(create(card.name, **card.exact), model)
    with torch.no_grad():
        expected = model(ids).logits
    with apply(model, method) as run:
        cache = run.new_cache()
        first = logits(model, ids[:, :60], cache)
        steps = [logits(model, ids[:, t : t + 1], cache) for t in range(60, 64)]
    torch.testing.assert_close(torch.cat([first, *steps], 1), expected, rtol=1e-4, atol=2e-5)


@cards("bites", having="small")
def test_small_options_change_something(card: Card, model: Any) -> None:
    """Otherwise the other checks would test dense attention."""
    if card.kind == "dense":
        pytest.skip("dense attention changes nothing")
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, small(card, model)) as run:
        changed = generate_logits(model, ids, run)
        stored = run.stats
    with apply(model, "full") as run:
        dense = generate_logits(model, ids, run)
    held = max(max(row) for row in stored.lengths)
    less = held < stored.seen or (stored.density or 1.0) < 1.0
    assert less or not torch.allclose(changed, dense, atol=1e-6)


def generate_logits(model: Any, ids: torch.Tensor, run: Any) -> torch.Tensor:
    cache = run.new_cache()
    out = [logits(model, ids, cache)[:, -1:]]
    out += [logits(model, torch.tensor([[5 + t]]), cache) for t in range(12)]
    return torch.cat(out, 1)


@cards("padding")
def test_left_padded_batch_equals_single_runs(card: Card, model: Any) -> None:
    ids, mask = prompts()
    with apply(model, small(card, model)):
        batch = generate(model, ids, mask)
        alone = [generate(model, ids[row : row + 1, mask[row] == 1]) for row in range(3)]
    assert torch.equal(batch, torch.cat(alone))


@cards("beams")
def test_beams_and_return_sequences(card: Card, model: Any) -> None:
    ids, _ = prompts(rows=2, pads=(0, 0))
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    with apply(model, small(card, model)):
        both = generate(model, ids, **options)
        alone = [generate(model, ids[row : row + 1], **options) for row in range(2)]
    assert torch.equal(both, torch.cat(alone))


@cards("copies")
def test_reordered_batch_decodes_as_its_rows_did(card: Card, model: Any) -> None:
    """Swapping two sequences swaps their logits: every per-token tensor follows."""
    ids, _ = prompts(rows=2, pads=(0, 0))
    token = torch.tensor([[7], [9]])
    with apply(model, small(card, model)) as run:
        cache = run.new_cache()
        logits(model, ids, cache)
        logits(model, token, cache)
        other = copy.deepcopy(cache)
        other.reorder_cache(torch.tensor([1, 0]))
        straight = [logits(model, token, cache) for _ in range(3)][-1]
        swapped = [logits(model, token.flip(0), other) for _ in range(3)][-1]
    torch.testing.assert_close(swapped.flip(0), straight, rtol=1e-5, atol=1e-6)


@cards("second_turn")
def test_second_turn_on_a_kept_cache(card: Card, model: Any) -> None:
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, small(card, model)) as run:
        cache = run.new_cache()
        logits(model, ids[:, :40], cache)
        logits(model, torch.tensor([[5]]), cache)
        out = logits(model, ids[:, 40:52], cache)
        more = logits(model, torch.tensor([[6]]), cache)
    assert torch.isfinite(out).all()
    assert torch.isfinite(more).all()
    assert cache.get_seq_length() == 54


@cards("causality")
def test_a_future_token_changes_nothing_earlier(card: Card, model: Any) -> None:
    """Within a prompt, outputs of a method that reads by position do not depend on later tokens."""
    ids, _ = prompts(rows=1, pads=(0,))
    other = ids.clone()
    other[0, 40:] = (other[0, 40:] + 7) % 125 + 3
    with apply(model, small(card, model)) as run:
        a, b = logits(model, ids, run.new_cache()), logits(model, other, run.new_cache())
    torch.testing.assert_close(a[:, :40], b[:, :40], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(a[:, 40:], b[:, 40:], atol=1e-3)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@cards("groups")
def test_group_sizes(card: Card, group: int) -> None:
    model = tiny("llama", num_attention_heads=2 * group, num_key_value_heads=2, hidden_size=32 * group)
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, small(card, model)) as run:
        assert generate(model, ids, max_new_tokens=4).shape[1] <= 4
        assert all(len(row) == 2 for row in run.stats.lengths)


@cards("lengths")
def test_logical_and_stored_lengths(card: Card, model: Any) -> None:
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, small(card, model)) as run:
        cache = run.new_cache()
        logits(model, ids, cache)
        for token in range(3):
            logits(model, torch.tensor([[token + 3]]), cache)
        stats = run.stats
    assert cache.get_seq_length() == stats.seen == 67
    for layer, row in enumerate(stats.lengths):
        for head, held in enumerate(row):
            positions = stats.positions(layer, head)
            assert positions.numel() == held <= 67
            assert positions.unique().numel() == held
            assert bool((positions < 67).all())


@cards("restored")
def test_model_is_itself_after_exit_and_after_an_exception(card: Card, model: Any) -> None:
    ids, _ = prompts(rows=1, pads=(0,))
    before = generate(model, ids)
    implementation = model.config._attn_implementation
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    with apply(model, small(card, model)):
        generate(model, ids, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="stop"), apply(model, small(card, model)):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == implementation
    assert hooks == sum(len(module._forward_pre_hooks) for module in model.modules())
    assert torch.equal(generate(model, ids), before)


@cards("requests")
def test_nothing_leaks_into_the_next_request(card: Card, model: Any) -> None:
    ids, _ = prompts(rows=2, pads=(0, 0))
    with apply(model, small(card, model)) as run:
        first = generate_logits(model, ids[:1], run)
        generate_logits(model, ids[1:], run)
        again = generate_logits(model, ids[:1], run)
    assert torch.equal(first, again)


@cards("two_models")
def test_two_models_one_applied(card: Card, model: Any) -> None:
    other = tiny("llama", seed=1)
    ids, _ = prompts(rows=1, pads=(0,))
    expected = generate(other, ids)
    with apply(model, small(card, model)):
        assert torch.equal(generate(other, ids), expected)


@cards("chunked")
def test_chunked_prompt_runs_and_keeps_its_length(card: Card, model: Any) -> None:
    ids, _ = prompts(rows=1, pads=(0,))
    with apply(model, small(card, model), chunked=True) as run:
        cache = run.new_cache()
        for start in range(0, 64, 16):
            logits(model, ids[:, start : start + 16], cache)
        run.finish_prefill()
        out = logits(model, torch.tensor([[5]]), cache)
        lengths = run.stats.lengths
    assert torch.isfinite(out).all()
    if isinstance(card.target, type) and card.kind == "keep":
        assert max(max(row) for row in lengths) <= 65


@cards("options")
def test_values_outside_the_bounds_are_refused(card: Card) -> None:
    checked = 0
    for option in card.options:
        bounds = option.bounds
        bad: Any
        if bounds.one_of is not None:
            bad = "nonsense"
        elif bounds.at_least is not None:
            bad = bounds.at_least - 1
        elif bounds.above is not None:
            bad = bounds.above
        elif bounds.at_most is not None:
            bad = bounds.at_most + 1
        else:
            continue
        checked += 1
        with pytest.raises(OptionError, match=option.name):
            create(card.name, **{option.name: bad})
    assert checked or not card.options


@cards("composes")
def test_composes_with_itself_or_refuses(card: Card, model: Any) -> None:
    partner = "snapkv:budget=24,window=8"
    ids, _ = prompts(rows=1, pads=(0,))
    try:
        method = create("+".join([partner, _spec(card)])) if card.name != "snapkv" else None
    except CompositionError as error:
        assert card.name in str(error) or card.target.__name__ in str(error)
        return
    if method is None:
        return
    with apply(model, bind_profile(method, model)):
        assert generate(model, ids, max_new_tokens=5).shape[1] <= 5


def _spec(card: Card) -> str:
    from foveate.options import format_spec

    return format_spec(card.name, card.small or {})


@cards("single_layer")
def test_runs_without_a_model(card: Card) -> None:
    """A method needs no transformers: one layer driven by hand."""
    from foveate.attention import Rope

    method = bind_profile(create(card.name, **(card.small or {})), None, layers=1, heads=4, kv_heads=2)
    layer = SingleLayer(method, rope=Rope(16), layers=1)
    q, k, v = torch.randn(2, 4, 64, 16), torch.randn(2, 2, 64, 16), torch.randn(2, 2, 64, 16)
    hidden = torch.randn(2, 64, 32)
    assert layer(q, k, v, hidden=hidden).shape == q.shape
    for _ in range(3):
        out = layer(torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), hidden=hidden[:, :1])
        assert torch.isfinite(out).all()
    assert layer.cache.seen == 67


def test_every_method_met_every_check() -> None:
    """The suite walks the registry, so a registered name cannot be missed."""
    assert {card.name for card in CARDS} == set(registry.names(kind=registry.METHOD_KINDS))
    assert len(CARDS) >= 5
