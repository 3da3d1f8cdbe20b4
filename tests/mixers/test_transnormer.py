"""TransNormer's two layers against their matrices of weights, their states across blocks, and the bounded gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import OptionError
from foveate.mixers.base import create_mixer
from foveate.mixers.linear.transnormer import MirroredRotary, normed

DIM, HEADS = 16, 2


def made(spec: str, **options):
    torch.manual_seed(0)
    return create_mixer(spec, dim=DIM, heads=HEADS, **options).double().eval()


def tokens(length: int = 13, rows: int = 2, seed: int = 5) -> Tensor:
    return torch.randn(rows, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def joined(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2)


def parts(mixer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return heads_of(mixer.q_proj(x)), heads_of(mixer.k_proj(x)), heads_of(mixer.v_proj(x))


def same_block(length: int, block: int) -> Tensor:
    at = torch.arange(length) // block
    return at[:, None] == at


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("feature_map", "phi"), [("elu", F.elu), ("elu+1", lambda x: F.elu(x) + 1)])
def test_norm_attention_is_its_matrix_of_weights(feature_map, phi, causal):
    mixer, x = made("transnormer-norm", feature_map=feature_map, causal=causal, lrpe=False), tokens()
    q, k, v = parts(mixer, x)
    weights = phi(q) @ phi(k).transpose(-1, -2)
    expected = mixer.o_proj(normed(joined((weights.tril() if causal else weights) @ v)))
    assert torch.allclose(mixer(x)[0], expected, atol=1e-10)


def test_lrpe_makes_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    lrpe = MirroredRotary(8).double()
    q, k = (torch.randn(1, 1, 1, 8, dtype=torch.float64) for _ in range(2))

    def score(i: int, j: int) -> Tensor:
        return (lrpe(q, torch.tensor([[i]])) * lrpe(k, torch.tensor([[j]]))).sum()

    assert torch.allclose(score(7, 3), score(104, 100), atol=1e-12)
    assert torch.allclose(score(5, 5), (q * k).sum(), atol=1e-12)
    assert (score(7, 3) - score(8, 3)).abs() > 1e-3


def test_the_norm_is_the_root_mean_square_and_leaves_zeros_alone():
    x = tokens().requires_grad_()
    assert torch.allclose(normed(x), x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-8), atol=1e-14)
    zero = torch.zeros(1, 4, requires_grad=True)
    assert not bool(normed(zero).any())
    assert bool(torch.autograd.grad(normed(zero).sum(), zero)[0].isfinite().all())


def test_norm_attention_takes_no_notice_of_the_size_of_values_and_queries():
    mixer, x = made("transnormer-norm"), tokens()
    expected = mixer(x)[0]
    with torch.no_grad():
        mixer.v_proj.weight.mul_(7)
        mixer.v_proj.bias.mul_(7)
    assert torch.allclose(mixer(x)[0], expected, atol=1e-10)


@pytest.mark.parametrize("block", [1, 5, 13, 64])
@pytest.mark.parametrize("weights", ["relu", "softmax"])
@pytest.mark.parametrize("causal", [True, False])
def test_diag_attention_is_attention_under_a_block_diagonal_mask(causal, weights, block):
    mixer, x = made("transnormer-diag", block=block, weights=weights, causal=causal), tokens()
    q, k, v = parts(mixer, x)
    seen = same_block(13, block)
    seen = seen.tril() if causal else seen
    if weights == "softmax":
        o = joined(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
    else:
        o = normed(joined((F.relu(q @ k.transpose(-1, -2) * 8**-0.5) * seen) @ v))
    assert torch.allclose(mixer(x)[0], mixer.o_proj(o), atol=1e-10)


def test_the_zeros_that_fill_up_a_last_block_can_be_read_as_in_the_authors_code():
    x = tokens(7)
    mixer = made("transnormer-diag", block=5, weights="softmax", causal=False, fill_keys=True)
    q, k, v = parts(mixer, x)
    padded = [F.pad(each, (0, 0, 0, 3)) for each in (q, k, v)]
    o = F.scaled_dot_product_attention(*padded, attn_mask=same_block(10, 5))[:, :, :7]
    assert torch.allclose(mixer(x)[0], mixer.o_proj(joined(o)), atol=1e-10)
    without = made("transnormer-diag", block=5, weights="softmax", causal=False)(x)[0]
    assert torch.allclose(without[:, :5], mixer(x)[0][:, :5], atol=1e-10)
    assert not torch.allclose(without[:, 5:], mixer(x)[0][:, 5:])


@pytest.mark.parametrize("weights", ["relu", "softmax"])
@pytest.mark.parametrize("sizes", [[13], [4, 1, 8], [1] * 13, [5, 5, 3], [2, 11]], ids=str)
def test_any_split_across_blocks_gives_the_outputs_of_one_call(sizes, weights):
    mixer, x = made("transnormer-diag", block=5, weights=weights, lrpe=True), tokens()
    expected, end = mixer(x)
    state, outputs = None, []
    for piece in x.split(sizes, 1):
        y, state = mixer(piece, state=state)
        outputs.append(y)
    assert torch.allclose(torch.cat(outputs, 1), expected, atol=1e-10)
    assert state.length.tolist() == [3, 3]
    assert torch.allclose(state.keys, end.keys, atol=1e-10)
    assert not bool(state.keys[:, :, 3:].any())
    assert state.bytes() == mixer.state_bytes(2, 13) == mixer.state_bytes(2, 10**6)


@pytest.mark.parametrize("weights", ["relu", "softmax"])
def test_rows_that_stand_at_different_places_of_their_blocks_go_on_together(weights):
    mixer, x = made("transnormer-diag", block=5, weights=weights), tokens(8, rows=3)
    real = torch.ones(3, 8, dtype=torch.bool)
    real[0] = real[1, :6] = False
    _, state = mixer(x, padding=real)
    assert state.length.tolist() == [0, 2, 3]
    more = tokens(9, rows=3, seed=6)
    outputs = []
    for piece in more.split([1, 1, 6, 1], 1):
        y, state = mixer(piece, state=state)
        outputs.append(y)
    for row, pads in enumerate((8, 6, 0)):
        alone = mixer(torch.cat((x[row : row + 1, pads:], more[row : row + 1]), 1))[0]
        assert torch.allclose(torch.cat(outputs, 1)[row], alone[0, 8 - pads :], atol=1e-10)


def test_a_row_whose_weights_are_all_zero_gives_zero():
    mixer, x = made("transnormer-diag", block=1), tokens()
    with torch.no_grad():
        mixer.k_proj.weight.copy_(-mixer.q_proj.weight)
        mixer.k_proj.bias.copy_(-mixer.q_proj.bias)
        mixer.o_proj.bias.zero_()
    assert not bool(mixer(x)[0].any())


def test_the_norm_bounds_the_gradient_of_a_score_and_the_denominator_does_not():
    values = torch.randn(6, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Signed scores whose sum nearly cancels, though their weighted sum of values does not.
    scores = torch.tensor([1.0, -1.0 + 1e-6, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    by_sum = torch.autograd.functional.jacobian(lambda s: s @ values / s.sum(), scores).abs().max()
    by_norm = torch.autograd.functional.jacobian(lambda s: normed(s @ values), scores).abs().max()
    assert by_norm < 3
    assert by_sum > 1e6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("transnormer-norm:feature_map=relu", "feature_map='relu', allowed: "),
        ("transnormer-diag:block=0", "block=0, allowed: >= 1"),
        ("transnormer-diag:weights=linear", "weights='linear', allowed: 'relu', 'softmax'"),
        ("transnormer-diag:fill_keys=true", "fill_keys with causal=True, allowed: causal=False"),
    ],
)
def test_bad_options(spec, message):
    with pytest.raises(OptionError, match=message):
        made(spec)


@pytest.mark.parametrize("spec", ["transnormer-norm", "transnormer-diag:lrpe=true"])
def test_heads_of_odd_width_have_no_lrpe(spec):
    with pytest.raises(OptionError, match="head width 5, allowed with lrpe: even"):
        create_mixer(spec, dim=10, heads=2)
