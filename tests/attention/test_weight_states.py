"""memory_scan: the closed form against autograd (weight_state_scan), weights kept per token, and packed sequences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.delta import WeightState, weight_state_scan
from foveate.attention.memories import MLPMemory
from foveate.attention.weight_states import MemoryState, memory_scan
from foveate.errors import OptionError, ShapeError, StateError

B, T, H, D, E = 2, 11, 2, 4, 6
MEMORIES = [
    MLPMemory(depth=1),
    MLPMemory(depth=2),
    MLPMemory(depth=3, activation="gelu", form="residual"),
    MLPMemory(depth=2, activation="gelu", form="residual-gain"),
    MLPMemory(depth=4, form="residual-gain"),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(memory: MLPMemory, heads: int = H) -> tuple[Tensor, ...]:
    return tuple(0.7 * normal(heads, *shape, seed=20 + n) for n, shape in enumerate(memory.shapes(D, E)))


def inputs(length: int = T, batch: int = B, seed: int = 0) -> dict[str, Tensor]:
    q, k, v = (normal(batch, length, H, D, seed=s + seed) for s in range(3))
    return {
        "q": q,
        "k": F.normalize(k, dim=-1),
        "v": v,
        "rate": 0.1 * normal(batch, length, H, seed=3 + seed).sigmoid(),
        "g": F.logsigmoid(normal(batch, length, H, seed=4 + seed) + 2),
        "momentum_g": F.logsigmoid(normal(batch, length, H, seed=5 + seed)),
    }


def start(memory: MLPMemory, batch: int = B, **options) -> MemoryState:
    return MemoryState.start(weights_of(memory), batch, **{"momentum": True, **options})


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
@pytest.mark.parametrize("C", [1, 4, 16])
@pytest.mark.parametrize("without", [(), ("g",), ("momentum_g",)])
def test_the_closed_form_is_autograd(memory, C, without):
    tensors = {name: x for name, x in inputs().items() if name not in without}
    y, state = memory_scan(memory, start(memory, momentum="momentum_g" in tensors), **tensors, chunk_size=C)
    expected, end = weight_state_scan(memory, WeightState.start(weights_of(memory), B), **tensors, chunk_size=C)
    assert torch.allclose(y, expected, atol=1e-12)
    for w, other in zip(state.weights, end.weights):
        assert torch.allclose(w, other, atol=1e-12)
    assert state.phase.tolist() == [T % C] * B


def through(weights: list[Tensor]):
    return lambda n, x: x * weights[n] if weights[n].dim() == 1 else x @ weights[n]


def per_token(memory: MLPMemory, tensors: dict[str, Tensor], C: int) -> Tensor:
    """The recurrence with every token's weights written down."""
    y = torch.zeros(B, T, H, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            W = [w[h] for w in weights_of(memory)]
            S = [torch.zeros_like(w) for w in W]
            for t in range(T):
                if t % C == 0:
                    base = [w.clone().requires_grad_() for w in W]
                guess = memory(through(base), tensors["k"][b, t, h][None])
                grads = torch.autograd.grad((guess - tensors["v"][b, t, h]).square().sum(), base)
                rate, decay, keep = (tensors[name][b, t, h] for name in ("rate", "g", "momentum_g"))
                S = [keep.exp() * s - rate * each for s, each in zip(S, grads)]
                W = [decay.exp() * w + s for w, s in zip(W, S)]
                y[b, t, h] = memory(through(W), tensors["q"][b, t, h][None])[0]
    return y


@pytest.mark.parametrize("memory", MEMORIES[1:4], ids=str)
@pytest.mark.parametrize("C", [1, 5])
def test_the_closed_form_is_weights_per_token(memory, C):
    tensors = inputs()
    tensors["g"][:, 3] = -torch.inf
    tensors["momentum_g"][:, 6] = -torch.inf
    y, _ = memory_scan(memory, start(memory), **tensors, chunk_size=C)
    assert torch.allclose(y, per_token(memory, tensors, C), atol=1e-11)


class Bent:
    """A lag whose two maps are not linear."""

    def begin(self, weights: Tensor) -> Tensor:
        return weights.tanh()

    def step(self, weights: Tensor, decay: Tensor, step: Tensor) -> Tensor:
        return (decay * weights - step).sin()


def inverse_norm(w: Tensor) -> Tensor:
    return 1 / (1 + w.square().flatten(2).sum(-1))


RETENTIONS = {
    "linear": ({}, {"momentum": True}),
    "normalise": ({"normalise": inverse_norm}, {"momentum": True, "normalise": inverse_norm}),
    "lag": ({"lag": Bent(), "momentum_g": None}, {"momentum": False}),
}


@pytest.mark.parametrize("retention", RETENTIONS)
@pytest.mark.parametrize("cuts", [(1,) * T, (3, 8), (4, 7), (6, 1, 4)])
def test_any_split_agrees(retention, cuts):
    memory = MLPMemory(depth=2, form="residual")
    options, begun = RETENTIONS[retention]
    tensors = {**inputs(), **options, "chunk_size": 4}
    y, end = memory_scan(memory, start(memory, **begun), **tensors)
    state, outputs, t = start(memory, **begun), [], 0
    for n in cuts:
        piece = {name: x[:, t : t + n] if isinstance(x, Tensor) else x for name, x in tensors.items()}
        one, state = memory_scan(memory, state, **piece)
        outputs.append(one)
        t += n
    assert torch.allclose(torch.cat(outputs, 1), y, atol=1e-12)
    assert state.phase.tolist() == end.phase.tolist()
    for name in ("weights", "momentum", "scales"):
        for a, b in zip(getattr(state, name), getattr(end, name), strict=True):
            assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("retention", RETENTIONS)
def test_packed_sequences_of_any_phase_are_the_loop(retention):
    memory = MLPMemory(depth=2, form="residual")
    options, begun = RETENTIONS[retention]
    first, more = inputs(9, 1), inputs(12, 1, seed=40)
    _, state = memory_scan(
        memory,
        start(memory, 4, **begun),
        **{**first, **options},
        chunk_size=4,
        cu_seqlens=torch.tensor([0, 2, 2, 8, 9]),
    )
    y, state = memory_scan(
        memory, state, **{**more, **options}, chunk_size=4, cu_seqlens=torch.tensor([0, 3, 7, 7, 12])
    )
    pieces = [((0, 2), (0, 3)), ((2, 2), (3, 7)), ((2, 8), (7, 7)), ((8, 9), (7, 12))]
    for n, ((a, b), (c, d)) in enumerate(pieces):
        whole = {name: torch.cat((first[name][:, a:b], more[name][:, c:d]), 1) for name in first}
        expected, end = memory_scan(memory, start(memory, 1, **begun), **{**whole, **options}, chunk_size=4)
        assert torch.allclose(y[:, c:d], expected[:, b - a :], atol=1e-12)
        assert torch.allclose(state.weights[0][n], end.weights[0][0], atol=1e-12)
        assert int(state.phase[n]) == (b - a + d - c) % 4


def test_a_lag_of_one_token_chunks_is_its_recurrence():
    memory, lag = MLPMemory(depth=1), Bent()
    tensors = inputs()
    tensors.pop("momentum_g")
    y, _ = memory_scan(memory, start(memory, momentum=False), **tensors, lag=lag, chunk_size=1)
    W = weights_of(memory)[0].expand(B, H, D, D)
    for t in range(T):
        q, k, v = (tensors[name][:, t].unsqueeze(-2) for name in "qkv")
        W = lag.begin(W)
        step = 2 * tensors["rate"][:, t, :, None, None] * k.mT @ (k @ W - v)
        W = lag.step(W, tensors["g"][:, t, :, None, None].exp(), step)
        assert torch.allclose(y[:, t], (q @ W)[..., 0, :], atol=1e-12)


@pytest.mark.parametrize("retention", RETENTIONS)
def test_outer_gradients(retention):
    memory = MLPMemory(depth=2, form="residual")
    options, begun = RETENTIONS[retention]
    small = {name: x[:1, :5, :1].clone() for name, x in inputs().items() if name not in options}
    for name in "qkv":
        small[name] = small[name][..., :3].clone()
    weights = [w[:1] for w in (normal(1, 3, 2), normal(1, 2, 3))]

    def run(*given):
        state = MemoryState.start(given[:2], 1, **begun)
        tensors = dict(zip(small, given[2:]))
        y, end = memory_scan(memory, state, **tensors, **options, chunk_size=3)
        return y, *end.weights

    values = [x.requires_grad_() for x in (*weights, *small.values())]
    assert torch.autograd.gradcheck(run, values, fast_mode=True)


def test_nan_stays_in_its_sequence():
    memory, tensors = MEMORIES[2], inputs(9, 1)
    bounds = torch.tensor([0, 2, 6, 9])
    expected, _ = memory_scan(memory, start(memory, 3), **tensors, chunk_size=4, cu_seqlens=bounds)
    tensors["v"][:, 2:6] = torch.nan
    y, state = memory_scan(memory, start(memory, 3), **tensors, chunk_size=4, cu_seqlens=bounds)
    assert torch.equal(y[:, :2], expected[:, :2])
    assert torch.equal(y[:, 6:], expected[:, 6:])
    assert bool(state.weights[0][[0, 2]].isfinite().all())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"chunk_size": 0}, OptionError, "chunk_size=0"),
        ({"rate": torch.zeros(B, T)}, ShapeError, r"rate \[2, 11\], allowed"),
        ({"rate": (torch.zeros(B, T, H),)}, ShapeError, "rate has 1 tensors for 2 weights"),
        ({"g": torch.zeros(B, T, H) + 0.5}, OptionError, "g has the value 0.5"),
        ({"momentum_g": None}, StateError, "allowed: as the state was started with: True, False"),
        ({"lag": Bent()}, OptionError, "lag with momentum"),
        ({"memory": MLPMemory(depth=3)}, StateError, "the memory's weights are"),
    ],
)
def test_refuses(change, error, message):
    memory = MLPMemory(depth=2)
    good = {"memory": memory, "state": start(memory), **inputs()}
    with pytest.raises(error, match=message):
        memory_scan(**{**good, **change})


@pytest.mark.parametrize("change", [{"depth": 0}, {"activation": "relu"}, {"form": "post"}], ids=str)
def test_memories_refuse(change):
    with pytest.raises(OptionError, match=f"MLPMemory: {next(iter(change))}="):
        MLPMemory(**change)
