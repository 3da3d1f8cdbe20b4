"""Weights of the last query over all stored keys: what several selections start from."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.scoring import query_scores, softmax_votes
from foveate.attention.statistics import by_group
from foveate.methods.step import Step


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


def last_votes(step: Step, groups: int, reduce: str) -> Tensor:
    """`last_weights` reduced ("mean", "max", "sum") over the query heads of each of `groups` groups: [B, groups, N]."""
    plain = step.softcap is None and step.cache.log_weight is None and reduce != "mean"
    if plain and step.positions.all_visible(1, step.window, True):
        return softmax_votes(step.q[:, :, -1], step.k, step.scale, groups=groups, reduce=reduce)
    return by_group(last_weights(step), groups, reduce)
