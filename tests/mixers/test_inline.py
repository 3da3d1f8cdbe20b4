"""InLine attention against its matrix of weights and its convolution image by image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.linear import kv_matmul_attention
from foveate.errors import OptionError
from foveate.mixers.base import create_mixer
from foveate.mixers.linear.inline import convolve_each

GRID = (3, 5)


def made(**options):
    torch.manual_seed(0)
    given = {"dim": 16, "heads": 2, "height": GRID[0], "width": GRID[1], **options}
    return create_mixer("inline", **given).double().eval()


def tokens(length: int = 15, rows: int = 3) -> Tensor:
    return torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


PHI = {"identity": lambda x: x, "relu": F.relu, "leaky-relu": lambda x: F.leaky_relu(x, 0.01), "exp": torch.exp}


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("feature_map", PHI)
def test_equals_its_matrix_of_weights_and_a_convolution_per_image(feature_map, class_token):
    mixer = made(feature_map=feature_map, class_token=class_token)
    x = tokens(15 + class_token)
    q, k, v = mixer.qkv_proj(x).chunk(3, -1)
    N = x.shape[1]
    w = PHI[feature_map](heads_of(q)) @ PHI[feature_map](heads_of(k)).transpose(-1, -2) * 8**-0.5 / N
    weights = w - w.sum(-1, keepdim=True) / N + 1 / N
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-12)
    o = (weights @ heads_of(v)).transpose(1, 2).flatten(2)
    first, _, second = mixer.kernel
    for row in range(3):
        hidden = F.gelu(F.conv1d(x[row].mean(0)[None, :, None], first.weight, first.bias, groups=2))
        taps = F.conv1d(hidden, second.weight, second.bias, groups=2).reshape(16, 1, 3, 3)
        image = v[row, int(class_token) :].T.reshape(1, 16, *GRID)
        local = F.conv2d(image, taps, padding=1, groups=16).flatten(2)[0].T
        o[row, int(class_token) :] += local
    assert torch.allclose(mixer(x)[0], mixer.o_proj(o), atol=1e-10)


def test_a_centre_tap_of_one_is_the_values_and_no_tap_nothing():
    x, taps = tokens(), torch.zeros(3, 16, 3, 3, dtype=torch.float64)
    assert not convolve_each(x, taps, GRID).any()
    taps[:, :, 1, 1] = 1
    assert torch.equal(convolve_each(x, taps, GRID), x)
    mixer = made(residual=False)
    assert mixer.kernel is None
    assert mixer(x)[0].shape == x.shape


def weights(q: Tensor, k: Tensor, normalizer: str) -> Tensor:
    one_hot = torch.eye(k.shape[1], dtype=torch.float64)[None, :, None]
    return kv_matmul_attention(q, k, one_hot, normalizer=normalizer)[0, 0, 0]


def test_a_query_of_twice_the_size_reads_differently_and_none_reads_all_alike():
    torch.manual_seed(0)
    q, k = torch.rand(1, 1, 1, 8).double(), torch.rand(1, 12, 1, 8).double()
    assert not torch.allclose(weights(q, k, "subtractive"), weights(2 * q, k, "subtractive"), atol=1e-3)
    assert torch.allclose(weights(q, k, "sum"), weights(2 * q, k, "sum"), atol=1e-6)
    uniform = torch.full((12,), 1 / 12, dtype=torch.float64)
    assert torch.allclose(weights(0 * q, k, "subtractive"), uniform, atol=1e-12)


def test_another_grid_than_its_own():
    mixer = made(class_token=True)
    other = made(class_token=True, height=4, width=2)
    x = tokens(9)
    assert torch.equal(mixer.mix_grid(x, (4, 2)), other(x)[0])


def test_bad_options():
    with pytest.raises(OptionError, match="feature_map='elu', allowed: "):
        made(feature_map="elu")
    with pytest.raises(OptionError, match="dim=16 with heads=3, allowed: a multiple"):
        made(heads=3)
