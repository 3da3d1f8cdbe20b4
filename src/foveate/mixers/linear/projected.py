"""What mixers with the plain projections of multi-head attention share."""

from __future__ import annotations

from torch import Tensor, nn

from foveate.mixers.base import Mixer


class ProjectedMixer(Mixer):
    """q, k and v of H heads and the output, each by a linear layer with bias."""

    def __init__(self, *, dim: int, layer: int, layers: int, heads: int) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.head_dim = dim // heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q of x, k and v of the source, [B, H, N, D] each."""
        return (
            self.split(self.q_proj(x)),
            self.split(self.k_proj(source)),
            self.split(self.v_proj(source)),
        )

    def split(self, x: Tensor) -> Tensor:
        """[B, N, H D] -> [B, H, N, D]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def output(self, o: Tensor) -> Tensor:
        """[B, H, N, D] -> y [B, N, C]."""
        return self.o_proj(o.transpose(1, 2).flatten(2))
