"""Gradients of block-sparse flash attention: queries by the plan's rows, keys and values by its transposed lists, and
single key columns by their stripes (block_flash_bwd_columns.py).

    p[i, j] = exp(s[i, j] - lse[i]),  s = scale * q k (capped),  D[i] = sum(dO[i] * O[i]) - dlse[i]
    dS = p * (dO V^T - D) (times 1 - tanh^2 under a cap);  dQ = scale * dS K;  dK = scale * dS^T Q;  dV = p^T dO
    d sink = - sum over queries of exp(sink - lse) * D
    sigmoid weights: p = sigmoid(s + bias),  dS = p * (1 - p) * dO V^T, with no lse and no D; the rest as above

Scores are recomputed from the log-sum-exp. Every gradient is summed by one thread block in a fixed order (that of a
column by several, and joined in a fixed order), so there are no atomics and two runs agree bit for bit. The kernel of
keys and values computes its scores transposed: a product's result is never transposed (design/kernels.md, 6.1). The
heads of a KV group are summed in the kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import configs, runtime
from foveate.attention.backends.triton.block_flash import check_plan, first_of_tile, place, power_in
from foveate.attention.backends.triton.block_flash_bwd_columns import Columns, add_columns, query_columns
from foveate.attention.backends.triton.block_flash_bwd_parts import key_tile, query_tile
from foveate.attention.backends.triton.stripes import Stripes, stripes
from foveate.attention.sparse_plan import ByKeys, SparsePlan


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(
    O, DO, LSE, DLSE, STATE, rows, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """STATE [2, rows]: the log-sum-exp in base 2 (inf for a query that reads nothing: its p is 0), and D."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = r < rows
    d = tl.arange(0, BLOCK_DV)
    there = live[:, None] & (d < DV)[None, :]
    o = tl.load(O + r[:, None] * DV + d[None, :], mask=there, other=0.0).to(tl.float32)
    do = tl.load(DO + r[:, None] * DV + d[None, :], mask=there, other=0.0).to(tl.float32)
    lse = tl.load(LSE + r, mask=live, other=0.0)
    delta = tl.sum(o * do, 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + r, mask=live, other=0.0)
    tl.store(STATE + r, tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634), mask=live)
    tl.store(STATE + rows + r, delta, mask=live)


