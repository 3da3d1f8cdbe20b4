"""MALA against its matrix of weights, and what the magnitude of a query does to them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.linear import kv_matmul_attention
from foveate.errors import OptionError, ShapeError
from foveate.mixers.base import create_mixer

HEIGHT, WIDTH = 3, 5


def made(spec: str = "mala", **options):
    torch.manual_seed(0)
    given = {"dim": 16, "heads": 2, **options}
    if spec.startswith("mala") and "causal" not in spec:
        given |= {"height": HEIGHT, "width": WIDTH}
    return create_mixer(spec, **given).double().eval()


def tokens(length: int = HEIGHT * WIDTH, rows: int = 1) -> Tensor:
    return torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def turned(x: Tensor) -> Tensor:
    """[B, H, N, 8] turned by row and column, pair by pair as complex numbers."""
    y = x.clone()
    for n in range(x.shape[2]):
        angles = [place * rate for place in divmod(n, WIDTH) for rate in (1.0, 1e-4)]
        for pair, angle in enumerate(angles):
            value = torch.complex(x[:, :, n, 2 * pair], x[:, :, n, 2 * pair + 1])
            value = value * complex(math.cos(angle), math.sin(angle))
            y[:, :, n, 2 * pair], y[:, :, n, 2 * pair + 1] = value.real, value.imag
    return y


def finished(mixer, o: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    image = v.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH))
    local = F.conv2d(image, mixer.local.weight, mixer.local.bias, padding=2, groups=16).flatten(2).transpose(1, 2)
    return mixer.o_proj((o.transpose(1, 2).flatten(2) + local) * gate)


@pytest.mark.parametrize("rotary", [True, False])
def test_equals_its_matrix_of_weights(rotary):
    mixer, x = made(rotary=rotary), tokens()
    q, k, v, gate = mixer.qkvo_proj(x).chunk(4, -1)
    phi_q, phi_k = (F.elu(heads_of(each)) + 1 for each in (q, k))
    s, N = 8**-0.5, HEIGHT * WIDTH
    z = (s / N) * (phi_q @ phi_k.transpose(-1, -2)).sum(-1, keepdim=True)
    if rotary:
        phi_q, phi_k = turned(phi_q), turned(phi_k)
    weights = (1 + 1 / (z + 1e-6)) * (s / N) * (phi_q @ phi_k.transpose(-1, -2)) - z / N
    if not rotary:
        assert torch.allclose(weights.sum(-1), torch.ones(1, 2, N, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(mixer(x)[0], finished(mixer, weights @ heads_of(v), v, gate), atol=1e-9)


def test_softmax_in_the_same_layer():
    mixer, x = made(attention="softmax"), tokens()
    q, k, v, gate = mixer.qkvo_proj(x).chunk(4, -1)
    weights = (turned(heads_of(q)) @ turned(heads_of(k)).transpose(-1, -2) * 8**-0.5).softmax(-1)
    assert torch.allclose(mixer(x)[0], finished(mixer, weights @ heads_of(v), v, gate), atol=1e-9)


def test_the_means_follow_the_number_of_tokens():
    """An image of two equal halves reads as one half does, so N is that of the input."""
    mixer = made(rotary=False)
    with torch.no_grad():
        mixer.local.weight.zero_()
    half = tokens(10)
    small = mixer.mix_grid(half, (2, 5))
    large = mixer.mix_grid(torch.cat((half, half), 1), (4, 5))
    assert torch.allclose(large, torch.cat((small, small), 1), atol=1e-12)


def test_larger_queries_read_more_sharply_and_vanishing_ones_like_plain_linear_attention():
    torch.manual_seed(0)
    q, k = torch.rand(1, 1, 1, 8).double(), torch.rand(1, 12, 1, 8).double()
    one_hot = torch.eye(12, dtype=torch.float64)[None, :, None]

    def weights(size: float, normalizer: str) -> Tensor:
        return kv_matmul_attention(size * q, k, one_hot, normalizer=normalizer, eps=0.0)[0, 0, 0]

    z = (8**-0.5 * q[0, 0, 0] @ k[0, :, 0].mean(0)).item()
    spread = [float(weights(size, "affine").max() - weights(size, "affine").min()) for size in (1.0, 3.0)]
    assert spread[1] / spread[0] == pytest.approx((3 + 1 / z) / (1 + 1 / z), rel=1e-9)
    assert torch.allclose(weights(1.0, "sum"), weights(3.0, "sum"), atol=1e-12)
    assert torch.allclose(weights(1e-7, "affine"), weights(1.0, "sum"), atol=1e-6)


def test_causal_form_is_its_matrix_of_weights():
    mixer, x = made("mala-causal", rotary=False), tokens(11)
    q, k, v, gate = mixer.qkvo_proj(x).chunk(4, -1)
    scores = ((F.elu(heads_of(q)) + 1) @ (F.elu(heads_of(k)) + 1).transpose(-1, -2) * 8**-0.5).tril()
    count = torch.arange(1, 12, dtype=torch.float64)[:, None]
    z = scores.sum(-1, keepdim=True) / count
    weights = ((1 + 1 / (z + 1e-6)) * scores - z).tril() / count
    expected = mixer.o_proj((weights @ heads_of(v)).transpose(1, 2).flatten(2) * gate)
    assert torch.allclose(mixer(x)[0], expected, atol=1e-8)


def test_the_last_token_of_the_causal_form_reads_as_an_image_does():
    causal, image, x = made("mala-causal", rotary=False), made(rotary=False), tokens()
    with torch.no_grad():
        image.local.weight.zero_()
        image.local.bias.zero_()
    image.load_state_dict({**image.state_dict(), **causal.state_dict()})
    assert torch.allclose(causal(x)[0][:, -1], image(x)[0][:, -1], atol=1e-9)


def test_causal_rotation_depends_on_distances_alone():
    mixer, x = made("mala-causal"), tokens(9)
    shifted = torch.arange(9)[None] + 500
    assert torch.allclose(mixer(x, positions=shifted)[0], mixer(x)[0], atol=1e-6)
    assert not torch.allclose(mixer(x, positions=shifted * 2)[0], mixer(x)[0], atol=1e-3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mala:attention=sparse", "attention='sparse', allowed: 'linear', 'softmax'"),
        ("mala:heads=8", "allowed with rotary: a multiple of 32"),
        ("mala:eps=-1.0", "eps=-1.0, allowed: >= 0"),
        ("mala-causal:rope_base=0.0", "rope_base=0.0, allowed: > 0"),
        ("mala-causal:heads=16", "head width 1, allowed with rotary: even"),
    ],
)
def test_bad_options(spec, message):
    with pytest.raises(OptionError, match=message):
        create_mixer(spec, dim=16)


def test_a_grid_of_another_size_is_refused():
    mixer = made()
    with pytest.raises(ShapeError, match=r"sequences of \[14\] tokens, allowed: 15 each"):
        mixer(tokens(14))
    with pytest.raises(ShapeError, match=r"x \[1, 15, 16\] on grid=\(2, 5\), allowed: \[B, 10, 16\]"):
        mixer.mix_grid(tokens(), (2, 5))
    with pytest.raises(OptionError, match="height=0, allowed: >= 1"):
        create_mixer("mala:height=0", dim=16)
    with pytest.raises(OptionError, match="width=0, allowed: >= 1"):
        create_mixer("mala:width=0", dim=16)
