"""Block-sparse flash attention: each block of queries reads its listed blocks of keys, and single key columns.

    o[i] = sum_j p[i, j] v[j],  p = softmax over the listed, visible j of scale * q[i] . k[j],
                                or sigmoid(scale * q[i] . k[j] + bias) of each of them (arXiv 2409.04431)

A row of the plan is one program (or several, where the plan's query block is larger than the tile). Its list has the
blocks that need no mask first: one loop reads those, a second one the few that do; a third one reads the columns that
every query sees, out of a packed stripe (stripes.py), a fourth one the few beside the diagonal; all feed the same
softmax. Rows run one head after another and the longest of a head first, so that the keys in use fit in the L2 cache:
random blocks of all heads at once would come from memory.
Positions are aligned: the M queries are the last of the N keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from foveate.attention.backends.triton import configs, runtime
from foveate.attention.backends.triton.kv_compact import kv_compact
from foveate.attention.backends.triton.stripes import Stripes, read_bits, stripes
from foveate.attention.sparse_plan import SparsePlan
from foveate.errors import PlanError, ShapeError


@triton.jit
def products(q, k, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Scores of queries [M, D] and keys [N, D]: raw without a softcap, else capped and in base 2."""
    if UPCAST:
        scores = tl.dot(q.to(tl.float32), tl.trans(k).to(tl.float32), input_precision="ieee")
    else:
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)); scale then holds scale / softcap, and softcap the factor log2(e).
        scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (scale * 2.8853900817779268))))
    return scores


@triton.jit
def sigmoid(scores, scale, bias, SOFTCAP: tl.constexpr):
    """1 / (1 + exp(-s - bias)), from scores as `products` gives them and a bias in base 2; 0 for a score of -inf.

    Not by the hardware's tanh, whose error exceeds the weight of one key among ten thousand; and a squared reciprocal
    root takes 3 instructions less than a division.
    """
    if SOFTCAP:
        scale = 1.0
    root = tl.rsqrt(1.0 + tl.exp2(-bias - scores * scale))
    return root * root


