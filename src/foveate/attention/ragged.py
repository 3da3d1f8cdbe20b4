"""Attention over packed per-head lists of keys: every head of every sequence has its own length.

Keys and values lie in one flat array of rows; segment s = b * Hkv + h holds rows start[s] .. start[s] + length[s].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.attention.backends import cpp_plans
from foveate.attention.backends.torch_dense import fused
from foveate.attention.backends.triton import availability
from foveate.attention.merge import apply_sink
from foveate.attention.shapes import match
from foveate.errors import ShapeError


def attend_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Sequence[int] | Tensor,
    length: Sequence[int] | Tensor,
    *,
    scale: float | None = None,
    k_positions: Tensor | None = None,
    q_positions: Tensor | None = None,
    window: int | None = None,
    log_weight: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of q [B, Hq, M, D] over packed k [R, D], v [R, Dv].

    start, length: B * Hkv integers on the host; on a GPU also int64 tensors [B * Hkv] there (one query, no window),
    which a recorded graph may change. k_positions [R] and q_positions [B, M] are needed when M > 1 or a
    window applies (a single query sees all its segment otherwise). log_weight: [R], added to scores.
    Returns o [B, Hq, M, Dv], and lse [B, Hq, M] when asked; an empty segment gives o = 0, lse = -inf.
    """
    B, Hq, M, D = q.shape
    match(k=(k, "R D"), v=(v, "R Dv"))
    if len(start) != len(length) or len(start) % B or not len(start) or Hq % (len(start) // B):
        raise ShapeError(f"{len(start)} segments do not fit a batch of {B} with {Hq} query heads")
    needs_positions = M > 1 or window is not None
    if needs_positions and (k_positions is None or q_positions is None):
        raise ShapeError("several queries or a window over ragged keys need k_positions and q_positions")
    heads = len(start) // B
    G = Hq // heads
    scale = D**-0.5 if scale is None else scale
    if not needs_positions and availability.serves(q, k, v):
        return _gather(q, k, v, start, length, scale, log_weight, sink, return_lse)
    if isinstance(start, Tensor) or isinstance(length, Tensor):
        start, length = (x.tolist() if isinstance(x, Tensor) else x for x in (start, length))
    if M == 1 and window is None and log_weight is None and cpp_plans.why_not_segments(q, k, v, G) is None:
        rows = q.reshape(B * heads, G, D).contiguous()
        k_at, v_at = ([x.data_ptr() + row * x.stride(0) * x.element_size() for row in start] for x in (k, v))
        o, lse = cpp_plans.decode(
            rows, k_at, v_at, k.stride(0), v.stride(0), [0] * len(k_at), list(length), v.shape[1], scale
        )
        o, lse = o.view(B, Hq, M, -1).to(q.dtype), lse.view(B, Hq, M)
        return _finish(o, lse, sink, return_lse)
    need_lse = return_lse or sink is not None
    o = torch.zeros(B, heads, G * M, v.shape[1], dtype=q.dtype, device=q.device)
    lse = torch.full((B, heads, G * M), -torch.inf, dtype=torch.float32, device=q.device)
    rows = q.reshape(B, heads, G * M, D)
    if not needs_positions and log_weight is None:
        _attend_runs(rows.reshape(B * heads, G * M, D), k, v, start, length, scale, need_lse, o, lse)
        return _finish(o.view(B, Hq, M, -1), lse.view(B, Hq, M), sink, return_lse)
    for segment, (begin, count) in enumerate(zip(start, length)):
        if not count:
            continue
        b, h = divmod(segment, heads)
        part = slice(begin, begin + count)
        mask = None
        if needs_positions:
            assert k_positions is not None
            assert q_positions is not None
            at, q_at = k_positions[part][None], q_positions[b][:, None]
            mask = (at <= q_at) & (q_at >= 0)
            mask = mask if window is None else mask & (q_at - at <= window)
            mask = mask.repeat(G, 1)[None, None]
        bias = mask
        if log_weight is not None:
            bias = log_weight[part][None, None, None].to(torch.float32).expand(1, 1, G * M, -1)
            bias = bias if mask is None else torch.where(mask, bias, -torch.inf)
            bias = bias.to(q.dtype)
        own, own_lse = fused(
            rows[b : b + 1, h : h + 1], k[None, None, part], v[None, None, part], scale=scale, mask=bias, lse=need_lse
        )
        if mask is not None:
            blind = ~mask.any(-1)
            own = own.masked_fill(blind[..., None], 0.0)
            own_lse = None if own_lse is None else own_lse.masked_fill(blind, -torch.inf)
        o[b, h] = own[0, 0]
        if own_lse is not None:
            lse[b, h] = own_lse[0, 0]
    return _finish(o.view(B, Hq, M, -1), lse.view(B, Hq, M), sink, return_lse)


def _gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Sequence[int] | Tensor,
    length: Sequence[int] | Tensor,
    scale: float,
    log_weight: Tensor | None,
    sink: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    from foveate.attention.backends.triton.gather_decode import gather_decode

    first, count = (torch.as_tensor(x, dtype=torch.int64, device=q.device) for x in (start, length))
    o, lse = gather_decode(
        q,
        k,
        v,
        start=first,
        length=count.view(q.shape[0], -1),
        scale=scale,
        log_weight=log_weight,
        sink=sink,
        return_lse=return_lse,
    )
    if not return_lse:
        return o
    assert lse is not None
    return o, lse


def _attend_runs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Sequence[int],
    length: Sequence[int],
    scale: float,
    need_lse: bool,
    o: Tensor,
    lse: Tensor,
) -> None:
    """Whole segments, q [S, R, D], into o and lse (seen as [S, R, ...]): one fused call per run of equal segments."""
    flat_o, flat_lse = o.view(len(start), *o.shape[2:]), lse.view(len(start), -1)
    for first, last in runs(start, length):
        n = length[first]
        if not n:
            continue
        gap = start[first + 1] - start[first] if last - first > 1 else n
        keys, values = (
            x.as_strided(
                (1, last - first, n, x.shape[1]),
                (0, gap * x.stride(0), *x.stride()),
                x.storage_offset() + start[first] * x.stride(0),
            )
            for x in (k, v)
        )
        own, own_lse = fused(q[None, first:last], keys, values, scale=scale, lse=need_lse)
        flat_o[first:last] = own[0]
        if own_lse is not None:
            flat_lse[first:last] = own_lse[0]


def runs(start: Sequence[int], length: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring segments [first, last) of one length, equally far apart and in order: one strided view each."""
    found: list[tuple[int, int]] = []
    for s, n in enumerate(length):
        if found:
            first, last = found[-1]
            evenly = last - first == 1 or start[s] - start[s - 1] == start[first + 1] - start[first]
            if n == length[first] and evenly and start[s] >= start[s - 1]:
                found[-1] = (first, s + 1)
                continue
        found.append((s, s + 1))
    return found


def _finish(o: Tensor, lse: Tensor, sink: Tensor | None, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    if sink is not None:
        o, lse = apply_sink(o, lse, sink)
    return (o, lse) if return_lse else o
