"""The C++ CPU kernels of votes from keys coded in 8 bits: a choice, and a whole decode step up to it."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from foveate.attention.backends.cpp.build import library, why_unavailable
from foveate.attention.backends.cpp_plans import KINDS
from foveate.attention.backends.cpp_scoring import chosen, starts

# Beyond this head size a sum of products of codes may overflow 32 bits.
MAX_SIZE = 512


def why_not(q: Tensor, codes: Tensor) -> str | None:
    """q [B, Hq, D], codes int8 [B, Hkv, N, D]."""
    if q.device.type != "cpu" or codes.dtype != torch.int8 or q.shape[-1] % 16 or q.shape[-1] > MAX_SIZE:
        return f"it serves CPU tensors of a head size that 16 divides, at most {MAX_SIZE}"
    if codes.stride(-1) != 1 or not codes.numel() or not q.numel():
        return "codes need a unit last stride and at least one token"
    return why_unavailable()


def choose(q: Tensor, codes: Tensor, step: Tensor, scale: float, first: int, count: int) -> Tensor:
    """As `cpp_scoring.choose`: q [B, Hkv, G, D] float32 with keys step [B, Hkv, N] times codes [B, Hkv, N, D]."""
    q, step = q.contiguous(), step if step.stride(-1) == 1 else step.contiguous()
    against = (
        ctypes.c_void_p(q.data_ptr()),
        ctypes.c_void_p(codes.data_ptr()),
        starts(codes),
        ctypes.c_void_p(step.data_ptr()),
        starts(step),
        ctypes.c_int64(codes.stride(2)),
        ctypes.c_int64(codes.shape[2]),
    )
    return chosen(library().foveate_choose_bytes, against, q.shape, scale, first, count)


class TokenStep(ctypes.Structure):
    """The fields of token.cpp, where they are explained."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cos", "sin", "back_cos", "back_sin", "mean", "spread")),
        *((name, ctypes.c_void_p) for name in ("codes", "steps", "held", "index", "served", "copied")),
        *((name, ctypes.c_void_p) for name in ("keys_copied", "values_copied", "reading", "out")),
        *((name, ctypes.c_int64) for name in ("k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row")),
        *((name, ctypes.c_int64) for name in ("c_batch", "c_head", "s_batch", "s_head")),
        *((name, ctypes.c_int64) for name in ("keys", "first", "last", "count")),
        *((name, ctypes.c_int32) for name in ("kind", "batch", "heads", "group", "size", "v_size", "pairs", "span")),
        *((name, ctypes.c_int32) for name in ("threads", "lend")),
        *((name, ctypes.c_float) for name in ("scale", "threshold", "softmax_scale")),
    )


def token_step(q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Tensor | None], **numbers: Any) -> Tensor | None:
    """The step of token.cpp for q [B, Hq, 1, D], k and v, whose last token is the new one: o [B, Hq, 1, Dv] as q, or
    None, where the choice is to be copied before it is read; then the queries at their rank are in `reading`.

    For what `cpp_scoring.why_not_rows` allows, and D <= MAX_SIZE.

    tensors: cos, sin, back_cos, back_sin, mean, spread, codes, steps, held, index, served, copied, keys_copied,
    values_copied, reading as there, all but codes and steps contiguous; slots of k, v, codes and steps agree.
    numbers: first, last, count, span, lend, scale, threshold, softmax_scale.
    """
    B, Hq, _, D = q.shape
    q, codes, steps, cos = q.contiguous(), tensors["codes"], tensors["steps"], tensors["cos"]
    assert codes is not None
    assert steps is not None
    assert cos is not None
    out = q.new_empty(B, Hq, 1, v.shape[-1])
    step = TokenStep(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        **{name: None if each is None else each.data_ptr() for name, each in tensors.items()},
        out=out.data_ptr(),
        k_batch=k.stride(0),
        k_head=k.stride(1),
        k_row=k.stride(2),
        v_batch=v.stride(0),
        v_head=v.stride(1),
        v_row=v.stride(2),
        c_batch=codes.stride(0),
        c_head=codes.stride(1),
        s_batch=steps.stride(0),
        s_head=steps.stride(1),
        keys=k.shape[2],
        kind=KINDS[q.dtype],
        batch=B,
        heads=k.shape[1],
        group=Hq // k.shape[1],
        size=D,
        v_size=v.shape[-1],
        pairs=cos.shape[-1],
        threads=torch.get_num_threads(),
        **numbers,
    )
    return None if library().foveate_token_step(ctypes.byref(step)) else out
