"""MAC-Attention: the ring, the match and the three reads, against loops over positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.attention import Rope, attend
from foveate.errors import OptionError, UnsupportedModelError
from foveate.methods import SingleLayer
from foveate.methods.cache import Keep
from foveate.methods.select.mac import Mac, Summaries

ROPE = Rope(8)
EMPTY = -torch.inf


def draw(tokens: int, batch: int = 1, alike: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """Unrotated queries that resemble one of 3 directions per head; rotated keys."""
    centres = torch.randn(batch, 4, 3, 8, dtype=torch.float64)
    which = torch.randint(0, 3, (batch, 4, tokens))
    q = centres.gather(2, which[..., None].expand(-1, -1, -1, 8))
    q = q + alike * torch.randn(q.shape, dtype=torch.float64)
    k, v = (torch.randn(batch, 2, tokens, 8, dtype=torch.float64) for _ in range(2))
    return q, k, v


def over(q: Tensor, k: Tensor, v: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """q [D], k, v [N, D]."""
    if end <= begin:
        return torch.zeros_like(q), torch.tensor(EMPTY, dtype=q.dtype)
    scores = k[begin:end] @ q / 8**0.5
    return scores.softmax(0) @ v[begin:end], scores.logsumexp(0)


def join(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    m = torch.maximum(a[1], b[1])
    if m == EMPTY:
        return a
    x, y = (a[1] - m).exp(), (b[1] - m).exp()
    return (x * a[0] + y * b[0]) / (x + y), m + (x + y).log()


def brute(q: Tensor, k: Tensor, v: Tensor, prompt: int, method: Mac) -> tuple[Tensor, int, int]:
    """One sequence: q [Hq, T, D] unrotated, k, v [Hkv, T, D]. Returns o of the decode steps, hits, and misses."""
    turned = ROPE.rotate(q[None], torch.arange(q.shape[1])[None])[0]
    M, r, F, hits, misses = method.memory, method.margin, method.sinks, 0, 0
    out = torch.zeros(4, q.shape[1] - prompt, 8, dtype=q.dtype)
    for h in range(4):
        keys, values = k[h // 2], v[h // 2]
        ring: dict[int, tuple[Tensor, Tensor]] = {}

        def end(p: int) -> int:
            return max(p + 1 - r, 0)

        for t in range(q.shape[1]):
            E, now = end(t), turned[h, t]
            c = over(now, keys, values, min(F, E), E)
            if t >= prompt:
                best = min(
                    range(max(0, t - M), t), key=lambda p: (float((q[h, t] - q[h, p]).float().square().sum()), p)
                )
                d2 = float((q[h, t] - q[h, best]).square().sum())
                hit = t >= method.start and d2 < 16 * (1 - method.threshold) ** 2 and ring[best][1] > EMPTY
                hit = hit and E - end(best) <= M and end(best) >= F
                hits, misses = hits + hit, misses + (not hit)
                if hit:
                    c = join(ring[best], over(now, keys, values, end(best), E))
                whole = join(join(c, over(now, keys, values, E, t + 1)), over(now, keys, values, 0, min(F, E)))
                out[h, t - prompt] = whole[0]
            ring[t] = c
    return out, hits, misses


def run(method: Mac, qkv: tuple[Tensor, Tensor, Tensor], prompt: int, positions: Tensor | None = None):  # type: ignore[no-untyped-def]
    q, k, v = qkv
    at = torch.arange(q.shape[2])[None] if positions is None else positions
    layer = SingleLayer(method, rope=ROPE)
    turned = ROPE.rotate(q, at.clamp_min(0))
    spans = [slice(0, prompt), *[slice(t, t + 1) for t in range(prompt, q.shape[2])]]
    outs = [
        layer(*(x[:, :, s] for x in (turned, k, v)), positions=None if positions is None else at[:, s]) for s in spans
    ]
    return torch.cat(outs, 2), layer


@pytest.mark.parametrize("sinks", [0, 3])
def test_decoding_equals_the_loops(sinks: int) -> None:
    qkv = draw(60)
    method = Mac(memory=14, margin=5, sinks=sinks, start=34, threshold=0.6)
    expected, hits, misses = brute(*(x[0] for x in qkv), 30, method)
    out, _ = run(method, qkv, 30)
    assert hits > 20
    assert misses > 20
    torch.testing.assert_close(out[0, :, 30:], expected, rtol=1e-5, atol=1e-6)


def test_a_threshold_of_one_is_dense_and_the_ring_holds_the_truncated_attention() -> None:
    q, k, v = draw(40, 2)
    out, layer = run(Mac(threshold=1.0, memory=9, margin=6, start=0), (q, k, v), 30)
    turned = ROPE.rotate(q, torch.arange(40)[None])
    torch.testing.assert_close(out, attend(turned, k, v), rtol=1e-6, atol=1e-6)
    ring = layer.cache.states[0]
    for t in range(31, 40):
        slot = t % 9
        assert int(ring.at[1, slot]) == t
        for h in range(4):
            o, lse = over(turned[1, h, t], k[1, h // 2], v[1, h // 2], 0, t + 1 - 6)
            torch.testing.assert_close(ring.o[1, slot, h], o, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(ring.lse[1, slot, h], lse.float(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ring.query[1, slot, h], q[1, h, t], rtol=1e-6, atol=1e-6)


def test_a_hit_on_its_own_query_is_full_attention() -> None:
    """The same query twice, its summary rebuilt under the present rotation: nothing is approximated."""
    q, k, v = draw(31)
    layer = run(Mac(threshold=1.0, memory=8, margin=4, start=0), (q[:, :, :30], k[:, :, :30], v[:, :, :30]), 29)[1]
    at = torch.tensor([[30]])
    now = ROPE.rotate(q[:, :, 30:], at)
    step = layer.step(now, k[:, :, 30:], v[:, :, 30:])
    ring = layer.cache.states[0]
    end = 26 + 1 - 4
    prefix = [over(now[0, h, 0], k[0, h // 2], v[0, h // 2], 0, end) for h in range(4)]
    ring.write(
        torch.tensor([[26]]),
        q[:, :, 30:],
        torch.stack([o for o, _ in prefix])[None, :, None],
        torch.stack([lse for _, lse in prefix])[None, :, None],
    )
    made = Mac(threshold=0.9, memory=8, margin=4, start=0).read(step, q[:, :, 30:])
    assert made.matched.tolist() == [[26] * 4]
    torch.testing.assert_close(made.o, attend(now, k, v), rtol=1e-6, atol=1e-6)


def test_ties_go_to_the_lowest_position_after_the_ring_has_wrapped() -> None:
    method = Mac(memory=8, margin=2, start=0)
    ring = Summaries(
        torch.tensor([[16, 17, 18, 19, 20, 13, 14, 15]]),
        *(torch.zeros(1, 8, 1, 4) for _ in range(2)),
        torch.zeros(1, 8, 1),
    )
    assert method.match(ring, torch.zeros(1, 1, 4), torch.tensor([[21]]))[0].tolist() == [[13]]
    ring.query[0, 5] = 0.1
    assert method.match(ring, torch.zeros(1, 1, 4), torch.tensor([[21]]))[0].tolist() == [[14]]
    assert method.match(ring, torch.full((1, 1, 4), 9.0), torch.tensor([[21]]))[0].tolist() == [[-1]]


def test_a_short_context_stores_an_empty_summary() -> None:
    _, layer = run(Mac(memory=8, margin=20, start=0), draw(12), 10)
    ring = layer.cache.states[0]
    assert bool((ring.at >= 0).all())
    assert bool((ring.o == 0).all())
    assert bool(ring.lse.isneginf().all())


def test_padded_rows_equal_single_ones() -> None:
    qkv = draw(50, 2)
    positions = (torch.arange(50)[None] - torch.tensor([[9], [0]])).clamp_min(-1)
    method = Mac(memory=12, margin=4, start=0, threshold=0.6, sinks=2)
    both, _ = run(method, qkv, 40, positions)
    for row, pad in enumerate((9, 0)):
        alone, layer = run(method, tuple(x[row : row + 1, :, pad:] for x in qkv), 40 - pad)
        torch.testing.assert_close(both[row : row + 1, :, pad:], alone, rtol=1e-6, atol=1e-6)
    assert min(each.read for each in layer.run.readings) < 30


def test_a_second_piece_of_text_fills_the_ring() -> None:
    q, k, v = draw(40)
    turned = ROPE.rotate(q, torch.arange(40)[None])
    one, two = (SingleLayer(Mac(memory=12, margin=4, start=0), rope=ROPE) for _ in range(2))
    one(turned, k, v)
    for part in (slice(0, 25), slice(25, 40)):
        two(*(x[:, :, part] for x in (turned, k, v)))
    a, b = one.cache.states[0], two.cache.states[0]
    for name in ("at", "query", "o", "lse"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-6, atol=1e-6)


def test_the_ring_is_forgotten_when_slots_change() -> None:
    q, k, v = draw(40)
    _, layer = run(Mac(memory=12, margin=4, start=0, threshold=0.0), tuple(x[:, :, :39] for x in (q, k, v)), 30)
    assert layer.run.readings[-1].read < 39
    kept = torch.arange(0, 39, 2).expand(1, 2, -1)
    layer.cache.apply(Keep(kept))
    now = ROPE.rotate(q[:, :, 39:], torch.tensor([[39]]))
    out = layer(now, k[:, :, 39:], v[:, :, 39:])
    slots = torch.cat((kept[0, 0], torch.tensor([39])))
    torch.testing.assert_close(out, attend(now, k[:, :, slots], v[:, :, slots]), rtol=1e-6, atol=1e-6)
    assert (layer.cache.states[0].at >= 0).sum() == 1


def test_equal_queries_are_found_wherever_they_stand() -> None:
    """The ring compares queries before rotary embedding."""
    q, k, v = draw(40, alike=0.0)
    _, layer = run(Mac(memory=20, margin=4, start=0, threshold=0.9), (q, k, v), 30)
    hits = [each.read for each in layer.run.readings if each.phase == "decode"]
    assert max(hits) < 35


@pytest.mark.parametrize(("name", "value"), [("threshold", 1.1), ("memory", 0), ("margin", 0), ("sinks", -1)])
def test_bad_options(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=name):
        Mac(**{name: value})


def test_unknown_rotary_embedding_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="rotary"):
        SingleLayer(Mac())(*draw(5))
