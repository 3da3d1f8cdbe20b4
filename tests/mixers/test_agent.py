"""Agent Attention against its two softmaxes and as linear attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.linear import kv_matmul_attention
from foveate.errors import OptionError
from foveate.mixers.base import create_mixer

GRID = (4, 6)


def made(**options):
    torch.manual_seed(0)
    given = {"dim": 16, "heads": 2, "height": GRID[0], "width": GRID[1], "pool": 2, **options}
    mixer = create_mixer("agent", **given).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def tokens(length: int = 24, rows: int = 2) -> Tensor:
    return torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def agents_of(q: Tensor) -> Tensor:
    """Means of 2 x 3 patches of a 4 x 6 grid, agent by agent."""
    image = q.unflatten(2, GRID)
    patches = [image[:, :, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3] for r in range(2) for c in range(2)]
    return torch.stack([patch.mean((2, 3)) for patch in patches], 2)


def bias_of(mixer, side: str, grid=GRID) -> Tensor:
    """[H, n, N], entry by entry."""
    table, rows, columns = (getattr(mixer, f"{side}_{part}") for part in ("table", "rows", "columns"))
    table = F.interpolate(table, size=grid, mode="bilinear")
    full = torch.zeros(2, 4, *grid, dtype=torch.float64)
    for r in range(grid[0]):
        for c in range(grid[1]):
            full[:, :, r, c] = table[:, :, r, c] + rows[:, :, r, 0] + columns[:, :, 0, c]
    bias = full.flatten(2)
    return torch.cat((getattr(mixer, f"{side}_class"), bias), -1) if mixer.class_tokens else bias


@torch.no_grad()
def both_steps(mixer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(Q A^T + B2) [B, H, N, n], softmax(A K^T + B1) [B, H, n, N], V."""
    q, k, v = (heads_of(each) for each in mixer.qkv_proj(x).chunk(3, -1))
    agents, s = agents_of(q[:, :, mixer.class_tokens :]), 8**-0.5
    gather, spread = (
        (bias_of(mixer, side) if mixer.position_bias else torch.zeros(2, 4, x.shape[1]))
        for side in ("gather", "spread")
    )
    read = (s * agents @ k.transpose(-1, -2) + gather).softmax(-1)
    told = (s * q @ agents.transpose(-1, -2) + spread.transpose(1, 2)).softmax(-1)
    return told, read, v


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("position_bias", [False, True])
def test_equals_two_softmaxes_and_a_convolution(class_token, position_bias):
    mixer = made(class_token=class_token, position_bias=position_bias)
    x = tokens(24 + class_token)
    told, read, v = both_steps(mixer, x)
    o = (told @ read @ v).transpose(1, 2).flatten(2)
    image = v.transpose(1, 2).flatten(2)[:, int(class_token) :].transpose(1, 2).unflatten(2, GRID)
    local = F.conv2d(image, mixer.local.weight, mixer.local.bias, padding=1, groups=16).flatten(2).transpose(1, 2)
    o[:, int(class_token) :] += local
    assert torch.allclose(mixer(x)[0], mixer.o_proj(o), atol=1e-10)


def test_rows_sum_to_one_and_rank_is_at_most_the_agents():
    told, read, _ = both_steps(made(), tokens())
    weights = told @ read
    assert bool((weights >= 0).all())
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-12)
    assert int(torch.linalg.matrix_rank(weights[0, 0])) <= 4


def test_is_linear_attention_with_softmax_features():
    told, read, v = both_steps(made(), tokens())
    q, k, values = told.transpose(1, 2), read.permute(0, 3, 1, 2), v.transpose(1, 2)
    o = kv_matmul_attention(q.contiguous(), k.contiguous(), values.contiguous(), scale=1.0)
    assert torch.allclose(o, (told @ read @ v).transpose(1, 2), atol=1e-12)


def test_one_agent_without_biases_tells_everyone_the_same():
    mixer = made(pool=1, position_bias=False)
    with torch.no_grad():
        mixer.local.weight.zero_()
    y = mixer(tokens())[0]
    assert torch.allclose(y, y[:, :1].expand_as(y), atol=1e-12)


def test_biases_follow_a_grid_of_another_size():
    mixer = made()
    twice = mixer.mix_grid(tokens(96), (8, 12))
    assert twice.shape == (2, 96, 16)
    with torch.no_grad():
        for side in ("gather", "spread"):
            getattr(mixer, f"{side}_rows").zero_()
            getattr(mixer, f"{side}_columns").zero_()
    larger = made(height=8, width=12)
    state = {name: value for name, value in mixer.state_dict().items() if "rows" not in name and "columns" not in name}
    zeros = {name: torch.zeros_like(value) for name, value in larger.state_dict().items() if name not in state}
    larger.load_state_dict({**state, **zeros})
    assert torch.allclose(mixer.mix_grid(tokens(96), (8, 12)), larger(tokens(96))[0], atol=1e-12)


def test_dropout_acts_in_training_alone():
    mixer, x = made(dropout=0.5), tokens()
    assert torch.equal(mixer(x)[0], mixer(x)[0])
    mixer.train()
    assert not torch.equal(mixer(x)[0], mixer(x)[0])


def test_bad_options():
    with pytest.raises(OptionError, match="pool=0, allowed: >= 1"):
        made(pool=0)
    with pytest.raises(OptionError, match=r"dropout=1.0, allowed: 0 to below 1"):
        made(dropout=1.0)
