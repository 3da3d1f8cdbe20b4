"""Scores of one query per head against many keys: what every selection starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.methods.step import Step


def query_scores(q: Tensor, k: Tensor) -> Tensor:
    """Unscaled q . k of q [B, Hq, D] with k [B, Hkv, N, D]: [B, Hq, N] float32 (float64 for float64).

    On CPU one product per KV head: batched products of so few rows are 10 times slower in bfloat16 (11.3 against
    1.2 ms at Hq 9, Hkv 3, N 32k, D 64; one core of a shared Zen 4, torch 2.13).
    """
    B, Hq, D = q.shape
    H, N = k.shape[1], k.shape[2]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.reshape(B, H, Hq // H, D)
    if q.device.type != "cpu":
        return (rows @ k.transpose(-1, -2)).to(exact).view(B, Hq, N)
    scores = torch.empty(B, H, Hq // H, N, dtype=exact)
    for b in range(B):
        for h in range(H):
            scores[b, h] = torch.nn.functional.linear(rows[b, h], k[b, h])
    return scores.view(B, Hq, N)


def last_weights(step: Step) -> Tensor:
    """Softmax weights of the step's last query over all slots: [B, Hq, N] float32, 0 where it may not look.

    The model's learned sinks take no part.
    """
    scores = query_scores(step.q[:, :, -1], step.k).mul_(step.scale)
    if step.softcap is not None:
        scores = step.softcap * torch.tanh(scores / step.softcap)
    if step.cache.log_weight is not None:
        scores += step.cache.log_weight.repeat_interleave(step.group, 1)
    positions = step.positions
    if not positions.all_visible(1, step.window, True):
        n = step.cache.stored
        seen = positions.visible(step.m, n, step.q.device, window=step.window, rows=slice(step.m - 1, None))[:, :, 0]
        scores = scores.unflatten(1, (step.kv_heads, -1)).masked_fill(~seen[:, :, None], -torch.inf).flatten(1, 2)
    return scores.softmax(-1)
