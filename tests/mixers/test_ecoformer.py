"""EcoFormer: attention by agreeing bits, and how the bits are learned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.errors import OptionError, ShapeError
from foveate.mixers.base import create_mixer
from foveate.mixers.linear.ecoformer import (
    binary_codes,
    code_attention,
    kernel_features,
    learn_hashes,
    similarity_targets,
)


def unit(rows: int = 2, N: int = 30, H: int = 2, D: int = 8, seed: int = 0) -> Tensor:
    x = torch.randn(rows, N, H, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def random_codes(N: int = 9, bits: int = 6) -> Tensor:
    return torch.randn(2, N, 3, bits, dtype=torch.float64).sign()


def learned(x: Tensor, bits: int = 8, anchors: int = 10, **options):
    H = x.shape[2]
    places = x[0, :anchors].transpose(0, 1)
    start = torch.randn(H, bits, anchors, dtype=torch.float64)
    return places, start, *learn_hashes(x, places, start, similarity_targets(x, 5), **options)


def test_the_exact_profile_is_the_normalised_quadratic_form():
    codes, v = random_codes(), torch.randn(2, 9, 3, 5, dtype=torch.float64)
    weights = torch.einsum("bnhr,bmhr->bhnm", codes, codes) + 7
    assert bool((weights >= 1).all())
    expected = torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v)
    assert torch.allclose(code_attention(codes, v), expected, atol=1e-12)


def test_the_official_profile_adds_the_tokens_own_value():
    codes, v = random_codes(), torch.randn(2, 9, 3, 5, dtype=torch.float64)
    agree = torch.einsum("bnhr,bmhr->bhnm", codes, codes)
    total = (agree.sum(-1) + 9 * 7).transpose(1, 2)[..., None]
    expected = (torch.einsum("bhnm,bmhd->bnhd", agree, v) + 7 * v) / total
    assert torch.allclose(code_attention(codes, v, profile="official"), expected, atol=1e-12)
    assert not torch.allclose(code_attention(codes, v), expected)


def test_equal_codes_give_the_mean():
    v = torch.randn(2, 9, 3, 5, dtype=torch.float64)
    found = code_attention(torch.ones(2, 9, 3, 6, dtype=torch.float64), v)
    assert torch.allclose(found, v.mean(1, keepdim=True).expand_as(v))


def test_kernel_features_are_their_definition():
    x = unit()
    anchors = x[0, :4].transpose(0, 1)
    found = kernel_features(x, anchors)
    for b in range(2):
        for h in range(2):
            squares = torch.cdist(x[b, :, h], anchors[h]).square()
            assert torch.allclose(found[b, :, h], torch.exp(-squares / (2 * squares.mean())), atol=1e-7)


def test_targets_mark_the_most_and_the_least_similar():
    x = unit(1, 12, 1)
    target = similarity_targets(x, 3)[0, 0]
    similar = x[0, :, 0] @ x[0, :, 0].T
    assert target.sum(-1).tolist() == [0.0] * 12
    for i in range(12):
        assert similar[i, target[i] == 1].min() >= similar[i, target[i] == 0].max()
        assert similar[i, target[i] == -1].max() <= similar[i, target[i] == 0].min()
        assert target[i, i] == 1
    assert similarity_targets(x, 10).abs().sum(-1).unique().tolist() == [12.0]


def test_learned_codes_follow_similarity():
    x = unit(2, 40)
    torch.manual_seed(1)
    anchors, _, hashes, centre, kept = learned(x, bits=12, anchors=20, rate=2e-2, steps=60)
    assert any(kept)
    codes = binary_codes(x, anchors, centre, hashes)
    agree = torch.einsum("bnhr,bmhr->bhnm", codes, codes)
    target = similarity_targets(x, 5)
    assert agree[target == 1].mean() > agree[target == -1].mean() + 4
    off = ~torch.eye(40, dtype=torch.bool)
    ranks = [
        each[:, :, off].flatten().argsort().argsort().double()
        for each in (agree, torch.einsum("bnhd,bmhd->bhnm", x, x))
    ]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.5


def test_a_bit_is_kept_only_where_it_is_better():
    x = unit()
    torch.manual_seed(1)
    _, start, hashes, _, kept = learned(x, rate=1e-12)
    assert kept == [False] * 8
    assert torch.equal(hashes, start)


def loss(x: Tensor, anchors: Tensor, hashes: Tensor, centre: Tensor) -> float:
    """What is left of the target after all bits, squared."""
    codes = binary_codes(x, anchors, centre, hashes)
    left = hashes.shape[1] * similarity_targets(x, 5) - torch.einsum("bnhr,bmhr->bhnm", codes, codes)
    return left.square().mean().item()


def test_learning_brings_the_codes_closer_to_the_target():
    x = unit()
    torch.manual_seed(1)
    anchors, start, hashes, centre, _ = learned(x, rate=2e-2, steps=60)
    assert loss(x, anchors, hashes, centre) < loss(x, anchors, start, centre)


def test_the_gradient_passes_where_the_sign_is_unsure():
    x = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    anchors = torch.eye(2, dtype=torch.float64)[None]
    found = []
    for factor in (0.5, 5.0):
        hashes = (factor * torch.eye(2, dtype=torch.float64))[None]
        point = x.clone().requires_grad_()
        codes = binary_codes(point + torch.tensor([0.5, 0.1]), anchors, torch.zeros(1, 2, dtype=torch.float64), hashes)
        assert bool((codes == 1).all())
        codes.sum().backward()
        found.append(bool(point.grad.any()))
    assert found == [True, False]


def test_codes_are_learned_once_and_only_in_training():
    torch.manual_seed(0)
    mixer = create_mixer("ecoformer:anchors=6,hash_steps=5,hash_rate=0.02", dim=16, heads=2)
    x = torch.randn(2, 20, 16)
    start = {name: each.clone() for name, each in mixer.named_buffers()}
    mixer.eval()(x)
    assert all(torch.equal(each, start[name]) for name, each in mixer.named_buffers())
    with torch.no_grad():
        mixer.train()(x)
    assert bool(mixer.learned)
    assert torch.allclose(mixer.anchors.norm(dim=-1), torch.ones(2, 6), atol=1e-5)
    held = {name: each.clone() for name, each in mixer.named_buffers()}
    mixer(torch.randn(2, 20, 16))[0].sum().backward()
    assert all(torch.equal(each, held[name]) for name, each in mixer.named_buffers())
    assert bool(mixer.qk_proj.weight.grad.any())
    fixed = create_mixer("ecoformer:anchors=6,learn=false", dim=16, heads=2).train()
    fixed(x)
    assert not bool(fixed.learned)


def test_the_layer_is_its_parts_and_equivariant():
    torch.manual_seed(0)
    mixer = create_mixer("ecoformer", dim=16, heads=2).double().eval()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    y = mixer(x)[0]
    order = torch.randperm(11)
    assert torch.allclose(mixer(x[:, order])[0], y[:, order])
    q = mixer.qk_proj(x).unflatten(-1, (2, 8))
    codes = binary_codes(q / q.norm(dim=-1, keepdim=True), mixer.anchors, mixer.centre, mixer.hashes)
    o = code_attention(codes, mixer.v_proj(x).unflatten(-1, (2, 8)))
    assert torch.allclose(mixer.o_proj(o.flatten(2)), y)
    # The width is a sequence's own.
    assert torch.allclose(mixer(x[:1])[0], y[:1])


def test_bad_input_is_refused():
    for name in ("bits", "anchors", "topk", "hash_steps"):
        with pytest.raises(OptionError, match=f"{name}=0, allowed: >= 1"):
            create_mixer("ecoformer", dim=16, heads=2, **{name: 0})
    with pytest.raises(OptionError, match="profile='paper', allowed"):
        create_mixer("ecoformer", dim=16, heads=2, profile="paper")
    with pytest.raises(OptionError, match="hash_rate=0.0, allowed: > 0"):
        create_mixer("ecoformer", dim=16, heads=2, hash_rate=0.0)
    with pytest.raises(OptionError, match="profile='paper', allowed"):
        code_attention(random_codes(), torch.zeros(2, 9, 3, 5), profile="paper")
    mixer = create_mixer("ecoformer", dim=16, heads=2).train()
    with pytest.raises(ShapeError, match="learning codes from N = 9 tokens, allowed: >= anchors = 25"):
        mixer(torch.randn(1, 9, 16))
    with pytest.raises(OptionError, match="learning the codes met values that are not finite with rate=0.0005"):
        learned(unit() * torch.nan)
