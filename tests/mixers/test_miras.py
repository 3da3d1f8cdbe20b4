"""Miras: biases and retentions by their formulas, layers against weights kept per token, TTT-Linear."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.features import l2norm
from foveate.attention.ttt import ttt_linear
from foveate.errors import OptionError
from foveate.mixers.base import Mixer
from foveate.mixers.memory.miras_choices import (
    BIASES,
    RETENTIONS,
    ElasticNet,
    LqNorm,
    Sigmoid,
    Simplex,
    loss_gradient,
)
from foveate.registry import card
from tests.mixers.build import DIM, HEADS, build, relative, run, tokens

D, N = DIM // HEADS, 11


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(value: float) -> Tensor:
    return torch.full((5, 1), value, dtype=torch.float64)


@pytest.mark.parametrize("bias", ["huber", "huber-norm", "huber-coordinates"])
def test_huber_without_a_threshold_is_l2_and_with_none_at_all_a_sign(bias):
    e, gradient = normal(5, 4), loss_gradient(bias)
    assert torch.equal(gradient(e, rows(1e9)), loss_gradient("l2")(e, None))
    small = gradient(e, rows(1e-3))
    expected = {
        "huber": 1e-3 * torch.tanh(10 * e),
        "huber-norm": 1e-3 * e / e.norm(dim=-1, keepdim=True),
        "huber-coordinates": 1e-3 * e.sign(),
    }
    assert torch.allclose(small, expected[bias], atol=1e-9)


def test_huber_by_norm_is_the_gradient_of_the_huber_loss():
    e, delta = normal(5, 4).requires_grad_(), rows(1.5)
    size = e.norm(dim=-1)
    loss = torch.where(size <= 1.5, 0.5 * size.square(), 1.5 * (size - 0.75)).sum()
    assert torch.allclose(loss_gradient("huber-norm")(e, delta), torch.autograd.grad(loss, e)[0], atol=1e-9)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 4.0])
def test_lp_is_the_smoothed_gradient_of_the_lp_loss(p):
    e = normal(50, 4).mul(3).requires_grad_()
    (expected,) = torch.autograd.grad(e.abs().pow(p).sum(), e)
    found = loss_gradient("lp", p)(e, None)
    far = e.abs() > 0.8
    assert torch.allclose(found[far], expected[far], rtol=1e-5)
    assert bool((loss_gradient("lp", p)(torch.zeros(1, 4), None) == 0).all())


def test_a_shift_of_values_is_felt_as_much_by_small_errors():
    e = normal(5, 4)
    assert torch.allclose(
        (loss_gradient("shift")(e, rows(0.3)) - e).norm(dim=-1), torch.tensor(0.3).double(), atol=1e-9
    )


def test_simplex_is_kept_and_knows_its_fixed_points():
    simplex = Simplex(2.0)
    W = simplex.begin(normal(1, 2, 6, 3))
    assert bool((W > 0).all())
    assert torch.allclose(W.sum(-2), torch.tensor(2.0).double())
    none = torch.zeros_like(W)
    assert torch.allclose(simplex.step(W, torch.tensor(1.0), none), W, atol=1e-12)
    assert torch.allclose(simplex.step(W, torch.tensor(0.0), none), torch.full_like(W, 2 / 6), atol=1e-12)
    after = simplex.step(W, torch.tensor(0.9), normal(1, 2, 6, 3, seed=1))
    assert torch.allclose(after.sum(-2), torch.tensor(2.0).double())


def test_kl_step_minimises_what_it_should():
    """W_t is where <s, W> + alpha KL(W | W_{t-1}) + (1 - alpha) KL(W | uniform) is least on the simplex."""
    alpha, s = 0.8, normal(6, 1, seed=1)
    before = normal(6, 1).softmax(0)

    def cost(w: Tensor) -> Tensor:
        return (s * w).sum() + alpha * (w * (w / before).log()).sum() + (1 - alpha) * (w * (6 * w).log()).sum()

    found = Simplex().step(before, torch.tensor(alpha), s)
    for seed in range(20):
        other = (found.log() + 0.1 * normal(6, 1, seed=seed)).softmax(0)
        assert float(cost(other)) > float(cost(found))


def test_lq_norm():
    A = normal(2, 2, 6, 3)
    for q in (2.0, 3.0, 4.0):
        norm = LqNorm(q)
        W, W3 = (a * norm(a)[..., None, None] for a in (A, 3 * A))
        assert torch.allclose(W3, 3 ** (3 - q) * W, atol=1e-12)
        start = norm.initial(A[0])
        assert torch.allclose(start.abs().pow(q).sum((-1, -2)), torch.ones(2).double())
    assert torch.allclose(LqNorm(2.0)(A), torch.ones(2, 2).double())
    assert bool(LqNorm(4.0)(torch.zeros(1, 1, 2, 2)).isfinite().all())


def test_elastic_net_shrinks_to_zero_below_its_threshold():
    net, one, none = ElasticNet(0.1), torch.tensor(1.0), torch.zeros(3)
    large, small = torch.tensor([5.0, -5.0, 8.0]), torch.tensor([1e-3, -1e-3, 2e-3])
    assert torch.allclose(net.step(large, one, none), large - large.sign() * 0.1 * 2 / math.pi, atol=1e-3)
    assert bool((net.step(small, one, none).abs() < 0.02 * small.abs()).all())


def test_sigmoid_memory_steps_on_logits():
    W = normal(4, 3).sigmoid()
    assert torch.allclose(Sigmoid().step(W, torch.tensor(1.0), torch.zeros_like(W)), W)
    assert torch.allclose(Sigmoid().step(W, torch.tensor(0.5), W), (0.5 * W.logit() - W).sigmoid())


def followed(mixer: Mixer, x: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """What the memory returns, and its last W (before the norm), with the weights of every token written down."""
    q, k, v = (
        F.conv1d(
            F.pad(getattr(mixer, f"{name}_proj")(x).mT, (3, 0)), getattr(mixer, f"{name}_conv").weight, groups=DIM
        ).mT.unflatten(-1, (HEADS, D))
        for name in "qkv"
    )
    q, k = l2norm(q), l2norm(k)
    alpha = (mixer.alpha_proj(x) + mixer.alpha_bias).sigmoid()
    eta = F.softplus(mixer.eta_proj(mixer.eta_down(x)) + mixer.eta_bias).unflatten(-1, (HEADS, -1))
    delta = None if mixer.delta_proj is None else F.softplus(mixer.delta_proj(x) + mixer.delta_bias).unsqueeze(-1)
    o, ends = torch.zeros(*x.shape[:2], HEADS, D, dtype=torch.float64), []
    for h in range(HEADS):
        W = [w[h : h + 1][None].detach() for w in mixer.weights(x)]
        for t in range(x.shape[1]):
            if t % C == 0:
                lagged = mixer.lag is not None
                base = [mixer.lag.begin(w) for w in W] if lagged else normalised(mixer, W)
                factors = [b / w for b, w in zip(base, W)]
            else:
                lagged = False
            grads = gradients(mixer, base, k[0, t, h], v[0, t, h], None if delta is None else delta[0, t, h])
            rates = eta[0, t, h].detach().split((mixer.hidden, D))
            steps = [r * g for r, g in zip(rates, grads)]
            keep = alpha[0, t, h].detach()
            if lagged:
                W = base = [mixer.lag.step(w, keep, s) for w, s in zip(base, steps)]
            else:
                W = [keep * w - s for w, s in zip(W, steps)]
            read = W
            if mixer.norm is not None:
                read = normalised(mixer, W) if t % C == C - 1 else [w * f for w, f in zip(W, factors)]
            o[0, t, h] = network(read, q[0, t, h]).detach()
        ends.append(W[0][0, 0])
    return o, torch.stack(ends)


def normalised(mixer: Mixer, W: list[Tensor]) -> list[Tensor]:
    return (
        W
        if mixer.norm is None
        else [w / w.abs().pow(mixer.norm.q).sum() ** ((mixer.norm.q - 2) / mixer.norm.q) for w in W]
    )


def network(W: list[Tensor], x: Tensor) -> Tensor:
    return x + F.layer_norm(F.gelu(x @ W[0][0, 0]) @ W[1][0, 0], (D,))


def gradients(mixer: Mixer, W: list[Tensor], k: Tensor, v: Tensor, delta: Tensor | None) -> tuple[Tensor, ...]:
    free = [w.clone().requires_grad_() for w in W]
    k, v = k.detach(), v.detach()
    y = network(free, k)
    felt = mixer.loss_gradient((y - v)[None], None if delta is None else delta[None])[0]
    return torch.autograd.grad(y, free, felt.detach())


LAYERS = {
    "moneta": ("moneta", {}),
    "moneta-sharp": ("moneta", {"p": 1.5, "q": 3.0}),
    "yaad": ("yaad", {}),
    "yaad-norm": ("yaad", {"huber": "huber-norm"}),
    "memora": ("memora", {"mass": 2.0}),
    "elastic": ("miras", {"bias": "lp", "retention": "elastic-net"}),
    "sigmoid": ("miras", {"bias": "huber-coordinates", "retention": "sigmoid"}),
}


@pytest.mark.parametrize("C", [1, 4])
@pytest.mark.parametrize("name, options", LAYERS.values(), ids=LAYERS)
def test_layers_are_their_recurrence(name, options, C):
    mixer, x = build(card(name), **options, chunk=C), tokens(1, N)
    _, state = mixer(x)
    expected, ends = followed(mixer, x, C)
    y = mixer.o_norm(expected, mixer.g_proj(x).unflatten(-1, (HEADS, D)))
    assert relative(mixer(x)[0], mixer.o_proj(y.flatten(2))) < 1e-7
    assert relative(state.memory.weights[0][0], ends) < 1e-7


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("retention", RETENTIONS)
def test_all_choices_decode_as_they_train(bias, retention):
    mixer, x = build(card("miras"), bias=bias, retention=retention, rank=None), tokens(2, 12)
    whole, _ = mixer(x)
    assert relative(run(mixer, x, [7, 1, 4])[0], whole) < 1e-9
    assert bool(whole.isfinite().all())


@pytest.mark.parametrize("name", ["moneta", "yaad", "memora"])
def test_keeping_all_and_stepping_nowhere_leaves_the_weights(name):
    mixer, x = build(card(name)), tokens(1, 12)
    with torch.no_grad():
        for layer in (mixer.alpha_proj, mixer.eta_proj):
            layer.weight.zero_()
        mixer.alpha_bias.fill_(200.0)
        mixer.eta_bias.fill_(-800.0)
    start = mixer.start(1, x).memory.weights
    for w, before in zip(mixer(x)[1].memory.weights, start):
        assert torch.allclose(w, before, atol=1e-9)


def test_a_long_sequence_stays_finite_and_positive_on_the_simplex():
    mixer = build(card("memora"), torch.float32)
    y, state = mixer(30 * tokens(1, 200, torch.float32))
    assert bool(y.isfinite().all())
    for w in state.memory.weights:
        assert torch.allclose(mixer.lag.begin(w).sum(-2), torch.tensor(1.0), atol=1e-5)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("miras", {"bias": "l1"}, "bias='l1', allowed"),
        ("miras", {"retention": "l1"}, "retention='l1', allowed"),
        ("miras", {"gamma": 0.0}, "gamma=0.0, allowed: > 0"),
        ("moneta", {"p": 0.5}, "p=0.5, allowed: >= 1"),
        ("moneta", {"q": 0.5}, "q=0.5, allowed: >= 1"),
        ("yaad", {"huber": "shift"}, "huber='shift', allowed"),
        ("memora", {"mass": 0.0}, "mass=0.0, allowed: > 0"),
        ("memora", {"rank": 0}, "rank=0, allowed: None or >= 1"),
        ("memora", {"chunk": 0}, "chunk=0, allowed: >= 1"),
        ("yaad", {"kernel": 0}, "kernel=0, allowed: >= 1"),
        ("yaad", {"expansion": 0.0}, "expansion=0.0, allowed: > 0"),
        ("yaad", {"head_dim": 0}, "head_dim=0, allowed: >= 1"),
    ],
)
def test_bad_options_are_refused_by_name(name, options, message):
    with pytest.raises(OptionError, match=f"{name}: {message}"):
        build(card(name), **options)


def test_biases_refuse_other_names_and_a_missing_threshold():
    with pytest.raises(OptionError, match="bias='l1', allowed"):
        loss_gradient("l1")
    with pytest.raises(OptionError, match="bias='shift' without a threshold per token"):
        loss_gradient("shift")(normal(2, 3), None)


def ttt_inputs(length: int) -> dict[str, Tensor]:
    q, k, v = (normal(2, length, HEADS, D, seed=n) for n in range(3))
    eta = 0.1 * normal(2, length, HEADS, seed=3).sigmoid()
    return {"q": q, "k": k, "v": v, "eta": eta, "gain": 1 + 0.1 * normal(HEADS, D), "shift": 0.1 * normal(HEADS, D)}


def test_ttt_linear_is_its_formula():
    """Mini-batches of 4, by autograd at their start; the tail of 3 is not padded."""
    given = ttt_inputs(11)
    o, state = ttt_linear(**given, chunk_size=4)
    for b in range(2):
        for h in range(HEADS):
            w, c = given["gain"][h], given["shift"][h]
            W, bb = torch.zeros(D, D).double(), torch.zeros(D).double()
            for begin in (0, 4, 8):
                q, k, v, eta = (given[name][b, begin : begin + 4, h] for name in ("q", "k", "v", "eta"))
                z = (k @ W + bb).requires_grad_()
                loss = 0.5 * (F.layer_norm(z, (D,), w, c, 1e-6) - (v - k)).square().sum()
                (g,) = torch.autograd.grad(loss, z)
                for i in range(q.shape[0]):
                    past = slice(i + 1)
                    y = D**-0.5 * q[i] @ (W - eta[i] * k[past].mT @ g[past]) + bb - eta[i] * g[past].sum(0)
                    assert torch.allclose(o[b, begin + i, h], y + F.layer_norm(y, (D,), w, c, 1e-6), atol=1e-10)
                if begin < 8:
                    W, bb = W - eta[-1] * k.mT @ g, bb - eta[-1] * g.sum(0)
            assert torch.allclose(state.weights[0][b, h], W, atol=1e-10)
            assert torch.allclose(state.weights[1][b, h, 0], bb, atol=1e-10)


def test_ttt_linear_in_pieces_and_with_a_padded_tail():
    given = ttt_inputs(11)
    layer = {name: given.pop(name) for name in ("gain", "shift")}
    whole, _ = ttt_linear(**given, **layer, chunk_size=4)
    first, state = ttt_linear(**{name: x[:, :6] for name, x in given.items()}, **layer, chunk_size=4)
    rest = {name: x[:, 6:] for name, x in given.items()}
    last, end = ttt_linear(**rest, **layer, chunk_size=4, state=state, pad_tail=True)
    assert torch.allclose(torch.cat((first, last), 1), whole, atol=1e-11)
    assert end.phase == 0
    filled = {name: F.pad(x, (0, 0) * (x.dim() - 2) + (0, 1)) for name, x in given.items()}
    filled["eta"][:, -1] = given["eta"][:, -1]
    _, expected = ttt_linear(**filled, **layer, chunk_size=4)
    for a, b in zip(end.weights, expected.weights):
        assert torch.allclose(a, b, atol=1e-11)
