"""TokenSelect against the definition on unrotated keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.attention import Rope, attend
from foveate.attention.backends.cpp import build
from foveate.errors import OptionError, UnsupportedModelError
from foveate.methods import SingleLayer
from foveate.methods.base import execute
from foveate.methods.select import ballots, rotations, tokenselect
from foveate.methods.select.reuse import similarity
from foveate.methods.select.tokenselect import TokenSelect
from foveate.methods.step import RopeLike

ROPE = Rope(16)
SMALL = {"sinks": 3, "local": 10, "chunk": 10, "budget": 6}


def draw(tokens: int, batch: int = 1) -> tuple[Tensor, ...]:
    """Unrotated q [B, 4, T, 16], k, v [B, 2, T, 16]."""
    return tuple(torch.randn(batch, heads, tokens, 16) for heads in (4, 2, 2))


class Shuffled:
    """A rotary embedding whose pairs lie anywhere."""

    def __init__(self, rope: Rope) -> None:
        self.rope, self.order = rope, torch.tensor([5, 11, 0, 3, 14, 8, 2, 13, 7, 1, 15, 4, 10, 6, 12, 9])

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rope.rotate(x[..., self.order], positions)[..., self.order.argsort()]

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rope.unrotate(x[..., self.order], positions)[..., self.order.argsort()]


class Scaled:
    """A rotary embedding of YaRN's kind."""

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return 1.3 * ROPE.rotate(x, positions)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return ROPE.unrotate(x, positions) / 1.3


def run(
    method: TokenSelect,
    qkv: tuple[Tensor, ...],
    spans: list[int],
    rope: RopeLike = ROPE,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, SingleLayer]:
    layer = SingleLayer(method, rope=rope)
    outputs, start = [], 0
    for count in spans:
        q, k, v = (each[:, :, start : start + count] for each in qkv)
        at = torch.arange(start, start + count)[None]
        step = layer.step(rope.rotate(q, at), rope.rotate(k, at), v)
        step.softcap, step.sink = softcap, sink
        outputs.append(execute(method, step))
        start += count
    return torch.cat(outputs, 2), layer


def vote(qbar: Tensor, middle: Tensor, method: TokenSelect) -> list[int]:
    """qbar [4, 16], middle [2, n, 16]: the chosen places in the middle."""
    votes = torch.zeros(middle.shape[1])
    for h in range(4):
        kv = h // 2 if method.head_map == "group" else h % 2
        votes += (method.scale * (middle[kv] @ qbar[h])).softmax(0)
    assert abs(float(votes.sum()) - 4) < 1e-4
    half = method.kernel // 2
    pooled = torch.stack([votes[max(0, j - half) : j + half + 1].max() for j in range(votes.shape[0])])
    return pooled.argsort(descending=True, stable=True)[: method.budget].sort().values.tolist()


def as_coded(k: Tensor, most: int) -> Tensor:
    """Unrotated keys [2, T, 16] as 8 bits hold them: each channel less its mean, over its spread, of the first."""
    sample = k[:, :most].double()
    mean, spread = sample.mean(1, keepdim=True), sample.std(1, correction=0, keepdim=True)
    x = (k - mean) / spread
    step = x.abs().amax(-1, keepdim=True) / 127
    return (mean + spread * step * (x / step).round()).float()


