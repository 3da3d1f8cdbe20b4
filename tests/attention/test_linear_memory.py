"""weight_state_scan: the dual form against weights kept per token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.delta import WeightState, matrix_memory, weight_state_read, weight_state_scan
from foveate.attention.linear import linear_scan
from foveate.errors import OptionError, ShapeError, StateError

B, T, H, D, E = 2, 11, 2, 4, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(linear, x):
    return x + F.layer_norm(linear(1, F.gelu(linear(0, x))), (D,))


def gained(linear, x):
    return x + linear(2, F.layer_norm(linear(1, F.silu(linear(0, x))), (D,)))


MEMORIES = {
    "matrix": (matrix_memory, (normal(H, D, D, seed=20),)),
    "mlp": (mlp, (normal(H, D, E, seed=20), normal(H, E, D, seed=21))),
    "gain": (gained, (normal(H, D, E, seed=20), normal(H, E, D, seed=21), normal(H, D, seed=22))),
}


def inputs(length: int = T) -> dict[str, Tensor]:
    q, k, v = (normal(B, length, H, D, seed=s) for s in range(3))
    return {
        "q": q,
        "k": F.normalize(k, dim=-1),
        "v": v,
        "rate": 0.1 * normal(B, length, H, seed=3).sigmoid(),
        "g": F.logsigmoid(normal(B, length, H, seed=4) + 2),
        "momentum_g": F.logsigmoid(normal(B, length, H, seed=5)),
    }


def per_token(network, weights, tensors, C, loss=lambda e: e.square().sum(), project=None, boundary=None, steps=None):
    """The definition: explicit weights for each token, gradients by autograd at the weights of the chunk's start."""
    y = torch.zeros(B, tensors["q"].shape[1], H, D, dtype=torch.float64)
    ends = []
    for b in range(B):
        for h in range(H):
            W = [w[h].clone() for w in weights]
            S = [torch.zeros_like(w) for w in W]
            for t in range(y.shape[1]):
                if t % C == 0:
                    base = [w.detach().requires_grad_() for w in (project(W) if project else W)]
                error = network(_with(base), tensors["k"][b, t, h][None]) - tensors["v"][b, t, h]
                grads = torch.autograd.grad(loss(error), base)
                rate, decay, momentum = (
                    tensors[name][b, t, h] if name in tensors else default
                    for name, default in (
                        ("rate", None),
                        ("g", torch.tensor(0.0)),
                        ("momentum_g", torch.tensor(-torch.inf)),
                    )
                )
                S = [momentum.exp() * s - rate * d for s, d in zip(S, grads)]
                W = [decay.exp() * w + s for w, s in zip(W, S)]
                y[b, t, h] = network(_with(W), tensors["q"][b, t, h][None])[0].detach()
                if (t + 1) % C == 0 and boundary:
                    W = boundary(W)
            ends.append(W)
    return y, [torch.stack([e[n] for e in ends]).unflatten(0, (B, H)) for n in range(len(weights))]


def _with(weights):
    return lambda n, x: x * weights[n] if weights[n].dim() == 1 else x @ weights[n]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("C", [1, 4, 16])
@pytest.mark.parametrize("without", [(), ("g",), ("momentum_g",), ("g", "momentum_g")])
def test_dual_form_is_weights_per_token(memory, C, without):
    network, weights = MEMORIES[memory]
    tensors = {name: x for name, x in inputs().items() if name not in without}
    y, state = weight_state_scan(network, WeightState.start(weights, B), **tensors, chunk_size=C)
    expected, ends = per_token(network, weights, tensors, C)
    assert torch.allclose(y, expected, atol=1e-11)
    for w, end in zip(state.weights, ends):
        assert torch.allclose(w, end, atol=1e-11)


