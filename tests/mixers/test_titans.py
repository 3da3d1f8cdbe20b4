"""Titans: each layer against its definition written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.features import l2norm
from foveate.attention.linear import linear_scan
from foveate.attention.weight_chunks import newton_schulz, soft_norm
from foveate.errors import OptionError
from foveate.mixers.base import Mixer, create_mixer
from foveate.registry import card
from tests.mixers.build import DIM, HEADS, build, relative, tokens

D = DIM // HEADS
PLAIN = {"form": "plain", "max_rate": 1.0}


def made(name: str, **options) -> Mixer:
    return build(card(name), **options)


def heads(x: Tensor) -> Tensor:
    """[B, N, C] -> [B, H, N, D]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def convolved(conv: torch.nn.Module, x: Tensor) -> Tensor:
    """silu of a causal depthwise convolution, by torch's own."""
    taps = conv.weight.shape[-1]
    return F.silu(F.conv1d(F.pad(x.mT, (taps - 1, 0)), conv.weight, groups=x.shape[-1])).mT


def test_a_matrix_without_momentum_or_decay_is_the_delta_rule():
    mixer, x = made("titans-memory", depth=1, momentum=False, chunk=1, **PLAIN), tokens()
    memory = mixer.memory
    with torch.no_grad():
        # alpha is 0 to the last bit, theta as the bias says.
        memory.step_proj.weight[:HEADS] = 0
        memory.step_bias[:HEADS] = -200
    o, _ = memory(x, memory.start(3, x))
    q, k, v = (
        convolved(getattr(memory, f"{name}_conv"), getattr(memory, f"{name}_proj")(x)).unflatten(-1, (HEADS, D))
        for name in "qkv"
    )
    theta = (memory.step_proj(x) + memory.step_bias)[..., HEADS:].sigmoid()
    expected, _ = linear_scan(
        l2norm(q),
        l2norm(k),
        v,
        beta=2 * theta,
        scale=1.0,
        initial_state=memory.weights.w0.expand(3, -1, -1, -1),
    )
    assert relative(o, expected.flatten(2)) < 1e-9


def test_gates_are_those_of_the_recurrence():
    """chunk=1, a plain MLP of two matrices: weights per token by autograd."""
    mixer, x = made("titans-memory", chunk=1, **PLAIN), tokens(1, 9)
    memory = mixer.memory
    o, _ = memory(x, memory.start(1, x))
    q, k, v = (
        heads(convolved(getattr(memory, f"{name}_conv"), getattr(memory, f"{name}_proj")(x)))[0] for name in "qkv"
    )
    logits = (memory.step_proj(x) + memory.step_bias)[0].unflatten(-1, (3, HEADS))
    for h in range(HEADS):
        W = [memory.weights.w0[h].detach(), memory.weights.w1[h].detach()]
        S = [torch.zeros_like(w) for w in W]
        for t in range(9):
            alpha, theta, eta = logits[t, :, h].sigmoid().tolist()
            free = [w.clone().requires_grad_() for w in W]
            loss = (F.silu(l2norm(k[h, t]) @ free[0]) @ free[1] - v[h, t]).square().sum()
            S = [eta * s - theta * grad for s, grad in zip(S, torch.autograd.grad(loss, free))]
            W = [(1 - alpha) * w + s for w, s in zip(W, S)]
            expected = F.silu(l2norm(q[h, t]) @ W[0]) @ W[1]
            assert relative(o[0, t, h * D : (h + 1) * D], expected) < 1e-9


def test_forgetting_all_keeps_only_the_step():
    """alpha = 1: W_t = S_t, whatever stood before."""
    mixer, x = made("titans-memory", depth=1, momentum=False, chunk=1, **PLAIN), tokens(1, 8)
    memory = mixer.memory
    with torch.no_grad():
        memory.step_proj.weight[:HEADS] = 0
        memory.step_bias[:HEADS] = 1e4
    _, state = memory(x, memory.start(1, x))
    rank = torch.linalg.matrix_rank(state.memory.weights[0])
    assert rank.unique().tolist() == [1]


