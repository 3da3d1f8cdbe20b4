"""The C++ CPU kernels of graphs over keys: the walk that searches one, and exact nearest keys to make one from."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from foveate.attention.backends.cpp.build import library, why_unavailable
from foveate.attention.backends.cpp_plans import KINDS
from foveate.errors import ShapeError


def why_not(q: Tensor, keys: Tensor) -> str | None:
    """q [B, Hq, D], keys [B, Hkv, capacity, D]."""
    if q.device.type != "cpu" or q.dtype not in KINDS or keys.dtype != q.dtype or q.shape[-1] % 16:
        return "it serves CPU tensors of one type, float32 or bfloat16, and head sizes that 16 divides"
    if keys.stride(-1) != 1 or not keys.numel() or not q.numel():
        return "keys need a unit last stride and at least one token"
    return why_unavailable()


def walk(
    q: Tensor,
    keys: Tensor,
    links: Tensor,
    entries: Tensor,
    linked: Tensor,
    length: Tensor,
    *,
    beam: int,
    expand: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Best-first search of graphs over keys [B, Hkv, capacity, D] by q [B, Hq, D].

    links: int32 [B, heads, rows, degree], entries: int64 [B, heads, E], absent: -1; heads divides Hq. linked, length:
    int64 [B], keys with links, and all; those between are scored one by one. beam: keys held; expand: of them, those
    whose links are followed in one round. Of equal products the one scored first comes first; what is no number is
    never returned.
    Returns index [B, Hq, count], best first, -1 absent, and how many keys were scored [B, Hq], both int64.
    O(scanned D + rounds beam) per query head, and n / 8 bytes while it runs.
    """
    B, Hq, D = q.shape
    q, links, entries = q.detach().contiguous(), links.contiguous(), entries.contiguous()
    linked, length = linked.contiguous(), length.contiguous()
    index = torch.empty(B, Hq, count, dtype=torch.int64)
    scanned = torch.empty(B, Hq, dtype=torch.int64)
    library().foveate_walks(
        KINDS[keys.dtype],
        ctypes.c_void_p(q.data_ptr()),
        ctypes.c_void_p(keys.data_ptr()),
        (ctypes.c_int64 * 3)(*keys.stride()[:3]),
        ctypes.c_void_p(links.data_ptr()),
        ctypes.c_void_p(entries.data_ptr()),
        ctypes.c_void_p(linked.data_ptr()),
        ctypes.c_void_p(length.data_ptr()),
        ctypes.c_int64(links.shape[2]),
        ctypes.c_int64(entries.shape[2]),
        links.shape[3],
        links.shape[1],
        B,
        Hq,
        keys.shape[1],
        D,
        ctypes.c_int64(max(beam, 1)),
        expand,
        ctypes.c_int64(count),
        torch.get_num_threads(),
        ctypes.c_void_p(index.data_ptr()),
        ctypes.c_void_p(scanned.data_ptr()),
    )
    return index, scanned


def why_not_nearest(queries: Tensor, keys: Tensor) -> str | None:
    """queries [m, D], keys [n, D]."""
    if any(each.device.type != "cpu" or each.dtype != torch.float32 for each in (queries, keys)):
        return "it serves float32 on CPU"
    if not queries.numel() or not keys.numel():
        return "it needs a query and a key"
    return why_unavailable()


def nearest(queries: Tensor, keys: Tensor, count: int, bias: Tensor | None = None) -> Tensor:
    """The `count` keys [n, D] with the largest q . k + bias [n] of each query [m, D]: int64 [m, count], best first, of
    equals the lower; what is no number comes last. 1 <= count <= n."""
    (m, D), n = queries.shape, keys.shape[0]
    if keys.shape[1] != D or not 1 <= count <= n or (bias is not None and bias.shape != (n,)):
        given = f"queries {list(queries.shape)}, keys {list(keys.shape)}, count={count}"
        raise ShapeError(f"nearest: {given}, allowed: one width, 1 <= count <= keys, and a bias per key")
    queries, keys = queries.detach().contiguous(), keys.detach().contiguous()
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    out = torch.empty(m, count, dtype=torch.int64)
    library().foveate_nearest(
        ctypes.c_void_p(queries.data_ptr()),
        ctypes.c_void_p(keys.data_ptr()),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        ctypes.c_int64(m),
        ctypes.c_int64(n),
        D,
        ctypes.c_int64(count),
        torch.get_num_threads(),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out
