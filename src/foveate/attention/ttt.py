"""TTT-Linear: a matrix memory with a bias, trained by mini-batches of tokens on what values add to keys.

    z_j = k_j W + b,  g_j = d/dz_j of 1/2 |LN(z_j) w + c - (v_j - k_j)|^2,  W and b those of the mini-batch's start
    z'_i = s q_i (W - eta_i sum_{j<=i} k_j^T g_j) + b - eta_i sum_{j<=i} g_j
    o_i = z'_i + LN(z'_i) w + c
    end of a mini-batch: W -= eta_C sum_j k_j^T g_j,  b -= eta_C sum_j g_j,  eta_C of the last token

The reading token's rate weighs all steps that it sees. Paper: Sun et al. 2024 (arXiv 2407.04620); a row of the table of
Miras (2504.13173).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.delta import Linear, WeightState, weight_state_scan
from foveate.attention.shapes import match


def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    gain: Tensor,
    shift: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    state: WeightState | None = None,
    chunk_size: int = 16,
    pad_tail: bool = False,
) -> tuple[Tensor, WeightState]:
    """TTT-Linear, token by token.

    Args:
        q, k, v: [B, T, H, D].    eta: [B, T, H], the inner learning rate.
        gain, shift: [H, D], w and c of the LayerNorm.    scale: s, default D ** -0.5.    eps: of the LayerNorm.
        state: what the last call returned, weights (W [B, H, D, D], b [B, H, 1, D]); default: zeros.
        chunk_size: tokens of a mini-batch.
        pad_tail: fill up a short last mini-batch as the fla library's reference does: with zeros for keys and values,
            which still step b, and the last token's eta in the last slot. It belongs to the last call.
    Returns:
        o [B, T, H, D] in q's dtype; the state after the last token, float32 (float64 for float64 inputs).
    Raises:
        ShapeError, StateError, OptionError. Gradients reach everything, also through the inner gradients.
    """
    sizes = match(q=(q, "B T H D"), k=(k, "B T H D"), v=(v, "B T H D"), eta=(eta, "B T H"))
    match(q=(q, "B T H D"), gain=(gain, "H D"), shift=(shift, "H D"))
    B, T, H, D = (sizes[letter] for letter in "BTHD")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if state is None:
        state = WeightState.start((q.new_zeros(H, D, D, dtype=wide), q.new_zeros(H, 1, D, dtype=wide)), B)
    w, c = (each.to(wide).unsqueeze(-2) for each in (gain, shift))
    missing = -(state.phase + T) % chunk_size if pad_tail else 0
    if missing:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v))
        eta = torch.cat((eta, eta.new_zeros(B, missing - 1, H), eta[:, -1:]), 1)

    def inner(linear: Linear, x: Tensor) -> Tensor:
        return linear(0, x) + linear(1, torch.ones_like(x[..., :1]))

    def guess(linear: Linear, x: Tensor) -> Tensor:
        return F.layer_norm(inner(linear, x), (D,), eps=eps) * w + c

    def read(linear: Linear, x: Tensor) -> Tensor:
        z = inner(linear, x)
        return z + F.layer_norm(z, (D,), eps=eps) * w + c

    with torch.autocast(q.device.type, enabled=False):
        o, after = weight_state_scan(
            guess,
            state,
            q * (D**-0.5 if scale is None else scale),
            k,
            v - k,
            rate=eta,
            loss_gradient=lambda y, target: y - target,
            read=read,
            rate_of="reading",
            chunk_size=chunk_size,
        )
    return o[:, :T], after
