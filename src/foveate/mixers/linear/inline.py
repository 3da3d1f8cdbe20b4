"""InLine: linear attention whose rows sum to 1 by a shift instead of a division, with a convolution made for the image.

    w_ij = (s / N) phi(q_i) . phi(k_j),  s = D^-0.5
    o_i  = sum_j (w_ij - (1 / N) sum_l w_il + 1 / N) v_j + sum over the 3x3 tokens around i of kernel(x) v
    kernel(x) = W_2 gelu(W_1 mean_n x_n), 9 taps per channel, each head from its own channels;   y = o W_o

Division makes q and 2 q read alike (the map from queries to rows is not injective); a shift does not. Weights may be
negative, so phi need not be positive and no sum is ever divided by.

Paper: Han et al. 2024 (arXiv 2412.06590). A class token is read by all and reads all, and counts in the mean that makes
the kernel; the convolution leaves it out. For windows, call it on windows as rows of the batch (`mix_grid` takes their
size). The kernel is applied tap by tap, which costs no transpose.

State: none. Cost: O(N D^2) per head, 9 N C for the convolution, 10 C^2 / H for its kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.linear import kv_matmul_attention
from foveate.mixers.linear.grid import Grid, GridMixer
from foveate.mixers.linear.recurrence import split_heads
from foveate.registry import register

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky-relu": F.leaky_relu,
    "exp": torch.exp,
}


@register(
    "inline",
    kind="mixer",
    paper="Bridging the Divide: Reconsidering Softmax and Linear Attention",
    arxiv="2412.06590",
    year=2024,
    applies_to="from scratch",
    small={"height": 4, "width": 6},
    claim=(
        "Fashion-MNIST, four layers, 1500 steps, two seeds: accuracy 0.866 with the residual and 0.843 without, "
        "softmax 0.854, linear attention with ReLU 0.861: above softmax with both parts, as claimed; subtraction "
        "alone is below division. The weights of q and 2q are 0.31 apart, and equal with division "
        "(benchmarks/results/claims/inline_fashion.json)."
    ),
)
class InLineMixer(GridMixer):
    """Injective linear attention on a grid of tokens, with a predicted 3x3 convolution of the values.

    height, width: the grid (width: default height).    class_token: whether a token comes before the grid.
    feature_map: "identity", "relu", "leaky-relu" or "exp".    residual: the convolution.    qkv_bias: of q, k and v.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        height: int = 14,
        width: int | None = None,
        class_token: bool = False,
        feature_map: str = "identity",
        residual: bool = True,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(
            dim=dim,
            layer=layer,
            layers=layers,
            heads=heads,
            height=height,
            width=width,
            class_tokens=int(class_token),
        )
        self.require(feature_map in FEATURES, f"feature_map={feature_map!r}, allowed: {tuple(FEATURES)}")
        self.feature_map = feature_map
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.kernel = (
            nn.Sequential(nn.Conv1d(dim, dim, 1, groups=heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=heads))
            if residual
            else None
        )
        self.o_proj = nn.Linear(dim, dim)

    def image(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = self.qkv_proj(x).chunk(3, -1)
        phi = FEATURES[self.feature_map]
        q, k, values = (split_heads(each, self.heads) for each in (phi(q), phi(k), v))
        o = kv_matmul_attention(q, k, values, normalizer="subtractive").flatten(2)
        if self.kernel is not None:
            taps = self.kernel(x.mean(1)[..., None]).unflatten(1, (self.dim, 3, 3)).squeeze(-1)
            local = convolve_each(v[:, self.class_tokens :], taps, grid)
            o = o + F.pad(local, (0, 0, self.class_tokens, 0))
        return self.o_proj(o)


def convolve_each(x: Tensor, taps: Tensor, grid: Grid) -> Tensor:
    """Each image by its own kernel: x [B, H W, C], taps [B, C, 3, 3], zeros around the grid -> [B, H W, C]."""
    H, W = grid
    around = F.pad(x.unflatten(1, grid), (0, 0, 1, 1, 1, 1))
    y = torch.zeros_like(x).unflatten(1, grid)
    for row in range(3):
        for column in range(3):
            y = y + around[:, row : row + H, column : column + W] * taps[:, None, None, :, row, column]
    return y.flatten(1, 2)