@triton.jit(do_not_specialize=["rows", "row_blocks", "m", "n", "total", "scale", "softcap", "bias", "factor", "width"])
def query_gradient_kernel(
    Q, K, V, DO, STATE, DQ, ROW_PTR, COL, N_FULL, ORDER, KS, VS, COLUMN, BITS, FREE, CUT,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    rows, row_blocks, m, n, total, scale, softcap, bias, factor, width,
    HQ: tl.constexpr, HKV: tl.constexpr, HEADS: tl.constexpr, PLAN_M: tl.constexpr, PLAN_N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles,), placed as in the forward kernel. total: queries of all heads, the length of STATE's rows."""
    row, b, h, first_query = place(tl.program_id(0), ORDER, rows, row_blocks, HQ, HKV, HEADS, PLAN_M, BLOCK_M)
    hkv = (h // (HQ // HKV)).to(tl.int64)
    r = first_query + tl.arange(0, BLOCK_M)
    live = r < m
    q_pos = n - m + r
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    out_row = (b * HQ + h) * m + r
    q_at = Q + b * stride_qb + h.to(tl.int64) * stride_qh + r.to(tl.int64)[:, None] * stride_qm + d[None, :]
    q = tl.load(q_at, mask=live[:, None] & (d < D)[None, :], other=0.0)
    do = tl.load(DO + out_row[:, None] * DV + dv[None, :], mask=live[:, None] & (dv < DV)[None, :], other=0.0)
    lse = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if not SIGMOID:
        lse = tl.load(STATE + out_row, mask=live, other=float("inf"))
        delta = tl.load(STATE + total + out_row, mask=live, other=0.0)
    k_at = K + b * stride_kb + hkv * stride_kh
    v_at = V + b * stride_vb + hkv * stride_vh
    begin = tl.load(ROW_PTR + row)
    count = (tl.load(ROW_PTR + row + 1) - begin).to(tl.int32)
    full = tl.load(N_FULL + row)
    COL += begin
    SPLIT: tl.constexpr = PLAN_N // BLOCK_N
    key = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start = first_of_tile(COL, 0, full * SPLIT, PLAN_N, BLOCK_N)
    for j in range(0, full * SPLIT):
        slot = start + key
        k_row = k_at + slot.to(tl.int64)[:, None] * stride_kn + d[None, :]
        v_row = v_at + slot.to(tl.int64)[:, None] * stride_vn + dv[None, :]
        k = tl.load(k_row) if D == BLOCK_D else tl.load(k_row, mask=(d < D)[None, :], other=0.0)
        v = tl.load(v_row) if DV == BLOCK_DV else tl.load(v_row, mask=(dv < DV)[None, :], other=0.0)
        acc = query_tile(k, v, None, acc, q, do, lse, delta, scale, softcap, bias, SOFTCAP, SIGMOID, PRECISION, UPCAST)
        start = first_of_tile(COL, j + 1, full * SPLIT, PLAN_N, BLOCK_N)
    start = first_of_tile(COL, full * SPLIT, count * SPLIT, PLAN_N, BLOCK_N)
    for j in range(full * SPLIT, count * SPLIT):
        slot = start + key
        there = slot < n
        k_row = k_at + slot.to(tl.int64)[:, None] * stride_kn + d[None, :]
        v_row = v_at + slot.to(tl.int64)[:, None] * stride_vn + dv[None, :]
        k = tl.load(k_row, mask=there[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(v_row, mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        see = there[None, :]
        if CAUSAL:
            see = see & (slot[None, :] <= q_pos[:, None])
        acc = query_tile(k, v, see, acc, q, do, lse, delta, scale, softcap, bias, SOFTCAP, SIGMOID, PRECISION, UPCAST)
        start = first_of_tile(COL, j + 1, count * SPLIT, PLAN_N, BLOCK_N)
    if KS is not None:
        # Stripes belong to query heads where the plan does, else to KV heads.
        stripe = (b * HQ + h if HEADS == HQ else b * HKV + hkv) * width
        acc = query_columns(
            acc, q, do, lse, delta, q_pos, row, row // row_blocks, stripe, KS, VS, COLUMN, BITS, FREE, CUT, width,
            scale, softcap, bias, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, SOFTCAP, SIGMOID, PRECISION, UPCAST,
        )  # fmt: skip
    tl.store(
        DQ + out_row[:, None] * D + d[None, :],
        (acc * factor).to(DQ.dtype.element_ty),
        mask=live[:, None] & (d < D)[None, :],
    )


@triton.jit(do_not_specialize=["key_blocks", "m", "n", "total", "scale", "softcap", "bias", "factor", "width"])
def key_gradient_kernel(
    Q, K, V, DO, STATE, DK, DV_OUT, PTR, ROW, N_MASKED, ORDER, SUM_K, SUM_V, PLACE,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    key_blocks, m, n, total, scale, softcap, bias, factor, width,
    HQ: tl.constexpr, HKV: tl.constexpr, HEADS: tl.constexpr, BATCHED: tl.constexpr, PLAN_M: tl.constexpr,
    PLAN_N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr, SOFTCAP: tl.constexpr,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (parts of key blocks, key blocks, KV heads, sequences, in one number); a KV head's query heads in turn.

    Key blocks go longest list first, by the lists of the group's first head. SUM_K, SUM_V, PLACE: what columns have
    added up already, and where (`Columns`).
    """
    PARTS: tl.constexpr = PLAN_N // BLOCK_N
    SPLIT: tl.constexpr = PLAN_M // BLOCK_M
    G: tl.constexpr = HQ // HKV
    tile = tl.program_id(0)
    head = tile // PARTS // key_blocks
    b = (head // HKV).to(tl.int64)
    hkv = head % HKV
    plan_head = 0
    if HEADS == HQ:
        plan_head = hkv * G
    elif HEADS == HKV:
        plan_head = hkv
    if BATCHED:
        plan_head += head // HKV * HEADS
    block = tl.load(ORDER + plan_head * key_blocks + tile // PARTS % key_blocks) % key_blocks
    slot = block * PLAN_N + tile % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    there = slot < n
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    k_row = K + b * stride_kb + hkv.to(tl.int64) * stride_kh + slot.to(tl.int64)[:, None] * stride_kn + d[None, :]
    v_row = V + b * stride_vb + hkv.to(tl.int64) * stride_vh + slot.to(tl.int64)[:, None] * stride_vn + dv[None, :]
    # Keys past the last one only spoil gradients of their own, which are not stored.
    k = tl.load(k_row, mask=there[:, None] & (d < D)[None, :], other=0.0)
    v = tl.load(v_row, mask=there[:, None] & (dv < DV)[None, :], other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for g in range(G):
        h = (hkv * G + g).to(tl.int64)
        listed = plan_head * key_blocks + block
        if HEADS == HQ:
            listed += g * key_blocks
        begin = tl.load(PTR + listed)
        count = (tl.load(PTR + listed + 1) - begin).to(tl.int32) * SPLIT
        masked = 0
        if CAUSAL:
            masked = tl.load(N_MASKED + listed) * SPLIT
        rows = ROW + begin
        q_at = Q + b * stride_qb + h * stride_qh
        do_at = DO + (b * HQ + h) * m * DV
        lse_at = STATE
        delta_at = STATE
        if not SIGMOID:
            lse_at += (b * HQ + h) * m
            delta_at = lse_at + total
        if CAUSAL:
            start = first_of_tile(rows, 0, masked, PLAN_M, BLOCK_M)
            for j in range(0, masked):
                dk, dv_acc = key_tile(
                    start, None, k, v, dk, dv_acc, slot, q_at, do_at, lse_at, delta_at, stride_qm, m, n, scale, softcap,
                    bias, True, EVEN, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, SOFTCAP, SIGMOID, PRECISION, UPCAST,
                )  # fmt: skip
                start = first_of_tile(rows, j + 1, masked, PLAN_M, BLOCK_M)
        start = first_of_tile(rows, masked, count, PLAN_M, BLOCK_M)
        for j in range(masked, count):
            dk, dv_acc = key_tile(
                start, None, k, v, dk, dv_acc, slot, q_at, do_at, lse_at, delta_at, stride_qm, m, n, scale, softcap,
                bias, False, EVEN, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, SOFTCAP, SIGMOID, PRECISION, UPCAST,
            )  # fmt: skip
            start = first_of_tile(rows, j + 1, count, PLAN_M, BLOCK_M)
    if PLACE is not None:
        for g in range(G if HEADS == HQ else 1):
            stripe = b * HQ + hkv * G + g if HEADS == HQ else b * HKV + hkv
            dk, dv_acc = add_columns(
                dk, dv_acc, SUM_K, SUM_V, PLACE, plan_head + g, stripe, slot, n, width, D, DV, BLOCK_D, BLOCK_DV
            )
    out_row = head.to(tl.int64) * n + slot
    tl.store(
        DK + out_row[:, None] * D + d[None, :],
        (dk * factor).to(DK.dtype.element_ty),
        mask=there[:, None] & (d < D)[None, :],
    )
    tl.store(
        DV_OUT + out_row[:, None] * DV + dv[None, :],
        dv_acc.to(DV_OUT.dtype.element_ty),
        mask=there[:, None] & (dv < DV)[None, :],
    )


def _state(do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor) -> Tensor:
    """`delta_kernel`'s STATE as [2, B, Hq, M]."""
    total, DV = lse.numel(), o.shape[3]
    state = torch.empty(2, *lse.shape, dtype=torch.float32, device=o.device)
    block_dv = runtime.power_of_two(DV, 16)
    rows_at_once = max(1, 8192 // block_dv)
    if total:
        delta_kernel[(runtime.cdiv(total, rows_at_once),)](
            o.contiguous(), do, lse.contiguous(), None if dlse is None else dlse.contiguous(), state, total,
            DV=DV, BLOCK_DV=block_dv, BLOCK=rows_at_once, num_warps=4,
        )  # fmt: skip
    return state


def block_flash_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    lse: Tensor | None,
    plan: SparsePlan,
    *,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    bias: float | None = None,
    lists: ByKeys | None = None,
    columns: Stripes | None = None,
    config: tuple[configs.BackwardConfig, configs.BackwardConfig] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `block_flash_fwd` at its inputs and results, for gradients `do` of o and `dlse` of lse.

    lists, columns: the plan's transposed lists, and its columns as kernels read them, where they are made already. With
    a bias (sigmoid weights) dlse, o and lse are not read, and may be None.
    Returns dq, dk, dv (contiguous, in their inputs' dtypes) and D [B, Hq, M] float32, from which a sink's gradient
    follows (None with a bias).
    """
    B, Hq, M, D = q.shape
    _, Hkv, N, DV = v.shape
    check_plan(plan, B, Hq, Hkv, M, N)
    scale = D**-0.5 if scale is None else scale
    do = do.contiguous()
    dq = torch.empty(B, Hq, M, D, dtype=q.dtype, device=q.device)
    dk = torch.empty(B, Hkv, N, D, dtype=k.dtype, device=k.device)
    dv = torch.empty(B, Hkv, N, DV, dtype=v.dtype, device=v.device)
    by_query, by_key = config or configs.backward(max(D, DV), q.element_size())
    block_d, block_dv = runtime.power_of_two(D, 16), runtime.power_of_two(DV, 16)
    total = B * Hq * M
    state = None
    if bias is None:
        assert o is not None
        assert lse is not None
        state = _state(do, dlse, o, lse)
    if not total:
        return dq, dk.zero_(), dv.zero_(), None if state is None else state[1]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    factors = (
        scale / softcap if softcap else scale * runtime.LOG2E, (softcap or 0.0) * runtime.LOG2E,
        (bias or 0.0) * runtime.LOG2E, scale,
    )  # fmt: skip
    shape = {
        "HQ": Hq, "HKV": Hkv, "HEADS": plan.heads, "PLAN_M": plan.block_m,
        "D": D, "DV": DV, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "CAUSAL": causal, "SOFTCAP": bool(softcap),
        "SIGMOID": bias is not None, "PRECISION": runtime.dot_precision(q.dtype), "UPCAST": runtime.upcast(q.dtype),
    }  # fmt: skip
    most_m, most_n = power_in(plan.block_m), power_in(plan.block_n)
    block_m, block_n = min(most_m, by_query.block_m), min(most_n, by_query.block_n)
    single, width = None, 0
    listed: tuple[Tensor | None, ...] = (None,) * 6
    sums: tuple[Tensor | None, ...] = (None,) * 3
    if columns is None and plan.columns is not None and plan.columns.shape[-1]:
        columns = stripes(plan, causal)
    if columns is not None:
        single = Columns.of(columns, k, v, plan)
        width = single.width
        listed = (single.keys, single.values, columns.column, columns.bits, columns.free, columns.cut)
    query_gradient_kernel[(B * Hq * plan.row_blocks * (plan.block_m // block_m),)](
        q, k, v, do, state, dq, plan.row_ptr, plan.col, plan.n_full, plan.order, *listed, *strides,
        plan.batch * plan.heads * plan.row_blocks, plan.row_blocks, M, N, total, *factors, width,
        PLAN_N=plan.block_n, BLOCK_M=block_m, BLOCK_N=block_n, **shape,
        num_warps=by_query.num_warps, num_stages=by_query.num_stages,
    )  # fmt: skip
    lists = lists or plan.by_keys
    block_m, block_n = min(most_m, by_key.block_m), min(most_n, by_key.block_n)
    if single is not None:
        sums = (*single.gradients(do, q, state, plan, by_key, block_m, factors[:3], shape), single.place)
    key_gradient_kernel[(B * Hkv * plan.key_blocks * (plan.block_n // block_n),)](
        q, k, v, do, state, dk, dv, lists.ptr, lists.row, lists.n_masked, lists.order, *sums, *strides,
        plan.key_blocks, M, N, total, *factors, width,
        BATCHED=plan.batch > 1, EVEN=M % plan.block_m == 0, PLAN_N=plan.block_n, BLOCK_M=block_m, BLOCK_N=block_n,
        **shape, num_warps=by_key.num_warps, num_stages=by_key.num_stages,
    )  # fmt: skip
    return dq, dk, dv, None if state is None else state[1]
