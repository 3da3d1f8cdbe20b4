"""One token of linear attention for decoding: the recurrence itself, the state read once and written once.

    S' = exp(g) S        w = v, or beta (v - k S')        S <- S' + k^T w        o = scale q S

All in float32, with the L2 norm of q and k and the division by the sum of keys (`normalize`) inside. A thread block has
all key channels and some value channels of one head. Cost: 8 K V bytes of state per head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime
from foveate.attention.backends.triton.scan_launch import kind_of


@triton.jit(do_not_specialize=["scale", "eps", "HEADS"])
def step_kernel(
    Q, K, V, G, BETA, STATE, OUT, AFTER,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_gb, stride_gh, stride_bb, stride_bh,
    scale, eps, HEADS,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr, NORM: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Grid (value blocks, heads, batch). STATE (or None) and AFTER [B, HEADS, DK, DV]; SUM: v's last column is 1."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_K)
    e = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    d_in, e_in = d < DK, e < DV
    inside = d_in[:, None] & e_in[None, :]
    VALUES: tl.constexpr = DV - 1 if SUM else DV
    q = tl.load(Q + b * stride_qb + h // GROUP * stride_qh + d, mask=d_in, other=0.0).to(tl.float32)
    k = tl.load(K + b * stride_kb + h // GROUP * stride_kh + d, mask=d_in, other=0.0).to(tl.float32)
    v = tl.load(V + b * stride_vb + h * stride_vh + e, mask=e < VALUES, other=0.0).to(tl.float32)
    if SUM:
        v = tl.where(e == VALUES, 1.0, v)
    if NORM:
        q = q * tl.rsqrt(tl.sum(q * q, 0) + 1e-6)
        k = k * tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    factor = tl.full([BLOCK_K], 1.0, tl.float32)
    if DECAY == 3:
        factor = tl.exp(tl.load(G + b * stride_gb + h * stride_gh + d, mask=d_in, other=0.0).to(tl.float32))
    elif DECAY != 0:
        factor = factor * tl.exp(tl.load(G + b * stride_gb + h * stride_gh).to(tl.float32))
    at = (b * HEADS + h) * (DK * DV) + (d[:, None] * DV + e[None, :])
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if STATE is not None:
        S += tl.load(STATE + at, mask=inside, other=0.0) * factor[:, None]
    if BETA is not None:
        beta = tl.load(BETA + b * stride_bb + h * stride_bh).to(tl.float32)
        v = beta * (v - tl.sum(S * k[:, None], 0))
    S += k[:, None] * v[None, :]
    tl.store(AFTER + at, S, mask=inside)
    o = tl.sum(S * q[:, None], 0) * scale
    if SUM:
        # Every block needs the sum of keys, the state's last column.
        keys = k
        if STATE is not None:
            column = (b * HEADS + h) * (DK * DV) + d * DV + VALUES
            keys += tl.load(STATE + column, mask=d_in, other=0.0) * factor
        o = o / (tl.sum(keys * q, 0) * scale + eps)
    tl.store(OUT + (b * HEADS + h) * VALUES + e, o.to(OUT.dtype.element_ty), mask=e < VALUES)


def recurrent_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor | None, scale: float,
    normalize: bool, eps: float, qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [B, 1, HV, V] in q's dtype and the new state float32, for arguments shaped as those of `linear_step`."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    B, _, HV, values = v.shape
    DK, DV = q.shape[3], values + normalize
    out = torch.empty(B, 1, HV, values, dtype=q.dtype, device=q.device)
    after = torch.empty(B, HV, DK, DV, dtype=torch.float32, device=q.device)
    decay = kind_of(g)
    g_strides = (0, 0)
    if g is not None:
        g = g if g.dim() < 4 or g.stride(-1) == 1 else g.contiguous()
        g_strides = (0, g.stride(0)) if g.dim() == 1 else (g.stride(0), g.stride(2))
    b_strides = (0, 0) if beta is None else (beta.stride(0), beta.stride(2))
    block_v = 32 if B * HV * runtime.cdiv(DV, 32) >= runtime.multiprocessors(q.device.index) else 16
    for part in runtime.batches(B, 1):
        own_g = g if g is None or g.dim() == 1 else runtime.part_of(g, part)
        tensors = (None if x is None else runtime.part_of(x, part) for x in (beta, state, out, after))
        step_kernel[(runtime.cdiv(DV, block_v), HV, part.stop - part.start)](
            *(runtime.part_of(x, part) for x in (q, k, v)), own_g, *tensors,
            q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2), *g_strides, *b_strides,
            scale, eps, HV,
            GROUP=HV // q.shape[2], DK=DK, DV=DV, BLOCK_K=runtime.power_of_two(DK, 16), BLOCK_V=block_v,
            DECAY=decay, NORM=qk_l2norm, SUM=normalize, num_warps=4,
        )  # fmt: skip
    return out, after
