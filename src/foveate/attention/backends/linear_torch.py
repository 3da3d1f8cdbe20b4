"""`linear_scan` in chunks, for any device, with gradients through autograd.

With the rows of a chunk as matrices Q, K, V, the state S before it, and decays as in `linear_decays`:

    O = (exp(G) Q) S + (scores of Q and K) V        S <- exp(G_L) S + (exp(G_L - G) K)^T V

Products inside chunks are batched over all heads and chunks; only S <- decay S + update runs in a loop, of T / C
steps. Cost per head: 2 T (C K + C V + 2 K V) FLOPs; memory O(T / C K V + T C). Half precision is computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.backends import delta_torch
from foveate.attention.backends.linear_decays import Decay, make_decay
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
            o, final = _outer_products(chunks, q, k, v, decay, call.start())
        else:
            beta = split(call.beta.to(call.dtype))
            o, final = delta_torch.scan(chunks, q, k, v, beta, decay, call.start())
        o = call.output(chunks.join(o.transpose(1, 2)))
        return o, (final if call.output_final_state else None)


def _outer_products(
    chunks: Chunks, q: Tensor, k: Tensor, v: Tensor, decay: Decay, start: Tensor
) -> tuple[Tensor, Tensor]:
    updates = decay.to_end(k).transpose(-1, -2) @ v

    def advance(rows: slice, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (decay.over(state[0], rows) + updates[rows],)

    (before,), (final,) = chunks.walk((start,), advance)
    inside = decay.scores(q, k) @ v
    o = torch.baddbmm(inside.flatten(0, 1), decay.since_start(q).flatten(0, 1), before.flatten(0, 1))
    return o.unflatten(0, q.shape[:2]), final


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
        return call.output((q.unsqueeze(-2) @ S).squeeze(-2)[:, None]), S
