"""Contextual memory: what is kept and read, by a second route; and in a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.errors import OptionError, ShapeError, StateError
from foveate.lm.cmr import Reweaving, capture_layers, fit, memory_for
from foveate.lm.data import PackedText
from foveate.mixers.memory.cmr import ContextualMemory, Memory, relevance
from tests.models import tiny

SMALL: dict[str, Any] = {"segment": 8, "chunk": 4, "kept": 2, "entries": 5, "width": 8, "rank": 2}


def awake(memory: ContextualMemory, seed: int = 0) -> ContextualMemory:
    """With weights that do something."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in memory.parameters():
            each.copy_(0.3 * torch.randn(each.shape, generator=random))
    return memory


def filled(module: ContextualMemory, segments: int = 2, rows: int = 2) -> tuple[Memory, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    states = torch.randn(rows, module.captured, segments * module.segment, module.dim, generator=random)
    surprise = torch.rand(rows, segments * module.segment, generator=random)
    memory = module.start(rows, states)
    for start in range(0, states.shape[2], module.segment):
        part = slice(start, start + module.segment)
        memory = module.capture(memory, states[:, :, part], surprise[:, part])
    return memory, states, surprise


def scaled(x: list[float]) -> list[float]:
    return [(each - min(x)) / (max(x) - min(x)) for each in x]


def kept_by_hand(module: ContextualMemory, states: torch.Tensor, surprise: torch.Tensor) -> dict[int, float]:
    """Positions that one row keeps, with their relevance: states [C, N, d], surprise [N]."""
    held: dict[int, float] = {}
    for start in range(0, surprise.shape[0], module.segment):
        for first in range(start, start + module.segment, module.chunk):
            chunk = states[:, first : first + module.chunk]
            away = [scaled([math.dist(h.tolist(), own.mean(0).tolist()) for h in own]) for own in chunk]
            rare = scaled(surprise[first : first + module.chunk].tolist())
            worth = [0.5 * sum(layer[t] for layer in away) / len(away) + 0.5 * rare[t] for t in range(module.chunk)]
            best = sorted(range(module.chunk), key=lambda t: -worth[t])[: module.kept]
            held |= {first + t: worth[t] for t in best if worth[t] >= module.threshold}
        seen = start + module.segment
        ranked = sorted(held, key=lambda at: -held[at] * (at + 1) / seen)[: module.entries]
        held = {at: held[at] for at in ranked}
    return held


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6])
def test_what_is_kept(threshold: float) -> None:
    module = ContextualMemory(dim=6, captured=2, threshold=threshold, **SMALL)
    memory, states, surprise = filled(module, segments=4)
    for row in range(2):
        expected = kept_by_hand(module, states[row], surprise[row])
        real = memory.positions[row] >= 0
        at = memory.positions[row][real]
        assert at.tolist() == sorted(expected)
        torch.testing.assert_close(
            memory.relevance[row][real], torch.tensor([expected[each] for each in sorted(expected)])
        )
        assert torch.equal(memory.states[row][:, real], states[row][:, at])
    assert memory.seen == 32
    assert memory.waiting.shape[2] == 0


def test_nothing_is_kept_before_its_segment_ends_however_it_comes() -> None:
    module = ContextualMemory(dim=6, captured=2, **SMALL)
    whole, states, surprise = filled(module, segments=2)
    memory = module.start(2, states)
    for token in range(16):
        assert memory.positions.shape[1] == (0 if token < 8 else 4)
        memory = module.capture(memory, states[:, :, token : token + 1], surprise[:, token : token + 1])
    assert torch.equal(memory.positions, whole.positions)
    assert torch.equal(memory.states, whole.states)


def test_chunks_of_equal_tokens_are_worth_nothing() -> None:
    assert torch.equal(relevance(torch.ones(2, 4, 3), torch.ones(4)), torch.zeros(4))


