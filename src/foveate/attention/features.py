"""Feature maps of linear attention: phi(q).phi(k) stands for a similarity of q and k.

Every map works on the last axis, in the dtype of its input, and leaves the other axes alone.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import OptionError, ShapeError


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last axis; a zero vector stays zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 > 0, elementwise (Katharopoulos et al., arXiv 2006.16236)."""
    return F.elu(x) + 1


def relu(x: Tensor) -> Tensor:
    """max(x, 0), elementwise."""
    return F.relu(x)


def taylor2(x: Tensor, *, packed: bool = False, scale: float | None = None) -> Tensor:
    """Second-order Taylor map of exp: phi(q).phi(k) = 1 + s + s^2 / 2 with s = scale * q.k >= 1/2 (arXiv 2402.18668).

    Args:
        x: [..., D].
        packed: keep only the D (D + 1) / 2 independent second-order entries; the products are the same.
        scale: default D ** -0.5.
    Returns:
        [..., 1 + D + D^2] in the order 1, x, x_i x_j; packed [..., 1 + D + D (D + 1) / 2] in the order
        1, x, x_i^2, x_i x_j for i > j row by row.
    """
    D = x.shape[-1]
    y = x * (D**-0.5 if scale is None else scale) ** 0.5
    ones = torch.ones_like(y[..., :1])
    if not packed:
        second = (y.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2)
        return torch.cat([ones, y, second * 2**-0.5], -1)
    row, column = torch.tril_indices(D, D, -1, device=x.device)
    return torch.cat([ones, y, y.square() * 2**-0.5, y[..., row] * y[..., column]], -1)


def hedgehog_softmax(y: Tensor, *, eps: float = 1e-12) -> Tensor:
    """[softmax(y), softmax(-y)] over the last axis, at least eps: [..., F] -> [..., 2 F] (arXiv 2402.04347).

    `y` is x W with a learned W per head. Take float32: eps vanishes in half precision.
    """
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp(min=eps)


def hedgehog_exp(y: Tensor, *, eps: float = 1e-12) -> Tensor:
    """[exp(y - max y), exp(min y - y)] over the last axis, at least eps: [..., F] -> [..., 2 F] (arXiv 2402.04347).

    The subtraction is per token, so it changes the weights of keys; it belongs to the map.
    """
    high = y.amax(-1, keepdim=True)
    low = y.amin(-1, keepdim=True)
    return torch.cat([(y - high).exp(), (low - y).exp()], -1).clamp(min=eps)


def cosine_reweighted(x: Tensor, positions: Tensor, length: int) -> Tensor:
    """[x cos a, x sin a] with a = pi * position / (2 * length): a product falls with the distance (arXiv 2202.08791).

    Args:
        x: [B, T, ..., K], non-negative features (ReLU in the paper).
        positions: [T] or [B, T]; cosFormer counts from 1.
        length: the largest position M of queries and keys.
    Returns:
        [B, T, ..., 2 K]
    """
    angle = positions.to(torch.promote_types(x.dtype, torch.float32)) * (math.pi / (2 * length))
    angle = angle.reshape(*angle.shape, *[1] * (x.dim() - 2))
    return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], -1)


def positive_random(
    x: Tensor,
    projection: Tensor,
    *,
    shift: Literal["none", "features", "positions"] = "none",
    eps: float = 0.0,
) -> Tensor:
    """Positive random features: E[phi(q).phi(k)] = exp(q.k) for Gaussian rows (arXiv 2009.14794).

        phi(x)_r = (exp(w_r.x - |x|^2 / 2 - c) + eps) / sqrt(m)

    Args:
        x: [B, T, ..., K], already scaled (K ** -0.25 on both sides gives softmax's temperature).
        projection: [m, K], rows w_r, see `gaussian_projection`.
        shift: what c is: 0; the largest exponent of a token ("features", for queries); the largest over the tokens
            too ("positions", for keys; axis 1). It cancels in a normalised attention, up to eps.
    Returns:
        [B, T, ..., m]
    """
    if projection.shape[-1] != x.shape[-1]:
        raise ShapeError(f"projection {list(projection.shape)} does not fit [m, K]: K is {x.shape[-1]} in x")
    exponent = x @ projection.T - x.square().sum(-1, keepdim=True) / 2
    if shift == "features":
        exponent = exponent - exponent.amax(-1, keepdim=True).detach()
    elif shift == "positions":
        exponent = exponent - exponent.amax((1, -1), keepdim=True).detach()
    elif shift != "none":
        raise OptionError(f"shift={shift!r}, allowed: 'none', 'features', 'positions'")
    return (exponent.exp() + eps) * projection.shape[0] ** -0.5


def gaussian_projection(
    features: int,
    dim: int,
    *,
    orthogonal: bool = False,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """[features, dim] with rows ~ N(0, I); `orthogonal` makes the rows of each block of `dim` orthogonal.

    Orthogonal rows keep the lengths of Gaussian ones (chi distributed), so the estimate stays unbiased with less
    variance.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    rows = normal(features, dim)
    if not orthogonal:
        return rows
    blocks = -(-features // dim)
    basis, triangle = torch.linalg.qr(normal(blocks, dim, dim))
    # The sign makes the basis uniform over rotations.
    basis = basis * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return basis.transpose(-1, -2).flatten(0, 1)[:features] * rows.norm(dim=-1, keepdim=True)