def test_the_inner_loss_falls_within_a_sequence():
    """A few pairs, shown again and again, are learned while they are read."""
    torch.manual_seed(0)
    mixer = create_mixer("titans-memory", dim=32, heads=1, chunk=8, **PLAIN).eval()
    x = torch.randn(1, 8, 32).repeat(1, 16, 1)
    memory = mixer.memory
    with torch.no_grad():
        v = convolved(memory.v_conv, memory.v_proj(x))
        memory.q_proj.weight.copy_(memory.k_proj.weight)
        memory.q_conv.weight.copy_(memory.k_conv.weight)
        memory.step_bias[0] = -20
        o, _ = memory(x, memory.start(1, x))
    error = (o - v).square().mean((0, 2)).unflatten(0, (16, 8)).mean(1)
    assert float(error[-1]) < 0.1 * float(error[0])
    assert float(error[-1]) < float(error[8]) < float(error[2])


@pytest.mark.parametrize("name", ["titans-memory", "titans-mac", "titans-mag", "titans-mal"])
def test_a_long_run_of_one_token_does_not_diverge(name):
    """Steps at one set of weights add up; behind a LayerNorm they shrink as the weights grow."""
    torch.manual_seed(0)
    mixer, x = create_mixer(name, dim=32, heads=2), torch.randn(1, 1, 32).repeat(1, 400, 1).requires_grad_()
    with torch.no_grad():
        mixer.memory.step_bias[2:4] = 5.0
    y, _ = mixer(x)
    (gradient,) = torch.autograd.grad(y.square().mean(), x)
    assert float(y.detach().abs().max()) < 10
    assert float(gradient.abs().max()) < 10


