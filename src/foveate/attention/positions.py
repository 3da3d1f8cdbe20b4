"""Positions of queries and keys, what they make visible, and rotary embedding.

A key is visible to a query when it holds a token (position >= 0), stands no later than the query, and lies at
most `window` tokens back. `window` does not count the query itself: a Hugging Face `sliding_window` W is
`window = W - 1` here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """Where M queries and N stored keys stand in the text.

    q: [B, M] int64, -1 for a padding query. None: the queries are the last M of the N keys; of more queries than keys
        the first see nothing where attention is causal.
    k: [B, 1 or Hkv, N] int64, -1 for an empty slot. None: key j stands at position j.
    holes: some slot may be empty; False promises that none is (known on the host, so no sync).
    ordered: keys stand in ascending order of position, apart from holes.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    holes: bool = False
    ordered: bool = True

    @property
    def aligned(self) -> bool:
        """Whether the queries are simply the last M of keys 0..N-1."""
        return self.q is None and self.k is None

    def queries(self, m: int, n: int, device: torch.device) -> Tensor:
        """[B or 1, M] int64."""
        if self.q is not None:
            return self.q
        return torch.arange(n - m, n, device=device)[None]

    def keys(self, n: int, device: torch.device) -> Tensor:
        """[B or 1, Hkv or 1, N] int64."""
        if self.k is not None:
            return self.k
        return torch.arange(n, device=device)[None, None]

    def all_visible(self, m: int, window: int | None, causal: bool) -> bool:
        """Whether every query surely sees every key (then no mask is needed)."""
        return not self.holes and window is None and (m == 1 or not causal)

    def visible(
        self,
        m: int,
        n: int,
        device: torch.device,
        *,
        window: int | None = None,
        causal: bool = True,
        rows: slice = slice(None),
    ) -> Tensor:
        """Bool [B or 1, Hkv or 1, rows, N]: the definition of what may be read."""
        q = self.queries(m, n, device)[:, None, rows, None]
        k = self.keys(n, device)[:, :, None, :]
        seen = k >= 0
        if self.q is not None:
            seen = seen & (q >= 0)
        if causal:
            seen = seen & (k <= q)
        if window is not None:
            seen = seen & (q - k <= window)
        return seen


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, as a map of positions.

    dim: rotated width (the first `dim` features of a head); base: theta; style: "half" pairs feature i with
    i + dim/2 (NeoX, Llama), "interleaved" pairs 2i with 2i + 1 (GPT-J, Cohere).
    """

    dim: int
    base: float = 10000.0
    style: str = "half"

    def rates(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Radians per position of each pair: [dim/2]."""
        return self.base ** (-torch.arange(0, self.dim, 2, dtype=dtype, device=device) / self.dim)

    def tables(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """cos and sin [..., dim/2] of positions [...]."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        angles = positions[..., None].to(exact) * self.rates(exact, positions.device)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [B, H, N, D] to positions [B or 1, N] or [B or 1, H or 1, N]."""
        cos, sin = self.tables(_per_head(positions), x.dtype if x.dtype == torch.float64 else torch.float32)
        return apply_rotary(x, cos, sin, self.style)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        cos, sin = self.tables(_per_head(positions), x.dtype if x.dtype == torch.float64 else torch.float32)
        return apply_rotary(x, cos, -sin, self.style)


def _per_head(positions: Tensor) -> Tensor:
    return positions[:, None] if positions.dim() == 2 else positions


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, style: str = "half") -> Tensor:
    """Rotate the first 2 * cos.shape[-1] features of x [..., D]; cos, sin [..., dim/2] broadcast over x.

    Computes in float32 (float64 for float64 input) and returns x's dtype.
    """
    width = 2 * cos.shape[-1]
    work = x.dtype if x.dtype == torch.float64 else torch.float32
    turned, rest = x[..., :width].to(work), x[..., width:]
    if style == "half":
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    elif style == "interleaved":
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        raise ValueError(f"style={style!r}, allowed: 'half', 'interleaved'")
    turned = turned.to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
