"""LongHeads: chunk keys, chosen chunks and compact distances against loops that rotate every key anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.attention import Rope, attend
from foveate.errors import OptionError, UnsupportedModelError
from foveate.methods import SingleLayer
from foveate.methods.base import execute
from foveate.methods.select import longheads
from foveate.methods.select.longheads import LongHeads

ROPE = Rope(8)
SMALL = {"chunk": 4, "length": 20, "start": 20}


def draw(tokens: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Unrotated q, k and v."""
    shapes = ((batch, 4, tokens, 8), (batch, 2, tokens, 8), (batch, 2, tokens, 8))
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return q * 2, k, v


def turn(x: Tensor, at: Tensor) -> Tensor:
    """x [n, D] to positions at [n]."""
    return ROPE.rotate(x[None, None], at[None])[0, 0]


def run(  # type: ignore[no-untyped-def]
    method: LongHeads,
    qkv: tuple[Tensor, Tensor, Tensor],
    *ends: int,
    positions: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
):
    q, k, v = qkv
    at = torch.arange(q.shape[2])[None] if positions is None else positions.clamp_min(0)
    rotated = ROPE.rotate(q, at), ROPE.rotate(k, at), v
    layer = SingleLayer(method, rope=ROPE)
    out = []
    for a, b in zip((0, *ends[:-1]), ends):
        own = (x[:, :, a:b] for x in rotated)
        step = layer.step(*own, positions=None if positions is None else positions[:, a:b])
        step.softcap, step.sink = softcap, sink
        out.append(execute(method, step))
    return torch.cat(out, 2), layer


