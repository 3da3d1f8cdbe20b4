"""L2ViT's attention, concentration and windows against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import OptionError, ShapeError
from foveate.mixers.base import create_mixer
from foveate.mixers.linear.l2vit import GlobalBlock, LocalConcentration, WindowAttention, WindowBlock


def made(**options):
    torch.manual_seed(0)
    return create_mixer("l2vit", **{"dim": 16, "heads": 2, **options}).double().eval()


def tokens(length: int = 24, rows: int = 2, size: float = 1.0) -> Tensor:
    return size * torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


@pytest.mark.parametrize("floor", [0.1, 5.0, 100.0])
def test_equals_its_matrix_of_weights(floor):
    mixer, x = made(floor=floor), tokens(size=3.0)
    with torch.no_grad():
        mixer.tau.copy_(torch.tensor([0.7, 1.9]))
    q, k, v = (heads_of(each) for each in mixer.qkv_proj(x).chunk(3, -1))
    scores = F.relu(q) @ F.relu(k).transpose(-1, -2)
    weights = scores / scores.sum(-1, keepdim=True).clamp(min=floor) * mixer.tau[:, None, None]
    expected = mixer.o_proj((weights @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(mixer(x)[0], expected, atol=1e-10)


def test_temperature_starts_at_the_softmax_scale():
    assert torch.allclose(made().tau, torch.tensor(8**-0.5, dtype=torch.float64))


def test_a_query_without_features_reads_nothing():
    mixer = made()
    with torch.no_grad():
        mixer.qkv_proj.weight[:16].zero_()
        mixer.qkv_proj.bias[:16].fill_(-1)
    y = mixer(tokens())[0]
    assert torch.equal(y, mixer.o_proj.bias.expand_as(y))


def test_tokens_may_stand_in_any_order():
    mixer, x = made(floor=1.0), tokens()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mixer(x[:, order])[0], mixer(x)[0][:, order], atol=1e-12)


def test_concentration_of_single_taps_is_gelu():
    module = LocalConcentration(16).double().eval()
    with torch.no_grad():
        for conv in (module.conv1, module.conv2):
            conv.weight.zero_()
            conv.bias.zero_()
            conv.weight[:, 0, 3, 3] = 1
        module.norm.eps = 0.0
    x = tokens()
    assert torch.allclose(module(x, (4, 6)), F.gelu(x), atol=1e-12)


def softmax_attention(module: WindowAttention, x: Tensor) -> Tensor:
    q, k, v = (heads_of(each) for each in module.qkv_proj(x).chunk(3, -1))
    o = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v
    return module.o_proj(o.transpose(1, 2).flatten(2))


def windows(**options) -> WindowAttention:
    torch.manual_seed(0)
    return WindowAttention(16, 2, **options).double()


@pytest.mark.parametrize("window", [6, 9])
def test_one_window_over_all_is_global_attention(window):
    module, x = windows(window=window, mask_padding=True), tokens()
    assert torch.allclose(module(x, (4, 6)), softmax_attention(module, x), atol=1e-10)


@pytest.mark.parametrize("mask_padding", [False, True])
def test_windows_are_apart_and_their_filling_is_read_unless_hidden(mask_padding):
    module, x = windows(window=3, mask_padding=mask_padding), tokens(20)
    y = module(x, (4, 5)).unflatten(1, (4, 5))
    image = x.unflatten(1, (4, 5))
    for rows in (slice(0, 3), slice(3, 6)):
        for columns in (slice(0, 3), slice(3, 6)):
            piece = image[:, rows, columns]
            height, width = piece.shape[1:3]
            if not mask_padding:
                piece = F.pad(piece, (0, 0, 0, 3 - width, 0, 3 - height))
            expected = softmax_attention(module, piece.flatten(1, 2)).unflatten(1, piece.shape[1:3])
            assert torch.allclose(y[:, rows, columns], expected[:, :height, :width], atol=1e-10)


def test_branches_are_dropped_in_training_alone():
    torch.manual_seed(0)
    block, x = WindowBlock(16, 2, window=2, drop_path=0.5).double(), tokens(24, rows=8)
    assert torch.equal(block.eval()(x, (4, 6)), block(x, (4, 6)))
    outputs = torch.stack([block.train()(x, (4, 6)) for _ in range(20)])
    plain = WindowBlock(16, 2, window=2).double()
    plain.load_state_dict(block.state_dict())
    assert not torch.equal(outputs[0], outputs[1])
    skipped = x + block.position1(x.transpose(1, 2).unflatten(2, (4, 6))).flatten(2).transpose(1, 2)
    skipped = skipped + block.position2(skipped.transpose(1, 2).unflatten(2, (4, 6))).flatten(2).transpose(1, 2)
    # Of 160 rows about a quarter loses both branches.
    lost = (outputs - skipped).abs().amax((2, 3)) < 1e-12
    assert 0.1 < float(lost.double().mean()) < 0.4


def test_blocks_have_gradients_everywhere():
    for block in (GlobalBlock(16, 2, floor=1.0), WindowBlock(16, 2, window=4)):
        block.double()(tokens(), (4, 6)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in block.parameters())


def test_bad_use():
    with pytest.raises(OptionError, match=r"floor=0.0, allowed: > 0"):
        made(floor=0.0)
    with pytest.raises(OptionError, match="kernel=4, allowed: odd"):
        LocalConcentration(16, 4)
    with pytest.raises(OptionError, match="window=0"):
        WindowAttention(16, 2, 0)
    with pytest.raises(OptionError, match=r"drop_path=1.0, allowed: 0 to below 1"):
        WindowBlock(16, 2, drop_path=1.0)
    with pytest.raises(ShapeError, match=r"x \[2, 24, 16\] on grid=\(4, 5\), allowed: \[B, 20, C\]"):
        LocalConcentration(16).double()(tokens(), (4, 5))
