"""The definition of `linear_scan`: one token after the other, in float64 where the inputs are.

    S <- diag(exp(g_t)) S                       decay first
    S <- S + k_t^T v_t                          without beta
    S <- S + k_t^T beta_t (v_t - k_t S)         with beta (delta rule): the prediction reads the decayed state
    o_t = scale q_t S                           the current token is included

With normalize, o_t is divided by scale q_t . z_t + eps, where z is the same recurrence with v = 1.
Cost: T steps of O(K V) per head.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from foveate.attention.linear_call import LinearCall


def why_not(call: LinearCall) -> str | None:
    return None


def scan(call: LinearCall) -> tuple[Tensor, Tensor | None]:
    """o [B, T, HV, V] in q's dtype, and the final state or None."""
    with torch.autocast(call.q.device.type, enabled=False):
        q, k, v = call.operands()
        q = q * call.scale
        start = call.start()
        if call.offsets is None:
            outputs, final = _recurrence(call, q, k, v, range(q.shape[1]), start)
            return call.output(torch.stack(outputs, 1)), (final if call.output_final_state else None)
        outputs, states = [], []
        for n, (begin, end) in enumerate(pairwise(call.offsets)):
            o, S = _recurrence(call, q, k, v, range(begin, end), start[n : n + 1])
            outputs += o
            states.append(S)
        return call.output(torch.stack(outputs, 1)), (torch.cat(states) if call.output_final_state else None)


def step(call: LinearCall) -> tuple[Tensor, Tensor | None]:
    return scan(call)


def _recurrence(
    call: LinearCall, q: Tensor, k: Tensor, v: Tensor, tokens: range, S: Tensor
) -> tuple[list[Tensor], Tensor]:
    g, beta = call.decay(), call.beta
    outputs = []
    for t in tokens:
        if g is not None:
            decay = g[:, t].to(S.dtype).exp()
            S = S * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
        write = v[:, t]
        if beta is not None:
            prediction = torch.einsum("bhk,bhkv->bhv", k[:, t], S)
            write = beta[:, t, :, None].to(S.dtype) * (write - prediction)
        S = S + k[:, t, :, :, None] * write[:, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return outputs, S