def test_reweaving_by_hand() -> None:
    module = awake(ContextualMemory(dim=6, captured=2, **SMALL))
    memory, _, _ = filled(module)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(5))
    made = module(x, memory, 1)
    share = module.mix[1].softmax(0)
    for row in range(2):
        real = (memory.positions[row] >= 0).nonzero().flatten().tolist()
        rebuilt = []
        for entry in real:
            mixed = torch.zeros(6)
            for layer in range(2):
                h = F.layer_norm(memory.states[row, layer, entry], (6,))
                mixed = mixed + share[layer] * (h + h @ module.down[1, layer] @ module.up[1, layer])
            rebuilt.append(mixed)
        for t in range(3):
            own = F.layer_norm(x[row, t], (6,))
            query = module.q[1].weight @ own
            scores = [query @ module.null[1] / 8**0.5]
            for entry, mixed in zip(real, rebuilt):
                far = math.log(1 + 16 + t - int(memory.positions[row, entry]))
                scores.append(query @ (module.k[1].weight @ mixed) / 8**0.5 - module.fading[1] * far)
            weights = torch.stack(scores).softmax(0)[1:]
            found = sum(w * (module.v[1].weight @ mixed) for w, mixed in zip(weights, rebuilt))
            gate = torch.sigmoid(module.gate[1].weight @ torch.cat((own, found)))
            torch.testing.assert_close(made[row, t], x[row, t] + gate * (module.out[1].weight @ found))


def test_reading_is_the_same_with_what_was_made_before() -> None:
    module = awake(ContextualMemory(dim=6, captured=2, **SMALL))
    memory, _, _ = filled(module)
    x = torch.randn(2, 3, 6)
    trained = module(x, memory, 0)
    assert memory.made == {}
    with torch.no_grad():
        assert torch.equal(module(x, memory, 0), trained)
        assert list(memory.made) == [0]
        assert torch.equal(module(x, memory, 0), trained)


def test_blending_without_training() -> None:
    module = ContextualMemory(dim=6, captured=2, trained=False, nearest=2, blend=0.1, **SMALL)
    memory, _, _ = filled(module)
    assert list(module.parameters()) == []
    entry = int((memory.positions[0] >= 0).nonzero()[0])
    x = 3 * memory.states[0, 1, entry].expand(2, 1, 6).clone()
    made = module(x, memory, 1)
    keys = F.layer_norm(memory.states[0, 1][memory.positions[0] >= 0], (6,))
    scores = keys @ F.layer_norm(x[0, 0], (6,)) / 6**0.5
    best = scores.topk(2)
    found = best.values.softmax(0) @ keys[best.indices]
    torch.testing.assert_close(made[0, 0], 0.9 * x[0, 0] + 0.1 * x[0, 0].norm() * found / found.norm())
    module.cosine = 1.1
    assert torch.equal(module(x, memory, 1), x)
    module.cosine, module.blend = -1.0, 0.0
    assert torch.equal(module(x, memory, 1), x)


def test_layers_are_rebuilt_from_the_others() -> None:
    module = ContextualMemory(dim=6, captured=2, **SMALL)
    memory, _, _ = filled(module)
    real = memory.positions >= 0
    a, b = (F.layer_norm(memory.states[:, each], (6,))[real] for each in (0, 1))
    torch.testing.assert_close(module.reconstruction_loss(memory), (a - b).square().mean())
    module.reconstruction_loss(memory).backward()
    assert module.up.grad is not None
    assert module.up.grad[0, 1].abs().sum() > 0
    assert module.up.grad[0, 0].abs().sum() == 0
    assert module.reconstruction_loss(module.start(2, memory.states)).item() == 0.0


def ids(tokens: int = 20, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(2))


