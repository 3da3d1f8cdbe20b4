"""The C++ CPU backend: one query (or a few) per head over all keys or a list of them, each key read once per group."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.attention.backends.cpp.build import library, why_unavailable
from foveate.attention.call import Call
from foveate.attention.merge import apply_sink
from foveate.attention.plan import Dense, Tokens

KINDS = {torch.float32: 0, torch.bfloat16: 1}
MAX_ROWS = 16


def why_not(call: Call) -> str | None:
    q, k, v = call.q, call.k, call.v
    if call.bias is not None:
        return "it weighs by softmax; sigmoid weights go to torch"
    if not isinstance(call.plan, Dense | Tokens):
        return f"it reads dense keys and token lists, not {type(call.plan).__name__} plans"
    if isinstance(call.plan, Tokens) and call.plan.index.dim() != 3:
        return "it reads one token list per head, not one per query"
    if call.m * call.group > MAX_ROWS or call.m > 1:
        return f"it serves one query per head and at most {MAX_ROWS} heads per group (prompts go to torch)"
    if q.dtype not in KINDS or q.shape[-1] % 16 or v.shape[-1] % 16:
        return f"it serves float32 and bfloat16 with head sizes that 16 divides, not {q.dtype}, {q.shape[-1]}"
    if call.window is not None or call.positions.holes or call.softcap is not None or call.log_weight is not None:
        return "windows, padding, softcap and log weights go to torch"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no gradients"
    if k.stride(-1) != 1 or v.stride(-1) != 1 or not k.shape[2]:
        return "keys and values need a unit last stride and at least one token"
    if isinstance(call.plan, Tokens) and call.plan.index.shape[1] != k.shape[1]:
        return "it reads one list per KV head"
    return why_unavailable()


def why_not_segments(q: Tensor, k: Tensor, v: Tensor, rows: int) -> str | None:
    """The same question for packed segments k [R, D], v [R, Dv] with `rows` query rows each."""
    if q.device.type != "cpu" or q.dtype not in KINDS or rows > MAX_ROWS or q.shape[-1] % 16 or v.shape[-1] % 16:
        return "it serves CPU tensors, float32 or bfloat16, of a head size that 16 divides"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no gradients"
    return why_unavailable()


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """o [B, Hq, 1, Dv] in q's dtype, lse [B, Hq, 1] float32."""
    B, Hq, M, D = call.q.shape
    H, N, Dv = call.k.shape[1], call.n, call.v.shape[-1]
    q = call.q.reshape(B * H, call.group * M, D).contiguous()
    index = None
    if isinstance(call.plan, Tokens):
        plan = call.plan
        index = plan.index if plan.length is None else torch.where(plan.valid(N), plan.index, -1)
        index = index.to(torch.int64).expand(B, H, -1).contiguous()
    o, lse = decode(
        q,
        heads_at(call.k),
        heads_at(call.v),
        call.k.stride(2),
        call.v.stride(2),
        [0] * (B * H) if index is None else heads_at(index),
        [N if index is None else index.shape[2]] * (B * H),
        Dv,
        call.scale,
        limit=N,
    )
    o, lse = o.view(B, Hq, M, Dv), lse.view(B, Hq, M)
    if call.sink is not None:
        o, lse = apply_sink(o, lse, call.sink)
    return o.to(call.q.dtype), lse


def heads_at(x: Tensor) -> list[int]:
    """Addresses of the first elements of each head of x [B, H, ...], sequence after sequence."""
    first, size = x.data_ptr(), x.element_size()
    steps = x.stride(0) * size, x.stride(1) * size
    return [first + b * steps[0] + h * steps[1] for b in range(x.shape[0]) for h in range(x.shape[1])]


def decode(
    q: Tensor,
    k_at: Sequence[int],
    v_at: Sequence[int],
    k_row: int,
    v_row: int,
    list_at: Sequence[int],
    lengths: Sequence[int],
    Dv: int,
    scale: float,
    *,
    limit: int = 0,
    parts: int = 1,
    turns: tuple[Tensor, Tensor, int, bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """q [parts * S, R, D]; keys and values of its dtype by addresses: segment s from k_at[s], its rows k_row elements
    apart. Segments s, S + s, ... are attended to as if they were one.

    list_at: addresses of lengths[s] int64 slots within a segment (absent: < 0 or >= limit), 0: the first lengths[s]
    slots. turns: cos, sin [K, P] float32, contiguous, the distance of a pair's features, and whether the list is
    compact, as in `cpp_scoring.take`: the keys of lists are turned before use. Returns float32 [S, R, Dv] and lse
    [S, R]. The caller holds what addresses are of.
    """
    S, R, D = q.shape[0] // parts, q.shape[1], q.shape[2]
    out = torch.empty(S, R, Dv, dtype=torch.float32)
    lse = torch.empty(S, R, dtype=torch.float32)
    pointers, longs = ctypes.c_void_p * len(k_at), ctypes.c_int64 * len(k_at)
    library().foveate_decode(
        KINDS[q.dtype],
        ctypes.c_void_p(q.data_ptr()),
        ctypes.c_float(scale),
        pointers(*k_at),
        pointers(*v_at),
        ctypes.c_int64(k_row),
        ctypes.c_int64(v_row),
        pointers(*list_at),
        longs(*lengths),
        ctypes.c_int64(limit),
        ctypes.c_void_p(None if turns is None else turns[0].data_ptr()),
        ctypes.c_void_p(None if turns is None else turns[1].data_ptr()),
        0 if turns is None else turns[0].shape[-1],
        1 if turns is None else turns[2],
        int(turns is not None and turns[3]),
        S,
        parts,
        R,
        D,
        Dv,
        torch.get_num_threads(),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_void_p(lse.data_ptr()),
    )
    return out, lse
