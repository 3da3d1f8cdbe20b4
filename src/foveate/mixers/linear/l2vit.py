"""L2ViT: global linear attention on ReLU features, concentrated by a convolution, between layers of local windows.

    den_i = max(relu(q_i) . sum_j relu(k_j), floor);   o_i = tau_h relu(q_i) [relu(K)^T V] / den_i;   y = o W_o
    concentration(x) = conv7x7(BatchNorm(gelu(conv7x7(x)))), depthwise
    global block  x += conv3x3(x); x += attention(norm(x)); x += concentration(norm(x)); x += mlp(norm(x))
    window block  x += conv3x3(x); x += softmax attention in windows of norm(x); x += conv3x3(x); x += mlp(norm(x))

tau is learned per head and starts at D^-0.5. Rows above the floor sum to tau, rows below to less: nothing explodes
where few keys fit. The floor of 100 suits sums over thousands of tokens; with small grids or activations it turns the
layer into linear attention without a division, so set it to the task.

Paper: Zheng 2025 (arXiv 2501.16182); stages alternate window blocks (even layers) and global ones. The mixer "l2vit" is
the attention alone, which knows no grid; the blocks are modules that are called with one. Windows fill up the right and
lower border with zeros after the norm, and as in the authors' code these take part in the softmax (their keys are the
bias) unless `mask_padding`. Optimisers should not decay tau; BatchNorm wants large or synchronised batches.

State: none. Cost: O(N D^2) per head, windows O(N w^2 D), concentration 98 N C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention import Positions, attend
from foveate.attention.linear import kv_matmul_attention
from foveate.errors import OptionError, ShapeError
from foveate.mixers.base import Mixer, MixerState
from foveate.mixers.linear.grid import Grid, convolve, to_map
from foveate.mixers.linear.recurrence import split_heads
from foveate.registry import register


@register(
    "l2vit",
    kind="mixer",
    paper="The Linear Attention Resurrection in Vision Transformer",
    arxiv="2501.16182",
    year=2025,
    applies_to="from scratch",
    small={"floor": 2.0},
    claim=(
        "Fashion-MNIST, four layers, 1500 steps, two seeds: accuracy 0.878 of global linear attention, 0.891 with the "
        "local concentration, 0.893 with windows between; softmax 0.853: each part adds, as claimed "
        "(benchmarks/results/claims/l2vit_fashion.json). Made-up glyphs are too easy to part them, 0.988 to 0.999 "
        "(benchmarks/results/claims/l2vit.json)."
    ),
)
class L2ViTMixer(Mixer):
    """Linear attention on ReLU features over all tokens, with a floor under the sum of weights.

    floor: the least that a row is divided by.    qkv_bias: of q, k and v.
    """

    patterns = frozenset({"noncausal-self", "noncausal-cross"})
    lacking: ClassVar[Mapping[str, str]] = {
        "causal-self": "the floor is set to a sum over all tokens, which a prefix does not reach",
        "causal-cross": "the floor is set to a sum over all tokens, which a prefix does not reach",
    }
    causal = False
    packs = False

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        floor: float = 100.0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.require(floor > 0, f"floor={floor}, allowed: > 0")
        self.floor = floor
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.tau = nn.Parameter(torch.empty(heads))
        self.o_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        return {"tau": torch.full_like(self.tau, (self.dim // self.heads) ** -0.5)}

    def mix(
        self, x: Tensor, state: MixerState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        return self.cross(x, x, None), state

    def cross(self, x: Tensor, context: Tensor, context_padding: Tensor | None) -> Tensor:
        if x is context:
            q, k, v = self.qkv_proj(x).chunk(3, -1)
        else:
            q, (_, k, v) = self.qkv_proj(x)[..., : self.dim], self.qkv_proj(context).chunk(3, -1)
        q, k, v = (split_heads(each, self.heads) for each in (F.relu(q), F.relu(k), v))
        o = kv_matmul_attention(q, k, v, normalizer="clamp", scale=self.tau, floor=self.floor, mask=context_padding)
        return self.o_proj(o.flatten(2))


class LocalConcentration(nn.Module):
    """Depthwise convolution, GELU, BatchNorm, depthwise convolution: x [B, H W, C] on a grid -> the same shape."""

    def __init__(self, dim: int, kernel: int = 7) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise OptionError(f"LocalConcentration: kernel={kernel}, allowed: odd, >= 1")
        self.conv1 = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        check_grid(x, grid)
        y = F.gelu(self.conv1(to_map(x, grid)))
        return self.conv2(self.norm(y)).flatten(2).transpose(1, 2)


class WindowAttention(nn.Module):
    """Softmax attention within windows of `window` x `window` tokens: x [B, H W, C] on a grid -> the same shape.

    mask_padding: hide the zeros that fill up windows at the border (the authors' code lets them be read).
    """

    def __init__(self, dim: int, heads: int, window: int = 7, *, mask_padding: bool = False) -> None:
        super().__init__()
        if window < 1 or dim % heads:
            raise OptionError(
                f"WindowAttention: window={window}, dim={dim}, heads={heads}, allowed: window >= 1, dim a multiple"
            )
        self.heads, self.window, self.mask_padding = heads, window, mask_padding
        self.qkv_proj = nn.Linear(dim, 3 * dim)
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        check_grid(x, grid)
        (H, W), w = grid, self.window
        right, below = -W % w, -H % w
        windows = self._windows(F.pad(x.unflatten(1, grid), (0, 0, 0, right, 0, below)))
        qkv = self.qkv_proj(windows).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        o = attend(q, k, v, positions=self._real(x, grid) if self.mask_padding else None, causal=False)
        y = self.o_proj(o.transpose(1, 2).flatten(2)).unflatten(1, (w, w))
        y = y.unflatten(0, (x.shape[0], (H + below) // w, (W + right) // w)).transpose(2, 3)
        return y.flatten(3, 4).flatten(1, 2)[:, :H, :W].flatten(1, 2)

    def _windows(self, image: Tensor) -> Tensor:
        """[B, H, W, C] -> [B windows, w w, C]."""
        w = self.window
        tiles = image.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3)
        return tiles.flatten(0, 2).flatten(1, 2)

    def _real(self, x: Tensor, grid: Grid) -> Positions:
        """Positions that hide what fills up the windows."""
        (H, W), w = grid, self.window
        real = F.pad(x.new_ones(x.shape[0], H, W, 1), (0, 0, 0, -W % w, 0, -H % w))
        k = self._windows(real)[:, None, :, 0].long() - 1
        return Positions(torch.zeros_like(k[:, 0]), k, holes=True)


class _Block(nn.Module):
    """What both blocks have: position convolutions, the residual sum, the MLP."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise OptionError(f"{type(self).__name__}: drop_path={drop_path}, allowed: 0 to below 1")
        self.drop_path = drop_path
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, int(mlp_ratio * dim)), nn.GELU(), nn.Linear(int(mlp_ratio * dim), dim))

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        """The sum; in training the branch of an image is left out with probability drop_path, others grow for it."""
        if self.training and self.drop_path:
            kept = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.drop_path) / (1 - self.drop_path)
            branch = branch * kept
        return x + branch