def chunk_key(heads: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """heads: [G, w, D], the query heads whose mean asks; k, v [w, D]."""
    at = torch.arange(k.shape[0])
    own = turn(k, at)
    u = torch.stack([((turn(q, at) @ own.T / 8**0.5).softmax(-1) @ v).mean(0) for q in heads]).mean(0)
    return (own @ u / 8**0.5).softmax(0) @ own


def brute(
    qkv: tuple[Tensor, Tensor, Tensor],
    t: int,
    heads: list[int],
    method: LongHeads,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """o [len(heads), D] at position t of the query heads of the first sequence that choose together (default rule)."""
    q, k, v = (x[0] for x in qkv)
    w, A, n, g = method.chunk, method.length // method.chunk, t + 1, heads[0] // 2
    if n < method.start:
        chosen = list(range(n))
    else:
        G = n // w
        keys = [chunk_key(q[heads, c * w : c * w + w], *(x[g, c * w : c * w + w] for x in (k, v))) for c in range(G)]
        scores = {c: float(sum(q[h, t] @ keys[c] for h in heads)) for c in range(1, G - 1)}
        best = sorted(scores, key=lambda c: -scores[c])[: A - 3]
        chunks = sorted({0, *best, G - 1})
        chosen = [j for c in chunks for j in range(c * w, c * w + w)] + list(range(G * w, n))
    places = torch.arange(len(chosen))
    own = turn(k[g, chosen], places)
    outputs = []
    for h in heads:
        row = turn(q[h, t][None], places[-1:]) @ own.T / 8**0.5
        row = row if softcap is None else softcap * torch.tanh(row / softcap)
        # A sink is one more key, of value 0.
        row = row if sink is None else torch.cat((row, sink[h].view(1, 1)), 1)
        outputs.append(row.softmax(-1)[:, : len(chosen)] @ v[g, chosen])
    return torch.cat(outputs)


@pytest.mark.parametrize("per_query_head", [False, True])
def test_prompt_and_steps_equal_the_loops(per_query_head: bool) -> None:
    qkv = draw(45)
    method = LongHeads(**SMALL, per_query_head=per_query_head)
    out, layer = run(method, qkv, 38, 41, *range(42, 46))
    groups = [[0], [1], [2], [3]] if per_query_head else [[0, 1], [2, 3]]
    for heads in groups:
        for t in range(45):
            torch.testing.assert_close(out[0, heads, t], brute(qkv, t, heads, method), rtol=1e-6, atol=1e-6)
    assert layer.cache.states[0].keys.shape == (1, 4 if per_query_head else 2, 11, 8)


@pytest.mark.parametrize("together", [7, 26])
def test_a_prompt_read_in_pieces_equals_the_loops(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longheads, "TOGETHER", together)
    monkeypatch.setattr(longheads, "FEW", 3)
    first, second = draw(60), draw(60)
    qkv = tuple(torch.cat(pair) for pair in zip(first, second))
    method = LongHeads(**SMALL)
    out, _ = run(method, qkv, 60)
    for row, own in enumerate((first, second)):
        for t in range(60):
            for heads in ([0, 1], [2, 3]):
                torch.testing.assert_close(out[row, heads, t], brute(own, t, heads, method), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("per_query_head", [False, True])
def test_softcap_and_sink_in_prompts_and_steps(per_query_head: bool) -> None:
    qkv, sink = draw(45), torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    method = LongHeads(**SMALL, per_query_head=per_query_head)
    groups = [[0], [1], [2], [3]] if per_query_head else [[0, 1], [2, 3]]
    for softcap in (1.5, None):
        out, _ = run(method, qkv, 39, 41, *range(42, 46), softcap=softcap, sink=sink)
        for heads in groups:
            for t in range(45):
                expected = brute(qkv, t, heads, method, softcap, sink)
                torch.testing.assert_close(out[0, heads, t], expected, rtol=1e-6, atol=1e-6)


def test_steps_over_keys_with_gaps_between_them() -> None:
    """Keys and values that cannot be seen as rows of one array give what those without gaps give."""
    qkv = draw(50)
    method = LongHeads(**SMALL)
    expected, layer = run(method, qkv, 49, 50)
    at = torch.arange(50)[None]
    keys, values = ROPE.rotate(qkv[1], at), qkv[2]
    step = layer.step(*(x[:, :, :1] for x in qkv))
    apart = (torch.nn.functional.pad(x, (0, 3))[..., :8] for x in (keys, values))
    part = longheads.Part(slice(None), ROPE.rotate(qkv[0], at)[:, :, 49:], *apart)
    made, _ = method._attend_chosen(step, ROPE, part, 49, 50, False)
    torch.testing.assert_close(made, expected[:, :, 49:], rtol=1e-6, atol=1e-7)


def test_a_prompt_reads_a_chunk_once_per_head(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(q: Tensor, *given: Tensor, **options: object) -> Tensor:
        calls.append(q.shape[2])
        return attend(q, *given, **options)  # type: ignore[no-any-return, arg-type]

    monkeypatch.setattr(longheads, "attend", counted)
    run(LongHeads(**SMALL), draw(200), 200)
    # Two calls make chunk keys, one reads what is dense, each own chunk takes one, each earlier chunk one per KV head.
    assert len(calls) <= 2 + 1 + 46 + 2 * 49


def test_a_prompt_equals_its_tokens_one_by_one() -> None:
    qkv = draw(50)
    method = LongHeads(**SMALL)
    whole, a = run(method, qkv, 50)
    single, b = run(method, qkv, *range(1, 51))
    torch.testing.assert_close(single, whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(a.cache.states[0].keys, b.cache.states[0].keys, rtol=1e-6, atol=1e-7)


def test_up_to_start_and_while_every_chunk_is_read_it_is_dense() -> None:
    q, k, v = draw(40)
    at = torch.arange(40)[None]
    expected = attend(ROPE.rotate(q, at), ROPE.rotate(k, at), v)
    out, _ = run(LongHeads(chunk=4, length=20, start=40), (q, k, v), 30, *range(31, 40))
    torch.testing.assert_close(out, expected[:, :, :39])
    out, _ = run(LongHeads(chunk=4, length=44, start=44), (q, k, v), 40)
    torch.testing.assert_close(out, expected)
    # 4 full chunks and 1 to 3 tokens of the fifth: everything is read, at true distances.
    out, _ = run(LongHeads(**{**SMALL, "start": 17}), (q, k, v), 20)
    torch.testing.assert_close(out[:, :, 16:19], expected[:, :, 16:19], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(out[:, :, 19], expected[:, :, 19], atol=1e-2)


def test_official_prompts_leave_out_their_own_key() -> None:
    q, k, v = draw(24)
    at = torch.arange(24)[None]
    turned = ROPE.rotate(q, at), ROPE.rotate(k, at)
    out, _ = run(LongHeads(**{**SMALL, "start": 17}, official_prompt=True), (q, k, v), 24)
    torch.testing.assert_close(out[:, :, :17], attend(*turned, v)[:, :, :17])
    for t in range(17, 20):
        expected = attend(turned[0][:, :, t : t + 1], turned[1][:, :, :t], v[:, :, :t], causal=False)
        torch.testing.assert_close(out[:, :, t : t + 1], expected, rtol=1e-6, atol=1e-7)


def test_chunk_keys_do_not_know_where_their_chunk_stands() -> None:
    q, k, v = draw(4)
    method = LongHeads(**SMALL)
    made = []
    for begin in (0, 7):
        at = torch.arange(4)[None] + 4 * begin
        made.append(method.chunk_keys(ROPE.rotate(q, at), ROPE.rotate(k, at), v, ROPE, 8**-0.5, begin))
    torch.testing.assert_close(*made, rtol=1e-6, atol=1e-7)


def test_chosen_chunks_hold_the_first_and_the_previous_one_and_no_later_one() -> None:
    qkv = draw(60)
    method = LongHeads(**SMALL)
    layer = run(method, qkv, 59)[1]
    step = layer.step(*(x[:, :, 59:] for x in qkv))
    at = torch.arange(52, 56)
    chosen = method.choose(step, torch.randn(1, 4, 4, 8, dtype=torch.float64), slice(None), at)
    for head in chosen[0]:
        for row, t in zip(head, at.tolist()):
            own = row[row >= 0].tolist()
            assert own == sorted(set(own))
            assert own[0] == 0
            assert own[-1] == 12 or t == 55
            assert len(own) == (4 if t < 55 else 3)
            assert max(own) <= 12


def test_padded_rows_equal_single_ones() -> None:
    qkv = draw(50, 2)
    positions = (torch.arange(50)[None] - torch.tensor([[6], [0]])).clamp_min(-1)
    method = LongHeads(**SMALL)
    both, _ = run(method, qkv, 44, *range(45, 51), positions=positions)
    for row, pad in enumerate((6, 0)):
        alone, _ = run(method, tuple(x[row : row + 1, :, pad:] for x in qkv), 44 - pad, *range(45 - pad, 51 - pad))
        torch.testing.assert_close(both[row : row + 1, :, pad:], alone, rtol=1e-6, atol=1e-7)


def test_reading_counts_keys() -> None:
    layer = run(LongHeads(**SMALL), draw(52), 50, 51, 52)[1]
    prompt, *steps = layer.run.readings
    # Position 50 stands at offset 2 of its chunk, 51 at the last one.
    assert [each.read for each in steps] == [4 * 4 + 3, 3 * 4 + 4]
    expected = sum(t + 1 for t in range(19)) + sum(16 + t % 4 + 1 - 4 * (t % 4 == 3) for t in range(19, 50))
    assert prompt.read == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 4, "length": 18, "start": 18}, "multiple of chunk=4"),
        ({"chunk": 4, "length": 8, "start": 8}, "at least 3"),
        ({"chunk": 4, "length": 16, "start": 12}, "> length - chunk = 12"),
    ],
)
def test_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LongHeads(**options)


def test_models_it_cannot_serve() -> None:
    with pytest.raises(UnsupportedModelError, match="rotary"):
        SingleLayer(LongHeads())(*draw(5))
    q, k, v = draw(5)
    with pytest.raises(UnsupportedModelError, match="widths differ: 8 and 6"):
        SingleLayer(LongHeads(), rope=ROPE)(q, k, v[..., :6])
