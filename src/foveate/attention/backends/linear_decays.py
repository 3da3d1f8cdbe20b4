"""Decays inside a chunk, as the chunk forms need them; every exponent is <= 0.

With G_i = sum of g_j over j <= i in the chunk (inclusive) and L its last slot, a decay offers

    scores(a, k)   [C, C], a_i . k_j weighed by exp(G_i - G_j) for i >= j, else 0
    since_start(x) row i of x times exp(G_i)
    to_end(x)      row i of x times exp(G_L - G_i)
    over(S)        exp(G_L) S: a state carried over the chunk

The last three take the chunks `rows` that x or S belongs to: applied to one step's chunks they work in cache.

Differences of G are taken in float64: in float32 a chunk of strong decays would lose the weak ones after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# exp(-1000) is 0 in float64 too. For -inf (a reset) it avoids the difference -inf - -inf.
LOWEST = -1000.0


class NoDecay:
    def scores(self, a: Tensor, k: Tensor) -> Tensor:
        return (a @ k.transpose(-1, -2)).tril()

    def since_start(self, x: Tensor, rows: slice) -> Tensor:
        return x

    def to_end(self, x: Tensor, rows: slice) -> Tensor:
        return x

    def over(self, S: Tensor, rows: slice) -> Tensor:
        return S


class ScalarDecay:
    """g: [R, HV, C], one decay per head and token."""

    def __init__(self, g: Tensor, dtype: torch.dtype) -> None:
        G = g.double().clamp(min=LOWEST).cumsum(-1)
        C = G.shape[-1]
        later = torch.ones(C, C, dtype=torch.bool, device=g.device).triu(1)
        # Masked before exp: above the diagonal the difference is positive and may overflow.
        between = (G.unsqueeze(-1) - G.unsqueeze(-2)).to(dtype)
        self.between = between.masked_fill_(later, -torch.inf).exp_()
        self.from_start = G.unsqueeze(-1).to(dtype).exp()
        self.until_end = (G[..., -1:] - G).unsqueeze(-1).to(dtype).exp()
        self.whole = G[..., -1:, None].to(dtype).exp()

    def scores(self, a: Tensor, k: Tensor) -> Tensor:
        return (a @ k.transpose(-1, -2)) * self.between

    def since_start(self, x: Tensor, rows: slice) -> Tensor:
        return x * self.from_start[rows]

    def to_end(self, x: Tensor, rows: slice) -> Tensor:
        return x * self.until_end[rows]

    def over(self, S: Tensor, rows: slice) -> Tensor:
        return S * self.whole[rows]


class VectorDecay:
    """g: [R, HV, C, K], one decay per head, token and key channel; C is a power of two.

    exp(G_i - G_j) differs per channel, so it must be split over both factors of the product, and exp(-G) alone would
    overflow. Halve the chunk again and again: where row i lies in the upper half of a block and j in its lower half,
    the border between them is a reference,
        exp(G_i - G_j) = exp(sum of g from the border to i) exp(sum of g after j to the border),
    and both exponents are <= 0. log2(C) levels of batched products cover the triangle, the diagonal has no decay.
    The sums grow with the blocks and are never differences: exact to rounding in any dtype, and safe for -inf.
    """

    def __init__(self, g: Tensor, dtype: torch.dtype) -> None:
        # Per block of the level: sum from its start to i, and from after i to its end.
        prefix = g.to(dtype)
        suffix = torch.zeros_like(prefix)
        self.levels: list[tuple[Tensor, Tensor]] = []
        half = 1
        while 2 * half <= g.shape[-2]:
            lower, upper = prefix.unflatten(-2, (-1, 2, half)).unbind(-3)
            after_lower, after_upper = suffix.unflatten(-2, (-1, 2, half)).unbind(-3)
            self.levels.append((upper.exp(), after_lower.exp()))
            prefix = torch.cat([lower, upper + lower[..., -1:, :]], -2).flatten(-3, -2)
            suffix = torch.cat([after_lower + upper[..., -1:, :], after_upper], -2).flatten(-3, -2)
            half *= 2
        self.from_start = prefix.exp()
        self.until_end = suffix.exp()
        self.whole = self.from_start[..., -1:, :].transpose(-1, -2)

    def scores(self, a: Tensor, k: Tensor) -> Tensor:
        block = (a * k).sum(-1)[..., None, None]
        half = 1
        for row_decay, key_decay in self.levels:
            rows = a.unflatten(-2, (-1, 2, half))[..., 1, :, :] * row_decay
            keys = k.unflatten(-2, (-1, 2, half))[..., 0, :, :] * key_decay
            cross = rows @ keys.transpose(-1, -2)
            pair = block.unflatten(-3, (-1, 2))
            above = torch.cat([pair[..., 0, :, :], torch.zeros_like(cross)], -1)
            below = torch.cat([cross, pair[..., 1, :, :]], -1)
            block = torch.cat([above, below], -2)
            half *= 2
        return block.squeeze(-3)

    def since_start(self, x: Tensor, rows: slice) -> Tensor:
        return x * self.from_start[rows]

    def to_end(self, x: Tensor, rows: slice) -> Tensor:
        return x * self.until_end[rows]

    def over(self, S: Tensor, rows: slice) -> Tensor:
        return S * self.whole[rows]


Decay = NoDecay | ScalarDecay | VectorDecay


def make_decay(g: Tensor | None, dtype: torch.dtype) -> Decay:
    """The decay for g None, [R, HV, C] or [R, HV, C, K]."""
    if g is None:
        return NoDecay()
    return ScalarDecay(g, dtype) if g.dim() == 3 else VectorDecay(g, dtype)


def multiply_add(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta c + alpha a @ b in one pass, for [n, HV, ., .]."""
    flat = (each.flatten(0, 1) for each in (c, a, b))
    return torch.baddbmm(*flat, beta=beta, alpha=alpha).unflatten(0, c.shape[:2])