def test_an_untrained_memory_leaves_the_model_as_it_is() -> None:
    model = tiny()
    with Reweaving(model, memory_for(model, **SMALL), carry=True) as run, torch.no_grad():
        scores, stream = run(ids())
        torch.testing.assert_close(scores, model(ids()).logits, rtol=1e-4, atol=2e-5)
    assert stream.memory.positions.shape == (2, 5)
    windows, _ = Reweaving(model, memory_for(model, **SMALL)).attach()(ids())
    torch.testing.assert_close(windows[:, 8:16], model(ids()[:, 8:16]).logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_how_a_text_is_cut_changes_nothing(carry: bool, trained: bool) -> None:
    model = tiny()
    memory = awake(memory_for(model, **SMALL)) if trained else memory_for(model, trained=False, cosine=-1.0, **SMALL)
    with Reweaving(model, memory, carry=carry) as run, torch.no_grad():
        whole, _ = run(ids())
        stream, pieces = None, []
        for part in ids().split([1, 1, 9, 3, 6], 1):
            made, stream = run(part, stream)
            pieces.append(made)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=2e-5)
        changed = ids().clone()
        changed[:, 9] = 5
        after, _ = run(changed)
        assert torch.equal(after[:, :9], whole[:, :9])
        # The second segment is kept after its end; the third reads it.
        assert not torch.allclose(after[:, 16:], whole[:, 16:], atol=1e-4)
    plain = model(ids(), use_cache=False).logits
    assert not torch.allclose(plain[:, 16:], whole[:, 16:], atol=1e-3)


def test_generation_continues_what_a_whole_text_gives() -> None:
    model = tiny()
    with Reweaving(model, awake(memory_for(model, **SMALL))) as run:
        made = run.generate(ids(13), 8)
        scores, _ = run(made)
    assert torch.equal(made[:, 13:], scores[:, 12:-1].argmax(-1))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "glm"])
def test_other_families(family: str) -> None:
    model = tiny(family)
    with Reweaving(model, awake(memory_for(model, **SMALL))) as run, torch.no_grad():
        whole, _ = run(ids())
        first, stream = run(ids()[:, :11])
        rest, _ = run(ids()[:, 11:], stream)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=1e-4, atol=1e-4)


def test_only_the_memory_learns() -> None:
    model = tiny()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    row = torch.randint(3, 128, (1, 8), generator=torch.Generator().manual_seed(4))
    tokens = torch.cat((row, row, row), 1)
    text = PackedText(tokens, tokens.roll(-1, 1))
    memory = memory_for(model, **{**SMALL, "threshold": 0.0, "kept": 4})
    losses = fit(model, memory, text, steps=12, batch=1, rate=3e-2)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(each.grad is None and each.requires_grad for each in model.parameters())
    touched = {name.split(".")[0] for name, each in memory.named_parameters() if each.grad.abs().sum() > 0}
    assert touched == {"mix", "down", "up", "q", "k", "v", "gate", "out", "null", "fading"}


def test_evenly_spaced_layers() -> None:
    assert capture_layers(30) == (7, 15, 22)
    assert capture_layers(3) == (0, 1, 2)
    assert capture_layers(4, 1) == (2,)


def test_what_is_refused() -> None:
    model = tiny()
    for wrong in ({"segment": 9}, {"kept": 5}, {"blend": 2.0}, {"entries": 0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            foveate.create("cmr", dim=6, **{**SMALL, **wrong})
    with pytest.raises(OptionError, match="captured=9"):
        memory_for(model, captured=9)
    memory = memory_for(model, **SMALL)
    with pytest.raises(OptionError, match="layers="):
        Reweaving(model, memory, layers=(0, 1))
    with pytest.raises(ShapeError, match="dim=6"):
        Reweaving(model, ContextualMemory(dim=6))
    run = Reweaving(model, memory)
    with pytest.raises(StateError, match="not in the model"):
        run(ids())
    with run:
        with pytest.raises(StateError, match="2 rows was given 1"):
            run(ids()[:1], run.start(2))
        with pytest.raises(ShapeError, match="ids"):
            run(ids()[0])
    assert not model.model.layers[0]._forward_hooks
    text = PackedText(ids(8), ids(8))
    with pytest.raises(OptionError, match="more than a segment"):
        fit(model, memory, text, steps=1)
    with pytest.raises(OptionError, match="trained=True"):
        fit(model, memory_for(model, trained=False), text, steps=1)
    empty = memory.start(2, torch.zeros(1))
    with pytest.raises(ShapeError, match="of a segment of 8"):
        memory.capture(empty, torch.zeros(2, 3, 9, 64), torch.zeros(2, 9))
    with pytest.raises(ShapeError, match="allowed"):
        memory.capture(empty, torch.zeros(2, 2, 4, 64), torch.zeros(2, 4))
