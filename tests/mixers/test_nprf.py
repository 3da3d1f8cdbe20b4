"""Kernel attention with relative positions: its definition, and what normalised random features are good for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.attention.features import gaussian_projection, positive_random
from foveate.errors import OptionError
from foveate.mixers.base import create_mixer
from tests.mixers.build import relative


def made(spec: str = "nprf", seed: int = 0, **options):
    torch.manual_seed(seed)
    mixer = create_mixer(spec, dim=16, heads=2, **options).double().eval()
    with torch.no_grad():
        mixer.bias.normal_()
    return mixer


def naive(mixer, x: Tensor) -> Tensor:
    """The layer on one sequence [N, C], weight by weight."""
    N, outputs = len(x), []
    q, k, v = ((x @ each.weight.T).view(N, 2, 8) for each in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    for h in range(2):
        a, b = (mixer.tau * each[:, h] / each[:, h].norm(dim=-1, keepdim=True) for each in (q, k))
        if mixer.features == "random":
            w = mixer.projection
            kernel = (a @ w.T - mixer.tau**2 / 2).exp() @ (b @ w.T - mixer.tau**2 / 2).exp().T / len(w)
        else:
            kernel = (torch.nn.functional.elu(a) + 1) @ (torch.nn.functional.elu(b) + 1).T
        weights = torch.zeros_like(kernel)
        for i in range(N):
            for j in range(N):
                r = max(-mixer.reach, min(j - i, mixer.reach))
                if j <= i or not mixer.causal:
                    weights[i, j] = mixer.bias[h, r + mixer.reach].exp() * kernel[i, j]
        outputs.append(weights @ v[:, h] / weights.sum(-1, keepdim=True))
    return torch.cat(outputs, -1) @ mixer.o_proj.weight.T


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("options", [{}, {"features": "elu"}, {"tau": 1.7, "reach": 3}, {"reach": 0}])
def test_is_the_definition(causal, options):
    mixer = made(causal=causal, **options)
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    y = mixer(x)[0]
    for row in range(2):
        # The norm has an epsilon under its root, the definition has none.
        assert relative(y[row], naive(mixer, x[row])) < 1e-5


def test_decoding_reads_biases_beyond_the_reach():
    mixer = made(reach=4)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    whole = mixer(x)[0]
    first, state = mixer(x[:, :20])
    rest, _ = mixer(x[:, 20:], state=state)
    assert relative(torch.cat((first, rest), 1), whole) < 1e-9


def test_many_tokens_after_a_state_are_read_in_blocks(monkeypatch):
    mixer = made(reach=4)
    x = torch.randn(1, 24, 16, dtype=torch.float64)
    expected = mixer(x)[0]
    monkeypatch.setattr("foveate.mixers.linear.nprf._ROWS", 5)
    _, state = mixer(x[:, :7])
    assert relative(mixer(x[:, 7:], state=state)[0], expected[:, 7:]) < 1e-9


def test_the_length_of_queries_and_keys_does_not_matter():
    mixer = made()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    y = mixer(x)[0]
    with torch.no_grad():
        mixer.q_proj.weight.mul_(7.0)
        mixer.k_proj.weight.mul_(0.3)
    assert relative(mixer(x)[0], y) < 1e-4


def test_many_features_give_softmax_with_a_bias():
    errors = []
    for features in (256, 16384):
        mixer = made(feature_dim=features, causal=False)
        x = torch.randn(1, 16, 16, dtype=torch.float64)
        q, k, v = (each(x).view(16, 2, 8) for each in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        q, k = (each / each.norm(dim=-1, keepdim=True) for each in (q, k))
        distance = torch.arange(16) - torch.arange(16)[:, None]
        logits = torch.einsum("ihd,jhd->hij", q, k) + mixer.bias[:, distance + mixer.reach]
        expected = torch.einsum("hij,jhd->ihd", logits.softmax(-1), v).flatten(1) @ mixer.o_proj.weight.T
        errors.append(relative(mixer(x)[0][0], expected))
    # One weight's estimate is off by sqrt((e^2 - 1) / m) for orthogonal unit vectors; the sum below it as much.
    assert errors[1] < 2 * math.sqrt((math.e**2 - 1) / 16384)
    assert errors[1] < errors[0] / 4


def test_normalised_features_estimate_the_kernel_more_surely():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)
    spread = {}
    for name, factor in (("unit", 1.0), ("long", 4.0)):
        a, b = (factor * each / each.norm() for each in (q, k))
        found = []
        for _ in range(300):
            w = gaussian_projection(32, 16, dtype=torch.float64)
            found.append(((positive_random(a, w) * positive_random(b, w)).sum() / (a * b).sum().exp()).item())
        spread[name] = torch.tensor(found).std().item()
    assert spread["unit"] < 0.5
    assert spread["long"] > 3 * spread["unit"]


def test_the_projection_is_saved_and_learned_by_nothing():
    mixer = made()
    assert "projection" in mixer.state_dict()
    assert "projection" not in dict(mixer.named_parameters())
    assert "projection" not in made(features="elu").state_dict()
    assert not bool(create_mixer("nprf", dim=16, heads=2).bias.any())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"features": "relu"}, r"features='relu', allowed: \('random', 'elu'\)"),
        ({"feature_dim": 0}, "feature_dim=0, allowed: >= 1"),
        ({"tau": 0.0}, "tau=0.0, allowed: > 0"),
        ({"reach": -1}, "reach=-1, allowed: >= 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        create_mixer("nprf", dim=16, heads=2, **options)