def test_decays_of_zero():
    network, weights = MEMORIES["mlp"]
    tensors = inputs()
    tensors["g"][:, 3] = -torch.inf
    tensors["momentum_g"][:, 5] = -torch.inf
    expected, _ = per_token(network, weights, tensors, 4)
    g = tensors["g"].requires_grad_()
    y, _ = weight_state_scan(network, WeightState.start(weights, B), **tensors, chunk_size=4)
    assert torch.allclose(y, expected, atol=1e-11)
    y.sum().backward()
    assert g.grad.isfinite().all()


@pytest.mark.parametrize("rate_of", ["written", "reading"])
@pytest.mark.parametrize("cuts", [(1,) * T, (3, 8), (4, 7), (6, 1, 4)])
def test_any_split_agrees(rate_of, cuts):
    network, weights = MEMORIES["gain"]
    tensors = inputs()
    if rate_of == "reading":
        tensors.pop("momentum_g")
    options = {"chunk_size": 4, "rate_of": rate_of, "boundary": lambda W: tuple(0.9 * w for w in W)}
    y, end = weight_state_scan(network, WeightState.start(weights, B), **tensors, **options)
    state, outputs, t = WeightState.start(weights, B), [], 0
    for n in cuts:
        piece = {name: x[:, t : t + n] for name, x in tensors.items()}
        one, state = weight_state_scan(network, state, **piece, **options)
        outputs.append(one)
        t += n
    assert torch.allclose(torch.cat(outputs, 1), y, atol=1e-11)
    assert state.phase == end.phase == T % 4
    for a, b in zip(state.weights + state.momentum, end.weights + end.momentum):
        assert torch.allclose(a, b, atol=1e-11)


def test_matrix_memory_of_one_token_chunks_is_the_delta_rule():
    tensors = inputs()
    q, k, v, rate = (tensors[name] for name in ("q", "k", "v", "rate"))
    zero = (torch.zeros(H, D, D, dtype=torch.float64),)
    y, state = weight_state_scan(matrix_memory, WeightState.start(zero, B), q, k, v, rate=rate, chunk_size=1)
    expected, S = linear_scan(q, k, v, beta=2 * rate, scale=1.0, output_final_state=True)
    assert torch.allclose(y, expected, atol=1e-12)
    assert torch.allclose(state.weights[0], S, atol=1e-12)
    read = weight_state_read(matrix_memory, state, q[:, -1:])
    assert torch.allclose(read, y[:, -1:], atol=1e-12)


def test_reading_rate_is_the_ttt_rule():
    """Token i reads W - rate_i sum_j k_j^T g_j; the chunk ends with the last token's rate (both by hand)."""
    tensors = inputs(8)
    q, k, v, rate = (tensors[name].transpose(1, 2) for name in ("q", "k", "v", "rate"))
    W = normal(H, D, D, seed=20)
    y, state = weight_state_scan(
        matrix_memory,
        WeightState.start((W,), B),
        *(tensors[name] for name in "qkv"),
        rate=tensors["rate"],
        rate_of="reading",
        chunk_size=4,
    )
    W = W.expand(B, H, D, D)
    for c in (slice(0, 4), slice(4, 8)):
        error = 2 * (k[:, :, c] @ W - v[:, :, c])
        mask = torch.ones(4, 4).tril().double()
        expected = q[:, :, c] @ W - rate[:, :, c, None] * ((q[:, :, c] @ k[:, :, c].mT) * mask @ error)
        assert torch.allclose(y.transpose(1, 2)[:, :, c], expected, atol=1e-12)
        W = W - rate[:, :, c][:, :, -1:, None] * (k[:, :, c].mT @ error)
    assert torch.allclose(state.weights[0], W, atol=1e-12)


