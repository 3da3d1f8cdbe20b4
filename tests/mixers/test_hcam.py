"""HCAM against torch's own multi-head attention, chunk by chunk and step by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from foveate.errors import OptionError, ShapeError
from foveate.lm import HybridConfig, HybridLM
from foveate.mixers.base import create_mixer
from foveate.mixers.memory import tiles
from foveate.mixers.memory.hcam import MemoryRead, cut_into_chunks
from tests.mixers.build import relative, run, tokens


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reader(**options) -> MemoryRead:
    torch.manual_seed(1)
    given = {"query_dim": 10, "memory_dim": 12, "features": 12, "heads": 3, "retrieve": 4, **options}
    read = MemoryRead(**given).double()
    with torch.no_grad():
        for parameter in read.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return read


def memory(m: int = 7, c: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    contents = draw(2, m, c, 12, seed=1)
    return draw(2, 9, 10), contents.mean(2), contents


def detail(read: MemoryRead, x: Tensor, steps: Tensor) -> Tensor:
    """One query [E] over one chunk's steps [C, D], by torch's module."""
    attention = nn.MultiheadAttention(12, read.heads, kdim=12, vdim=12, batch_first=True).double()
    query = read.q_proj(x)
    with torch.no_grad():
        # The query comes projected, because its width is another.
        weights = (torch.eye(12, dtype=x.dtype), read.k_proj.weight, read.v_proj.weight)
        attention.in_proj_weight.copy_(torch.cat(weights))
        attention.in_proj_bias.copy_(torch.cat((torch.zeros_like(query), read.k_proj.bias, read.v_proj.bias)))
        attention.out_proj.load_state_dict(read.o_proj.state_dict())
    return attention(query[None, None], steps[None], steps[None])[0][0, 0]


def placed(steps: Tensor) -> Tensor:
    """Steps [C, D] with their distance to the end told by sines and cosines."""
    C, D = steps.shape
    told = torch.zeros_like(steps)
    for c in range(C):
        for i in range(D // 2):
            angle = (C - 1 - c) * 10000 ** (-2 * i / D)
            told[c, i], told[c, D // 2 + i] = math.sin(angle), math.cos(angle)
    return steps + told


def by_hand(read: MemoryRead, x: Tensor, summaries: Tensor, contents: Tensor, visible: Tensor) -> Tensor:
    o = torch.zeros(*x.shape[:2], 12, dtype=x.dtype)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            logits = read.summary_k(summaries[b]) @ read.summary_q(x[b, t]) / math.sqrt(12)
            logits = logits.masked_fill(~visible[b, t], -1e6)
            best = logits.topk(min(read.retrieve, len(logits)))
            for weight, m in zip(best.values.softmax(0), best.indices.tolist()):
                steps = placed(contents[b, m]) if read.positional else contents[b, m]
                o[b, t] += weight * detail(read, x[b, t], steps)
    return o


@pytest.mark.parametrize("options", [{}, {"retrieve": 1}, {"positional": False}, {"retrieve": 20}])
def test_a_read_is_attention_inside_the_best_chunks(options):
    read, (x, summaries, contents) = reader(**options), memory()
    visible = draw(2, 9, 7, seed=4) > -0.5
    with torch.no_grad():
        expected = by_hand(read, x, summaries, contents, visible)
        assert relative(read(x, summaries, contents, visible=visible), expected) < 1e-12
        # One query projects the chunks that it reads alone.
        for t in (0, 8):
            alone = read(x[:, t : t + 1], summaries, contents, visible=visible[:, t : t + 1])
            assert relative(alone, expected[:, t : t + 1]) < 1e-12


def test_single_steps_that_are_their_own_summaries():
    read, contents = reader(retrieve=5, positional=False), draw(2, 5, 1, 12)
    x = draw(2, 3, 10, seed=1)
    logits = read.summary_q(x) @ read.summary_k(contents[:, :, 0]).mT / math.sqrt(12)
    # Attention to one key gives its value, whatever the query.
    values = read.o_proj(read.v_proj(contents[:, :, 0]))
    assert relative(read(x, contents[:, :, 0], contents), logits.softmax(-1) @ values) < 1e-12


def test_the_order_of_chunks_does_not_matter_and_that_of_steps_only_with_positions():
    x, summaries, contents = memory()
    visible = draw(2, 9, 7, seed=4) > -0.5
    order, steps = torch.randperm(7), [3, 1, 4, 0, 2]
    for positional in (True, False):
        read = reader(positional=positional)
        o = read(x, summaries, contents, visible=visible)
        moved = read(x, summaries[:, order], contents[:, order], visible=visible[..., order])
        assert relative(moved, o) < 1e-12
        shuffled = read(x, summaries, contents[:, :, steps], visible=visible)
        assert (relative(shuffled, o) < 1e-12) is not positional


def test_hidden_chunks_take_no_weight_and_none_visible_stays_finite():
    read, (x, summaries, contents) = reader(), memory()
    visible = torch.zeros(2, 1, 7, dtype=torch.bool)
    visible[..., 2:4] = True
    o = read(x, summaries, contents, visible=visible)
    assert relative(o, read(x, summaries[:, 2:4], contents[:, 2:4])) < 1e-12
    assert bool(read(x, summaries, contents, visible=visible & False).isfinite().all())


def test_the_search_learns_with_two_chunks_and_not_with_one():
    x, summaries, contents = memory()
    for retrieve in (1, 2):
        read = reader(retrieve=retrieve)
        read(x, summaries, contents).square().sum().backward()
        for weight in (read.summary_q.weight, read.summary_k.weight):
            assert bool(weight.grad.any()) is (retrieve == 2)


def test_tiles_change_nothing(monkeypatch):
    read, (_, summaries, contents) = reader(), memory()
    x = draw(2, 40, 10)
    visible = draw(2, 40, 7, seed=4) > -0.5

    def outputs() -> list[Tensor]:
        y = read(x, summaries, contents, visible=visible)
        return [y, *torch.autograd.grad(y.square().sum(), list(read.parameters()))]

    whole = outputs()
    monkeypatch.setattr(tiles, "TILE", 1)
    for a, b in zip(outputs(), whole):
        assert torch.allclose(a, b, atol=1e-11)


def test_chunks_are_filled_up_from_the_left():
    steps = draw(1, 7, 4)
    summaries, contents, mask = cut_into_chunks(steps, 3)
    assert mask is None
    assert torch.equal(contents.flatten(1, 2)[:, 2:], steps)
    assert not bool(contents[:, 0, :2].any())
    assert torch.allclose(summaries[0, 0], steps[0, 0] / 3)
    held = torch.tensor([[1, 1, 0, 1, 0, 0, 0]]).bool()
    summaries, contents, mask = cut_into_chunks(steps, 3, held)
    assert mask.tolist() == [[[False, False, True], [True, False, True], [False, False, False]]]
    assert torch.allclose(summaries[0, 1], (steps[0, 1] + steps[0, 3]) / (2 + 1e-5))
    assert not bool(summaries[0, 2].any())


def layer(**options):
    torch.manual_seed(2)
    given = {"dim": 16, "heads": 2, "chunk": 3, "retrieve": 2, **options}
    mixer = create_mixer("hcam", **given).double().eval()
    with torch.no_grad():
        mixer.read.o_proj.bias.normal_()
    return mixer


@pytest.mark.parametrize("slots", [None, 2])
def test_a_step_reads_the_chunks_complete_before_it(slots):
    mixer, x = layer(slots=slots), tokens(2, 16)
    y, state = mixer(x)
    assert not bool(y[:, :3].any())
    for t in range(3, 16):
        chunks = [x[:, c : c + 3] for c in range(0, t - 2, 3)][-slots if slots else 0 :]
        contents = torch.stack(chunks, 1)
        expected = mixer.read(x[:, t : t + 1], contents.mean(2), contents)
        assert relative(y[:, t : t + 1], expected) < 1e-12
    assert torch.equal(state.contents.flatten(1, 2)[:, -6:], x[:, 9:15])
    assert state.contents.shape[1] == (slots or 5)
    assert torch.equal(state.unfinished, x[:, 15:])


def test_any_split_with_few_slots():
    mixer, x = layer(slots=2, chunk=4), tokens(2, 40)
    whole, end = mixer(x)
    parts, state = run(mixer, x, [5, 1, 1, 16, 17])
    assert relative(parts, whole) < 1e-12
    assert state.bytes() == end.bytes() == mixer.state_bytes(2, 40)


def test_no_gradient_enters_the_memory():
    x = tokens(1, 9).requires_grad_()
    for detach in (True, False):
        y, state = layer(detach=detach)(x)
        gradient = torch.autograd.grad(y[:, 8].sum(), x)[0]
        assert bool(gradient[:, 8].any())
        assert bool(gradient[:, :6].any()) is not detach
        assert state.contents.requires_grad is not detach


def test_weights_start_as_published():
    config = HybridConfig(mixers=["hcam", "softmax:window=4"], dim=128, heads=4, vocab_size=9, mlp_ratio=0)
    for weight in (
        HybridLM(config).layers[0].mixer.read.k_proj.weight,
        create_mixer("hcam", dim=128).read.q_proj.weight,
    ):
        assert weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.03)
        assert weight.abs().max() <= 2 * math.sqrt(2 / 128) / 0.8796 + 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk=0, allowed: >= 1"),
        ({"retrieve": 0}, "retrieve=0, allowed: >= 1"),
        ({"slots": 0}, "slots=0, allowed: >= 1"),
        ({"heads": 3}, "dim=16 with heads=3, allowed: a multiple"),
        ({"dim": 15, "heads": 3}, "dim=15, allowed with positional: even"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        layer(**options)


def test_bad_memories_are_refused():
    read, (x, summaries, contents) = reader(), memory()
    with pytest.raises(ShapeError, match="summaries"):
        read(x, summaries[:, :6], contents)
    with pytest.raises(ShapeError, match="visible"):
        read(x, summaries, contents, visible=torch.ones(2, 9, 6, dtype=torch.bool))
    with pytest.raises(ShapeError, match="steps"):
        read(x, summaries, contents, steps=torch.ones(2, 7, 4, dtype=torch.bool))
    with pytest.raises(OptionError, match="chunk=0, allowed: >= 1"):
        cut_into_chunks(contents[:, 0], 0)
    for options, message in (({"heads": 5}, "features=12 with heads=5"), ({"retrieve": 0}, "retrieve=0")):
        with pytest.raises(OptionError, match=message):
            reader(**options)
    with pytest.raises(OptionError, match="memory_dim=11, allowed with positional: even"):
        reader(memory_dim=11)


def test_sequences_shorter_than_a_chunk_have_a_backward_pass():
    mixer = create_mixer("hcam", dim=8, heads=2, chunk=4)
    y, _ = mixer(torch.randn(2, 3, 8))
    assert not y.any()
    y.sum().backward()
    assert not mixer.read.o_proj.weight.grad.any()
    model = HybridLM(HybridConfig(mixers=["hcam:chunk=4"], dim=8, heads=2, vocab_size=11, mlp_ratio=0))
    ids = torch.tensor([[1, 2, 3]])
    model(ids, labels=ids).loss.backward()
    assert not model.layers[0].mixer.read.o_proj.weight.grad.any()
