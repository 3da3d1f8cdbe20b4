"""`linear_scan` with delta rule: the launches of its forward and backward pass.

Forward: `delta_chunk`. Backward, with M the prediction errors, N = beta M what is written, R_t the gradient of S_t and
E = dv (`delta_chunk_backward`):

    dq_t = scale S_t do_t                   a walk over writes k^T N, transposed
    dk_t = R_t N_t - (S_t - k_t^T N_t) E_t  a reverse walk over the writes scale q^T do and -k^T E, and a strict walk
    dbeta_t = M_t . r_t

    dg_t = <S_T, R'_T> + sum_{i >= t} (q_i . dq_i - k_i . (R_i N_i) - k_i . ((S_i - k_i^T N_i) E_i))

with T the end of t's piece and R'_T the gradient of S_T by later tokens: what reads the state counts with plus, what
writes it with minus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.attention.backends.triton import delta_chunk, delta_chunk_backward, runtime, scan_configs
from foveate.attention.backends.triton.scan_chunk import Walk
from foveate.attention.backends.triton.scan_chunk_backward import LONGEST, fold, gate_gradient, start_of
from foveate.attention.backends.triton.scan_launch import Cut, decay_sums, kind_of, rows_of, steps


@dataclass(frozen=True)
class Kept:
    """What the backward pass needs of the forward one: errors M [B, T, HV, V], and for split sequences the states
    before pieces [pieces, HV, K, V] and the pieces' matrices [pieces, HV, K, K]."""

    errors: Tensor | None
    states: Tensor | None
    maps: Tensor | None


def _cut(
    q: Tensor, v: Tensor, offsets: Sequence[int] | None, gate: bool, config: scan_configs.DeltaConfig
) -> Cut:  # fmt: skip
    return Cut.fill(q, v, offsets, config, longest=LONGEST if gate else None)


def _sizes(q: Tensor, heads: int, DV: int, config: scan_configs.DeltaConfig, decay: int) -> dict[str, object]:
    DK = q.shape[3]
    return {
        "K_GROUP": heads // q.shape[2],
        "DK": DK,
        "DV": DV,
        "BLOCK_K": runtime.power_of_two(DK, 16),
        "C": config.chunk,
        "DECAY": decay,
        "PRECISION": runtime.dot_precision(q.dtype),
        "UPCAST": runtime.upcast(q.dtype),
    }


