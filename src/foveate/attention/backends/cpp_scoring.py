"""The C++ CPU kernels of selection: scores against all keys, and the slots of the best scores."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from foveate.attention.backends.cpp.build import library, why_unavailable
from foveate.attention.backends.cpp_plans import KINDS


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
    starts = [b * k.stride(0) + h * k.stride(1) for b in range(B) for h in range(H)]
    library().foveate_scores(
        KINDS[k.dtype],
        ctypes.c_void_p(q.data_ptr()),
        ctypes.c_void_p(k.data_ptr()),
        (ctypes.c_int64 * (B * H))(*starts),
        ctypes.c_int64(k.stride(2)),
        ctypes.c_int64(N),
        B * H,
        G,
        D,
        torch.get_num_threads(),
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
