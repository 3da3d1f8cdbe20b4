"""Block-sparse attention in plain torch: key blocks are gathered per query block, nothing else is read.

Work items (one query block of one head) with the same number of key blocks share one fused call. The blocks that
lie wholly in the past need no mask; the one on the diagonal is computed apart and joined (softmax: by log-sum-exp).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from foveate.attention.backends.torch_dense import fused, join, per_query_head, repeat_heads
from foveate.attention.call import Call
from foveate.attention.plan import Blocks, Tokens, VerticalSlash, once

# Gathered keys and values of one fused call stay below this many elements.
GATHER_ELEMENTS = 1 << 24


def attend_blocks(call: Call, plan: Blocks) -> tuple[Tensor, Tensor | None]:
    """Attention over a plan of key blocks. Exact token causality inside the partial blocks."""
    B, Hq, M, D = call.q.shape
    N, Dv = call.n, call.v.shape[-1]
    bm, bn, R = plan.block_m, plan.block_n, plan.rows
    heads = plan.heads
    q = _pad(call.q, R * bm)
    columns = -(-N // bn)
    k, v = (_pad(each, columns * bn) for each in (call.k, call.v))
    o = torch.zeros(B, Hq, R * bm, Dv, dtype=call.q.dtype, device=q.device)
    lse = torch.full((B, Hq, R * bm), -torch.inf, dtype=torch.float32, device=q.device)
    q_tiles, o_tiles, lse_tiles = q.unflatten(2, (R, bm)), o.unflatten(2, (R, bm)), lse.unflatten(2, (R, bm))
    k_tiles, v_tiles = k.unflatten(2, (columns, bn)), v.unflatten(2, (columns, bn))
    counts = plan.row_ptr.diff().view(plan.batch, heads, R)
    start = plan.row_ptr[:-1].view(plan.batch, heads, R)
    for item in _buckets(counts, B, Hq, bn * max(D, Dv)):
        b, h, r, count = item
        plan_b, plan_h = b % plan.batch, h * heads // Hq
        first = start[plan_b, plan_h, r]
        col = plan.col[first[:, None] + torch.arange(count, device=first.device)].long()
        kv = h * call.k.shape[1] // Hq
        keys = k_tiles[b[:, None], kv[:, None], col].flatten(1, 2)[:, None]
        values = v_tiles[b[:, None], kv[:, None], col].flatten(1, 2)[:, None]
        mask = _item_mask(call, b, kv, r, col, bm, bn)
        part, part_lse = _attend_item(call, q_tiles[b, h, r][:, None], keys, values, mask, bn)
        o_tiles[b, h, r] = part[:, 0].to(o.dtype)
        if part_lse is not None:
            lse_tiles[b, h, r] = part_lse[:, 0].to(lse.dtype)
    return o[:, :, :M], lse[:, :, :M] if call.bias is None else None


def _attend_item(
    call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bn: int
) -> tuple[Tensor, Tensor | None]:
    if mask is None:
        return _fused(call, q, k, v)
    free = mask.flatten(0, -2).all(0)
    # Leading key blocks that every row of every item sees need no mask.
    whole = int(free.unflatten(0, (-1, bn)).all(1).to(torch.int8).cumprod(0).sum()) * bn
    parts = []
    if whole:
        parts.append(_fused(call, q, k[:, :, :whole], v[:, :, :whole]))
    if whole < k.shape[2]:
        parts.append(_fused(call, q, k[:, :, whole:], v[:, :, whole:], mask[..., whole:]))
    return join(parts)


def _fused(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """One fused call; o = 0 and lse = -inf for a query that the mask leaves nothing."""
    o, lse = fused(q, k, v, scale=call.scale, mask=mask, lse=call.bias is None, bias=call.bias)
    if mask is None:
        return o, lse
    blind = ~mask.any(-1).expand(o.shape[:3])
    return o.masked_fill(blind[..., None], 0.0), None if lse is None else lse.masked_fill(blind, -torch.inf)


def _pad(x: Tensor, length: int) -> Tensor:
    extra = length - x.shape[2]
    return torch.nn.functional.pad(x, (0, 0, 0, extra)) if extra else x


def _buckets(counts: Tensor, B: int, Hq: int, block_elements: int) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Yield (b, h, r, count): indices of the work items that read `count` key blocks, in bounded pieces."""
    per_item = counts.repeat_interleave(Hq // counts.shape[1], dim=1)
    per_item = per_item.expand(B, -1, -1).contiguous()
    for count in per_item.unique().tolist():
        if count == 0:
            continue
        b, h, r = (per_item == count).nonzero(as_tuple=True)
        piece = max(1, GATHER_ELEMENTS // (count * block_elements))
        for begin in range(0, b.numel(), piece):
            part = slice(begin, begin + piece)
            yield b[part], h[part], r[part], count


def _item_mask(call: Call, b: Tensor, kv: Tensor, r: Tensor, col: Tensor, bm: int, bn: int) -> Tensor | None:
    """Bool [items, 1, bm, keys] of what a work item may see, None when everything."""
    M, N, device = call.m, call.n, call.q.device
    slots = (col[..., None] * bn + torch.arange(bn, device=device)).flatten(1)
    rows = r[:, None] * bm + torch.arange(bm, device=device)
    positions = call.positions
    if positions.aligned:
        k_at, q_at = slots.masked_fill(slots >= N, -1), rows + (N - M)
    else:
        k_all = positions.keys(N, device)
        q_all = positions.queries(M, N, device)
        k_at = k_all[b.remainder(k_all.shape[0]), kv.remainder(k_all.shape[1])].gather(1, slots.clamp(max=N - 1))
        k_at = k_at.masked_fill(slots >= N, -1)
        q_at = q_all[b.remainder(q_all.shape[0])].gather(1, rows.clamp(max=M - 1))
    mask = (k_at >= 0)[:, None] & (q_at >= 0)[..., None]
    if call.causal:
        mask = mask & (k_at[:, None] <= q_at[..., None])
    if call.window is not None:
        mask = mask & (q_at[..., None] - k_at[:, None] <= call.window)
    return None if bool(mask.all()) else mask[:, None]


def attend_vertical_slash(call: Call, plan: VerticalSlash) -> tuple[Tensor, Tensor | None]:
    """Block diagonals by blocks; the columns they do not cover by a gather; joined."""
    blocks = plan.slash_blocks(call.m, call.n)
    o, lse = attend_blocks(call, blocks)
    B, Hq = call.q.shape[:2]
    heads = max(plan.vertical.shape[1], call.k.shape[1])
    listed = Tokens(once(plan.vertical))
    valid = listed.valid(call.n).expand(B, -1, -1)
    index = torch.where(valid, listed.index, 0).long().expand(B, -1, -1)
    index, valid = (repeat_heads(each, heads) for each in (index, valid))
    covered = blocks.block_mask(-(-call.n // plan.block)).expand(B, -1, -1, -1)
    covered = repeat_heads(covered, heads)
    k, v = (repeat_heads(each, heads) for each in (call.k, call.v))
    columns = torch.gather(covered, 3, (index // plan.block)[:, :, None].expand(-1, -1, covered.shape[2], -1))
    allowed = (valid[:, :, None] & ~columns).repeat_interleave(plan.block, 2)[:, :, : call.m]
    at = call.positions.keys(call.n, k.device).expand(B, heads, -1).gather(2, index)[:, :, None]
    q_at = call.positions.queries(call.m, call.n, k.device)[:, None, :, None]
    allowed = allowed & (at >= 0)
    if call.causal:
        allowed = allowed & (at <= q_at)
    if call.window is not None:
        allowed = allowed & (q_at - at <= call.window)
    gather = index[..., None].expand(-1, -1, -1, k.shape[-1])
    mask = per_query_head(allowed, Hq)
    return join([(o, lse), _fused(call, call.q, k.gather(2, gather), v.gather(2, gather), mask)])