def delta_forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial: Tensor | None, scale: float,
    offsets: Sequence[int] | None, gate: bool, keep: bool, config: scan_configs.DeltaConfig | None = None,
) -> tuple[Tensor, Tensor, Kept]:  # fmt: skip
    """o [B, T, HV, V], final state [N, HV, K, V], and what a backward pass needs (errors only with `keep`)."""
    q, k, v, beta = rows_of(q), rows_of(k), rows_of(v), rows_of(beta.unsqueeze(-1)).squeeze(-1)
    B, T, HV, DV = v.shape
    DK = q.shape[3]
    config = config or scan_configs.delta(DK, DV, q.element_size())
    cut, decay = _cut(q, v, offsets, gate, config), kind_of(g)
    sums = decay_sums(g, cut, config.chunk)
    prepared = delta_chunk.prepare(q, k, v, beta, sums, decay, scale, cut, config)
    sizes = _sizes(q, HV, DV, config, decay)
    strides = (*steps(q), *steps(k), cut.total, prepared[2].shape[1], *cut.sizes, scale, HV)
    states, maps = initial, None
    if cut.split:
        states = torch.empty(cut.pieces, HV, DK, DV, dtype=torch.float32, device=q.device)
        maps = torch.empty(cut.pieces, HV, DK, DK, dtype=torch.float32, device=q.device)
        block_v = scan_configs.columns(max(DK, DV), config.sum_v, config.chunk, q.element_size())
        delta_chunk.delta_kernel[(runtime.cdiv(DV, block_v) + runtime.cdiv(DK, block_v), HV, cut.pieces)](
            None, k, *prepared, sums, states, maps, cut.table, None, None, None, *strides,
            **sizes, BLOCK_V=block_v, LOCAL=True, EVERY=keep, SPLIT=True,
            num_warps=config.sum_warps, num_stages=config.sum_stages,
        )  # fmt: skip
        delta_chunk.join(states, maps, initial, cut, False, _join_precision(q, keep))
    o = torch.empty(B, T, HV, DV, dtype=q.dtype, device=q.device)
    errors = torch.empty_like(o) if keep else None
    final = start_of(initial, (cut.sequences, HV, DK, DV), q.device)
    block_v = scan_configs.columns(DV, config.block_v, config.chunk, q.element_size())
    delta_chunk.delta_kernel[(runtime.cdiv(DV, block_v), HV, cut.pieces)](
        q, k, *prepared, sums, states, None, cut.table, o, errors, final, *strides,
        **sizes, BLOCK_V=block_v, LOCAL=False, EVERY=False, SPLIT=cut.split,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return o, final, Kept(errors, states if cut.split else None, maps)


def _join_precision(q: Tensor, train: bool) -> str:
    """Gradients of gates subtract what is made of these states; outputs take them in half precision anyway."""
    if q.dtype == torch.float32:
        return "ieee"
    return "tf32x3" if train else "tf32"


def delta_backward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial: Tensor | None, scale: float,
    offsets: Sequence[int] | None, gate: bool, final: Tensor, kept: Kept,
    do: Tensor, dfinal: Tensor | None, config: scan_configs.DeltaConfig | None = None,
    walk_config: scan_configs.ScanConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of q, k, v, beta, g (None unless `gate`) and of the initial state."""
    q, k, v, do, beta = rows_of(q), rows_of(k), rows_of(v), rows_of(do), rows_of(beta.unsqueeze(-1)).squeeze(-1)
    HV, DK, DV = v.shape[2], q.shape[3], v.shape[3]
    config = config or scan_configs.delta(DK, DV, q.element_size())
    # The walks read the same sums of decays, so they take the same chunk.
    walk_config = replace(walk_config or scan_configs.scan(DK, DV, q.element_size()), chunk=config.chunk)
    cut, decay = _cut(q, v, offsets, gate, config), kind_of(g)
    sums = decay_sums(g, cut, config.chunk)
    assert kept.errors is not None
    R, dstart, E, products = _errors_gradient(
        q, k, do, beta, sums, decay, scale, cut, kept, dfinal, config, v.dtype
    )  # fmt: skip
    N = (kept.errors * beta.unsqueeze(-1)).to(q.dtype)
    before = kept.states if cut.split else initial
    walk = Walk(HV, decay, sums, cut, scale, transposed=True)
    wide = torch.float32 if q.shape[2] < HV else q.dtype
    dq, q_rows = walk.run(do, N, k, before, other=q if gate else None, out_dtype=wide, config=walk_config)
    written, written_rows = replace(walk, reverse=True).run(
        N, do, q, R, second=(E, k), other=k if gate else None, out_dtype=torch.float32, config=walk_config
    )
    dk, read_rows = replace(walk, strict=True, scale=-1.0).run(
        E, N, k, before, other=k if gate else None, add=written, out_dtype=wide, config=walk_config
    )
    dg = None
    if gate:
        assert g is not None
        assert q_rows is not None
        assert written_rows is not None
        assert read_rows is not None
        dg = gate_gradient(q_rows - written_rows + read_rows, before, final, R, 1.0, cut, g)
    return fold(dq, q), fold(dk, k), E, products.to(beta.dtype), dg, dstart


def _errors_gradient(
    q: Tensor, k: Tensor, do: Tensor, beta: Tensor, sums: Tensor | None, decay: int, scale: float, cut: Cut,
    kept: Kept, dfinal: Tensor | None, config: scan_configs.DeltaConfig, dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """R after pieces (or sequences), R before sequences, E = dv, and dbeta [B, T, HV] float32."""
    B, T, HV, DV = do.shape
    DK = q.shape[3]
    w, u = delta_chunk_backward.prepare_back(q, k, do, beta, sums, decay, scale, cut, config)
    sizes = _sizes(q, HV, DV, config, decay)
    strides = (*steps(q), *steps(k), *steps(do), beta.stride(1), beta.stride(2), cut.total, *cut.sizes, scale, HV)
    R = None if dfinal is None else dfinal.contiguous()
    dstart = start_of(R, (cut.sequences, HV, DK, DV), q.device)
    kernel = delta_chunk_backward.delta_back_kernel
    block_v = scan_configs.columns(DV, config.back_v, config.chunk, q.element_size())
    if cut.split:
        assert kept.maps is not None
        sums_of_pieces = torch.empty(cut.pieces, HV, DK, DV, dtype=torch.float32, device=q.device)
        kernel[(runtime.cdiv(DV, block_v), HV, cut.pieces)](
            q, k, do, w, u, beta, sums, None, sums_of_pieces, cut.table, None, None, None, *strides,
            **sizes, BLOCK_V=block_v, LOCAL=True, SPLIT=True,
            num_warps=config.back_warps, num_stages=config.back_stages,
        )  # fmt: skip
        delta_chunk.join(sums_of_pieces, kept.maps, R, cut, True, _join_precision(q, True))
        R = sums_of_pieces
    blocks = runtime.cdiv(DV, block_v)
    E = torch.empty(B, T, HV, DV, dtype=dtype, device=q.device)
    rows = torch.empty(blocks, B, T, HV, dtype=torch.float32, device=q.device)
    kernel[(blocks, HV, cut.pieces)](
        q, k, do, w, u, beta, sums, kept.errors, R, cut.table, E, rows, dstart, *strides,
        **sizes, BLOCK_V=block_v, LOCAL=False, SPLIT=cut.split,
        num_warps=config.back_warps, num_stages=config.back_stages,
    )  # fmt: skip
    return R, dstart, E, rows.sum(0)
