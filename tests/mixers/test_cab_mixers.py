"""CAB's efficient attentions against their definitions, token by token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import OptionError
from foveate.mixers.base import create_mixer
from foveate.mixers.linear import s4d
from foveate.mixers.linear.nystromformer import approximate_inverse, segment_means
from foveate.mixers.sparse.bands import band_places, bands, unband


def made(spec: str, **options):
    torch.manual_seed(0)
    mixer = create_mixer(spec, **{"dim": 16, "heads": 2, **options}).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def tokens(length: int = 23, rows: int = 2, seed: int = 5) -> Tensor:
    return torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def projected(mixer, x: Tensor, source: Tensor | None = None):
    source = x if source is None else source
    return heads_of(mixer.q_proj(x)), heads_of(mixer.k_proj(source)), heads_of(mixer.v_proj(source))


def merged(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (logits if hidden is None else logits.masked_fill(hidden, -torch.inf)).softmax(-1) @ v


def slots_of(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.stack(
        [sum((rows @ weights[:, r]).softmax(-1)[..., n, None] * rows[:, :, n] for n in range(rows.shape[2]))
         for r in range(weights.shape[1])], 2
    )  # fmt: skip


def test_abc_slots_are_softmaxes_over_the_tokens_so_far():
    mixer, x = made("abc", slots=4), tokens(9)
    q, k, v = projected(mixer, x)
    rows = []
    for t in range(9):
        few_k = slots_of(k[:, :, : t + 1], mixer.key_slots)
        few_v = slots_of(v[:, :, : t + 1], mixer.value_slots)
        rows.append(softmax_attention(q[:, :, t : t + 1], few_k, few_v))
    assert torch.allclose(mixer(x)[0], mixer.o_proj(merged(torch.cat(rows, 2))), atol=1e-10)
    both_ways = made("abc", slots=4, causal=False)
    last = both_ways(x)[0][:, -1]
    assert torch.allclose(last, mixer(x)[0][:, -1], atol=1e-10)


def test_abc_with_a_slot_for_each_token_is_softmax_attention():
    mixer, unit = made("abc", slots=8, causal=False), torch.eye(16, dtype=torch.float64)
    context = torch.linalg.qr(torch.randn(1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[
        0
    ]
    with torch.no_grad():
        # Tokens whose keys and values in every head are the unit vectors, and slots that pick one each.
        for proj in (mixer.k_proj, mixer.v_proj):
            proj.weight.copy_(torch.cat((unit[:8], unit[:8])) @ context[0].T)
            proj.bias.zero_()
        mixer.key_slots.copy_(1e4 * torch.eye(8))
        mixer.value_slots.copy_(1e4 * torch.eye(8))
    memory = context[:, :, :8].transpose(1, 2)
    x = tokens(5, rows=1)
    expected = mixer.o_proj(merged(softmax_attention(*projected(mixer, x, memory))))
    assert torch.allclose(mixer(x, context=memory)[0], expected, atol=1e-9)


def test_abc_reads_nothing_from_a_context_without_tokens():
    mixer = made("abc", causal=False)
    nobody = torch.zeros(2, 4, dtype=torch.bool)
    y, _ = mixer(tokens(), context=tokens(4), context_padding=nobody)
    assert torch.allclose(y, mixer.o_proj.bias.expand_as(y), atol=1e-12)


@pytest.mark.parametrize("length", [5, 23, 40])
def test_cosformer_is_relu_products_times_a_cosine(length):
    mixer, x, context = made("cosformer"), tokens(), tokens(length, seed=6)
    q, k, v = projected(mixer, x, context)
    i, j = torch.arange(23)[:, None], torch.arange(length)
    cosine = torch.cos(math.pi * (i - j).double() / (2 * max(23, length)))
    weights = q.relu() @ k.relu().transpose(-1, -2) * cosine
    assert bool((weights >= 0).all())
    o = weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    assert torch.allclose(mixer(x, context=context)[0], mixer.o_proj(merged(o)), atol=1e-10)


def test_segments_are_as_even_as_they_can_be_and_the_short_ones_first():
    x = torch.arange(11.0).view(1, 1, 11, 1)
    assert segment_means(x, 4).flatten().tolist() == [0.5, 3.0, 6.0, 9.0]
    assert segment_means(x, 11) is x
    assert segment_means(x, 1).flatten().tolist() == [5.0]


def test_iteration_finds_the_inverse():
    torch.manual_seed(0)
    A = (torch.randn(2, 3, 6, 6, dtype=torch.float64) + 4 * torch.eye(6)).softmax(-1)
    assert torch.allclose(approximate_inverse(A, 25), torch.linalg.inv(A), atol=1e-9)
    assert torch.allclose(approximate_inverse(A, 40, shared_start=True), torch.linalg.inv(A), atol=1e-9)


def test_nystromformer_is_its_product_of_three_softmaxes():
    mixer, x = made("nystromformer", landmarks=4, iterations=60, kernel=3), tokens()
    q, k, v = projected(mixer, x)
    few_q, few_k = segment_means(q, 4), segment_means(k, 4)

    def weights(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.transpose(-1, -2) * 8**-0.5).softmax(-1)

    o = weights(q, few_k) @ torch.linalg.pinv(weights(few_q, few_k)) @ weights(few_q, k) @ v
    local = F.conv2d(v, mixer.conv.weight, padding=(1, 0), groups=2)
    assert torch.allclose(mixer(x)[0], mixer.o_proj(merged(o + local)), atol=1e-6)


def test_nystromformer_with_enough_landmarks_is_softmax_attention():
    mixer, x = made("nystromformer", landmarks=23), tokens()
    expected = mixer.o_proj(merged(softmax_attention(*projected(mixer, x))))
    assert torch.allclose(mixer(x)[0], expected, atol=1e-10)


def test_rows_of_the_batch_influence_each_other_in_the_released_form_alone():
    x = tokens()
    for release in (False, True):
        mixer = made("nystromformer", landmarks=4, iterations=2, release=release)
        alone = torch.cat([mixer(row)[0] for row in x.split(1)])
        assert torch.allclose(mixer(x)[0], alone, atol=1e-12, rtol=0) is (not release)


def test_lara_is_its_samples_one_by_one():
    mixer, x = made("lara", landmarks=4), tokens()
    q, k, v = projected(mixer, x)
    mu = segment_means(q, 4) + segment_means(k, 4)
    root = 8**0.5

    def log_phi(rows: Tensor, w: Tensor) -> Tensor:
        return (rows * w).sum(-1) / root - rows.square().sum(-1) / (2 * root)

    logits, values = [], []
    for c in range(4):
        w = mu[:, :, c : c + 1]
        of_keys = log_phi(k, w)
        values.append((of_keys.softmax(-1)[..., None] * v).sum(2))
        own = log_phi(w, w)
        logits.append((w * q).sum(-1) / root + log_phi(q, w) + of_keys.logsumexp(-1, keepdim=True) - own)
    weights = torch.stack(logits, -1).softmax(-1)
    assert torch.allclose(mixer(x)[0], mixer.o_proj(merged(weights @ torch.stack(values, 2))), atol=1e-10)


def test_lara_draws_in_training_alone():
    mixer, x = made("lara", landmarks=4), tokens()
    assert torch.equal(mixer(x)[0], mixer(x)[0])
    assert not torch.equal(mixer.train()(x)[0], mixer(x)[0])
    fixed = made("lara", landmarks=4, noise=False).train()
    assert torch.equal(fixed(x)[0], mixer.eval()(x)[0])


def test_performer_comes_near_softmax_attention_with_more_features():
    x, errors = 0.5 * tokens(12), []
    for features in (8, 4096):
        mixer = made("performer", features=features, eps=0.0, least=1e-12)
        expected = mixer.o_proj(merged(softmax_attention(*projected(mixer, x))))
        errors.append(((mixer(x)[0] - expected).norm() / expected.norm()).item())
    assert errors[1] < 0.03 < errors[0]


def test_performer_is_its_features():
    mixer, x = made("performer", features=5), tokens(7)
    q, k, v = projected(mixer, x)

    def phi(rows: Tensor, over: tuple[int, ...]) -> Tensor:
        rows = rows * 8**-0.25
        along = torch.einsum("bhnd,hmd->bhnm", rows, mixer.projection)
        shift = along.amax(over, keepdim=True)
        return (torch.exp(along - rows.square().sum(-1, keepdim=True) / 2 - shift) + 1e-4) / 5**0.5

    weights = phi(q, (3,)) @ phi(k, (2, 3)).transpose(-1, -2)
    o = weights @ v / weights.sum(-1, keepdim=True).clamp(min=0.1)
    assert torch.allclose(mixer(x)[0], mixer.o_proj(merged(o)), atol=1e-10)


def test_performer_redraws_in_training_if_asked():
    x = tokens(7)
    mixer = made("performer").train()
    assert not torch.equal(mixer(x)[0], mixer(x)[0])
    assert torch.equal(mixer.eval()(x)[0], mixer(x)[0])
    fixed = made("performer", redraw=False).train()
    assert torch.equal(fixed(x)[0], fixed(x)[0])
    rows = mixer.projection[0, :8]
    between = F.normalize(rows, dim=-1) @ F.normalize(rows, dim=-1).T
    assert torch.allclose(between, torch.eye(8, dtype=torch.float64), atol=1e-5)


def test_probsparse_gives_full_attention_to_the_least_uniform_queries():
    mixer, x = made("probsparse", factor=2), tokens()
    sample = torch.randint(23, (23, 8), generator=torch.Generator().manual_seed(9))
    q, k, v = projected(mixer, x)
    o = v.mean(2, keepdim=True).expand_as(v).clone()
    full = softmax_attention(q, k, v)
    for b in range(2):
        for h in range(2):
            measured = []
            for i in range(23):
                drawn = torch.stack([q[b, h, i] @ k[b, h, j] for j in sample[i]])
                measured.append((drawn.max() - drawn.sum() / 23).item())
            for i in sorted(range(23), key=lambda i: -measured[i])[:8]:
                o[b, h, i] = full[b, h, i]
    assert torch.allclose(mixer.mix_sampled(x, sample), mixer.o_proj(merged(o)), atol=1e-10)


def test_probsparse_of_enough_queries_is_softmax_attention_and_of_one_token_its_value():
    mixer, x = made("probsparse", factor=10), tokens()
    assert torch.allclose(mixer(x)[0], mixer.o_proj(merged(softmax_attention(*projected(mixer, x)))), atol=1e-10)
    assert torch.allclose(mixer(x[:, :1])[0], mixer.o_proj(mixer.v_proj(x[:, :1])), atol=1e-12)
    first, second = made("probsparse", factor=1, seed=0), made("probsparse", factor=1, seed=1)
    assert not torch.equal(first(x)[0], second(x)[0])


def test_bands_are_windows_around_blocks():
    x = torch.arange(1.0, 8).view(1, 1, 7, 1)
    around = bands(x, 3, 2, 1)
    assert around[0, 0, ..., 0].tolist() == [[0, 0, 1, 2, 3, 4], [2, 3, 4, 5, 6, 7], [5, 6, 7, 0, 0, 0]]
    queries, keys = band_places(7, 3, 2, 1, x.device)
    assert queries.tolist() == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]
    assert keys.tolist() == [[-1, -1, 0, 1, 2, 3], [1, 2, 3, 4, 5, 6], [4, 5, 6, -1, -1, -1]]
    assert torch.equal(unband(bands(x, 3, 0, 0), 7), x)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("reach", [1, 4, 22, 50])
def test_local_attention_reads_within_its_reach(causal, reach):
    mixer, x = made("local", reach=reach, causal=causal), tokens()
    back = torch.arange(23)[:, None] - torch.arange(23)
    hidden = (back < 0) | (back >= reach) if causal else back.abs() > reach
    expected = mixer.o_proj(merged(softmax_attention(*projected(mixer, x), hidden)))
    assert torch.allclose(mixer(x)[0], expected, atol=1e-10)


def recurrence(mixer, x: Tensor, weights: Tensor) -> Tensor:
    """[B, N, channels, C] of the continuous system held over each step, state by state."""
    dt = mixer.log_dt.exp()[:, None]
    A = -mixer.log_real.exp() + 1j * mixer.imaginary
    keep, write = (dt * A).exp(), ((dt * A).exp() - 1) / A
    h = torch.zeros(x.shape[0], 16, mixer.state_dim // 2, dtype=torch.complex128)
    rows = []
    for t in range(x.shape[1]):
        h = keep * h + write * x[:, t, :, None]
        rows.append(2 * (torch.view_as_complex(weights.contiguous()) * h[:, None]).sum(-1).real)
    return torch.stack(rows, 1)


def finished(mixer, z: Tensor, x: Tensor) -> Tensor:
    return mixer.o_proj(F.gelu(z + x[:, :, None] * mixer.D).flatten(2))


@pytest.mark.parametrize("channels", [1, 3])
def test_s4d_is_its_recurrence(channels, monkeypatch):
    monkeypatch.setattr(s4d, "CHUNK", 7)
    mixer, x = made("s4d", state_dim=6, channels=channels), tokens()
    expected = finished(mixer, recurrence(mixer, x, mixer.C), x)
    assert torch.allclose(mixer(x)[0], expected, atol=1e-9)
    first, state = mixer(x[:, :10])
    rest, _ = mixer(x[:, 10:], state=state)
    assert torch.allclose(torch.cat((first, rest), 1), expected, atol=1e-9)


def test_s4d_both_ways_adds_a_recurrence_over_later_tokens():
    mixer, x = made("s4d", state_dim=6, channels=2, causal=False), tokens()
    z = recurrence(mixer, x, mixer.C[:2])
    later = recurrence(mixer, x.flip(1), mixer.C[2:]).flip(1)
    z[:, :-1] += later[:, 1:]
    assert torch.allclose(mixer(x)[0], finished(mixer, z, x), atol=1e-9)


def test_s4d_starts_as_published():
    mixer = create_mixer("s4d", dim=16, state_dim=8)
    assert torch.allclose(mixer.log_real.exp(), torch.tensor(0.5))
    expected = torch.tensor([8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)])
    assert torch.allclose(mixer.imaginary[0], expected)
    assert bool((mixer.log_dt.exp() >= 1e-3).all())
    assert bool((mixer.log_dt.exp() <= 0.1).all())


@pytest.mark.parametrize("window", [1, 4, 40])
def test_long_short_is_one_softmax_over_landmarks_and_a_window(window):
    mixer, x = made("long-short", landmarks=3, window=window), tokens(rows=1)
    q = heads_of(mixer.q_proj(x)) * 8**-0.5
    k, v = (heads_of(F.layer_norm(p(x), (16,), mixer.near_norm.weight, mixer.near_norm.bias))
            for p in (mixer.k_proj, mixer.v_proj))  # fmt: skip
    share = heads_of(mixer.compress(x)).softmax(2)
    far = [F.layer_norm(merged(share.transpose(-1, -2) @ each), (16,), mixer.far_norm.weight, mixer.far_norm.bias)
           for each in (k, v)]  # fmt: skip
    far_k, far_v = (heads_of(each) for each in far)
    side, rows = max(window // 2, 1), []
    for i in range(23):
        begin = i // window * window
        near = range(max(0, begin - side), min(23, begin + window + side))
        key, value = torch.cat((far_k, k[:, :, near]), 2), torch.cat((far_v, v[:, :, near]), 2)
        rows.append((q[:, :, i : i + 1] @ key.transpose(-1, -2)).softmax(-1) @ value)
    assert torch.allclose(mixer(x)[0], mixer.o_proj(merged(torch.cat(rows, 2))), atol=1e-10)


def test_causal_long_short_reads_near_tokens_and_rows_of_finished_chunks():
    mixer, x = made("long-short-causal", chunk=4, rank=2, window=5, memory=8), tokens(14, rows=1)
    q = heads_of(mixer.q_proj(x)) * 8**-0.5
    plain_k, plain_v = mixer.k_proj(x), mixer.v_proj(x)

    def normed(rows: Tensor, norm) -> Tensor:
        return F.layer_norm(rows, (16,), norm.weight, norm.bias)

    def rho(count: int) -> Tensor:
        j = torch.arange(8, dtype=torch.float64)
        return torch.stack([torch.cat(((i * 10000 ** (-2 * j / 16)).sin(), (i * 10000 ** (-2 * j / 16)).cos()))
                            for i in range(count)])  # fmt: skip

    near_table, far_table = (heads_of(p(rho(40))[None])[0] for p in (mixer.near_distance, mixer.far_distance))
    far = []
    for plain in (plain_k, plain_v):
        chunks = [torch.zeros(1, 4, 16, dtype=torch.float64)] * 2 + [plain[:, c : c + 4] for c in range(0, 12, 4)]
        inputs = [torch.zeros(1, 4, 16, dtype=torch.float64)] * 2 + [x[:, c : c + 4] for c in range(0, 12, 4)]
        rows = [merged(heads_of(mixer.compress(given)).softmax(2).transpose(-1, -2) @ heads_of(chunk))
                for given, chunk in zip(inputs, chunks)]  # fmt: skip
        far.append(heads_of(normed(torch.cat(rows, 1), mixer.far_norm)))
    padded = [heads_of(normed(F.pad(plain, (0, 0, 4, 0)), mixer.near_norm)) for plain in (plain_k, plain_v)]
    outputs = []
    for t in range(14):
        seen = (2 + t // 4) * 2
        heads = []
        for h in range(2):
            query = q[0, h, t]
            logits = [query @ far[0][0, h, r] + query @ far_table[h, seen - 1 - r] for r in range(seen)]
            for distance in range(5):
                key = padded[0][0, h, t + 4 - distance]
                logits.append((query + mixer.content_bias[h]) @ key
                              + (query + mixer.distance_bias[h]) @ near_table[h, distance])  # fmt: skip
            values = torch.cat((far[1][0, h, :seen], padded[1][0, h, t : t + 5].flip(0)))
            heads.append(torch.stack(logits).softmax(0) @ values)
        outputs.append(torch.cat(heads))
    expected = mixer.o_proj(torch.stack(outputs))[None]
    assert torch.allclose(mixer(x)[0], expected, atol=1e-10)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("abc:slots=0", "slots=0, allowed: >= 1"),
        ("cosformer:eps=0.0", "eps=0.0, allowed: > 0"),
        ("nystromformer:landmarks=0", "landmarks=0, allowed: >= 1"),
        ("nystromformer:kernel=4", "kernel=4, allowed: odd"),
        ("nystromformer:iterations=-1", "iterations=-1, allowed: >= 0"),
        ("lara:landmarks=0", "landmarks=0, allowed: >= 1"),
        ("performer:features=0", "features=0, allowed: >= 1"),
        ("performer:least=0.0", "least=0.0, allowed: > 0"),
        ("performer:eps=-1.0", "eps=-1.0, allowed: >= 0"),
        ("probsparse:factor=0", "factor=0, allowed: >= 1"),
        ("s4d:state_dim=5", "state_dim=5, allowed: even, >= 2"),
        ("s4d:channels=0", "channels=0, allowed: >= 1"),
        ("local:reach=0", "reach=0, allowed: >= 1"),
        ("long-short:window=0", "window=0, allowed: >= 1"),
        ("long-short:landmarks=0", "landmarks=0, allowed: >= 1"),
        ("long-short-causal:memory=33", "memory=33, allowed: multiples of chunk = 32"),
        ("long-short-causal:rank=0", "rank=0, allowed: >= 1"),
        ("abc:heads=3", "dim=16 with heads=3, allowed: a multiple"),
    ],
)
def test_bad_options(spec, message):
    with pytest.raises(OptionError, match=message):
        create_mixer(spec, dim=16)
