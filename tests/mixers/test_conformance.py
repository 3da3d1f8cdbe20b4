"""What every mixer promises, tested for every registered one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from foveate.errors import OptionError, ShapeError, StateError
from foveate.mixers.base import PATTERNS, Mixer, MixerState, create_mixer
from foveate.registry import Card
from tests.mixers.build import (
    DIM,
    HEADS,
    MIXERS,
    TOKENS,
    any_length,
    build,
    conforming,
    has,
    inputs,
    relative,
    run,
    tensors_of,
    tokens,
)

CAUSAL = has("causal-self")


def constant(card: Card) -> bool:
    return CAUSAL(card) and build(card).constant_state


@conforming("declares")
def test_card_and_class_declare_what_they_are(card):
    assert issubclass(card.target, Mixer)
    assert card.target.patterns
    assert card.target.patterns <= PATTERNS
    names = [option.name for option in card.options]
    assert names[:4] == ["dim", "layer", "layers", "heads"]
    assert card.summary


@conforming("chunks", having=CAUSAL)
@pytest.mark.parametrize("sizes", [[9, 15], [1, 1, 22], [7, 8, 9], [1] * TOKENS], ids=["two", "late", "three", "steps"])
def test_any_split_gives_the_outputs_of_one_call(card, sizes):
    mixer, x = build(card), tokens()
    whole, end = mixer(x)
    parts, state = run(mixer, x, sizes)
    assert relative(parts, whole) < 1e-9
    assert state.bytes() == end.bytes()
    for a, b in zip(tensors_of(state), tensors_of(end)):
        assert torch.allclose(a.double(), b.double(), atol=1e-9)


@conforming("causal", having=CAUSAL)
def test_later_tokens_change_nothing_earlier(card):
    mixer, x = build(card), tokens()
    changed = x.clone()
    changed[:, 15:] = tokens(seed=1)[:, 15:]
    before, after = mixer(x)[0], mixer(changed)[0]
    assert torch.allclose(before[:, :15], after[:, :15], atol=1e-12)
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@conforming("packed", having=any_length)
def test_packed_sequences_are_the_loop_over_them(card):
    mixer, x = build(card), tokens(1)
    lengths = [5, 0, 12, 7]
    packed, state = mixer(x, cu_seqlens=torch.tensor([0, 5, 5, 17, 24]))
    alone = [mixer(piece)[0] for piece in x.split(lengths, 1) if piece.shape[1]]
    assert relative(packed, torch.cat(alone, 1)) < 1e-9
    if mixer.causal:
        assert state.batch == 4
        assert state.position.tolist() == lengths


@conforming("packed-states", having=CAUSAL)
def test_packed_sequences_continue_from_their_states(card):
    mixer, x, more = build(card), tokens(1, 12), tokens(3, 6, seed=1)
    _, state = mixer(x, cu_seqlens=torch.tensor([0, 2, 9, 12]))
    packed, state = mixer(more.flatten(0, 1)[None], state=state, cu_seqlens=torch.tensor([0, 6, 12, 18]))
    batched, _ = mixer(tokens(3, 4, seed=2), state=state)
    for row, piece in enumerate(x.split([2, 7, 3], 1)):
        whole = torch.cat((piece, more[row : row + 1], tokens(3, 4, seed=2)[row : row + 1]), 1)
        expected = mixer(whole)[0]
        start = piece.shape[1]
        assert relative(packed[0, 6 * row : 6 * row + 6], expected[0, start : start + 6]) < 1e-9
        assert relative(batched[row], expected[0, start + 6 :]) < 1e-9


@conforming("nan", having=any_length)
def test_nan_in_one_packed_sequence_reaches_no_other(card):
    mixer, x = build(card), tokens(1)
    expected, _ = mixer(x, cu_seqlens=torch.tensor([0, 9, 15, 24]))
    spoiled = x.clone()
    spoiled[:, 9:15] = torch.nan
    found, state = mixer(spoiled, cu_seqlens=torch.tensor([0, 9, 15, 24]))
    assert torch.equal(found[:, :9], expected[:, :9])
    assert torch.equal(found[:, 15:], expected[:, 15:])
    if mixer.causal:
        kept = state.reorder(torch.tensor([0, 2]))
        assert all(bool(each.isfinite().all()) for each in tensors_of(kept))


@conforming("padding", having=any_length)
def test_padding_anywhere_is_as_if_it_were_not_there(card):
    mixer, x = build(card), tokens()
    real = torch.ones(3, TOKENS, dtype=torch.bool)
    real[0, :10] = real[1, 4:9] = real[2, 20:] = False
    y, _ = mixer(x.masked_fill(~real[..., None], torch.nan), padding=real)
    for row in range(3):
        alone, _ = mixer(x[row, real[row]][None])
        assert relative(y[row, real[row]], alone[0]) < 1e-9
    assert not bool(y[~real].any())


@conforming("padding-decode", having=CAUSAL)
def test_left_padded_rows_decode_as_alone(card):
    mixer, x = build(card), tokens()
    real = torch.ones(3, 12, dtype=torch.bool)
    real[0, :12] = real[1, :5] = False
    _, state = mixer(x[:, :12], padding=real)
    y, _ = run(mixer, x[:, 12:], [1, 1, 6, 1, 3], state=state)
    for row, pads in enumerate((12, 5, 0)):
        alone, _ = mixer(x[row : row + 1, pads:])
        assert relative(y[row], alone[0, 12 - pads :]) < 1e-9


@conforming("bytes", having=CAUSAL)
@pytest.mark.parametrize("length", [1, 5, 24])
def test_state_bytes_are_the_bytes_of_the_state(card, length):
    mixer = build(card, torch.float32)
    _, state = mixer(tokens(3, length, torch.float32))
    assert mixer.state_bytes(3, length) == state.bytes()
    assert state.bytes() == sum(each.numel() * each.element_size() for each in tensors_of(state))


@conforming("constant", having=constant)
def test_a_constant_state_does_not_grow(card):
    mixer = build(card, torch.float32)
    x = tokens(1, 24, torch.float32)
    _, state = mixer(x)
    early = state.bytes()
    for _ in range(3):
        _, state = run(mixer, x, [1] * 24, state=state)
    assert state.bytes() == early == mixer.state_bytes(1, 10**6)


@conforming("gradient")
def test_gradients_are_right(card):
    mixer = build(card).train()
    x = (inputs(mixer, 1) if mixer.length else tokens(1, 5)).requires_grad_()
    parameters = list(mixer.parameters())

    def outputs(x, *values):
        if mixer.causal:
            return run(mixer, x, [3, 1, 1])[0]
        return mixer(x)[0]

    assert torch.autograd.gradcheck(outputs, (x, *parameters), fast_mode=True, atol=1e-4)
    whole = torch.autograd.grad(mixer(x)[0].square().sum(), parameters, allow_unused=True)
    assert [each is None for each in whole].count(True) == 0


@conforming("autocast")
def test_bfloat16_autocast_is_close(card):
    mixer = build(card, torch.float32)
    x = inputs(mixer, 2, torch.float32)
    exact, _ = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = mixer(x)
        assert relative(rough, exact) < 0.03
        if mixer.causal:
            stepped, state = run(mixer, x, [10, 1, 13])
            assert relative(stepped, exact) < 0.03
            assert all(bool(each.isfinite().all()) for each in tensors_of(state))


@conforming("dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_have_the_inputs_dtype(card, dtype):
    mixer = build(card, dtype)
    y, _ = mixer(inputs(mixer, 2, dtype))
    assert y.dtype == dtype


@conforming("save")
def test_saved_weights_give_the_same_layer(card, tmp_path):
    mixer = build(card)
    x = inputs(mixer)
    save_file(mixer.state_dict(), tmp_path / "weights.safetensors")
    other = type(mixer)(**{"dim": DIM, "heads": mixer.heads, "layer": 1, "layers": 3, **(card.small or {})})
    other.to(torch.float64).eval().load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other(x)[0], mixer(x)[0])


@conforming("initial")
def test_reset_parameters_sets_all_that_linear_layers_do_not(card):
    mixer = build(card)
    for module in mixer.modules():
        own = dict(module.named_parameters(recurse=False))
        if own and not isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv1d | nn.Conv2d | nn.Embedding):
            assert set(own) <= set(module.initial_values()), f"{type(module).__name__} leaves {set(own)} to chance"


@conforming("rows", having=CAUSAL)
def test_rows_of_a_state_can_be_moved(card):
    mixer, x = build(card), tokens()
    _, state = mixer(x[:, :10])
    rest = x[:, 10:]
    expected, _ = mixer(rest, state=state)
    halves = state.split([1, 2])
    assert [each.batch for each in halves] == [1, 2]
    merged = type(state).merge(halves)
    assert torch.equal(mixer(rest, state=merged)[0], expected)
    index = torch.tensor([2, 0, 2, 1])
    moved, _ = mixer(rest[index], state=state.reorder(index))
    assert relative(moved, expected[index]) < 1e-12


@conforming("call", having=CAUSAL)
def test_a_call_leaves_its_state_as_it_was(card):
    mixer, x = build(card), tokens()
    _, state = mixer(x[:, :10])
    before = [each.clone() for each in tensors_of(state)]
    mixer(x[:, 10:], state=state)
    mixer(x[:, 10:11], state=state)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(state)))


@conforming("errors", having=CAUSAL)
def test_bad_input_is_refused_by_name(card):
    mixer, x = build(card), tokens()
    _, state = mixer(x)
    with pytest.raises(StateError, match=rf"the state is of other, allowed: a state of {card.name}\("):
        mixer(x, state=MixerState(owner="other", position=torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(StateError, match="has 3 rows, allowed: 2"):
        mixer(x[:2], state=state)
    with pytest.raises(ShapeError, match="N = 0, allowed: at least one token"):
        mixer(x[:, :0])
    with pytest.raises(ShapeError, match=f"{DIM} is {DIM + 1} here"):
        mixer(torch.zeros(1, 4, DIM + 1, dtype=torch.float64))
    with pytest.raises(ShapeError, match="allowed: from 0 to T = 24"):
        mixer(x[:1], cu_seqlens=torch.tensor([0, 20]))
    with pytest.raises(ShapeError, match="needs packed sequences with B = 1"):
        mixer(x, cu_seqlens=torch.tensor([0, 72]))
    with pytest.raises(OptionError, match="layer=3, allowed: 0 to layers - 1 = 2"):
        build(card, layer=3)


@conforming("pattern-errors")
def test_patterns_that_a_mixer_lacks_are_refused(card):
    mixer = build(card)
    x = inputs(mixer)
    pattern = "causal-cross" if mixer.causal else "noncausal-cross"
    if pattern not in mixer.patterns:
        with pytest.raises(OptionError, match=f"used as {pattern}, allowed"):
            mixer(x, context=x)
    if not mixer.causal:
        with pytest.raises(StateError, match="is not causal and keeps no state"):
            mixer(x, state=MixerState(owner=mixer.owner, position=torch.zeros(3, dtype=torch.int64)))


def noncausal(card: Card) -> Mixer:
    if not CAUSAL(card):
        return build(card)
    # A window looks back only, and is refused without causality.
    return build(card, causal=False, **({"window": None} if "window" in (card.small or {}) else {}))


@conforming("noncausal-self", having=has("noncausal-self"))
def test_noncausal_tokens_read_later_ones(card):
    mixer = noncausal(card)
    x = inputs(mixer)
    y, state = mixer(x)
    assert state is None
    assert mixer.state_bytes(3, TOKENS) == 0
    changed = x.clone()
    changed[:, -1] += 1
    # The token before the last: a mixer may read no further than its own block.
    assert not torch.allclose(mixer(changed)[0][:, -2], y[:, -2])


@conforming("noncausal-cross", having=has("noncausal-cross"))
def test_cross_attention_reads_the_context_alone(card):
    mixer = noncausal(card)
    x, context = inputs(mixer), tokens(length=10, seed=1)
    y, state = mixer(x, context=context)
    assert state is None
    assert y.shape == x.shape
    real = torch.ones(3, 10, dtype=torch.bool)
    real[0, 3:6] = False
    masked, _ = mixer(x, context=context.masked_fill(~real[..., None], torch.nan), context_padding=real)
    shorter, _ = mixer(x[:1], context=torch.cat((context[:1, :3], context[:1, 6:]), 1))
    assert relative(masked[:1], shorter) < 1e-9
    assert relative(masked[1:], y[1:]) < 1e-9


@conforming("causal-cross", having=has("causal-cross"))
def test_causal_cross_outputs_depend_on_earlier_queries_only(card):
    mixer, x, context = build(card), tokens(), tokens(length=10, seed=1)
    whole, _ = mixer(x, context=context)
    for last in (0, 11, 23):
        part, _ = mixer(x[:, : last + 1], context=context)
        assert relative(part[:, last], whole[:, last]) < 1e-9


def test_there_are_mixers_of_every_room():
    assert {card.name for card in MIXERS} >= {"softmax", "linear", "lightning", "gated-deltanet", "lookups"}


@conforming("bounds")
def test_values_outside_the_bounds_are_refused(card: Card) -> None:
    """Those that the card shows, by name and by the class itself."""
    bounded = {option.name: option.bounds for option in card.options if option.bounds.at_least is not None}
    assert bounded.keys() >= {"dim", "layer", "layers", "heads"}
    for name, bounds in bounded.items():
        given = {"dim": DIM, "heads": HEADS, "layer": 1, "layers": 3, **(card.small or {}), name: bounds.at_least - 1}
        for make in (card.target, lambda **options: create_mixer(card.name, **options)):
            with pytest.raises(OptionError, match=rf"{card.name}: {name}={given[name]}, allowed: {bounds}"):
                make(**given)
