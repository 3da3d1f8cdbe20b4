"""Merging partial attention outputs by their log-sum-exps.

Softmax attention over a union of disjoint key sets is the average of the parts' outputs, weighted by
exp(lse). A part that read nothing has lse = -inf and weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.errors import ShapeError


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge parts o [..., M, Dv] with lse [..., M] (natural log).

    Returns o in the first part's dtype and lse in float32 (float64 for float64 parts). Where every part is
    empty, o = 0 and lse = -inf. O(parts * M * Dv).
    """
    if not outputs or len(outputs) != len(lses):
        raise ShapeError(f"merge needs as many lses as outputs, at least one: {len(outputs)} and {len(lses)}")
    for o, lse in zip(outputs, lses):
        if o.shape[:-1] != lse.shape:
            raise ShapeError(f"lse {list(lse.shape)} does not fit its output {list(o.shape)} without the last size")
    if len(outputs) == 1:
        return outputs[0], lses[0]
    stacked = torch.stack(list(lses))
    total = torch.logsumexp(stacked, dim=0)
    weights = torch.exp(stacked - total.masked_fill(total == -torch.inf, 0.0))[..., None]
    mixed = sum(w * torch.where(w > 0, o.to(weights.dtype), 0.0) for w, o in zip(weights, outputs))
    assert isinstance(mixed, Tensor)
    return mixed.to(outputs[0].dtype), total


def subtract(o: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Take a part away again: the attention over all keys but the part's, given both.

    The inverse of `merge`. Ill-conditioned when the part holds nearly all the weight; where it holds all of it,
    o = 0 and lse = -inf.
    """
    share = torch.exp(torch.clamp(part_lse - lse.masked_fill(lse == -torch.inf, 0.0), max=0.0))
    share = torch.where(lse == -torch.inf, torch.zeros_like(share), share)
    rest = 1.0 - share
    gone = rest <= torch.finfo(rest.dtype).eps
    safe = torch.where(gone, torch.ones_like(rest), rest)
    left = (o.to(safe.dtype) - share[..., None] * part.to(safe.dtype)) / safe[..., None]
    left = torch.where(gone[..., None], torch.zeros_like(left), left)
    return left.to(o.dtype), torch.where(gone, torch.full_like(lse, -torch.inf), lse + torch.log(safe))


def apply_sink(o: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Add a learned sink logit per query head (a key with value 0) to o [B, Hq, M, Dv], lse [B, Hq, M].

    sink: [Hq], natural-log scale like the scores. The weight that goes to the sink leaves the output.
    """
    logit = sink.to(lse.dtype)[None, :, None]
    total = torch.logaddexp(lse, logit.expand_as(lse))
    return (o * torch.exp(lse - total)[..., None].to(o.dtype)), total
