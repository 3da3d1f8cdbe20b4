"""Dense, windowed and token-list attention by torch's fused kernels, on any device.

The query heads of a KV group are folded into rows wherever few queries are asked: on CPU, fused attention with
`enable_gqa` re-reads the keys for every query head (3.5 to 17 times slower at one query).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.call import Call
from foveate.attention.merge import apply_sink, merge
from foveate.attention.plan import Tokens
from foveate.attention.positions import Positions

# Rows of one masked piece: its mask stays below 8 million entries, so never M x N.
MASK_ENTRIES = 1 << 23
FOLD_QUERIES = 16
# Query rows whose weights exist at a time where no fused kernel makes them, when more than MASK_ENTRIES weights.
LEAST_ROWS = 64


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    lse: bool,
    softcap: float | None = None,
    bias: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T scale + mask) v for equal or grouped heads, with the log-sum-exp when asked.

    causal means the square causal mask (M = N). bias: sigmoid(q k^T scale + mask + bias) v instead, without one.
    """
    if bias is not None:
        return _by_sigmoid(q, k, v, scale=scale, mask=mask, causal=causal, softcap=softcap, bias=bias), None
    if softcap is not None:
        return _explicit(q, k, v, scale=scale, mask=mask, causal=causal, softcap=softcap)
    if not lse:
        grouped = q.shape[1] != k.shape[1]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
        return o, None
    # The fused CPU kernel's log-sum-exp has no gradient.
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _explicit(q, k, v, scale=scale, mask=mask, causal=causal)
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and q.dtype != torch.float16 and k.shape[2] > 0:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        # The kernel takes features to be neighbours, whatever the stride says.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        k, v = (repeat_heads(each, q.shape[1]) for each in (k, v))
        mask = None if mask is None else mask.to(q.dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    return _explicit(q, k, v, scale=scale, mask=mask, causal=causal)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _by_sigmoid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    softcap: float | None,
    bias: float,
) -> Tensor:
    """Matmuls and a float32 sigmoid, in pieces of rows; a causal piece reads no key after its last query."""
    B, Hq, M, _ = q.shape
    N = k.shape[2]
    k, v = (repeat_heads(each, Hq) for each in (k, v))
    rows = max(LEAST_ROWS, MASK_ENTRIES // max(1, B * Hq * N))
    outputs = []
    for start in range(0, max(1, M), rows):
        part = slice(start, min(start + rows, M))
        own = mask if mask is None or mask.shape[2] == 1 else mask[:, :, part]
        keys = slice(None)
        if causal:
            keys = slice(0, part.stop)
            own = torch.ones(part.stop - start, part.stop, dtype=torch.bool, device=q.device).tril(start)
        o, _ = _explicit(
            q[:, :, part], k[:, :, keys], v[:, :, keys], scale=scale, mask=own, causal=False, softcap=softcap, bias=bias
        )
        outputs.append(o)
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    softcap: float | None = None,
    bias: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Matmuls and a float32 softmax (with a bias, a sigmoid) over one piece of rows."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (repeat_heads(each, q.shape[1]) for each in (k, v))
    scores = (q @ k.transpose(-1, -2)).to(exact) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = keep if mask is None else mask
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if bias is not None:
        return torch.sigmoid(scores + bias).to(v.dtype) @ v, None
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return (weights.to(v.dtype) @ v), lse


def join(parts: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Attention over disjoint keys as one: by the log-sum-exps, or as a sum where weights have no normaliser."""
    lses = [lse for _, lse in parts if lse is not None]
    if lses:
        return merge([o for o, _ in parts], lses)
    return torch.stack([o for o, _ in parts]).sum(0), None


def attend_masked(
    call: Call,
    k: Tensor,
    v: Tensor,
    positions: Positions,
    restrict: Callable[[slice], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the call's queries over k, v, masked by visibility. Handles softcap and weights.

    restrict: gives, for a slice of query rows, a further bool mask [B or 1, H or 1, rows, N].
    """
    M, N, Hkv = call.m, k.shape[2], k.shape[1]
    need_lse = call.need_lse or call.sink is not None
    plain = call.softcap is None and call.log_weight is None and restrict is None
    if plain and call.causal and M == N and M > 1 and positions.aligned and call.window is None:
        return fused(call.q, k, v, scale=call.scale, causal=True, lse=need_lse, bias=call.bias)
    if plain and positions.all_visible(M, call.window, call.causal):
        return _folded(call, call.q, k, v, None, need_lse)
    rows = max(1, MASK_ENTRIES // max(1, N * (Hkv if positions.k is not None else 1)))
    outputs, lses = [], []
    for start in range(0, M, rows):
        part = slice(start, min(start + rows, M))
        mask = positions.visible(M, N, k.device, window=call.window, causal=call.causal, rows=part)
        if restrict is not None:
            mask = mask & restrict(part)
        q = call.q[:, :, part]
        bias = _weigh(mask, call.log_weight, q.dtype)
        o, lse = _folded(call, q, k, v, bias, need_lse)
        # A row that sees nothing: fused kernels give NaN or the mean of v.
        if positions.holes or call.window is not None or not positions.aligned or M > N or restrict:
            blind = ~per_query_head(mask.any(-1), q.shape[1])
            o = o.masked_fill(blind[..., None], 0.0)
            lse = None if lse is None else lse.masked_fill(blind, -torch.inf)
        outputs.append(o)
        lses.append(lse)
    o = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
    return o, torch.cat([each for each in lses if each is not None], dim=2) if need_lse else None


def _weigh(mask: Tensor, log_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    if log_weight is None:
        return mask
    bias = log_weight[:, :, None].to(torch.float64 if dtype == torch.float64 else torch.float32)
    return torch.where(mask, bias, torch.full_like(bias, -torch.inf)).to(dtype)


def per_query_head(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], dim=1)


def _folded(
    call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """One fused call, the query heads of a group folded into rows when the queries are few."""
    B, Hq, M, D = q.shape
    Hkv = k.shape[1]
    G = Hq // Hkv
    if M > FOLD_QUERIES:
        spread = None if mask is None else per_query_head(mask, Hq)
        return fused(q, k, v, scale=call.scale, mask=spread, lse=need_lse, softcap=call.softcap, bias=call.bias)
    q = q.reshape(B, Hkv, G * M, D)
    if mask is not None and mask.shape[2] != 1:
        mask = mask.repeat(1, 1, G, 1)
    o, lse = fused(q, k, v, scale=call.scale, mask=mask, lse=need_lse, softcap=call.softcap, bias=call.bias)
    return o.reshape(B, Hq, M, v.shape[-1]), None if lse is None else lse.reshape(B, Hq, M)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, H, N, D] by index [B, H, K] -> [B, H, K, D]: one index_select over flattened rows.

    torch.gather would walk every element by itself on a CPU (docs/kernels.md, 3). Needs no copy of x when its rows
    can be viewed flat; otherwise falls to advanced indexing, which copies only what it reads.
    """
    B, H, _N, D = x.shape
    base, rows = flat_rows(x)
    if base is None:
        batch = torch.arange(B, device=x.device)[:, None, None]
        head = torch.arange(H, device=x.device)[None, :, None]
        return x[batch, head, index.long()]
    picked = base.index_select(0, (index + rows).reshape(-1))
    return picked.view(B, H, index.shape[2], D)


def flat_rows(x: Tensor) -> tuple[Tensor | None, Tensor]:
    """x [B, H, N, D] as rows [R, D] of its storage, and the first row of each (b, h) as int64 [B, H, 1]."""
    B, H, N, D = x.shape
    sb, sh, sn, sd = x.stride()
    none = torch.empty(0)
    if D == 0 or sd != 1 or sn != D or sb % D or sh % D or N == 0:
        return None, none
    total = ((B - 1) * sb + (H - 1) * sh) // D + N
    base = x.as_strided((total, D), (D, 1), x.storage_offset())
    batch = torch.arange(B, device=x.device)[:, None, None] * (sb // D)
    head = torch.arange(H, device=x.device)[None, :, None] * (sh // D)
    return base, batch + head


def attend_tokens(call: Call, plan: Tokens) -> tuple[Tensor, Tensor | None]:
    """Gather the listed keys once per head, then attend to them."""
    if plan.index.dim() == 4:
        return _attend_tokens_per_query(call, plan)
    H, Hkv = plan.index.shape[1], call.k.shape[1]
    B = call.q.shape[0]
    heads = max(H, Hkv)
    valid = plan.valid(call.n)
    index = torch.where(valid, plan.index, 0).long().expand(B, -1, -1)
    k, v = call.k, call.v
    if heads != Hkv:
        k, v = (each.repeat_interleave(heads // Hkv, dim=1) for each in (k, v))
    index, valid = (each.expand(B, heads, -1) for each in (index, valid))
    positions = call.positions
    kept = positions.keys(call.n, k.device).expand(B, heads, -1).gather(2, index)
    kept = kept.masked_fill(~valid, -1)
    q_positions = positions.queries(call.m, call.n, k.device)
    chosen = Positions(q_positions.expand(B, -1), kept, holes=True, ordered=False)
    if call.m == 1 and not positions.holes and call.window is None and bool(valid.all()):
        chosen = Positions(q_positions.expand(B, -1), kept, holes=False, ordered=False)
    weight = call.log_weight
    if weight is not None:
        weight = repeat_heads(weight, heads).gather(2, index)
    narrowed = replace(call, k=k, v=v, positions=chosen, log_weight=weight, sink=None, need_lse=call.bias is None)
    return attend_masked(narrowed, gather_rows(k, index), gather_rows(v, index), chosen)


def _attend_tokens_per_query(call: Call, plan: Tokens) -> tuple[Tensor, Tensor | None]:
    """A list per query: queries become rows of their own, in pieces."""
    B, Hq, M, D = call.q.shape
    H, K = plan.index.shape[1], plan.index.shape[-1]
    Hkv = call.k.shape[1]
    heads = max(H, Hkv)
    valid = plan.valid(call.n).expand(B, heads, M, K)
    index = torch.where(valid, plan.index.expand(B, heads, M, K), 0).long()
    k, v = (repeat_heads(each, heads) for each in (call.k, call.v))
    seen = call.positions.keys(call.n, k.device).expand(B, heads, -1)
    queries = call.positions.queries(M, call.n, k.device).expand(B, -1)
    outputs, lses = [], []
    step = max(1, MASK_ENTRIES // max(1, B * heads * K * D))
    for start in range(0, M, step):
        part = slice(start, min(start + step, M))
        m = part.stop - part.start
        flat = index[:, :, part].reshape(B, heads, m * K)
        at = seen.gather(2, flat).view(B, heads, m, K).masked_fill(~valid[:, :, part], -1)
        q_at = queries[:, None, part, None]
        mask = (at >= 0) & (q_at >= 0)
        mask = mask & (at <= q_at) if call.causal else mask
        mask = mask if call.window is None else mask & (q_at - at <= call.window)
        rows = call.q[:, :, part].reshape(B, heads, Hq // heads, m, D).transpose(2, 3)
        rows = rows.reshape(B * heads * m, 1, Hq // heads, D)
        keys = gather_rows(k, flat).view(B * heads * m, 1, K, D)
        values = gather_rows(v, flat).view(B * heads * m, 1, K, -1)
        bias: Tensor = mask
        if call.log_weight is not None:
            weight = repeat_heads(call.log_weight, heads).gather(2, flat).view(B, heads, m, K)
            bias = torch.where(mask, weight, -torch.inf)
        o, lse = _explicit(
            rows,
            keys,
            values,
            scale=call.scale,
            mask=bias.reshape(B * heads * m, 1, 1, K),
            causal=False,
            softcap=call.softcap,
            bias=call.bias,
        )
        outputs.append(o.view(B, heads, m, Hq // heads, -1).transpose(2, 3).reshape(B, Hq, m, -1))
        if lse is not None:
            lses.append(lse.view(B, heads, m, Hq // heads).transpose(2, 3).reshape(B, Hq, m))
    return torch.cat(outputs, 2), torch.cat(lses, 2) if lses else None


def finish(call: Call, o: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Apply the sink and settle dtypes."""
    if call.sink is not None:
        assert lse is not None
        o, lse = apply_sink(o, lse, call.sink)
    return o.to(call.q.dtype), lse
