"""The definition of attention: plain tensors, a full M x N mask, any dtype up to float64, any device.

Slow and memory-hungry on purpose; it judges every other backend and is what `backend="reference"` runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.call import Call


def why_not(call: Call) -> str | None:
    return None


def attend(call: Call) -> tuple[Tensor, Tensor | None]:
    """o [B, Hq, M, Dv] in q's dtype and lse [B, Hq, M] (float32, float64 for float64 input; None for sigmoid)."""
    exact = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    _B, Hq, M, _ = call.q.shape
    k, v = (each.repeat_interleave(call.group, dim=1).to(exact) for each in (call.k, call.v))
    scores = call.q.to(exact) @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.log_weight is not None:
        scores = scores + per_query_head(call.log_weight.to(exact), Hq)[:, :, None]
    device = call.q.device
    mask = call.plan.reads(M, call.n, call.positions).to(device)
    visible = call.positions.visible(M, call.n, device, window=call.window, causal=call.causal)
    allowed = per_query_head(mask, Hq) & per_query_head(visible, Hq)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if call.bias is not None:
        return (torch.sigmoid(scores + call.bias) @ v).to(call.q.dtype), None
    lse = torch.logsumexp(scores, dim=-1)
    if call.sink is not None:
        lse = torch.logaddexp(lse, call.sink.to(exact)[None, :, None].expand_as(lse))
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return (weights @ v).to(call.q.dtype), lse


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """Repeat dimension 1 (1, Hkv or Hq) to the query heads; a size of 1 stays."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], dim=1)
