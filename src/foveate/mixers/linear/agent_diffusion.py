"""Agent attention for diffusion U-Nets, without training: similar tokens merge, and self-attention goes through few.

In each self-attention of the finest levels, tokens y of the grid are matched: one destination per cell x cell square,
the others are sources, each with its most similar destination (cosine). With r = int(ratio N), a = int(agent_ratio N):

    merged = the r most similar sources averaged into their destinations;   agents = the a most similar ones, so fewer
    q, k, v = merged W;   A = agents W_q
    o = softmax(D^(-exponent / 2) q A^T) softmax(D^-0.5 A K^T) V + shortcut V,   each source gets its destination's o

Where agents would not be fewer than half of the merged tokens, attention among the merged ones stays as it is. The
schedule merges strongly in the first steps (cell 4, agent_ratio 0.95), then as token merging does (cell 2, 0.5).

Paper: Han et al. 2023 (arXiv 2312.08874), `agentsd`. exponent 0.3 makes logits larger than D^-0.5 does. Destinations
are the first token of each cell for a batch of odd size, else drawn at random, one draw for all images. Rows and
columns beyond the last whole cell hold none. Differs from the authors' code: matching is sorted stably; r = 0 is
allowed; it works through the attention processors of `diffusers`, where theirs never passes the agents on.

Cost: matching N^2 / cell^2 similarities, then O(N n D) with n agents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import OptionError, ShapeError, UnsupportedModelError

Grid = tuple[int, int]


@dataclass(frozen=True)
class Matching:
    """Sources and destinations among N tokens.

    sources: [B, S] int64, by falling similarity to their destination.    targets: [B, S] int64, the place of that
    destination among `destinations` [E] int64, which stand row by row.
    """

    sources: Tensor
    targets: Tensor
    destinations: Tensor

    def limit(self, count: int) -> int:
        """How many of `count` merges there are sources for."""
        return max(0, min(count, self.sources.shape[1]))

    def merge(self, x: Tensor, count: int) -> Tensor:
        """x [B, N, C] -> [B, N - count, C]: the sources that stay, by falling similarity, then the destinations.

        A destination becomes the mean of itself and of what is merged into it.
        """
        count = self.limit(count)
        rows = x.gather(1, self.sources[..., None].expand(-1, -1, x.shape[-1]))
        target = self.targets[:, :count, None].expand(-1, -1, x.shape[-1])
        merged = x[:, self.destinations].scatter_reduce(1, target, rows[:, :count], "mean", include_self=True)
        return torch.cat((rows[:, count:], merged), 1)

    def unmerge(self, y: Tensor, count: int) -> Tensor:
        """The inverse order of `merge`: [B, N - count, C] -> [B, N, C]; merged sources copy their destination."""
        count = self.limit(count)
        stay = self.sources.shape[1] - count
        if y.shape[1] != stay + self.destinations.shape[0]:
            raise ShapeError(
                f"unmerge: y {list(y.shape)}, allowed: {stay + self.destinations.shape[0]} tokens for count={count}"
            )
        kept, merged = y[:, :stay], y[:, stay:]
        copied = merged.gather(1, self.targets[:, :count, None].expand(-1, -1, y.shape[-1]))
        out = y.new_empty(y.shape[0], self.sources.shape[1] + self.destinations.shape[0], y.shape[-1])
        out[:, self.destinations] = merged
        return out.scatter(1, self.sources[..., None].expand(-1, -1, y.shape[-1]), torch.cat((copied, kept), 1))


def match_tokens(x: Tensor, grid: Grid, cell: Grid, generator: torch.Generator | None = None) -> Matching:
    """Match the tokens of images, x [B, H W, C]; `cell` is (height, width) of the square of each destination.

    generator: draws the place of the destination in each cell; without one it is the first. ShapeError for another
    grid, OptionError for a cell larger than it.
    """
    (H, W), (height, width) = grid, cell
    if x.dim() != 3 or x.shape[1] != H * W:
        raise ShapeError(f"match_tokens: x {list(x.shape)} on grid={grid}, allowed: [B, {H * W}, C]")
    if not (1 <= height <= H and 1 <= width <= W):
        raise OptionError(f"match_tokens: cell={cell}, allowed: (1, 1) to {grid}")
    rows, columns = H // height, W // width
    place = torch.zeros(rows, columns, dtype=torch.int64)
    if generator is not None:
        place = torch.randint(height * width, (rows, columns), generator=generator)
    top = torch.arange(rows)[:, None] * height + place // width
    left = torch.arange(columns) * width + place % width
    destinations = (top * W + left).flatten()
    is_source = torch.ones(H * W, dtype=torch.bool)
    is_source[destinations] = False
    sources, destinations = is_source.nonzero()[:, 0].to(x.device), destinations.to(x.device)
    unit = F.normalize(x, dim=-1)
    best, target = (unit[:, sources] @ unit[:, destinations].transpose(1, 2)).max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    return Matching(sources[order], target.gather(1, order), destinations)


def agent_attention(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *, exponent: float = 0.3, shortcut: float = 0.075
) -> Tensor:
    """Two softmaxes through agents: q, k, v [B, H, M, D], agents [B, H, n, D] -> [B, H, M, D].

    exponent: the second softmax is scaled by D^(-exponent / 2).    shortcut: times v, added.
    """
    found = F.scaled_dot_product_attention(agents, k, v)
    return F.scaled_dot_product_attention(q, agents, found, scale=q.shape[-1] ** (-exponent / 2)) + shortcut * v


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How strongly tokens are merged: shares of all tokens, and the side of a cell."""

    cell: int
    ratio: float
    agent_ratio: float

    def __post_init__(self) -> None:
        if self.cell < 1 or not 0 <= self.ratio <= 1 or not 0 <= self.agent_ratio <= 1:
            raise OptionError(f"{self}, allowed: cell >= 1, ratio and agent_ratio from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class AgentDiffusion:
    """Options.

    early, late: the stages before and from step `early_steps` on.    max_downsample: 1 acts on the finest level only,
    2 on the next too, and so on.    exponent, shortcut: see `agent_attention`.    seed: of the random destinations.
    """

    early: Stage = Stage(cell=4, ratio=0.4, agent_ratio=0.95)
    late: Stage = Stage(cell=2, ratio=0.4, agent_ratio=0.5)
    early_steps: int = 20
    max_downsample: int = 1
    exponent: float = 0.3
    shortcut: float = 0.075
    seed: int = 0

    def __post_init__(self) -> None:
        if self.early_steps < 0 or self.max_downsample < 1:
            raise OptionError(
                f"AgentDiffusion: early_steps={self.early_steps}, max_downsample={self.max_downsample}, allowed: "
                "early_steps >= 0, max_downsample >= 1"
            )


class AgentRun:
    """One image being made: which step it is in (`step`, from 0), and how large the latent image is (`size`)."""

    def __init__(self, options: AgentDiffusion) -> None:
        self.options = options
        self.step = -1
        self.size: Grid = (0, 0)
        self.generator = torch.Generator().manual_seed(options.seed)

    def grid(self, tokens: int) -> Grid | None:
        """The grid of a level with so many tokens, or None where it is too coarse to be changed."""
        height, width = self.size
        downsample = math.ceil(math.sqrt(height * width / tokens))
        if downsample > self.options.max_downsample:
            return None
        grid = (math.ceil(height / downsample), math.ceil(width / downsample))
        if grid[0] * grid[1] != tokens:
            raise ShapeError(f"a latent image of {self.size} has no level of {tokens} tokens; nearest: {grid}")
        return grid

    def attend(self, attn: Any, x: Tensor, grid: Grid) -> Tensor:
        """The self-attention of a `diffusers` attention module over tokens x [B, N, C] on a grid."""
        options = self.options
        stage = options.early if self.step < options.early_steps else options.late
        cell = (min(stage.cell, grid[0]), min(stage.cell, grid[1]))
        matching = match_tokens(x, grid, cell, self.generator if x.shape[0] % 2 == 0 else None)
        N = x.shape[1]
        count, fewer = (matching.limit(int(share * N)) for share in (stage.ratio, stage.agent_ratio))
        merged = matching.merge(x, count)
        q, k, v = (_heads(attn, proj(merged)) for proj in (attn.to_q, attn.to_k, attn.to_v))
        if 2 * (N - fewer) < N - count:
            agents = _heads(attn, attn.to_q(matching.merge(x, fewer)))
            o = agent_attention(q, k, v, agents, exponent=options.exponent, shortcut=options.shortcut)
        else:
            o = F.scaled_dot_product_attention(q, k, v)
        y = o.transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            y = layer(y)
        return matching.unmerge(y, count)


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


class AgentProcessor:
    """An attention processor of `diffusers`: agent attention where the level is fine enough, else the processor that
    was there before."""

    def __init__(self, run: AgentRun, before: Any) -> None:
        self.run, self.before = run, before

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise UnsupportedModelError(
                "agent diffusion: a self-attention was called with encoder_hidden_states or a mask, allowed: neither"
            )
        grid = self.run.grid(hidden_states.shape[1]) if hidden_states.dim() == 3 else None
        if grid is None:
            given = {"encoder_hidden_states": None, "attention_mask": None, **rest}
            return self.before(attn, hidden_states, **given)
        return self.run.attend(attn, hidden_states, grid)


@contextmanager
def agent_diffusion(unet: Any, **options: Any) -> Iterator[AgentRun]:
    """Put agent attention on the self-attentions ("attn1") of a `diffusers` U-Net while the block runs.

        with agent_diffusion(pipe.unet):
            image = pipe(prompt).images[0]

    Options as in `AgentDiffusion`. Every call of the U-Net is a step; enter again for the next image. On leaving, also
    by an exception, the processors are those from before. Raises UnsupportedModelError for a model without such layers.
    """
    before = getattr(unet, "attn_processors", {})
    if not any(name.endswith("attn1.processor") for name in before):
        raise UnsupportedModelError(
            f"agent diffusion: {type(unet).__name__} has no 'attn1' processors, allowed: a diffusers U-Net with "
            "transformer blocks"
        )
    run = AgentRun(AgentDiffusion(**options))

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        run.step += 1
        run.size = (sample.shape[-2], sample.shape[-1])

    hook = unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        unet.set_attn_processor(
            {
                name: AgentProcessor(run, each) if name.endswith("attn1.processor") else each
                for name, each in before.items()
            }
        )
        yield run
    finally:
        hook.remove()
        unet.set_attn_processor(dict(before))