class GlobalBlock(_Block):
    """A transformer block with linear global attention: x [B, H W, C] on a grid -> the same shape.

    heads, floor: see `L2ViTMixer`.    mlp_ratio: hidden over model width.    drop_path: of each branch, in training.
    """

    def __init__(
        self, dim: int, heads: int, *, floor: float = 100.0, mlp_ratio: float = 4.0, drop_path: float = 0.0
    ) -> None:
        super().__init__(dim, mlp_ratio, drop_path)
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.attention = L2ViTMixer(dim=dim, heads=heads, floor=floor)
        self.norm3 = nn.LayerNorm(dim)
        self.concentration = LocalConcentration(dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        check_grid(x, grid)
        x = x + convolve(self.position, x, grid)
        x = self._add(x, self.attention(self.norm1(x))[0])
        x = self._add(x, self.concentration(self.norm3(x), grid))
        return self._add(x, self.mlp(self.norm2(x)))


class WindowBlock(_Block):
    """A transformer block with softmax attention in windows: x [B, H W, C] on a grid -> the same shape.

    window, mask_padding: see `WindowAttention`; the others as in `GlobalBlock`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 7,
        mask_padding: bool = False,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(dim, mlp_ratio, drop_path)
        self.position1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.attention = WindowAttention(dim, heads, window, mask_padding=mask_padding)
        self.position2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        check_grid(x, grid)
        x = x + convolve(self.position1, x, grid)
        x = self._add(x, self.attention(self.norm1(x), grid))
        x = x + convolve(self.position2, x, grid)
        return self._add(x, self.mlp(self.norm2(x)))


def check_grid(x: Tensor, grid: Grid) -> None:
    """Raise ShapeError unless x is [B, H W, C]."""
    if x.dim() != 3 or x.shape[1] != grid[0] * grid[1]:
        raise ShapeError(f"x {list(x.shape)} on grid={grid}, allowed: [B, {grid[0] * grid[1]}, C]")
