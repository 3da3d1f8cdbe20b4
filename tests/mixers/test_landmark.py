"""Grouped softmax and block retrieval against loops over tokens and groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.attention import Rope, attend
from foveate.errors import OptionError, ShapeError
from foveate.mixers.base import create_mixer
from foveate.mixers.memory import tiles
from foveate.mixers.memory.blocks import BlockMemory, Retrieval
from foveate.mixers.memory.grouped import grouped_attention, grouped_attention_reference
from tests.mixers.build import relative, run, tokens

BLOCK = 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(heads: int = 2, kv_heads: int = 2, m: int = 21, n: int = 21) -> tuple[Tensor, Tensor, Tensor]:
    return draw(2, heads, m, 8), draw(2, kv_heads, n, 8, seed=1), draw(2, kv_heads, n, 8, seed=2)


def every(block: int, n: int) -> Tensor:
    return (torch.arange(n) % block == block - 1).expand(2, n)


IRREGULAR = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0], [0] * 20 + [1]]).bool()


def nested(logits: Tensor, marks: list[bool]) -> Tensor:
    """Weights [n] of one query that stands at the last of the n keys, one group after the other."""
    n = len(marks)
    sections = [sum(marks[: j + 1]) - marks[j] for j in range(n)]
    last = sections[-1]
    own = [j for j in range(n) if sections[j] == last and not marks[j]]
    gates = [j for j in range(n) if marks[j] and sections[j] < last]
    weights = torch.zeros(n, dtype=logits.dtype)
    if not own + gates:
        return weights
    first = dict(zip(own + gates, logits[own + gates].softmax(0)))
    for j in own:
        weights[j] = first[j]
    for gate in gates:
        inside = [j for j in range(n) if sections[j] == sections[gate] and not marks[j]]
        if inside:
            weights[inside] = logits[inside].softmax(0) * first[gate]
    return weights


def by_hand(q: Tensor, k: Tensor, v: Tensor, marks: Tensor) -> Tensor:
    groups, before = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    o = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = before + i + 1
                keys, values = k[b, h // groups, :seen], v[b, h // groups, :seen]
                weights = nested(keys @ q[b, h, i] / math.sqrt(q.shape[-1]), marks[b, :seen].tolist())
                o[b, h, i] = weights @ values
    return o


@pytest.mark.parametrize(("heads", "kv_heads", "m"), [(2, 2, 21), (4, 2, 21), (2, 1, 6), (2, 2, 1)])
def test_both_forms_are_the_nested_softmax(heads, kv_heads, m):
    q, k, v = qkv(heads, kv_heads, m)
    for marks, given in ((every(BLOCK, 21), {"block": BLOCK}), (IRREGULAR, {"landmarks": IRREGULAR})):
        expected = by_hand(q, k, v, marks)
        assert relative(grouped_attention(q, k, v, **given), expected) < 1e-12
        assert relative(grouped_attention_reference(q, k, v, landmarks=marks), expected) < 1e-12


def test_a_first_block_is_ordinary_attention():
    q, k, v = qkv()
    assert relative(grouped_attention(q, k, v, block=40), attend(q, k, v)) < 1e-12


def test_rows_sum_to_one_and_landmarks_give_nothing():
    q, k, v = qkv()
    assert torch.allclose(grouped_attention(q, k, torch.ones_like(v), block=BLOCK), torch.ones_like(q), atol=1e-12)
    changed = v.clone()
    changed[:, :, BLOCK - 1 :: BLOCK] = 1e3
    assert torch.equal(grouped_attention(q, k, changed, block=BLOCK), grouped_attention(q, k, v, block=BLOCK))


def test_a_block_has_the_weight_that_its_landmark_takes():
    q, k, _ = qkv(m=1)
    inside = torch.arange(8) % BLOCK != BLOCK - 1
    k[:, :, :8][:, :, inside] = k[:, :, :1]
    held = torch.zeros(2, 2, 21, 8, dtype=torch.float64)
    held[:, :, :4, 0] = held[:, :, 4:8, 1] = 1
    found = grouped_attention(q, k, held, block=BLOCK)[:, :, 0, :2]
    z = (q @ k.mT)[:, :, 0] / math.sqrt(8)
    taken = torch.cat((z[..., 3:20:BLOCK], z[..., 20:]), -1).softmax(-1)
    assert torch.allclose(found, taken[..., :2], atol=1e-12)


def test_a_query_that_reads_nothing_gives_zero():
    q, k, v = qkv(m=3, n=3)
    marks = torch.tensor([[1, 0, 0], [0, 1, 0]]).bool()
    o = grouped_attention(q, k, v, landmarks=marks)
    assert not bool(o[0, :, 0].any())
    assert bool(o.isfinite().all())


@pytest.mark.parametrize("given", [{"block": 3}, {"landmarks": torch.tensor([[0, 1, 1, 0, 0, 1, 0]]).bool()}])
def test_gradients_are_right(given):
    q, k, v = (draw(1, 2, 7, 4, seed=n).requires_grad_() for n in range(3))
    assert torch.autograd.gradcheck(lambda q, k, v: grouped_attention(q, k, v, **given), (q, k, v))


def gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(grouped_attention(q, k, v, block=BLOCK).square().sum(), (q, k, v))


def test_tiles_change_nothing(monkeypatch):
    q, k, v = (each.requires_grad_() for each in qkv(4, 2, 50, 50))
    whole, expected = grouped_attention(q, k, v, block=BLOCK), gradients(q, k, v)
    monkeypatch.setattr(tiles, "TILE", 1)
    assert relative(grouped_attention(q, k, v, block=BLOCK), whole) < 1e-12
    for a, b in zip(gradients(q, k, v), expected):
        assert relative(a, b) < 1e-12


def test_nothing_of_size_n_by_n_is_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 1)
    q, k, v = (draw(1, 1, 512, 4, seed=n).requires_grad_() for n in range(3))
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 8
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        grouped_attention(q, k, v, block=BLOCK)
    assert sum(kept.values()) < 512 * 64


def test_bad_input_is_refused():
    q, k, v = qkv()
    with pytest.raises(OptionError, match="exactly one of them"):
        grouped_attention(q, k, v)
    with pytest.raises(OptionError, match="block=1, allowed: >= 2"):
        grouped_attention(q, k, v, block=1)
    with pytest.raises(ShapeError, match="landmarks"):
        grouped_attention(q, k, v, landmarks=every(BLOCK, 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 1}, "block=1, allowed: >= 2"),
        ({"retrieve": 0}, "retrieve=0, allowed: >= 1"),
        ({"chunk": 0}, "chunk=0, allowed: >= 1"),
        ({"memory": 0}, "memory=0, allowed: >= 1"),
        ({"selection": "all"}, "selection='all', allowed"),
        ({"placement": "here"}, "placement='here', allowed"),
        ({"kv_heads": 3}, "kv_heads=3, allowed: divisors of 4"),
        ({"head_dim": 3}, "head_dim=3, allowed: even"),
        ({"rope_base": 0.0}, "rope_base=0.0, allowed: > 0"),
        ({"rope_style": "whole"}, "rope_style='whole', allowed"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        create_mixer("landmark", dim=16, **options)


def layer(**options):
    torch.manual_seed(5)
    given = {"dim": 16, "heads": 2, "block": BLOCK, **options}
    mixer = create_mixer("landmark", **given).double().eval()
    with torch.no_grad():
        # Sharper scores, so that blocks differ.
        mixer.q_proj.weight.mul_(4)
    return mixer


def retrieved_by_hand(mixer, x: Tensor, k: int, chunk: int, selection: str, memory: int = 10**6) -> Tensor:
    """Chunk after chunk, block after block, with every key rotated to where it stands; one sequence."""
    H, D, s = mixer.heads, mixer.head_dim, mixer.block
    q, keys, v = (f(x)[0].unflatten(-1, (-1, D)).transpose(0, 1) for f in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    keys, v = (each.repeat_interleave(H // mixer.kv_heads, 0) for each in (keys, v))

    def rotated(each: Tensor, at: list[int]) -> Tensor:
        return mixer.rope.rotate(each[None, None], torch.tensor(at)[None])[0, 0]

    o = torch.zeros_like(q)
    for begin in range(0, x.shape[1], chunk * s):
        rows = list(range(begin, min(begin + chunk * s, x.shape[1])))
        stored = list(range(begin // s))[-memory:]
        taken = min(k, len(stored))
        prefix = begin - (taken + 1) * s
        newest = stored[len(stored) - taken :]
        shares = torch.zeros(H, len(rows), len(stored), dtype=x.dtype)
        for h in range(H):
            for n, b in enumerate(stored):
                slot = newest.index(b) + 1 if b in newest else 0
                mark = rotated(keys[h, b * s + s - 1][None], [prefix + slot * s + s - 1])
                shares[h, :, n] = (rotated(q[h, rows], rows) @ mark.T)[:, 0] / math.sqrt(D)
        shares = shares.softmax(-1)
        if selection == "max_over_tokens":
            shares = shares.amax(1, keepdim=True).expand_as(shares)
        if selection == "max_over_heads":
            shares = shares.amax(0, keepdim=True).expand_as(shares)
        for h in range(H):
            for t, i in enumerate(rows):
                chosen = sorted(stored[n] for n in shares[h, t].topk(taken).indices.tolist())
                held, places = [], []
                for rank, b in enumerate(chosen):
                    base = prefix + rank * s + (s if b in newest else 0)
                    held += range(b * s, b * s + s)
                    places += range(base, base + s)
                held += range(begin, i + 1)
                places += range(begin, i + 1)
                logits = rotated(keys[h, held], places) @ rotated(q[h, i][None], [i])[0] / math.sqrt(D)
                o[h, i] = nested(logits, [j % s == s - 1 for j in held]) @ v[h, held]
    return mixer.o_proj(o.transpose(0, 1).flatten(1))[None]


@pytest.mark.parametrize("selection", ["per_token_and_head", "max_over_tokens", "max_over_heads"])
@pytest.mark.parametrize(("k", "chunk", "memory"), [(1, 1, None), (2, 2, None), (2, 1, 3)])
def test_retrieval_is_the_loop_over_blocks(selection, k, chunk, memory):
    mixer = layer(heads=4, kv_heads=2, retrieve=k, chunk=chunk, selection=selection, memory=memory)
    x = tokens(1, 30)
    with torch.no_grad():
        expected = retrieved_by_hand(mixer, x, k, chunk, selection, memory or 10**6)
        assert relative(mixer(x)[0], expected) < 1e-12


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_reading_as_many_blocks_as_there_are_is_reading_all(chunk):
    x = tokens(2, 30)
    everything = layer(chunk=chunk)
    some = layer(chunk=chunk, retrieve=100)
    expected, _ = everything(x)
    assert relative(run(some, x, [9, 1, 20])[0], expected) < 1e-12
    assert relative(run(everything, x, [9, 1, 20])[0], expected) < 1e-12
    few = layer(chunk=1, retrieve=1)
    assert relative(few(x)[0], expected) > 1e-3
    assert torch.equal(few.train()(x)[0], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"retrieve": 2, "chunk": 2, "kv_heads": 1},
        {"retrieve": 2, "chunk": 1, "memory": 3},
        {"retrieve": 2, "chunk": 3, "selection": "max_over_heads"},
        {"retrieve": 2, "chunk": 2, "placement": "anchored", "rope_style": "interleaved"},
        {"retrieve": 2, "chunk": 2, "host": True},
    ],
)
def test_any_split_retrieves_the_same(options):
    mixer, x = layer(**options), tokens(2, 40)
    whole, end = mixer(x)
    parts, state = run(mixer, x, [5, 1, 1, 16, 17])
    assert relative(parts, whole) < 1e-12
    assert state.bytes() == end.bytes() == mixer.state_bytes(2, 40)


def test_tiles_of_a_chunk_retrieve_the_same(monkeypatch):
    x = tokens(2, 120)
    for selection in ("per_token_and_head", "max_over_tokens"):
        mixer = layer(block=5, retrieve=2, chunk=8, selection=selection)
        whole, _ = mixer(x)
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "TILE", 1)
            assert relative(mixer(x)[0], whole) < 1e-12


def test_a_limited_memory_keeps_the_newest_blocks():
    mixer, x = layer(retrieve=2, chunk=1, memory=3), tokens(1, 40)
    _, state = mixer(x)
    assert state.memory.count == 3
    assert state.seen == 10
    unlimited = layer(retrieve=2, chunk=1)(x)[1]
    assert torch.equal(state.memory.keys, unlimited.memory.keys[:, :, -3:])
    assert torch.equal(state.memory.landmarks, unlimited.memory.landmarks[:, :, -3:])


def test_blocks_on_the_host_give_the_same():
    x = tokens(2, 40)
    here, there = (layer(retrieve=2, chunk=1, host=host)(x) for host in (False, True))
    assert torch.equal(here[0], there[0])
    assert there[1].memory.keys.device.type == there[1].memory.values.device.type == "cpu"


def test_positions_of_the_published_example():
    retrieval = Retrieval(2, 4, Rope(2), 1.0)
    assert retrieval.prefix(6, 6) == 12
    assert retrieval.start(6) == 24
    anchored = Retrieval(2, 4, Rope(2), 1.0, placement="anchored")
    assert (anchored.prefix(4, 9), anchored.start(9), anchored.start(1)) == (0, 12, 4)
    # All keys are [1, 0] turned to their place, so a product with the query [1, 0] at 30 tells the distance.
    blocks = Rope(2).rotate(torch.tensor([1.0, 0.0]).expand(1, 1, 24, 2), torch.arange(24)[None] % 4)
    memory = BlockMemory.empty(blocks, 4, False).append(blocks, blocks)
    found = retrieval.retrieve(
        torch.tensor([1.0, 0.0]).view(1, 1, 1, 2),
        torch.tensor([30]),
        torch.tensor([1, 5]).view(1, 1, 1, 1, 2),
        memory,
        6,
    )
    places = torch.cat((found.inside, found.gates[..., None]), -1).flatten()
    assert torch.allclose(places, (30.0 - torch.tensor([12, 13, 14, 15, 20, 21, 22, 23])).cos(), atol=1e-5)