def rms(norm: torch.nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def attention(layer, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
    """Softmax over persistent keys [H, P, D] and k, with all weights written down; queries of the two apart."""
    plain, turned = q
    pk, pv = (heads(proj(sinks[None])) for proj in (layer.k_proj, layer.v_proj))
    scores = torch.cat((plain @ pk.mT, (turned @ k.mT).masked_fill(~mask, -torch.inf)), -1) / D**0.5
    o = scores.softmax(-1) @ torch.cat((pv.expand(v.shape[0], -1, -1, -1), v), 2)
    return layer.o_proj(o.transpose(1, 2).flatten(2))


def window_mask(n: int, window: int) -> Tensor:
    back = torch.arange(n)[:, None] - torch.arange(n)
    return (back >= 0) & (back <= window)


def test_memory_as_a_gate():
    mixer, x = made("titans-mag"), tokens()
    layer, at = mixer.attention, torch.arange(24)[None]
    q, k, v = (heads(proj(x)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    turned = layer.rope.rotate(q, at), layer.rope.rotate(k, at)
    y = attention(layer, (q, turned[0]), turned[1], v, mixer.persistent, window_mask(24, 6))
    whole = torch.cat((mixer.persistent.expand(3, -1, -1), x), 1)
    m = mixer.memory(whole, mixer.memory.start(3, x))[0][:, 3:]
    expected = rms(mixer.combined.y_norm, y) * rms(mixer.combined.m_norm, m).sigmoid()
    assert relative(mixer(x)[0], expected) < 1e-9


def test_memory_as_a_layer():
    mixer, x = made("titans-mal"), tokens()
    whole = torch.cat((mixer.persistent.expand(3, -1, -1), x), 1)
    m = rms(mixer.combined, mixer.memory(whole, mixer.memory.start(3, x))[0])
    layer, at = mixer.attention, torch.arange(27)[None]
    q, k, v = (heads(proj(m)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = layer.rope.rotate(q, at), layer.rope.rotate(k, at)
    expected = attention(layer, (q, q), k, v, mixer.persistent[:0], window_mask(27, 6))[:, 3:]
    assert relative(mixer(x)[0], expected) < 1e-9


def test_memory_as_a_context():
    mixer, x = made("titans-mac", **PLAIN), tokens()
    S, memory, outputs = 6, mixer.memory, []
    state = memory.start(3, x)
    queries = convolved(mixer.context_conv, memory.q_proj(x))
    at = torch.arange(S)[None]
    seen = torch.ones(S, S, dtype=torch.bool).tril().repeat(1, 2)
    for begin in range(0, 24, S):
        s = x[:, begin : begin + S]
        W = state.memory.weights
        h = F.silu(l2norm(heads(queries[:, begin : begin + S])) @ W[0]) @ W[1]
        h = h.transpose(1, 2).flatten(2)
        k, v = (torch.cat([heads(proj(part)) for part in (h, s)], 2) for proj in (mixer.k_proj, mixer.v_proj))
        q = mixer.rope.rotate(heads(mixer.q_proj(s)), at)
        k = mixer.rope.rotate(k, at.repeat(1, 2))
        y = attention(mixer, (q, q), k, v, mixer.persistent, seen)
        m, state = memory(y, state)
        outputs.append(rms(mixer.gate.y_norm, y) * rms(mixer.gate.m_norm, m).sigmoid())
    assert relative(mixer(x)[0], torch.cat(outputs, 1)) < 1e-9


def test_what_lies_segments_back_is_reached_through_the_memory():
    mixer, x = made("titans-mac"), tokens(1)
    changed = x.clone()
    changed[:, 0] += 1
    moved = (mixer(x)[0] - mixer(changed)[0]).abs().amax(-1)[0]
    assert bool((moved[12:] > 1e-6).all())


CHUNKED = {
    "plain": {},
    "deep": {"depth": 3, "activation": "silu"},
    "norms": {"qk_norm": True, "post_norm": True, "pre_norm": False},
    "modulated": {"modulation": True, "max_norm": 0.05},
    "orthogonal": {"orthogonal": True},
    "still": {"momentum": False, "refresh": None, "form": "plain"},
}


@pytest.mark.parametrize("options", CHUNKED.values(), ids=CHUNKED)
def test_one_gradient_per_chunk(options):
    """The loop over chunks, with gradients by autograd."""
    mixer, x = made("titans-memory-chunked", **options), tokens(1, 22)
    stored, read = (mixer.store_norm(x), mixer.retrieve_norm(x))
    q, k = (
        mixer.q_norm(mixer.q_proj(read).unflatten(-1, (HEADS, D))),
        mixer.k_norm(mixer.k_proj(stored).unflatten(-1, (HEADS, D))),
    )
    v = mixer.v_proj(stored).unflatten(-1, (HEADS, D))
    rate = mixer.rate_proj(stored).sigmoid()
    expected = torch.zeros(1, 22, HEADS, D, dtype=torch.float64)
    for h in range(HEADS):
        W = [each[h].detach() for each in mixer.weights(x)]
        S = [torch.zeros_like(w) for w in W]
        base = W
        for c in range(6):
            rows = slice(4 * c, min(4 * c + 4, 22))
            ending = torch.arange(22)[rows] % 4 == 3
            expected[0, rows, h][~ending] = network(mixer, W, q[0, rows, h])[~ending].detach()
            if 4 * c + 4 > 22:
                break
            free = [w.clone().requires_grad_() for w in base]
            errors = (network(mixer, free, k[0, rows, h]) - v[0, rows, h]).square().mean(-1)
            grads = torch.autograd.grad((rate[0, rows, h] * errors).sum(), free)
            if mixer.max_norm:
                grads = [g / g.norm() * (0.025 * (1 + torch.tanh(g.norm() / 0.025))) for g in grads]
            if mixer.modulation_proj is not None:
                # Logits of a mean are the mean of logits.
                gate = mixer.modulation_proj(stored[0, rows].mean(0)).sigmoid().unflatten(0, (HEADS, -1))[h]
                grads = [g * each for g, each in zip(grads, gate)]
            pooled = stored[0, rows].mean(0)
            eta = mixer.momentum_proj(pooled).sigmoid()[h] if mixer.momentum else 0.0
            S = [eta * s - g for s, g in zip(S, grads)]
            steps = [newton_schulz(s) if s.dim() == 2 and mixer.orthogonal else s for s in S]
            alpha = mixer.decay_proj(pooled).sigmoid()[h]
            W = [((1 - alpha) * w + s).detach() for w, s in zip(W, steps)]
            expected[0, rows, h][ending] = network(mixer, W, q[0, rows, h])[ending].detach()
            if mixer.refresh and (c + 1) % mixer.refresh == 0:
                base = W
    y = mixer.o_norm(expected) * mixer.gate_proj(read).sigmoid().unsqueeze(-1)
    assert relative(mixer(x)[0], mixer.o_proj(y.flatten(2))) < 1e-9


def network(mixer: Mixer, W: list[Tensor], x: Tensor) -> Tensor:
    depth = mixer.memory.depth
    act = F.silu if mixer.memory.activation == "silu" else F.gelu
    y = x @ W[0]
    for w in W[1:depth]:
        y = act(y) @ w
    return y if len(W) == depth else F.layer_norm(y, (D,)) * (W[depth] + 1) + x


def test_soft_norm_is_below_its_bound_and_above_half_of_it():
    x = torch.cat([1e-6 * tokens(1, 2), tokens(1, 2), 1e6 * tokens(1, 2)]).unsqueeze(1)
    norms = soft_norm(x, 0.8).flatten(2).norm(dim=-1)
    assert bool((norms <= 0.8 + 1e-12).all())
    assert bool((norms >= 0.4).all())
    assert bool(soft_norm(torch.zeros(1, 1, 3), 0.8).isfinite().all())


def test_newton_schulz_brings_singular_values_near_one():
    x = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(newton_schulz(x))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("titans-memory", {"depth": 0}, "depth=0, allowed: >= 1"),
        ("titans-memory", {"activation": "relu"}, "activation='relu', allowed"),
        ("titans-memory", {"form": "post"}, "form='post', allowed"),
        ("titans-memory", {"expansion": 0.0}, r"expansion=0.0, allowed: > 0"),
        ("titans-memory", {"chunk": 0}, "chunk=0, allowed: >= 1"),
        ("titans-memory", {"max_rate": 0.0}, "max_rate=0.0, allowed: > 0"),
        ("titans-mac", {"segment": 0}, "segment=0, allowed: >= 1"),
        ("titans-mag", {"window": 0}, "window=0, allowed: >= 1"),
        ("titans-mag", {"persistent": -1}, "persistent=-1, allowed: >= 0"),
        ("titans-mal", {"heads": 3}, "dim=16 with heads=3, allowed: a multiple of 2 heads"),
        ("titans-memory-chunked", {"refresh": 6}, "refresh=6, allowed: None or a multiple of chunk = 4"),
        ("titans-memory-chunked", {"heads": 1, "head_dim": 8}, "head_dim=8 with heads=1, allowed: dim = 16"),
    ],
)
def test_bad_options_are_refused_by_name(name, options, message):
    with pytest.raises(OptionError, match=f"{name}: {message}"):
        made(name, **options)


@pytest.mark.parametrize("name", ["titans-mac", "titans-mag", "titans-mal"])
def test_without_persistent_tokens(name):
    mixer, x = made(name, persistent=0), tokens()
    whole, _ = mixer(x)
    first, state = mixer(x[:, :10])
    assert relative(torch.cat((first, mixer(x[:, 10:], state=state)[0]), 1), whole) < 1e-9
