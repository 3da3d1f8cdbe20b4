"""Agent Attention: a few pooled queries read all keys, and all queries read what they found.

    A = queries averaged over pool x pool windows of the grid, n = pool^2 agents;  s = D^-0.5
    found = softmax over tokens of (s A K^T + B1), times V
    o = softmax over agents of (s Q A^T + B2), times found;   y = (o + conv3x3(V)) W_o

Two softmax attentions of n on one side are linear attention with the features softmax(Q A^T) and softmax(A K^T)^T.
The biases are sums of a 7x7 table resized to the grid, and of a row and a column part, per head and agent; a class
token has an entry of its own.

Paper: Han et al. 2023 (arXiv 2312.08874). Windows of the pooling overlap where the grid is no multiple of `pool`. The
class token is no agent's source and is left out of the convolution. On another grid than its own, the row and column
parts are resized too (linearly), which the authors' code does not do. The training-free form for diffusion models is
`foveate.mixers.linear.agent_diffusion`.

State: none; there is no causal form. Cost: 2 N n D per head, biases H n N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.mixers.linear.grid import Grid, GridMixer, convolve, to_map
from foveate.registry import register


@register(
    "agent",
    kind="mixer",
    paper="Agent Attention: On the Integration of Softmax and Linear Attention",
    arxiv="2312.08874",
    year=2023,
    applies_to="from scratch",
    small={"height": 4, "width": 6, "pool": 2},
    claim=(
        "Fashion-MNIST, four layers, 1500 steps, two seeds: accuracy 0.870, 0.873 and 0.872 with agents of 2 x 2, 4 x "
        "4 and 7 x 7, softmax 0.854, linear attention 0.840: above both "
        "(benchmarks/results/claims/agent_fashion.json). 4096 tokens take 2.1 ms against softmax's 3.2, 256 tokens "
        "1.2 against 0.7 on an H200 (benchmarks/results/claims/agent.json)."
    ),
)
class AgentMixer(GridMixer):
    """Attention through agent tokens on a grid.

    height, width: the grid (width: default height).    pool: agents are pool x pool averages of queries.
    class_token: whether a token comes before the grid.    position_bias: B1 and B2.    qkv_bias: of q, k and v.
    dropout: of both attentions, in training.
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
        pool: int = 7,
        class_token: bool = False,
        position_bias: bool = True,
        qkv_bias: bool = True,
        dropout: float = 0.0,
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
        self.require(pool >= 1, f"pool={pool}, allowed: >= 1")
        self.require(0 <= dropout < 1, f"dropout={dropout}, allowed: 0 to below 1")
        self.pool, self.dropout, self.position_bias = pool, dropout, position_bias
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.o_proj = nn.Linear(dim, dim)
        if position_bias:
            H, W = self.grid
            shape = (heads, pool**2)
            self.gather_table = nn.Parameter(torch.empty(*shape, 7, 7))
            self.gather_rows = nn.Parameter(torch.empty(*shape, H, 1))
            self.gather_columns = nn.Parameter(torch.empty(*shape, 1, W))
            self.spread_table = nn.Parameter(torch.empty(*shape, 7, 7))
            self.spread_rows = nn.Parameter(torch.empty(*shape, H, 1))
            self.spread_columns = nn.Parameter(torch.empty(*shape, 1, W))
            if class_token:
                self.gather_class = nn.Parameter(torch.empty(*shape, 1))
                self.spread_class = nn.Parameter(torch.empty(*shape, 1))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        own = dict(self.named_parameters(recurse=False))
        return {name: nn.init.trunc_normal_(torch.empty_like(each), std=0.02) for name, each in own.items()}

    def image(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv_proj(x).chunk(3, -1))
        found = self._attend(self._agents(q, grid), k, v, self._bias("gather", grid))
        spread = self._bias("spread", grid)
        o = self._attend(q, self._agents(q, grid), found, None if spread is None else spread.transpose(1, 2))
        tokens = v.transpose(1, 2).flatten(2)[:, self.class_tokens :]
        local = F.pad(convolve(self.local, tokens, grid), (0, 0, self.class_tokens, 0))
        return self.o_proj(o.transpose(1, 2).flatten(2) + local)

    def _agents(self, q: Tensor, grid: Grid) -> Tensor:
        """[B, H, n, D] of queries [B, H, N, D]."""
        tokens = q[:, :, self.class_tokens :].flatten(0, 1)
        pooled = F.adaptive_avg_pool2d(to_map(tokens, grid), self.pool)
        return pooled.flatten(2).transpose(1, 2).unflatten(0, (-1, self.heads))

    def _bias(self, side: str, grid: Grid) -> Tensor | None:
        """[H, n, N] of the agents and all tokens, of the step that gathers or the one that spreads."""
        if not self.position_bias:
            return None
        table, rows, columns = (getattr(self, f"{side}_{part}") for part in ("table", "rows", "columns"))
        rows, columns = _resized(rows, (grid[0], 1)), _resized(columns, (1, grid[1]))
        bias = (_resized(table, grid) + rows + columns).flatten(2)
        return torch.cat((getattr(self, f"{side}_class"), bias), -1) if self.class_tokens else bias

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        mask = None if bias is None else bias[None].to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def _resized(table: Tensor, size: Grid) -> Tensor:
    """[H, n, h, w] -> [H, n, *size], bilinear."""
    if tuple(table.shape[2:]) == size:
        return table
    return F.interpolate(table, size=size, mode="bilinear", align_corners=False)
