"""`linear_scan` in chunks, for any device, with gradients through autograd.

With the rows of a chunk as matrices Q, K, V, the state S before it, and decays as in `linear_decays`:

    O = (exp(G) Q) S + (scores of Q and K) V        S <- exp(G_L) S + (exp(G_L - G) K)^T V

Scores and their product with V are batched over all heads and chunks. What touches S goes through a loop of T / C
steps, batched over heads and sequences: one chunk's rows and state stay in the processor's cache, and without
gradients no state but the last is kept.
Cost per head: 2 T (C K + C V + 2 K V) FLOPs; memory O(T C), with gradients O(T / C K V) more. Half precision is
computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.backends import delta_torch
from foveate.attention.backends.linear_decays import Decay, make_decay, multiply_add
from foveate.attention.chunks import Chunks
from foveate.attention.linear_call import LinearCall


def why_not(call: LinearCall) -> str | None:
    return None


def scan(call: LinearCall) -> tuple[Tensor, Tensor | None]:
    """o [B, T, HV, V] in q's dtype, and the final state or None."""
    with torch.autocast(call.q.device.type, enabled=False):
        chunks = Chunks.cut(call.q.shape[0], call.q.shape[1], call.chunk_size, call.offsets, call.q.device)

        def split(x: Tensor) -> Tensor:
            return chunks.split(x).transpose(1, 2).contiguous()

        q, k, v = (split(each) for each in call.operands())
        g = call.decay()
        decay = make_decay(None if g is None else split(g), call.dtype)
        if call.beta is None:
            outputs, final = _outer_products(chunks, q, k, v, decay, call.scale, call.start())
        else:
            beta = split(call.beta.to(call.dtype))
            outputs, final = delta_torch.scan(chunks, q, k, v, beta, decay, call.scale, call.start())
        o = torch.cat([each.transpose(1, 2) for each in outputs])
        return call.output(chunks.join(o)), (final if call.output_final_state else None)


def _outer_products(
    chunks: Chunks, q: Tensor, k: Tensor, v: Tensor, decay: Decay, scale: float, start: Tensor
) -> tuple[list[Tensor], Tensor]:
    inside = decay.scores(q, k) @ v
    outputs: list[Tensor] = []

    def advance(rows: slice, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (S,) = state
        queries, keys = decay.since_start(q[rows], rows), decay.to_end(k[rows], rows)
        outputs.append(multiply_add(inside[rows], queries, S, beta=scale, alpha=scale))
        return (multiply_add(decay.over(S, rows), keys.transpose(-1, -2), v[rows]),)

    (final,) = chunks.walk((start,), advance)
    return outputs, final


def step(call: LinearCall) -> tuple[Tensor, Tensor | None]:
    """One token: the recurrence itself, O(K V) per head."""
    with torch.autocast(call.q.device.type, enabled=False):
        q, k, v = (each[:, 0] for each in call.operands())
        S = call.start()
        g = call.decay()
        if g is not None:
            factor = g[:, 0].to(S.dtype).exp().unsqueeze(-1)
            S = S * (factor if factor.dim() == 4 else factor.unsqueeze(-1))
        if call.beta is not None:
            v = call.beta[:, 0].to(S.dtype).unsqueeze(-1) * (v - (k.unsqueeze(-2) @ S).squeeze(-2))
        S = S + k.unsqueeze(-1) * v.unsqueeze(-2)
        return call.output(call.scale * (q.unsqueeze(-2) @ S).squeeze(-2)[:, None]), S
