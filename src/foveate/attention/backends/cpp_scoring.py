"""The C++ CPU kernels of selection: scores and votes against all keys, the slots of the best, and the chosen rows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.attention.backends.cpp.build import library, why_unavailable
from foveate.attention.backends.cpp_plans import KINDS, MAX_ROWS, decode, heads_at


def why_not(q: Tensor, k: Tensor) -> str | None:
    """q [B, Hkv, G, D], k [B, Hkv, N, D]."""
    if q.device.type != "cpu" or q.dtype not in KINDS or k.dtype != q.dtype or q.shape[-1] % 16:
        return "it serves CPU tensors of one type, float32 or bfloat16, and head sizes that 16 divides"
    if k.stride(-1) != 1 or not k.numel() or not q.numel():
        return "keys need a unit last stride and at least one token"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "it has no gradients"
    return why_unavailable()


def scores(q: Tensor, k: Tensor) -> Tensor:
    """Unscaled products: q [B, Hkv, G, D] with k [B, Hkv, N, D] -> [B, Hkv * G, N] float32."""
    B, H, G, D = q.shape
    N, q = k.shape[2], q.contiguous()
    out = torch.empty(B, H * G, N, dtype=torch.float32)
    library().foveate_scores(
        *_against(q, k),
        B * H,
        G,
        D,
        torch.get_num_threads(),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


def _against(q: Tensor, k: Tensor) -> tuple[Any, ...]:
    """The first arguments of what meets q with all keys of k [B, H, N, D]; the caller holds both."""
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (q, k))
    return KINDS[k.dtype], *pointers, starts(k), ctypes.c_int64(k.stride(2)), ctypes.c_int64(k.shape[2])


def starts(x: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """Where the rows of each head of x [B, H, N, D] begin, in elements."""
    B, H = x.shape[:2]
    return (ctypes.c_int64 * (B * H))(*(b * x.stride(0) + h * x.stride(1) for b in range(B) for h in range(H)))


def votes(q: Tensor, k: Tensor, scale: float, groups: int, greatest: bool) -> Tensor:
    """Softmax weights of q [B, Hkv, G, D] over k [B, Hkv, N, D], reduced per group of heads: [B, groups, N] float32."""
    B, H, G, D = q.shape
    N, q = k.shape[2], q.contiguous()
    weights, out = torch.empty(B, H * G, N, dtype=torch.float32), torch.empty(B, groups, N, dtype=torch.float32)
    library().foveate_votes(
        *_against(q, k),
        B,
        H,
        G,
        D,
        groups,
        int(greatest),
        ctypes.c_float(scale),
        torch.get_num_threads(),
        ctypes.c_void_p(weights.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


def choose(q: Tensor, k: Tensor, scale: float, first: int, count: int) -> Tensor:
    """Slots 0..first - 1, and first + those of the `count` keys of k [B, Hkv, N, D] that the heads of q [B, Hkv, G, D]
    vote for, ascending: int64 [B, first + count]."""
    q = q.contiguous()
    return chosen(library().foveate_choose, _against(q, k), q.shape, scale, first, count)


def chosen(
    call: Callable[..., Any], against: tuple[Any, ...], shape: Sequence[int], scale: float, first: int, count: int
) -> Tensor:
    """What a kernel that takes queries of a shape [B, Hkv, G, D] against keys chooses: int64 [B, first + count]."""
    out = torch.empty(shape[0], first + count, dtype=torch.int64)
    call(
        *against,
        *shape,
        ctypes.c_float(scale),
        torch.get_num_threads(),
        ctypes.c_int64(first),
        ctypes.c_int64(count),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


def why_not_top(scores: Tensor) -> str | None:
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or not scores.numel():
        return "it serves float32 scores on CPU"
    return why_unavailable()


def top(scores: Tensor, count: int | Tensor) -> Tensor:
    """Slots of the best of scores [B, H, N] float32, ascending: int64 [B, H, n], -1 absent."""
    B, H, N = scores.shape
    scores = scores.contiguous()
    if isinstance(count, int):
        counts, width = torch.full((B * H,), count), min(max(count, 0), N)
    else:
        counts = count.to("cpu", torch.int64).expand(B, H).reshape(-1).contiguous()
        width = min(max(int(counts.max()), 0), N)
    out = torch.empty(B, H, width, dtype=torch.int64)
    library().foveate_top(
        ctypes.c_void_p(scores.data_ptr()),
        ctypes.c_int64(B * H),
        ctypes.c_int64(N),
        ctypes.c_void_p(counts.data_ptr()),
        ctypes.c_int64(width),
        torch.get_num_threads(),
        ctypes.c_void_p(out.data_ptr()),
    )
    # A row of few finite scores leaves columns that no row uses.
    most = int((out >= 0).sum(-1).max()) if width and bool((out[..., -1] < 0).all()) else width
    return out[..., :most]


def why_not_take(x: Tensor, out: Tensor) -> str | None:
    """Rows of x [B, H, N, D] to out [B, H, K, D]."""
    if x.device.type != "cpu" or x.dtype not in KINDS:
        return "it serves float32 and bfloat16 on CPU"
    if x.stride(-1) != 1 or out.stride(-1) != 1 or out.stride(2) != x.shape[-1] or not out.numel():
        return "rows need a unit last stride, and those of the result to lie one after the other"
    if torch.is_grad_enabled() and x.requires_grad:
        return "it has no gradients"
    return why_unavailable()


def take(
    x: Tensor, index: Tensor, cos: Tensor | None, sin: Tensor | None, span: int, out: Tensor, compact: bool = False
) -> None:
    """Rows of x [B, H, N, D] by index int64 [B, K] or [B, H, K] to out [B, H, K, D], their first features turned.

    cos, sin: [K, P] float32, pair p being feature p + span * (p // span) and the one `span` further; None: unturned.
    compact: entry j, slot s, is turned by row s - j of them, of which there are enough.
    """
    B, H, N, D = x.shape
    index = index.contiguous()
    angles = [None if each is None else each.contiguous() for each in (cos, sin)]
    library().foveate_take(
        KINDS[x.dtype],
        ctypes.c_void_p(x.data_ptr()),
        starts(x),
        ctypes.c_int64(x.stride(2)),
        ctypes.c_int64(N),
        B * H,
        H if index.dim() == 2 else 1,
        ctypes.c_void_p(index.data_ptr()),
        ctypes.c_int64(index.shape[-1]),
        D,
        *(ctypes.c_void_p(None if each is None else each.data_ptr()) for each in angles),
        0 if cos is None else cos.shape[-1],
        span,
        int(compact),
        torch.get_num_threads(),
        ctypes.c_void_p(out.data_ptr()),
        starts(out),
    )


def why_not_rows(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """One query q [B, Hq, 1, D] over listed rows of k [B, Hkv, N, D], v [B, Hkv, N, Dv], read where they lie."""
    if q.device.type != "cpu" or q.dtype not in KINDS or not q.dtype == k.dtype == v.dtype:
        return "it serves CPU tensors of one type, float32 or bfloat16"
    if q.shape[-1] % 16 or v.shape[-1] % 16 or k.stride(-1) != 1 or v.stride(-1) != 1 or not k.shape[2]:
        return "it serves head sizes that 16 divides, of a unit last stride, and at least one token"
    if q.shape[2] != 1 or q.shape[1] // k.shape[1] > MAX_ROWS:
        return f"it serves one query per head and at most {MAX_ROWS} heads per group"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no gradients"
    return why_unavailable()


def attend_rows(
    parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]],
    turns: tuple[Tensor, Tensor, int, bool] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One softmax over all parts: q [B, Hq, 1, D], k, v, and the rows index int64 [B, K] of them, or all; the keys of
    lists turned as `decode` does it: o [B, Hq, 1, Dv] in q's dtype, lse [B, Hq, 1] float32. Rows of all parts' keys
    must be as far apart, and of their values."""
    q, k, v, _ = parts[0]
    B, Hq, _, D = q.shape
    H = k.shape[1]
    indices = [None if index is None else index.contiguous() for *_, index in parts]
    queries = [each.reshape(B * H, Hq // H, D) for each, *_ in parts]
    k_at, v_at, list_at, lengths = [], [], [], []
    for (_, keys, values, _), index in zip(parts, indices):
        k_at += heads_at(keys)
        v_at += heads_at(values)
        list_at += [0] * (B * H) if index is None else heads_at(index[:, None].expand(-1, H, -1))
        lengths += [keys.shape[2] if index is None else index.shape[1]] * (B * H)
    o, lse = decode(
        queries[0].contiguous() if len(parts) == 1 else torch.cat(queries),
        k_at,
        v_at,
        k.stride(2),
        v.stride(2),
        list_at,
        lengths,
        v.shape[-1],
        scale,
        limit=min((keys.shape[2] for (_, keys, *_), index in zip(parts, indices) if index is not None), default=0),
        parts=len(parts),
        turns=turns,
    )
    return o.view(B, Hq, 1, -1).to(q.dtype), lse.view(B, Hq, 1)
