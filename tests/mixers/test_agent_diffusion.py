"""Merging of tokens, agent attention without training, and putting it on a U-Net and taking it off."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import OptionError, ShapeError, UnsupportedModelError
from foveate.mixers.linear.agent_diffusion import (
    AgentDiffusion,
    AgentProcessor,
    AgentRun,
    Stage,
    agent_attention,
    agent_diffusion,
    match_tokens,
)

GRID = (6, 9)


def tokens(rows: int = 2) -> Tensor:
    return torch.randn(rows, 54, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_one_destination_per_whole_cell():
    first = match_tokens(tokens(), GRID, (4, 4))
    # Rows 4 and 5 and column 8 belong to no whole cell.
    assert first.destinations.tolist() == [0, 4]
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(match_tokens(tokens(), GRID, (3, 3), generator).destinations.tolist()) for _ in range(20)}
    assert len(drawn) > 1
    for destinations in drawn:
        cells = sorted((place // 9 // 3, place % 9 // 3) for place in destinations)
        assert cells == [(r, c) for r in range(2) for c in range(3)]


def test_matching_is_the_most_similar_destination_and_sorted():
    x = tokens()
    matching = match_tokens(x, GRID, (3, 3))
    for row in range(2):
        similar = F.cosine_similarity(x[row, :, None], x[row, matching.destinations][None], dim=-1)
        best = similar[matching.sources[row]].max(-1)
        assert best.indices.tolist() == matching.targets[row].tolist()
        assert bool((best.values.diff() <= 0).all())
        every = sorted(matching.sources[row].tolist() + matching.destinations.tolist())
        assert every == list(range(54))


def test_merge_is_the_mean_of_a_destination_and_its_sources():
    x = tokens()
    matching = match_tokens(x, GRID, (3, 3))
    merged = matching.merge(x, 20)
    assert merged.shape == (2, 34, 8)
    for row in range(2):
        assert torch.equal(merged[row, :28], x[row, matching.sources[row, 20:]])
        for place, destination in enumerate(matching.destinations.tolist()):
            sources = matching.sources[row, :20][matching.targets[row, :20] == place].tolist()
            assert torch.allclose(merged[row, 28 + place], x[row, [destination, *sources]].mean(0), atol=1e-12)


def test_unmerge_gives_back_what_was_not_merged_and_copies_the_rest():
    x = tokens()
    matching = match_tokens(x, GRID, (3, 3))
    assert torch.equal(matching.unmerge(matching.merge(x, 0), 0), x)
    merged = matching.merge(x, 20)
    back = matching.unmerge(merged, 20)
    for row in range(2):
        kept = matching.sources[row, 20:]
        assert torch.equal(back[row, kept], x[row, kept])
        for source, target in zip(matching.sources[row, :20], matching.targets[row, :20]):
            assert torch.equal(back[row, source], merged[row, 28 + target])
    # More merges than there are sources are cut to them.
    assert matching.merge(x, 1000).shape[1] == 6
    assert matching.unmerge(matching.merge(x, 1000), 1000).shape == x.shape
    with pytest.raises(ShapeError, match="allowed: 34 tokens for count=20"):
        matching.unmerge(merged[:, 1:], 20)


def test_agent_attention_is_two_softmaxes():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 10, 8, dtype=torch.float64)
    agents = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    found = (agents @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v
    expected = (q @ agents.transpose(-1, -2) * 8**-0.15).softmax(-1) @ found + 0.075 * v
    assert torch.allclose(agent_attention(q, k, v, agents), expected, atol=1e-12)
    stacked = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
    twice = stacked @ ((k @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v)
    assert torch.allclose(agent_attention(q, k, v, k, exponent=1.0, shortcut=0.0), twice, atol=1e-12)


class Attention(nn.Module):
    """The parts of a diffusers attention module that a processor uses."""

    heads = 2

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])
        self.processor = plain

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.processor(self, x, encoder_hidden_states=context)


def plain(attn, x, encoder_hidden_states=None, attention_mask=None):
    context = x if encoder_hidden_states is None else encoder_hidden_states
    q, k, v = (
        proj(each).unflatten(-1, (2, -1)).transpose(1, 2)
        for proj, each in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
    )
    return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class UNet(nn.Module):
    """Two levels of self and cross attention with diffusers' way of naming and setting processors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict(
            {f"{level}_{kind}": Attention() for level in ("fine", "coarse") for kind in ("attn1", "attn2")}
        )

    @property
    def attn_processors(self):
        return {f"{name.replace('_', '.')}.processor": layer.processor for name, layer in self.layers.items()}

    def set_attn_processor(self, processors):
        for name, layer in self.layers.items():
            layer.processor = processors.pop(f"{name.replace('_', '.')}.processor")

    def forward(self, sample: Tensor) -> Tensor:
        fine = sample.flatten(2).transpose(1, 2)
        fine = fine + self.layers["fine_attn1"](fine)
        fine = fine + self.layers["fine_attn2"](fine, fine[:, :3])
        coarse = F.avg_pool2d(fine.transpose(1, 2).unflatten(2, sample.shape[2:]), 2).flatten(2).transpose(1, 2)
        return fine.mean(1) + (coarse + self.layers["coarse_attn1"](coarse)).mean(1)


