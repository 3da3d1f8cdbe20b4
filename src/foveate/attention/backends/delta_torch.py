"""The delta rule in chunks by the WY representation (arXiv 2406.06484, gated 2412.06464).

    L = strict lower triangle of the scores of beta K and K        T = (I + L)^-1
    U = T (beta V)        W = T (exp(G) beta K)        N = U - W S          N: what is really written
    O = (exp(G) Q) S + (scores of Q and K) N        S <- exp(G_L) S + (exp(G_L - G) K)^T N

T comes from a batched triangular solve, never from a product of Householder matrices. It is float32 or float64; it
grows without bound for keys that are not normalised, or beta > 1 with like keys: that is the inputs' doing.
Cost per head: 2 T (2 C K + C V + 3 K V) + T C^2 / 3 + 2 T C (K + V) FLOPs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.backends.linear_decays import Decay, multiply_add
from foveate.attention.chunks import Chunks


def scan(
    chunks: Chunks, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Decay, scale: float, start: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The outputs [n, HV, C, V] of every step, and the final state.

    q, k [R, HV, C, K], v [R, HV, C, V], beta [R, HV, C], start [N, HV, K, V].
    """
    beta = beta.unsqueeze(-1)
    L = decay.scores(beta * k, k)
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    # `unitriangular` reads only what is strictly below the diagonal and takes the diagonal as ones.
    T = torch.linalg.solve_triangular(L, identity, upper=False, unitriangular=True)
    U = T @ (beta * v)
    W = T @ decay.since_start(beta * k, slice(None))
    scores = decay.scores(q, k)
    outputs: list[Tensor] = []

    def advance(rows: slice, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (S,) = state
        N = multiply_add(U[rows], W[rows], S, alpha=-1)
        queries, keys = decay.since_start(q[rows], rows), decay.to_end(k[rows], rows)
        outputs.append(multiply_add(scores[rows] @ N, queries, S, beta=scale, alpha=scale))
        return (multiply_add(decay.over(S, rows), keys.transpose(-1, -2), N),)

    (final,) = chunks.walk((start,), advance)
    return outputs, final