@triton.jit
def _fold(
    scores, v, see, top, mass, acc, scale, bias,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile into the running softmax. The scale meets the maximum and the exponent, never all scores alone.

    see: keys [N] that count, None for all. Those that do not are read elsewhere by every query of the tile, so that the
    maximum may include them. Sigmoid weights are only summed: `top` and `mass` pass through.
    """
    if SIGMOID:
        new = top
        p = sigmoid(scores, scale, bias, SOFTCAP)
    else:
        if SOFTCAP:
            scale = 1.0
        new = tl.maximum(top, tl.max(scores, 1) * scale)
        safe = new
        if MASKED:
            safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(scores * scale - safe[:, None])
    if see is not None:
        p = tl.where(see[None, :], p, 0.0)
    if not SIGMOID:
        keep = tl.exp2(top - safe)
        mass = mass * keep + tl.sum(p, 1)
        acc = acc * keep[:, None]
    if UPCAST:
        acc += tl.dot(p, v.to(tl.float32), input_precision="ieee")
    else:
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return new, mass, acc


@triton.jit
def first_of_tile(LIST, j, count, PLAN: tl.constexpr, BLOCK: tl.constexpr):
    """First slot of tile j of a list of blocks, `count` tiles in all: a plan's block is cut into tiles."""
    SPLIT: tl.constexpr = PLAN // BLOCK
    block = tl.load(LIST + j // SPLIT, mask=j < count, other=0)
    return block * PLAN + (j % SPLIT) * BLOCK


@triton.jit
def place(
    tile, ORDER, rows, row_blocks,
    HQ: tl.constexpr, HKV: tl.constexpr, HEADS: tl.constexpr, PLAN_M: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The plan's row, the sequence (int64), the query head and the first query of a query tile.

    Tiles count the parts of the plan's block, then the query heads that share the plan's row, then its rows.
    """
    PARTS: tl.constexpr = PLAN_M // BLOCK_M
    SHARERS: tl.constexpr = 1 if HEADS == HQ else HQ // HKV
    OUTER: tl.constexpr = HKV if HEADS == 1 else 1
    outer = tile // (PARTS * SHARERS) // rows
    row = tl.load(ORDER + tile // (PARTS * SHARERS) % rows)
    head_row = row // row_blocks
    # A plan of batch 1 serves every sequence; then `outer` counts sequences too.
    b = (head_row // HEADS + outer // OUTER).to(tl.int64)
    h = (head_row % HEADS + outer % OUTER) * SHARERS + (tile // PARTS) % SHARERS
    return row, b, h, (row % row_blocks) * PLAN_M + tile % PARTS * BLOCK_M


@triton.jit
def _row_tile(
    tile, Q, K, V, KD, VD, ROW_PTR, COL, N_FULL, ORDER, KS, VS, COLUMN, BITS, FREE, CUT, SINK, OUT, LSE,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    rows, row_blocks, m, n, width, scale, softcap, bias,
    HQ: tl.constexpr, HKV: tl.constexpr, HEADS: tl.constexpr, PLAN_M: tl.constexpr, PLAN_N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head; consecutive tiles share their list, then their keys."""
    G: tl.constexpr = HQ // HKV
    row, b, h, first_query = place(tile, ORDER, rows, row_blocks, HQ, HKV, HEADS, PLAN_M, BLOCK_M)
    head_row = row // row_blocks
    hkv = (h // G).to(tl.int64)
    r = first_query + tl.arange(0, BLOCK_M)
    live = r < m
    q_pos = n - m + r
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q_at = Q + b * stride_qb + h.to(tl.int64) * stride_qh + r.to(tl.int64)[:, None] * stride_qm + d[None, :]
    q = tl.load(q_at, mask=live[:, None] & (d < D)[None, :], other=0.0)
    k_at = K + b * stride_kb + hkv * stride_kh
    v_at = V + b * stride_vb + hkv * stride_vh

    begin = tl.load(ROW_PTR + row)
    count = (tl.load(ROW_PTR + row + 1) - begin).to(tl.int32)
    full = tl.load(N_FULL + row)
    COL += begin

    if SINK is not None:
        top = tl.zeros([BLOCK_M], tl.float32) + tl.load(SINK + h).to(tl.float32) * 1.4426950408889634
        mass = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    key = tl.arange(0, BLOCK_N)

    # The next tile's place is loaded one step ahead (design/kernels.md, 2.9).
    SPLIT: tl.constexpr = PLAN_N // BLOCK_N
    start = first_of_tile(COL, 0, full * SPLIT, PLAN_N, BLOCK_N)
    for j in range(0, full * SPLIT):
        if KD is not None:
            k = KD.load([b.to(tl.int32), hkv.to(tl.int32), start, 0]).reshape(BLOCK_N, BLOCK_D)
            v = VD.load([b.to(tl.int32), hkv.to(tl.int32), start, 0]).reshape(BLOCK_N, BLOCK_DV)
        else:
            k_row = k_at + start.to(tl.int64) * stride_kn + key[:, None] * stride_kn + d[None, :]
            v_row = v_at + start.to(tl.int64) * stride_vn + key[:, None] * stride_vn + dv[None, :]
            k = tl.load(k_row) if D == BLOCK_D else tl.load(k_row, mask=(d < D)[None, :], other=0.0)
            v = tl.load(v_row) if DV == BLOCK_DV else tl.load(v_row, mask=(dv < DV)[None, :], other=0.0)
        scores = products(q, k, scale, softcap, SOFTCAP, PRECISION, UPCAST)
        top, mass, acc = _fold(scores, v, None, top, mass, acc, scale, bias, False, SOFTCAP, SIGMOID, PRECISION, UPCAST)
        start = first_of_tile(COL, j + 1, full * SPLIT, PLAN_N, BLOCK_N)

    # Smaller tiles where there are masks, so that they do not decide how many registers the kernel needs.
    EDGE_SPLIT: tl.constexpr = PLAN_N // BLOCK_E
    key = tl.arange(0, BLOCK_E)
    start = first_of_tile(COL, full * EDGE_SPLIT, count * EDGE_SPLIT, PLAN_N, BLOCK_E)
    for j in range(full * EDGE_SPLIT, count * EDGE_SPLIT):
        slot = start + key
        there = slot < n
        k_row = k_at + slot.to(tl.int64)[:, None] * stride_kn + d[None, :]
        v_row = v_at + slot.to(tl.int64)[:, None] * stride_vn + dv[None, :]
        k = tl.load(k_row, mask=there[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(v_row, mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        scores = products(q, k, scale, softcap, SOFTCAP, PRECISION, UPCAST)
        see = there[None, :]
        if CAUSAL:
            see = see & (slot[None, :] <= q_pos[:, None])
        scores = tl.where(see, scores, float("-inf"))
        top, mass, acc = _fold(scores, v, None, top, mass, acc, scale, bias, True, SOFTCAP, SIGMOID, PRECISION, UPCAST)
        start = first_of_tile(COL, j + 1, count * EDGE_SPLIT, PLAN_N, BLOCK_E)

    if KS is not None:
        # Stripes belong to query heads where the plan does, else to KV heads.
        STRIPES: tl.constexpr = HQ if HEADS == HQ else HKV
        stripe = (b * STRIPES + (h if HEADS == HQ else hkv)) * width
        KS += stripe * D
        VS += stripe * DV
        COLUMN += head_row.to(tl.int64) * width
        BITS += row.to(tl.int64) * (width // 32)
        cut = tl.load(CUT + row)
        whole = tl.load(FREE + row) // BLOCK_N * BLOCK_N
        at = tl.arange(0, BLOCK_N)
        bits = read_bits(BITS, at, whole)
        for _ in range(0, whole, BLOCK_N):
            k_row = KS + at[:, None] * D + d[None, :]
            v_row = VS + at[:, None] * DV + dv[None, :]
            k = tl.load(k_row) if D == BLOCK_D else tl.load(k_row, mask=(d < D)[None, :], other=0.0)
            v = tl.load(v_row) if DV == BLOCK_DV else tl.load(v_row, mask=(dv < DV)[None, :], other=0.0)
            scores = products(q, k, scale, softcap, SOFTCAP, PRECISION, UPCAST)
            top, mass, acc = _fold(
                scores, v, bits != 0, top, mass, acc, scale, bias, False, SOFTCAP, SIGMOID, PRECISION, UPCAST
            )
            at += BLOCK_N
            bits = read_bits(BITS, at, whole)

        at = whole + tl.arange(0, BLOCK_E)
        slot = tl.load(COLUMN + at, mask=at < cut, other=0)
        bits = read_bits(BITS, at, cut)
        for _ in range(whole, cut, BLOCK_E):
            there = bits != 0
            k_row = KS + at[:, None] * D + d[None, :]
            v_row = VS + at[:, None] * DV + dv[None, :]
            k = tl.load(k_row, mask=there[:, None] & (d < D)[None, :], other=0.0)
            v = tl.load(v_row, mask=there[:, None] & (dv < DV)[None, :], other=0.0)
            scores = products(q, k, scale, softcap, SOFTCAP, PRECISION, UPCAST)
            see = there[None, :]
            if CAUSAL:
                see = see & (slot[None, :] <= q_pos[:, None])
            scores = tl.where(see, scores, float("-inf"))
            top, mass, acc = _fold(
                scores, v, None, top, mass, acc, scale, bias, True, SOFTCAP, SIGMOID, PRECISION, UPCAST
            )
            at += BLOCK_E
            slot = tl.load(COLUMN + at, mask=at < cut, other=0)
            bits = read_bits(BITS, at, cut)

    if not SIGMOID:
        some = mass > 0
        acc = acc / tl.where(some, mass, 1.0)[:, None]
    out_row = (b * HQ + h) * m + r
    tl.store(
        OUT + out_row[:, None] * DV + dv[None, :],
        acc.to(OUT.dtype.element_ty),
        mask=live[:, None] & (dv < DV)[None, :],
    )
    if LSE is not None:
        lse = tl.where(some, (top + tl.log2(tl.where(some, mass, 1.0))) * 0.6931471805599453, float("-inf"))
        tl.store(LSE + out_row, lse, mask=live)


@triton.jit(do_not_specialize=["tiles", "rows", "row_blocks", "m", "n", "width", "scale", "softcap", "bias"])
def block_flash_kernel(
    Q, K, V, KD, VD, ROW_PTR, COL, N_FULL, ORDER, KS, VS, COLUMN, BITS, FREE, CUT, SINK, OUT, LSE,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    tiles, rows, row_blocks, m, n, width, scale, softcap, bias,
    HQ: tl.constexpr, HKV: tl.constexpr, HEADS: tl.constexpr, PLAN_M: tl.constexpr, PLAN_N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """One tile per program, or all tiles dealt to a grid that fills the device once."""
    if PERSISTENT:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _row_tile(
                tile, Q, K, V, KD, VD, ROW_PTR, COL, N_FULL, ORDER, KS, VS, COLUMN, BITS, FREE, CUT, SINK, OUT, LSE,
                stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
                rows, row_blocks, m, n, width, scale, softcap, bias,
                HQ, HKV, HEADS, PLAN_M, PLAN_N, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BLOCK_E, CAUSAL, SOFTCAP,
                SIGMOID, PRECISION, UPCAST,
            )  # fmt: skip
    else:
        _row_tile(
            tl.program_id(0),
            Q, K, V, KD, VD, ROW_PTR, COL, N_FULL, ORDER, KS, VS, COLUMN, BITS, FREE, CUT, SINK, OUT, LSE,
            stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
            rows, row_blocks, m, n, width, scale, softcap, bias,
            HQ, HKV, HEADS, PLAN_M, PLAN_N, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BLOCK_E, CAUSAL, SOFTCAP,
            SIGMOID, PRECISION, UPCAST,
        )  # fmt: skip


def _descriptor(x: Tensor, block_n: int) -> TensorDescriptor | None:
    """x [B, H, N, D] for the tensor memory accelerator, None where its strides do not allow it."""
    B, H, N, D = x.shape
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:3])
    if not aligned or runtime.power_of_two(D, 16) != D:
        return None
    return TensorDescriptor(x, [B, H, N, D], list(x.stride()), [1, 1, block_n, D])


def check_plan(plan: SparsePlan, batch: int, heads: int, kv_heads: int, m: int, n: int) -> None:
    if plan.batch not in (1, batch) or plan.heads not in (1, kv_heads, heads) or (plan.m, plan.n) != (m, n):
        raise PlanError(
            f"a plan of batch {plan.batch}, {plan.heads} heads, M={plan.m}, N={plan.n} does not fit q of batch "
            f"{batch}, {heads} heads over {kv_heads}, M={m}, N={n}; allowed: batch 1 or {batch}, heads 1, {kv_heads} "
            f"or {heads}"
        )
    if min(power_in(plan.block_m), power_in(plan.block_n)) < 16:
        raise PlanError(f"plan blocks {plan.block_m} x {plan.block_n}, allowed: multiples of 16")
    if plan.columns is not None and plan.columns.shape[:2] != (plan.batch, plan.heads):
        raise PlanError(f"columns {list(plan.columns.shape)}, allowed: [{plan.batch}, {plan.heads}, V]")


def power_in(x: int) -> int:
    """The largest power of two that divides x."""
    return x & -x


def block_flash_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    *,
    scale: float | None = None,
    causal: bool = True,
    sink: Tensor | None = None,
    softcap: float | None = None,
    bias: float | None = None,
    return_lse: bool = True,
    columns: Stripes | None = None,
    config: configs.BlockConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of q [B, Hq, M, D] over the blocks and columns of `plan`, with softmax or sigmoid weights.

    Args:
        k, v: [B, Hkv, N, D] and [B, Hkv, N, Dv], last stride 1.
        plan: heads 1, Hkv or Hq; batch 1 or B; block sizes multiples of 16.
        scale: > 0; default D ** -0.5.    causal: a query sees no later key (queries are the last M of N keys).
        sink: [Hq], a learned logit per query head.    softcap: before masks.
        bias: of sigmoid weights, which have no lse and no sink; None: softmax weights.
        columns: the plan's columns where they are prepared already; else they are made from it, once per plan.
    Returns:
        o [B, Hq, M, Dv] in q's dtype, lse [B, Hq, M] float32, natural log (None unless asked for, and for sigmoid);
        o = 0 and lse = -inf for a query that reads nothing.
    Reads O(listed blocks x block_n + columns) keys per query block; nothing M x N is stored.
    """
    B, Hq, M, D = q.shape
    _, Hkv, N, DV = v.shape
    if Hq % Hkv or k.shape != (B, Hkv, N, D) or v.shape[0] != B:
        raise ShapeError(f"q {list(q.shape)} does not fit k {list(k.shape)} and v {list(v.shape)}")
    runtime.check_floats(q=q, k=k, v=v)
    runtime.check_unit_stride(q=q, k=k, v=v)
    check_plan(plan, B, Hq, Hkv, M, N)
    if bias is not None and sink is not None:
        raise ShapeError("sink with a bias, allowed: one of them (sigmoid weights have no normaliser)")
    scale = D**-0.5 if scale is None else scale
    if scale <= 0:
        raise ShapeError(f"scale={scale}, allowed: > 0 (negate q instead)")
    out = torch.empty(B, Hq, M, DV, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, Hq, M, dtype=torch.float32, device=q.device) if return_lse and bias is None else None
    if not out.numel():
        return out, lse
    config = config or configs.blocks(max(D, DV), q.element_size(), plan.block_m, N)
    block_m = min(power_in(plan.block_m), config.block_m)
    block_n = min(power_in(plan.block_n), config.block_n)
    row_blocks = runtime.cdiv(M, plan.block_m)
    rows = plan.batch * plan.heads * row_blocks
    tiles = B * Hq * row_blocks * (plan.block_m // block_m)
    stripe_k = stripe_v = None
    column = bits = free = cut = None
    width = 0
    if columns is None and plan.columns is not None and plan.columns.shape[-1]:
        columns = stripes(plan, causal)
    if columns is not None:
        column, bits, free, cut = columns.column, columns.bits, columns.free, columns.cut
        width = column.shape[1]
        stripe_k, stripe_v = kv_compact(k, v, column.view(plan.batch, plan.heads, width))
    descriptors = (_descriptor(k, block_n), _descriptor(v, block_n)) if config.tma else (None, None)
    if None in descriptors:
        descriptors = (None, None)
    grid = tiles
    if config.persistent:
        grid = min(tiles, runtime.multiprocessors(q.device.index) * config.per_sm)
    block_flash_kernel[(grid,)](
        q, k, v, *descriptors, plan.row_ptr, plan.col, plan.n_full, plan.order,
        stripe_k, stripe_v, column, bits, free, cut, sink, out, lse,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        v.stride(0), v.stride(1), v.stride(2),
        tiles, rows, row_blocks, M, N, width,
        scale / softcap if softcap else scale * runtime.LOG2E, (softcap or 0.0) * runtime.LOG2E,
        (bias or 0.0) * runtime.LOG2E,
        HQ=Hq, HKV=Hkv, HEADS=plan.heads, PLAN_M=plan.block_m, PLAN_N=plan.block_n,
        D=D, DV=DV, BLOCK_D=runtime.power_of_two(D, 16), BLOCK_DV=runtime.power_of_two(DV, 16),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_E=min(block_n, config.edge), CAUSAL=causal, SOFTCAP=bool(softcap),
        SIGMOID=bias is not None, PRECISION=runtime.dot_precision(q.dtype), UPCAST=runtime.upcast(q.dtype),
        PERSISTENT=config.persistent,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.registers,
    )  # fmt: skip
    return out, lse
