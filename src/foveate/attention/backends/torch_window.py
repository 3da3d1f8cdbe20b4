"""Sinks and a sliding window in plain torch: each block of queries reads its own stretch of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.backends.torch_dense import attend_masked, fused, per_query_head
from foveate.attention.call import Call
from foveate.attention.plan import Window
from foveate.attention.positions import Positions

QUERY_BLOCK = 128


def attend_window(call: Call, plan: Window) -> tuple[Tensor, Tensor | None]:
    """Query i reads keys at most `left` back, and the first `sinks`."""
    N = call.n
    if call.positions.aligned and plan.sinks + plan.left + 1 >= N:
        return attend_masked(call, call.k, call.v, call.positions)
    if call.positions.aligned and call.causal and call.softcap is None and call.log_weight is None:
        return _by_stretches(call, plan)

    def restrict(rows: slice) -> Tensor:
        q = call.positions.queries(call.m, N, call.k.device)[:, rows]
        return plan.reads(q.shape[1], N, Positions(q, call.positions.keys(N, call.k.device)))

    return attend_masked(call, call.k, call.v, call.positions, restrict)


def _by_stretches(call: Call, plan: Window) -> tuple[Tensor, Tensor | None]:
    M, N, Hq, device = call.m, call.n, call.q.shape[1], call.q.device
    outputs, lses = [], []
    for start in range(0, M, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, M)
        first, last = N - M + start, N - M + stop
        begin = max(0, first - plan.left)
        sinks = min(plan.sinks, begin)
        k, v = (_stretch(each, sinks, begin, last) for each in (call.k, call.v))
        at = torch.cat((torch.arange(sinks, device=device), torch.arange(begin, last, device=device)))
        stretch = Positions(torch.arange(first, last, device=device)[None], at[None, None])
        mask = stretch.visible(stop - start, at.numel(), device, window=call.window, causal=call.causal)
        mask = mask & plan.reads(stop - start, at.numel(), stretch)
        whole = bool(mask.all())
        o, lse = fused(
            call.q[:, :, start:stop],
            k,
            v,
            scale=call.scale,
            mask=None if whole else per_query_head(mask, Hq),
            lse=call.bias is None,
            bias=call.bias,
        )
        blind = ~mask.any(-1).expand(o.shape[:3])
        outputs.append(o.masked_fill(blind[..., None], 0.0))
        if lse is not None:
            lses.append(lse.masked_fill(blind, -torch.inf))
    return torch.cat(outputs, 2), torch.cat(lses, 2) if lses else None


def _stretch(x: Tensor, sinks: int, begin: int, end: int) -> Tensor:
    return torch.cat((x[:, :, :sinks], x[:, :, begin:end]), dim=2) if sinks else x[:, :, begin:end]