def test_hooks_for_loss_projection_boundary_and_channel_rates():
    network, weights = MEMORIES["mlp"]
    tensors = {name: x for name, x in inputs().items() if name != "momentum_g"}

    def project(W):
        return tuple(w / w.square().sum((-1, -2), keepdim=True).sqrt() for w in W)

    def boundary(W):
        return tuple(0.5 * w for w in W)

    y, _ = weight_state_scan(
        network,
        WeightState.start(weights, B),
        **tensors,
        loss_gradient=lambda y, v: 3 * (y - v).abs() * (y - v),
        project=project,
        boundary=boundary,
        chunk_size=4,
    )
    expected, _ = per_token(
        network, weights, tensors, 4, loss=lambda e: e.abs().pow(3).sum(), project=project, boundary=boundary
    )
    assert torch.allclose(y, expected, atol=1e-11)
    rate = tensors.pop("rate")
    channels = (rate.unsqueeze(-1).expand(B, T, H, E), rate)
    start = WeightState.start(weights, B)
    same, _ = weight_state_scan(network, start, **tensors, rate=channels, chunk_size=4)
    plain, _ = weight_state_scan(network, start, **tensors, rate=rate, chunk_size=4)
    assert torch.allclose(same, plain, atol=1e-13)


def test_outer_gradients():
    """Through the inner gradients, checked numerically."""
    W = tuple(w[:1, :2, :3].clone().requires_grad_() for w in MEMORIES["mlp"][1][:1]) + (
        MEMORIES["mlp"][1][1][:1, :3, :2].clone().requires_grad_(),
    )
    small = {name: x[:1, :5, :1].clone() for name, x in inputs().items()}
    for name in "qkv":
        small[name] = small[name][..., :2].clone()
    names = list(small)
    values = [small[name].requires_grad_() for name in names]

    def run(*given):
        state = WeightState.start(given[:2], 1)
        network = lambda linear, x: x + linear(1, torch.tanh(linear(0, x)))  # noqa: E731
        y, end = weight_state_scan(network, state, **dict(zip(names, given[2:])), chunk_size=3)
        return y, *end.weights

    assert torch.autograd.gradcheck(run, (*W, *values))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    network, weights = MEMORIES["mlp"]
    expected, _ = weight_state_scan(network, WeightState.start(weights, B), **inputs(), chunk_size=4)
    with mode():
        tensors = inputs()
        state, outputs = WeightState.start(tuple(w.clone() for w in weights), B), []
        for t in range(T):
            one, state = weight_state_scan(
                network, state, **{n: x[:, t : t + 1] for n, x in tensors.items()}, chunk_size=4
            )
            outputs.append(one)
    y = torch.cat(outputs, 1)
    assert not y.requires_grad
    assert torch.allclose(y, expected, atol=1e-11)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"chunk_size": 0}, OptionError, "chunk_size=0"),
        ({"rate_of": "both"}, OptionError, "rate_of='both', allowed"),
        ({"rate_of": "reading"}, OptionError, "no momentum_g"),
        ({"rate": torch.zeros(B, T)}, ShapeError, r"rate \[2, 11\] does not fit"),
        ({"rate": (torch.zeros(B, T, H),)}, ShapeError, "rate has 1 tensors for 2 weights"),
        ({"g": torch.zeros(B, T, H) + 0.5}, OptionError, "g has the value 0.5"),
        ({"momentum_g": torch.zeros(B, T)}, ShapeError, "momentum_g"),
        ({"state": WeightState.start((normal(3, D, D),), B)}, StateError, r"allowed: \[B, H, ...\] = \[2, 2, ...\]"),
        ({"network": lambda linear, x: linear(0, linear(0, x))}, OptionError, r"calls linear\(0, x\) twice"),
        ({"network": lambda linear, x: linear(0, x)}, OptionError, "for all 2 weights"),
    ],
)
def test_refuses(change, error, message):
    _, weights = MEMORIES["mlp"]
    weights = (weights[0][..., :D], weights[1][:, :D])
    good = {"network": mlp, "state": WeightState.start(weights, B), **inputs()}
    with pytest.raises(error, match=message):
        weight_state_scan(**{**good, **change})


def test_the_chunk_size_must_not_shrink_inside_a_chunk():
    network, weights = MEMORIES["mlp"]
    _, state = weight_state_scan(network, WeightState.start(weights, B), **inputs(7), chunk_size=8)
    with pytest.raises(StateError, match="7 tokens into a chunk, but chunk_size=4"):
        weight_state_scan(network, state, **inputs(1), chunk_size=4)
