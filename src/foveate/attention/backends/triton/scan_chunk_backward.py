"""`linear_scan` without delta rule and with at most a scalar decay: the launches of its forward and backward pass.

The gradients of q, k and v are walks (see `scan_chunk`). That of a decay needs no kernel over pairs of tokens: o
depends on g only through sums between two tokens, so with S_t the state after token t and R_t its gradient by later
tokens

    dg_t = <S_T, R_T> + sum_{i >= t} (q_i . dq_i - k_i . dk_i)

for any T >= t; T is the end of t's piece, and the row products come out of the walks in float32. Pieces are kept short
(`LONGEST`) where this is wanted, since rounding in both terms adds up over a piece.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.attention.backends.triton import scan_configs
from foveate.attention.backends.triton.scan_chunk import Walk
from foveate.attention.backends.triton.scan_launch import Cut, decay_sums, kind_of, rows_of, sum_from_end
from foveate.attention.backends.triton.scan_split import border_states

LONGEST = 1024


def start_of(initial: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A tensor for final states: empty sequences keep what stands in it."""
    if initial is None:
        return torch.zeros(shape, dtype=torch.float32, device=device)
    return initial.clone()


def cut_of(
    q: Tensor, v: Tensor, offsets: Sequence[int] | None, config: scan_configs.ScanConfig, gate: bool
) -> Cut:  # fmt: skip
    return Cut.fill(q, v, offsets, config, longest=LONGEST if gate else None)


def scan_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None, scale: float,
    offsets: Sequence[int] | None, gate: bool, config: scan_configs.ScanConfig | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """o [B, T, HV, V], final state [N, HV, K, V], states before pieces [pieces, HV, K, V] (None: nothing is split).

    gate: whether a gradient of g will be wanted.
    """
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    HV, DK, DV = v.shape[2], q.shape[3], v.shape[3]
    config = config or scan_configs.scan(DK, DV, q.element_size())
    cut, decay = cut_of(q, v, offsets, config, gate), kind_of(g)
    sums = decay_sums(g, cut, config.chunk)
    states = border_states(k, v, initial, HV, sums, decay, cut, config=config)
    final = start_of(initial, (cut.sequences, HV, DK, DV), q.device)
    o, _ = Walk(HV, decay, sums, cut, scale).run(q, k, v, states, final=final, out_dtype=out_dtype, config=config)
    return o, final, states if cut.split else None


def scan_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None, scale: float,
    offsets: Sequence[int] | None, gate: bool, final: Tensor, states: Tensor | None,
    do: Tensor, dfinal: Tensor | None, config: scan_configs.ScanConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g (None unless `gate`) and of the initial state."""
    q, k, v, do = rows_of(q), rows_of(k), rows_of(v), rows_of(do.to(q.dtype))
    HV, DK, DV = v.shape[2], q.shape[3], v.shape[3]
    config = config or scan_configs.scan(DK, DV, q.element_size())
    cut, decay = cut_of(q, v, offsets, config, gate), kind_of(g)
    sums = decay_sums(g, cut, config.chunk)
    # R is the states' gradient without the factor `scale`, which the walks apply.
    end = None if dfinal is None else dfinal.contiguous() / scale
    wide = torch.float32 if q.shape[2] < HV else q.dtype
    before = states if cut.split else initial
    dq, q_rows = Walk(HV, decay, sums, cut, scale, transposed=True).run(
        do, v, k, before, other=q if gate else None, out_dtype=wide, config=config
    )
    R = border_states(q, do, end, HV, sums, decay, cut, reverse=True, config=config)
    dstart = start_of(end, (cut.sequences, HV, DK, DV), q.device)
    back = Walk(HV, decay, sums, cut, scale, reverse=True)
    dv, _ = back.run(k, q, do, R, final=dstart, config=config)
    dk, k_rows = Walk(HV, decay, sums, cut, scale, reverse=True, transposed=True).run(
        v, do, q, R, other=k if gate else None, out_dtype=wide, config=config
    )
    dg = None
    if gate:
        assert g is not None
        assert q_rows is not None
        assert k_rows is not None
        dg = gate_gradient(q_rows - k_rows, before, final, R, scale, cut, g)
    return fold(dq, q), fold(dk, k), dv, dg, dstart * scale


def gate_gradient(
    rows: Tensor, states: Tensor | None, final: Tensor, R: Tensor | None, scale: float, cut: Cut, g: Tensor
) -> Tensor:
    """dg from row products [B, T, HV] (or [B, T, HV, K], with the products <S, R> per key channel)."""
    axes = (-1,) if rows.dim() == 4 else (-1, -2)
    if R is None:
        anchor = rows.new_zeros(cut.pieces, *rows.shape[2:])
    else:
        after = cut.after(states, final) if cut.split and states is not None else cut.by_piece(final)
        anchor = scale * (after * (R if cut.split else cut.by_piece(R))).sum(axes)
    dg = sum_from_end(rows.flatten(2).flatten(0, 1), anchor.flatten(1), cut).view(rows.shape)
    return dg.sum((0, 1)).to(g.dtype) if g.dim() == 1 else dg.to(g.dtype)


def fold(x: Tensor, like: Tensor) -> Tensor:
    """Gradients per value head [B, T, HV, K] summed over those that share a q/k head."""
    H = like.shape[2]
    if x.shape[2] > H:
        x = x.unflatten(2, (H, -1)).sum(3)
    return x.to(like.dtype)