def brute(
    qkv: tuple[Tensor, ...],
    spans: list[int],
    method: TokenSelect,
    rope: RopeLike = ROPE,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """One sequence, chunk by chunk."""
    q, k, v = (each[0] for each in qkv)
    voted = as_coded(k, method.most) if method.bits else k
    outputs, start, last, kept = [], 0, None, None
    chunks = [min(method.chunk, span - begin) for span in spans for begin in range(0, span, method.chunk)]
    for count in chunks:
        N = start + count
        if method.most >= N:
            read = list(range(N))
        else:
            at = torch.arange(method.local, method.local + count)[None]
            qbar = rope.rotate(q[None, :, start:N], at)[0].mean(1)
            fresh = method.reuse is None or last is None or similarity(qbar[None], last[None], flat=True) < method.reuse
            if fresh:
                kept, last = vote(qbar, voted[:, method.sinks : N - method.local], method), qbar
            read = [*range(method.sinks), *(j + method.sinks for j in kept), *range(N - method.local, N)]
        ranks = torch.arange(len(read))[None]
        keys = rope.rotate(k[None, :, read], ranks)[0].repeat_interleave(2, 0)
        queries = rope.rotate(q[None, :, start:N], ranks[:, -count:])[0]
        scores = queries @ keys.transpose(-1, -2) / 4
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        seen = torch.arange(len(read)) <= torch.arange(len(read))[-count:, None]
        scores = scores.masked_fill(~seen, -torch.inf)
        # A sink is one more key, of value 0.
        scores = scores if sink is None else torch.cat((scores, sink.view(4, 1, 1).expand(-1, count, -1)), -1)
        outputs.append(scores.softmax(-1)[..., : len(read)] @ v[:, read].repeat_interleave(2, 0))
        start = N
    return torch.cat(outputs, 1)[None]


SPANS = {"prompt and tokens": [47] + [1] * 8, "tokens": [1] * 45, "pieces": [18, 25, 1, 1, 7, 1, 1]}


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize(
    "options",
    [
        {"reuse": None},
        {"reuse": 0.3},
        {"reuse": -1.0},
        {"reuse": 1.5},
        {"reuse": None, "kernel": 3, "scale": 0.25},
        {"reuse": None, "head_map": "modulo"},
        {"reuse": None, "sinks": 0, "local": 7, "chunk": 4},
        {"reuse": None, "bits": None},
        {"reuse": 0.3, "bits": None},
    ],
)
def test_equals_the_definition(options: dict[str, object], spans: list[int]) -> None:
    method = TokenSelect(**{**SMALL, **options})  # type: ignore[arg-type]
    qkv = draw(sum(spans))
    torch.testing.assert_close(run(method, qkv, spans)[0], brute(qkv, spans, method), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reuse", [None, 0.3, -1.0])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_softcap_and_sink(spans: list[int], reuse: float | None) -> None:
    method, qkv, sink = TokenSelect(**SMALL, reuse=reuse), draw(sum(spans)), torch.tensor([0.5, -1.0, 2.0, 0.0])
    for given in ((1.5, None), (None, sink), (1.5, sink)):
        expected = brute(qkv, spans, method, ROPE, *given)
        torch.testing.assert_close(run(method, qkv, spans, ROPE, *given)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reuse", [None, 0.3, -1.0])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_without_the_kernel(spans: list[int], reuse: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_CPP", "0")
    method, qkv = TokenSelect(**SMALL, reuse=reuse), draw(sum(spans))
    torch.testing.assert_close(run(method, qkv, spans)[0], brute(qkv, spans, method), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("reuse", [None, 0.3, -1.0])
def test_bfloat16_and_values_of_another_size(reuse: float | None, size: int) -> None:
    method = TokenSelect(**SMALL, reuse=reuse)
    q, k, _ = draw(60)
    # One query for all steps, so that rounding seldom moves a vote.
    q[:, :, 40:], v = q[:, :, 40:41], torch.randn(1, 2, 60, size)
    expected = brute((q, k, v), [40] + [1] * 20, method)
    torch.testing.assert_close(run(method, (q, k, v), [40] + [1] * 20)[0], expected, rtol=1e-4, atol=1e-5)
    half = tuple(each.bfloat16() for each in (q, k, v))
    found, layer = run(method, half, [40] + [1] * 20)
    error = (found.float() - expected)[:, :, 40:].norm(dim=-1) / expected[:, :, 40:].norm(dim=-1)
    assert found.dtype == torch.bfloat16
    assert float(error.median()) < 0.02
    assert layer.cache.states[0].index.shape == (1, 9)


def test_more_steps_than_rotations_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotations, "POSITIONS", 7)
    method, qkv, spans = TokenSelect(**SMALL, reuse=0.3), draw(80), [30] + [1] * 50
    torch.testing.assert_close(run(method, qkv, spans)[0], brute(qkv, spans, method), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rope", [Rope(8), Rope(16, style="interleaved"), Shuffled(ROPE), Scaled()], ids=lambda rope: str(rope)[:9]
)
@pytest.mark.parametrize("reuse", [None, 0.3])
def test_any_rotary_embedding(rope: RopeLike, reuse: float | None) -> None:
    method, qkv, spans = TokenSelect(**SMALL, reuse=reuse), draw(50), [40] + [1] * 10
    expected = brute(qkv, spans, method, rope)
    torch.testing.assert_close(run(method, qkv, spans, rope)[0], expected, rtol=1e-4, atol=1e-5)


def test_layers_that_turn_alike_share_a_table() -> None:
    _, layer = run(TokenSelect(**SMALL, reuse=None), draw(30), [30])
    ropes = [ROPE, Rope(16, base=500.0), Shuffled(ROPE), Shuffled(ROPE), Rope(16)]
    for rope in ropes:
        layer.rope = rope
        layer(*(torch.randn(1, heads, 1, 16) for heads in (4, 2, 2)))
    (tables,) = layer.run.shared.values()
    assert [tables[rope] is None for rope in ropes] == [False, False, True, True, False]
    assert tables[ropes[0]] is not tables[ropes[1]]

    class Same(Shuffled):
        rotate, unrotate = staticmethod(ROPE.rotate), staticmethod(ROPE.unrotate)

    layer.rope = Same(ROPE)
    layer(*(torch.randn(1, heads, 1, 16) for heads in (4, 2, 2)))
    assert tables[layer.rope] is tables[ROPE]


def test_everything_that_fits_is_ordinary_attention() -> None:
    qkv = draw(30)
    at = torch.arange(30)[None]
    dense = attend(ROPE.rotate(qkv[0], at), ROPE.rotate(qkv[1], at), qkv[2])
    for spans in ([30], [20] + [1] * 10, [12, 18]):
        out, _ = run(TokenSelect(**{**SMALL, "budget": 17}), qkv, spans)
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)


def test_rows_of_a_batch_choose_and_reuse_for_themselves() -> None:
    method = TokenSelect(**SMALL, reuse=0.2)
    spans = [40] + [1] * 10
    qkv = draw(50, batch=3)
    batch, _ = run(method, qkv, spans)
    for row in range(3):
        own = tuple(each[row : row + 1] for each in qkv)
        torch.testing.assert_close(batch[row : row + 1], brute(own, spans, method), rtol=1e-4, atol=1e-5)


def test_padded_rows_equal_single_ones() -> None:
    method = TokenSelect(**SMALL, reuse=0.2)
    pads, tokens = torch.tensor([0, 13, 30]), 50
    qkv = draw(tokens, batch=3)
    at = (torch.arange(tokens)[None] - pads[:, None]).clamp_min(-1)
    q, k = (ROPE.rotate(each, at.clamp_min(0)) for each in qkv[:2])
    layer = SingleLayer(method, rope=ROPE)
    spans = [slice(0, 40), *(slice(t, t + 1) for t in range(40, tokens))]
    batch = torch.cat([layer(q[:, :, s], k[:, :, s], qkv[2][:, :, s], positions=at[:, s]) for s in spans], 2)
    for row, pad in enumerate(pads.tolist()):
        own = tuple(each[row : row + 1, :, pad:] for each in qkv)
        expected = brute(own, [40 - pad] + [1] * 10, method)
        torch.testing.assert_close(batch[row : row + 1, :, pad:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize(("reuse", "expected"), [(1.5, 20), (-1.0, 1), (None, 20)])
def test_a_kept_choice_is_not_made_again(reuse: float | None, expected: int, bits: int | None) -> None:
    layer = run(TokenSelect(**SMALL, reuse=reuse, prompt=False, bits=bits), draw(30), [30])[1]
    made = 0
    for _ in range(20):
        layer(*(torch.randn(1, heads, 1, 16) for heads in (4, 2, 2)))
        made += int(layer.cache.states[0].served[0] == 0)
    assert made == expected


@pytest.mark.parametrize("kernel", [True, False])
def test_a_choice_that_serves_long_is_copied_once(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_CPP", "1" if kernel else "0")
    if kernel and build.why_unavailable() is not None:
        pytest.skip(f"the C++ kernel is not available: {build.why_unavailable()}")
    copied = []
    original = tokenselect.take_rows
    monkeypatch.setattr(
        tokenselect, "take_rows", lambda *given, **more: (copied.append(1), original(*given, **more))[1]
    )
    layer = run(TokenSelect(**SMALL, reuse=-1.0, prompt=False), draw(40), [40])[1]
    # Keys and values, in the first step that does not read them where they lie.
    lent = tokenselect.LEND if kernel else 0
    for steps in range(1, 9):
        layer(*(torch.randn(1, heads, 1, 16) for heads in (4, 2, 2)))
        assert len(copied) == (2 if steps > lent else 0)
        assert (layer.cache.states[0].keys is None) == (steps <= lent)


def test_positions_stay_compact() -> None:
    """Text far away that is not chosen leaves the output as if it had never been there."""
    method = TokenSelect(sinks=2, local=6, chunk=6, budget=2, reuse=None)
    q, k, v = draw(80)
    k[:, :, 2:74] = -5 * q[:, ::2, 79:].expand(-1, -1, 72, -1)
    k[:, :, [2, 3]] = 8 * q[:, ::2, 79:]
    k[:, :, [40, 41]], v[:, :, [40, 41]] = k[:, :, [2, 3]], v[:, :, [2, 3]]
    outputs = []
    for cut in (list(range(2, 40)), list(range(4, 42))):
        rest = [j for j in range(80) if j not in cut]
        own = tuple(each[:, :, rest] for each in (q, k, v))
        outputs.append(run(method, own, [len(rest) - 1, 1])[0][:, :, -1])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bits", "most"), [(8, 2.8), (None, 3.6)])
def test_stored_bytes_beside_the_cache(bits: int | None, most: float) -> None:
    """Two parts are the keys and values; with 8 bits of 32 and a scale per 16, half a part is the unrotated keys'."""
    _, layer = run(TokenSelect(**SMALL, reuse=None, bits=bits), draw(200), [200])
    keys = layer.cache.keys.numel() * 4
    assert (most - 0.6) * keys <= layer.cache.bytes() <= most * keys


@pytest.mark.parametrize("bits", [8, None])
def test_what_all_read_keeps_nothing_beside_the_cache(bits: int | None) -> None:
    method = TokenSelect(**SMALL, bits=bits)
    _, layer = run(method, draw(method.most), [method.most - 3, 1, 1, 1])
    assert not layer.cache.states
    assert not layer.cache.has_extra(ballots.KEYS)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_prompt_in_pieces_codes_its_keys_alike(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_CPP", "1" if kernel else "0")
    qkv = draw(60)
    codes = []
    for spans in ([60], [5, 30, 25], [22] + [1] * 38):
        cache = run(TokenSelect(**SMALL), qkv, spans)[1].cache
        codes.append((cache.extra(ballots.KEYS).float(), cache.extra(ballots.STEPS)))
    for other, steps in codes[1:]:
        torch.testing.assert_close(steps, codes[0][1], rtol=1e-4, atol=0)
        # A number between two codes may fall to either.
        assert (other - codes[0][0]).abs().amax() <= 1
        assert bool((other != codes[0][0]).float().mean() < 0.01)


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="chunk=20, allowed: <= local=10"):
        TokenSelect(**{**SMALL, "chunk": 20})
    with pytest.raises(OptionError, match="kernel=2, allowed: an odd number"):
        TokenSelect(kernel=2)


def test_an_unknown_rotary_embedding_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="rotary embedding is not known"):
        SingleLayer(TokenSelect(**SMALL))(*draw(4))