def image(rows: int = 2) -> Tensor:
    return torch.randn(rows, 8, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_u_net_is_changed_within_the_block_and_restored_after_it():
    unet = UNet()
    before, processors = unet(image()), unet.attn_processors
    with agent_diffusion(unet) as run:
        assert not torch.allclose(unet(image()), before, atol=1e-4)
        assert (run.step, run.size) == (0, (8, 8))
    assert torch.equal(unet(image()), before)
    assert unet.attn_processors == processors
    assert run.step == 0
    with pytest.raises(ValueError, match="stop"), agent_diffusion(unet):
        raise ValueError("stop")
    assert torch.equal(unet(image()), before)


@torch.no_grad()
def test_merging_nothing_changes_nothing():
    unet, none = UNet(), Stage(cell=2, ratio=0.0, agent_ratio=0.0)
    before = unet(image())
    with agent_diffusion(unet, early=none, late=none, max_downsample=8):
        assert torch.allclose(unet(image()), before, atol=1e-6)


@torch.no_grad()
def test_stages_levels_and_seeds():
    unet, none = UNet(), Stage(cell=2, ratio=0.0, agent_ratio=0.0)
    before = unet(image())
    with agent_diffusion(unet, late=none, early_steps=2):
        steps = [unet(image()) for _ in range(3)]
    assert not torch.allclose(steps[1], before, atol=1e-4)
    assert torch.allclose(steps[2], before, atol=1e-6)
    outputs = []
    for options in ({}, {"seed": 1}, {"max_downsample": 2}):
        with agent_diffusion(unet, **options):
            outputs.append(unet(sample=image()))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    with agent_diffusion(unet), agent_diffusion(unet, max_downsample=1):
        assert torch.equal(unet(image()), outputs[0])
    with agent_diffusion(unet, seed=4):
        odd = unet(image(3))
    with agent_diffusion(unet):
        assert torch.equal(unet(image(3)), odd)


def test_what_cannot_be_served_is_refused_by_name():
    with (
        pytest.raises(UnsupportedModelError, match="Linear has no 'attn1' processors"),
        agent_diffusion(nn.Linear(1, 1)),
    ):
        pass
    processor = AgentProcessor(AgentRun(AgentDiffusion()), plain)
    with pytest.raises(UnsupportedModelError, match="a self-attention was called with encoder_hidden_states"):
        processor(Attention(), tokens(), encoder_hidden_states=tokens())
    with pytest.raises(OptionError, match="ratio and agent_ratio from 0 to 1"):
        Stage(cell=2, ratio=1.5, agent_ratio=0.5)
    with pytest.raises(OptionError, match="early_steps=-1"):
        AgentDiffusion(early_steps=-1)
    with pytest.raises(OptionError, match=r"cell=\(7, 1\), allowed: \(1, 1\) to \(6, 9\)"):
        match_tokens(tokens(), GRID, (7, 1))
    with pytest.raises(ShapeError, match=r"on grid=\(5, 9\), allowed: \[B, 45, C\]"):
        match_tokens(tokens(), (5, 9), (2, 2))
    run = AgentRun(AgentDiffusion())
    run.size = (8, 8)
    with pytest.raises(ShapeError, match="no level of 65 tokens"):
        run.grid(65)
