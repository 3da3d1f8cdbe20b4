"""Mixers as dynamical systems (arXiv 2405.15731): each is x_t = A_t x_{t-1} + B_t u_t, y_t = C_t x_t + D u_t.

A is diagonal. The systems are written down from the layers' parameters, run by one loop, and set against the layers;
the operator Phi_ij = C_i (A_i .. A_{j+1}) B_j is set against both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.features import taylor2
from foveate.attention.linear import linear_scan
from foveate.mixers.base import create_mixer

N, DIM, HEADS = 9, 16, 2
D = DIM // HEADS


def made(spec: str, **options):
    torch.manual_seed(0)
    mixer = create_mixer(spec, dim=DIM, heads=HEADS, **options).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def tokens() -> Tensor:
    return torch.randn(1, N, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@dataclass
class System:
    """A [N, S, W], B and C [N, S], inputs [N, W]: W channels, each with a state of S numbers.

    x_t[s, w] = A_t[s, w] x_{t-1}[s, w] + B_t[s] u_t[w];  y_t[w] = sum_s C_t[s] x_t[s, w].
    """

    A: Tensor
    B: Tensor
    C: Tensor
    u: Tensor

    def run(self) -> Tensor:
        x = torch.zeros_like(self.A[0])
        rows = []
        for a, b, c, u in zip(self.A, self.B, self.C, self.u):
            x = a * x + b[:, None] * u
            rows.append((c[:, None] * x).sum(0))
        return torch.stack(rows)

    def operator(self) -> Tensor:
        """Phi [W, N, N], lower triangular."""
        phi = torch.zeros(self.u.shape[1], N, N, dtype=self.A.dtype)
        for j in range(N):
            product = torch.ones_like(self.A[0])
            for i in range(j, N):
                product = product * self.A[i] if i > j else product
                phi[:, i, j] = ((self.C[i] * self.B[j])[:, None] * product).sum(0)
        return phi


def settled(system: System) -> Tensor:
    """The outputs [N, W], the same by the loop and by the operator."""
    looped = system.run()
    assert torch.allclose(looped, torch.einsum("wij,jw->iw", system.operator(), system.u), atol=1e-10)
    return looped


def attention_system(q: Tensor, k: Tensor, v: Tensor, eta: Tensor) -> System:
    """Separable attention q_i . k_j / eta_i as a system: q, k [N, S], v [N, W], eta [N] with the first one repeated."""
    before = torch.cat((eta[:1], eta[:-1]))
    decay = (before / eta)[:, None, None].expand(-1, q.shape[1], v.shape[1])
    return System(decay, k / eta[:, None], q, v)


def per_head(x: Tensor) -> list[Tensor]:
    return list(x[0].unflatten(-1, (HEADS, -1)).unbind(1))


def test_linear_attention():
    mixer, x = made("linear:eps=0.0"), tokens()
    heads = []
    for q, k, v in zip(*(per_head(p(x)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        heads.append(settled(attention_system(q, k, v, (q * k.cumsum(0)).sum(-1))))
    assert torch.allclose(mixer(x)[0][0], mixer.o_proj(torch.cat(heads, -1)), atol=1e-9)


def test_normalised_attention():
    mixer, x = made("normalised-attention:typical_length=3"), tokens()
    q, k = mixer.qk_proj(x).chunk(2, -1)
    eta = mixer.log_divisor(x)[0].exp()
    heads = [
        settled(attention_system(*each, eta[:, n]))
        for n, each in enumerate(zip(per_head(q), per_head(k), per_head(mixer.v_proj(x))))
    ]
    assert torch.allclose(mixer(x)[0][0], mixer.o_proj(torch.cat(heads, -1)), atol=1e-9)


def test_the_divisor_of_normalised_attention_is_bounded_and_starts_at_a_typical_length():
    mixer = create_mixer("normalised-attention", dim=DIM, heads=HEADS, typical_length=100, bound=3.0)
    assert torch.allclose(mixer.n_bias.exp(), torch.tensor(100.0))
    assert bool((mixer.log_divisor(torch.randn(1, 5, DIM)).abs() <= 3).all())


def test_the_second_order_softmax_is_based():
    mixer, x = made("based:feature_dim=4,eps=0.0"), tokens()
    heads = []
    for q, k, v in zip(*(per_head(p(x)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))):
        q, k = taylor2(q), taylor2(k)
        heads.append(settled(attention_system(q, k, v, (q * k.cumsum(0)).sum(-1))))
    assert torch.allclose(mixer(x)[0][0], mixer.o_proj(torch.cat(heads, -1)), atol=1e-8)


def taylor_features(x: Tensor, order: int) -> Tensor:
    """[1, x, x (x) x / sqrt(2!), ...] up to an order, of x [N, K]."""
    power, parts = torch.ones_like(x[:, :1]), []
    for m in range(order + 1):
        parts.append(power / math.sqrt(math.factorial(m)))
        power = (power[:, :, None] * x[:, None]).flatten(1)
    return torch.cat(parts, -1)


def test_softmax_is_the_limit_of_growing_states():
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, N, 3, generator=generator, dtype=torch.float64)
    q, k = 0.8 * F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    later = torch.ones(N, N, dtype=torch.bool).triu(1)
    expected = (q @ k.T).masked_fill(later, -torch.inf).softmax(-1) @ v
    errors = []
    for order in range(1, 8):
        phi_q, phi_k = taylor_features(q, order), taylor_features(k, order)
        assert phi_q.shape[1] == sum(3**m for m in range(order + 1))
        system = attention_system(phi_q, phi_k, v, (phi_q * phi_k.cumsum(0)).sum(-1))
        errors.append(float((settled(system) - expected).abs().max()))
    # A weight misses at most r = exp(0.8) 0.8^(p + 1) / (p + 1)! and is positive; the rows' sums are at least
    # exp(-0.8) times their lengths. So outputs are off by at most 2 r exp(0.8) times the largest value.
    largest = 2 * math.exp(1.6) * float(v.abs().max())
    for order, error in zip(range(1, 8), errors):
        assert error < largest * 0.8 ** (order + 1) / math.factorial(order + 1)


def test_state_space_duality_is_mamba2():
    mixer, x = made("mamba2:state_dim=5"), tokens()
    shared, inner = mixer.state_dim, mixer.inner
    z, u, raw = mixer.in_proj(x).split([inner, inner + 2 * shared, HEADS], -1)
    u, b, c = mixer.conv(u, mixer.conv.start(1, x))[0].split([inner, shared, shared], -1)
    dt = F.softplus(raw + mixer.dt_bias)
    decay = (-mixer.A_log.exp() * dt).exp()[0]
    heads = []
    for n, u_head in enumerate(per_head(u)):
        a = decay[:, n, None, None].expand(-1, shared, u_head.shape[1])
        system = System(a, b[0] * dt[0, :, n, None], c[0], u_head)
        heads.append(settled(system) + mixer.D[n] * u_head)
    assert torch.allclose(mixer(x)[0][0], mixer.o_proj(mixer.o_norm(torch.cat(heads, -1)[None], z))[0], atol=1e-7)


def test_a_scalar_decay_is_a_divisor_of_linear_attention():
    # eta_i = exp(sum of the steps so far) gives eta_{i-1} / eta_i = exp(-a dt_i): SSD and linear attention coincide.
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, N, 4, generator=generator, dtype=torch.float64)
    step = torch.rand(N, generator=generator, dtype=torch.float64)
    eta = step.cumsum(0).exp()
    o, _ = linear_scan(*(each[None, :, None] for each in (q, k, v)), g=-step[None, :, None], scale=1.0)
    system = attention_system(q, k * eta[:, None], v, eta)
    assert torch.allclose(settled(system), o[0, :, 0], atol=1e-10)


def test_s6():
    mixer, x = made("s6:state_dim=3"), tokens()
    u, z = mixer.in_proj(x).chunk(2, -1)
    u = mixer.conv(u, mixer.conv.start(1, x))[0]
    raw, b, c = mixer.x_proj(u).split([mixer.step_rank, 3, 3], -1)
    dt = F.softplus(mixer.dt_proj(raw) + mixer.dt_bias)[0]
    decay = torch.exp(-mixer.A_log.exp().T * dt[:, None])
    s = settled(System(decay, b[0], c[0], dt * u[0])) + mixer.D * u[0]
    assert torch.allclose(mixer(x)[0][0], mixer.o_proj(s * F.silu(z[0])), atol=1e-9)


def test_rg_lru():
    mixer, x = made("rg-lru"), tokens()
    u = mixer.conv(mixer.x_proj(x), mixer.conv.start(1, x))[0]
    log_a, gate = mixer.lru.log_keep(u)[0], mixer.lru.gate(u, "input")[0]
    root = (1 - (2 * log_a).exp()).sqrt()
    root[0] = 1
    one = torch.ones(N, 1, dtype=torch.float64)
    h = settled(System(log_a.exp()[:, None], one, one, root * gate * u[0]))
    expected = mixer.o_proj(F.gelu(mixer.y_proj(x)[0], approximate="tanh") * h)
    assert torch.allclose(mixer(x)[0][0], expected, atol=1e-10)


@pytest.mark.parametrize("reverse", [True, False])
def test_qlstm(reverse):
    mixer, x = made("qlstm", reverse=reverse), tokens()
    z, u = mixer.in_proj(x)[0].chunk(2, -1)
    u = mixer.conv(u[None], mixer.conv.start(1, x))[0][0]
    f, i, o = mixer.gates(u).chunk(3, -1)
    a = torch.sigmoid(-f) ** mixer.alpha if reverse else torch.sigmoid(f)
    one = torch.ones(N, 1, dtype=torch.float64)
    h = settled(System(a[:, None], one, one, torch.sigmoid(i) * u))
    assert torch.allclose(mixer(x)[0][0], mixer.o_proj(F.gelu(z) * torch.sigmoid(o) * h), atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_a_reversed_sigmoid_is_the_decay_of_a_state_space(alpha):
    mixer = made("qlstm")
    with torch.no_grad():
        mixer.alpha.fill_(alpha)
    f = torch.linspace(-8, 8, 33, dtype=torch.float64)
    assert torch.allclose(mixer.log_forget(f).exp(), torch.exp(-alpha * F.softplus(f)), atol=1e-12)
    if alpha == 0:
        assert bool((mixer.log_forget(f) == 0).all())


def test_negative_alpha_forgets_nothing():
    mixer = made("qlstm")
    with torch.no_grad():
        mixer.alpha.fill_(-1.0)
    assert not bool(mixer.log_forget(torch.randn(5)).any())
