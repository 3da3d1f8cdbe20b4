"""States at the borders of pieces, so that the pieces of one sequence can be walked at the same time.

Each piece's own writes are summed from a zero state (`states_kernel`); then one thread block per part of a state goes
over the pieces of a sequence, S <- exp(c) S + the piece's sum, and leaves in place of each sum the state that the
piece starts from (`join_kernel`). Backwards in time alike.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime, scan_configs
from foveate.attention.backends.triton.scan_launch import Cut, steps
from foveate.attention.backends.triton.scan_parts import bounds, chunk_decay, decay_row, product


@triton.jit(do_not_specialize=["total", "tokens", "length", "per_sequence", "HEADS"])
def states_kernel(
    K, V, G, TABLE, STATES, DECAYS,
    stride_kt, stride_kh, stride_vt, stride_vh, total, tokens, length, per_sequence, HEADS,
    K_GROUP: tl.constexpr, V_GROUP: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """STATES [pieces, HEADS, DK, DV] and base-2 DECAYS [pieces, HEADS] of all pieces from which another one starts.

    Grid (key blocks * value blocks, heads, pieces).
    """
    BLOCKS_V: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    block = tl.program_id(0)
    h = tl.program_id(1)
    piece = tl.program_id(2)
    _, begin, end, first, last_piece = bounds(TABLE, piece, tokens, length, per_sequence)
    if REVERSE:
        if first:
            return
    else:
        if last_piece:
            return
    i = tl.arange(0, C)
    d = block // BLOCKS_V * BLOCK_K + tl.arange(0, BLOCK_K)
    e = block % BLOCKS_V * BLOCK_V + tl.arange(0, BLOCK_V)
    d_in, e_in = d < DK, e < DV
    k_at = K + begin * stride_kt + (h // K_GROUP).to(tl.int64) * stride_kh + i[:, None] * stride_kt + d[None, :]
    v_at = V + begin * stride_vt + (h // V_GROUP).to(tl.int64) * stride_vh + i[:, None] * stride_vt + e[None, :]
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if DECAY != 0:
        G = decay_row(G, h.to(tl.int64), begin, total, C, DECAY)
    decayed = 0.0
    chunks = tl.cdiv(end - begin, C).to(tl.int32)
    zero = tl.full([], 0, tl.int64)
    for step in range(0, chunks):
        ahead = (zero + (chunks - 1 - step if REVERSE else step)) * C
        start = begin + ahead
        there = (start + i < end)[:, None]
        k = tl.load(k_at + ahead * stride_kt, mask=there & d_in[None, :], other=0.0)
        v = tl.load(v_at + ahead * stride_vt, mask=there & e_in[None, :], other=0.0)
        if DECAY != 0:
            c, c_last = chunk_decay(G, ahead, i, tl.minimum(end - start, C).to(tl.int32), DECAY, True)
            weight = tl.exp2(c if REVERSE else tl.minimum(c_last - c, 0.0))
            v = (v * weight[:, None]).to(v.dtype)
            S = S * tl.exp2(c_last)
            decayed += c_last
        S += product(tl.trans(k), v, PRECISION, UPCAST)
    at = piece.to(tl.int64) * HEADS + h
    tl.store(STATES + at * (DK * DV) + d[:, None] * DV + e[None, :], S, mask=d_in[:, None] & e_in[None, :])
    if DECAY != 0 and block == 0:
        tl.store(DECAYS + at, decayed)


@triton.jit(do_not_specialize=["per_sequence", "HEADS"])
def join_kernel(
    STATES, DECAYS, START, FIRST, per_sequence, HEADS,
    SIZE: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Sums of pieces into states before them, in place. Grid (parts of a state, heads, sequences)."""
    h = tl.program_id(1)
    n = tl.program_id(2)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = x < SIZE
    if FIRST is not None:
        first = tl.load(FIRST + n).to(tl.int32)
        pieces = tl.load(FIRST + n + 1).to(tl.int32) - first
    else:
        first, pieces = n * per_sequence, per_sequence
    S = tl.zeros([BLOCK], tl.float32)
    if START is not None:
        S += tl.load(START + (n.to(tl.int64) * HEADS + h) * SIZE + x, mask=inside, other=0.0)
    zero = tl.full([], 0, tl.int64)
    for step in range(0, pieces):
        piece = first + (pieces - 1 - step if REVERSE else step)
        at = (zero + piece) * HEADS + h
        # The last one's sum is not there and not needed.
        more = step < pieces - 1
        own = tl.load(STATES + at * SIZE + x, mask=inside & more, other=0.0)
        tl.store(STATES + at * SIZE + x, S, mask=inside)
        if DECAY == 3:
            # Per key channel: [pieces, HEADS, K].
            c = tl.load(DECAYS + at * (SIZE // DV) + x // DV, mask=inside & more, other=0.0)
            S = S * tl.exp2(c)
        elif DECAY != 0:
            S = S * tl.exp2(tl.load(DECAYS + at, mask=more, other=0.0))
        S += own


def join(states: Tensor, decays: Tensor | None, start: Tensor | None, cut: Cut, decay: int, reverse: bool) -> None:
    """Run `join_kernel` on states [pieces, heads, K, V]; start [N, heads, K, V] float32 or None."""
    _, heads, K, V = states.shape
    block = min(1024, runtime.power_of_two(K * V))
    join_kernel[(runtime.cdiv(K * V, block), heads, cut.sequences)](
        states, decays, start, cut.first, cut.per_sequence, heads,
        SIZE=K * V, DV=V, BLOCK=block, DECAY=decay, REVERSE=reverse, num_warps=4, num_stages=4,
    )  # fmt: skip


def border_states(
    k: Tensor, v: Tensor, start: Tensor | None, heads: int, sums: Tensor | None, decay: int, cut: Cut, *,
    reverse: bool = False, config: scan_configs.ScanConfig | None = None,
) -> Tensor | None:  # fmt: skip
    """What `Walk.run` takes as states: those before each piece, or `start` [N, heads, K, V] where none is split."""
    if not cut.split:
        return start
    DK, DV = k.shape[-1], v.shape[-1]
    config = config or scan_configs.scan(DK, DV, k.element_size())
    block_k = min(config.sum_k, runtime.power_of_two(DK, 16))
    block_v = scan_configs.columns(DV, config.sum_v, config.chunk, k.element_size())
    states = torch.empty(cut.pieces, heads, DK, DV, dtype=torch.float32, device=k.device)
    decays = torch.empty(cut.pieces, heads, dtype=torch.float32, device=k.device) if decay else None
    states_kernel[(runtime.cdiv(DK, block_k) * runtime.cdiv(DV, block_v), heads, cut.pieces)](
        k, v, sums, cut.table, states, decays, *steps(k), *steps(v), cut.total, *cut.sizes, heads,
        K_GROUP=heads // k.shape[2], V_GROUP=heads // v.shape[2],
        DK=DK, DV=DV, BLOCK_K=block_k, BLOCK_V=block_v, C=config.chunk, DECAY=decay, REVERSE=reverse,
        PRECISION=runtime.dot_precision(k.dtype), UPCAST=runtime.upcast(k.dtype),
        num_warps=config.sum_warps, num_stages=config.sum_stages,
    )  # fmt: skip
    join(states, decays, start, cut, decay, reverse)
    return states
