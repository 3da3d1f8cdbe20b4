"""Hedgehog: what its feature maps are, and how they learn softmax's weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.attention import attend
from foveate.attention.linear import linear_scan
from foveate.errors import OptionError, ShapeError
from foveate.mixers.base import create_mixer
from foveate.mixers.linear.hedgehog import HedgehogMap, mimicry_loss

KINDS = ["softmax", "exp"]


def weights(phi_q: Tensor, phi_k: Tensor) -> Tensor:
    """[B, N, H, N] the weights that the scan gives each key: its outputs for one-hot values."""
    B, N, H, _ = phi_q.shape
    one_hot = torch.eye(N, dtype=phi_q.dtype)[None, :, None].expand(B, N, H, N)
    return linear_scan(phi_q, phi_k, one_hot, scale=1.0, normalize=True, eps=0.0)[0]


def features(
    kind: str, seed: int = 0, factor: float = 1.0, **options
) -> tuple[HedgehogMap, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    q, k = (factor * torch.randn(2, 12, 3, 8, dtype=torch.float64) for _ in range(2))
    learned = HedgehogMap(3, 8, 8, kind=kind, **options).double()
    return learned, q, k, learned(q), learned(k)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_weights_are_distributions(kind):
    _, _, _, phi_q, phi_k = features(kind)
    w = weights(phi_q, phi_k)
    assert bool((w >= 0).all())
    assert torch.allclose(w.sum(-1), torch.ones(2, 12, 3, dtype=torch.float64), atol=1e-12)
    quadratic = torch.einsum("bnhe,bmhe->bhnm", phi_q, phi_k).tril()
    quadratic = quadratic / quadratic.sum(-1, keepdim=True)
    assert torch.allclose(w.transpose(1, 2), quadratic, atol=1e-12)


def test_halves_of_the_softmax_map_each_sum_to_one():
    _, _, _, phi, _ = features("softmax")
    assert torch.allclose(phi.unflatten(-1, (2, 8)).sum(-1), torch.ones(2, 12, 3, 2, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_changing_both_signs_changes_no_weight(kind):
    learned, q, k, phi_q, phi_k = features(kind)
    assert torch.allclose(weights(learned(-q), learned(-k)), weights(phi_q, phi_k), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_longerqueries_and_keys_make_spikier_weights(kind):
    entropies = []
    for factor in (1.0, 2.0, 4.0):
        _, _, _, phi_q, phi_k = features(kind, factor=factor)
        w = weights(phi_q, phi_k)[:, -1].detach()
        entropies.append(float(-(w * w.clamp(min=1e-300).log()).sum(-1).mean()))
    assert entropies[0] > entropies[1] > entropies[2]


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_features_are_made_in_float32(kind):
    learned, q, _, phi, _ = features(kind)
    rough = learned.to(torch.bfloat16)(q.to(torch.bfloat16))
    assert rough.dtype == torch.float32
    assert float((rough - phi).detach().abs().max()) < 0.03
    assert bool((learned(torch.full((1, 1, 3, 8), 200.0, dtype=torch.bfloat16)) > 0).all())


def test_maps_start_as_the_identity_as_nothing_or_with_unit_gain():
    assert torch.equal(HedgehogMap(2, 4, 4).weight, torch.eye(4).expand(2, -1, -1))
    assert not bool(HedgehogMap(2, 4, 4, skip=True).weight.any())
    wide = HedgehogMap(2, 256, 64).weight
    assert float(wide.square().sum(1).mean()) == pytest.approx(1, rel=0.05)


def test_a_skip_map_at_its_start_is_the_identity_map():
    learned, q, _, phi, _ = features("exp", skip=True)
    assert torch.equal(phi, HedgehogMap(3, 8, 8, kind="exp").double()(q))
    with torch.no_grad():
        learned.weight.copy_(torch.eye(8))
    assert torch.allclose(learned(q), HedgehogMap(3, 8, 8, kind="exp").double()(2 * q))


def naive(q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor, causal: bool = True) -> float:
    """The mean cross-entropy, row by row, of one sequence each."""
    found = []
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                seen = slice(i + 1 if causal else None)
                p = (k[b, seen, h] @ q[b, i, h] / math.sqrt(q.shape[-1])).softmax(0)
                w = phi_k[b, seen, h] @ phi_q[b, i, h]
                found.append(float(-(p * (w / w.sum()).log()).sum()))
    return sum(found) / len(found)


def test_the_loss_without_causality_is_over_all_keys():
    _, q, k, phi_q, phi_k = features("exp")
    loss = mimicry_loss(q, k, phi_q, phi_k, eps=0.0, causal=False)
    assert loss.item() == pytest.approx(naive(q, k, phi_q, phi_k, causal=False), rel=1e-9)


@pytest.mark.parametrize("block", [1, 5, 12, 100])
def test_the_loss_is_its_definition_in_any_blocks(block):
    learned, q, k, phi_q, phi_k = features("softmax")
    loss = mimicry_loss(q, k, phi_q, phi_k, eps=0.0, block=block)
    assert loss.item() == pytest.approx(naive(q, k, phi_q, phi_k), rel=1e-9)
    loss.backward()
    found = learned.weight.grad.clone()
    learned.weight.grad = None
    mimicry_loss(q, k, learned(q), learned(k), eps=0.0, block=12).backward()
    assert torch.allclose(found, learned.weight.grad, atol=1e-12)


def test_padding_counts_neither_as_row_nor_as_key():
    _, q, k, phi_q, phi_k = features("softmax")
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :4] = real[1, 9:] = False
    loss = mimicry_loss(q, k, phi_q, phi_k, eps=0.0, padding=real)
    parts = [[each[row : row + 1, real[row]] for each in (q, k, phi_q, phi_k)] for row in range(2)]
    expected = sum(naive(*part) * part[0].shape[1] for part in parts) / int(real.sum())
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_the_loss_is_never_below_the_entropy_of_softmax():
    _, q, k, phi_q, phi_k = features("softmax")
    one_hot = torch.eye(12, dtype=torch.float64).expand(2, 3, 12, 12)
    p = attend(q.transpose(1, 2), k.transpose(1, 2), one_hot)
    entropy = float(-(p * p.clamp(min=1e-300).log()).sum(-1).mean())
    assert mimicry_loss(q, k, phi_q, phi_k).item() > entropy


def test_training_the_maps_brings_the_weights_closer_and_moves_nothing_else():
    mixer = create_mixer("hedgehog:kv_heads=2", dim=32, heads=4)
    x = 3 * torch.randn(2, 24, 32)
    before = {name: each.clone() for name, each in mixer.named_parameters()}
    optimiser = torch.optim.AdamW(mixer.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = mixer.mimicry(x)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert {name for name, each in mixer.named_parameters() if not torch.equal(each, before[name])} == {
        "q_map.weight",
        "k_map.weight",
    }


def test_the_teacher_is_the_softmax_mixer_of_the_same_weights():
    options = {"dim": 16, "heads": 4, "kv_heads": 2, "qk_norm": True, "rope_base": 500.0}
    teacher = create_mixer("softmax", **options).double()
    student = create_mixer("hedgehog", **options).double()
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert missing == ["q_map.weight", "k_map.weight"]
    assert unexpected == []
    x, positions = torch.randn(2, 9, 16, dtype=torch.float64), torch.arange(9)[None] + 40
    q, k = student.queries_and_keys(x, x, positions)
    v = student._per_query_head(student.v_proj(x).unflatten(-1, (-1, 4)))
    o = attend(*(each.transpose(1, 2) for each in (q, k, v)))
    y = student.o_proj(o.transpose(1, 2).flatten(2))
    assert torch.allclose(y, teacher(x, positions=positions)[0], atol=1e-12)


def test_tied_maps_are_one_parameter():
    mixer = create_mixer("hedgehog:tied=true,feature_dim=5", dim=16, heads=2)
    assert [name for name, _ in mixer.named_parameters() if "map" in name] == ["q_map.weight"]
    assert mixer.q_map.weight.shape == (2, 8, 5)
    x = torch.randn(1, 6, 16)
    assert mixer(x)[1].memory.shape == (1, 2, 10, 9)
    mixer.mimicry(x).backward()
    assert bool(mixer.q_map.weight.grad.any())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"feature_map": "relu"}, r"feature_map='relu', allowed: \('softmax', 'exp'\)"),
        ({"skip": True, "feature_dim": 4}, "feature_dim=4 with skip, allowed: the head width 8"),
        ({"kv_heads": 3}, "kv_heads=3, allowed: divisors of 2"),
        ({"head_dim": 7}, "head_dim=7, allowed with rotary: even"),
        ({"feature_dim": 0}, "feature_dim=0, allowed: >= 1"),
        ({"eps": -1.0}, "eps=-1.0, allowed: >= 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        create_mixer("hedgehog", dim=16, heads=2, **options)


def test_bad_maps_and_losses_are_refused():
    with pytest.raises(OptionError, match="kind='relu', allowed"):
        HedgehogMap(2, 4, 4, kind="relu")
    with pytest.raises(OptionError, match="features=8 with skip, allowed: dim = 4"):
        HedgehogMap(2, 4, 8, skip=True)
    x = torch.zeros(1, 3, 2, 4)
    with pytest.raises(OptionError, match="block=0, allowed: >= 1"):
        mimicry_loss(x, x, x, x, block=0)
    with pytest.raises(ShapeError, match="phi_k"):
        mimicry_loss(x, x, x, x[:, :2])
