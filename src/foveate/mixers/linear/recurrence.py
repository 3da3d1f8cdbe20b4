"""What the linear mixers share: their state, and one call that scans many tokens or steps one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.linear import linear_scan, linear_step
from foveate.mixers.base import MixerState, exact


@dataclass(frozen=True, kw_only=True)
class LinearState(MixerState):
    """memory: [B, H, K, V] float32 (float64 for float64), see `linear_scan`; an elementwise mixer's is [B, D].

    convolutions: the last inputs of each short convolution, [B, W - 1, C].
    """

    memory: Tensor
    convolutions: tuple[Tensor, ...] = ()


def empty_memory(batch: int, heads: int, key_dim: int, value_dim: int, like: Tensor) -> Tensor:
    """Zeros [B, H, K, V] in the dtype that recurrences keep."""
    return torch.zeros(batch, heads, key_dim, value_dim, dtype=exact(like), device=like.device)


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-10,
    qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_scan` from a memory to the memory after it, or `linear_step` for one token; arguments as there."""
    if q.shape[1] == 1 and cu_seqlens is None:
        return linear_step(
            q, k, v, memory, g=g, beta=beta, scale=scale, normalize=normalize, eps=eps, qk_l2norm=qk_l2norm
        )
    o, after = linear_scan(
        q,
        k,
        v,
        g=g,
        beta=beta,
        scale=scale,
        normalize=normalize,
        eps=eps,
        qk_l2norm=qk_l2norm,
        initial_state=memory,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    assert after is not None
    return o, after


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H D] -> [B, N, H, D]."""
    return x.unflatten(-1, (heads, -1))
