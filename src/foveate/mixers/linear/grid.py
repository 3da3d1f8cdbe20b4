"""What the mixers of images share: tokens that stand on a grid, row by row, after class tokens or none.

A grid is (height, width) in tokens. A mixer is made for one grid, which its `forward` insists on; `mix_grid` takes
another one (a larger image, a window).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.errors import ShapeError
from foveate.mixers.base import Mixer, MixerState

Grid = tuple[int, int]


class GridMixer(Mixer):
    """A mixer of the tokens of an image, [B, class tokens + height width, C] -> the same shape.

    `lacking` says why it cannot be used for the other patterns.
    """

    patterns = frozenset({"noncausal-self"})
    lacking: ClassVar[Mapping[str, str]] = {
        "causal-self": "tokens of an image have no order in time, and a convolution reads all sides",
        "causal-cross": "its convolution reads the values of the grid that the queries stand on",
        "noncausal-cross": "its convolution reads the values of the grid that the queries stand on",
    }
    causal = False
    packs = False

    def __init__(
        self,
        *,
        dim: int,
        layer: int,
        layers: int,
        heads: int,
        height: int,
        width: int | None,
        class_tokens: int = 0,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.require(height >= 1, f"height={height}, allowed: >= 1")
        self.require(width is None or width >= 1, f"width={width}, allowed: >= 1")
        self.head_dim = dim // heads
        self.grid: Grid = (height, height if width is None else width)
        self.class_tokens = class_tokens
        self.length = class_tokens + self.grid[0] * self.grid[1]

    def mix(
        self, x: Tensor, state: MixerState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        return self.mix_grid(x, self.grid), state

    def mix_grid(self, x: Tensor, grid: Grid) -> Tensor:
        """The layer on a grid of any size: x [B, class tokens + height width, C]; ShapeError for another length."""
        tokens = self.class_tokens + grid[0] * grid[1]
        if min(grid) < 1 or x.dim() != 3 or x.shape[1:] != (tokens, self.dim):
            raise ShapeError(f"{self.owner}: x {list(x.shape)} on grid={grid}, allowed: [B, {tokens}, {self.dim}]")
        return self.image(x, grid)

    @abstractmethod
    def image(self, x: Tensor, grid: Grid) -> Tensor:
        """The layer, after all checks."""


def to_map(x: Tensor, grid: Grid) -> Tensor:
    """Tokens [B, H W, C] as a feature map [B, C, H, W]."""
    return x.transpose(1, 2).unflatten(2, grid)


def convolve(conv: nn.Conv2d, x: Tensor, grid: Grid) -> Tensor:
    """A convolution that keeps the size, on tokens [B, H W, C]."""
    y: Any = conv(to_map(x, grid))
    return y.flatten(2).transpose(1, 2)
