"""Block-sparse attention by torch's flex_attention (compiled), for block plans and dense causal calls.

Kept for comparison and for devices without Triton kernels of ours; each new shape compiles for seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.attention.call import Call
from foveate.attention.plan import Blocks, Dense

_compiled: Any = None


def why_not(call: Call) -> str | None:
    if call.bias is not None:
        return "flex weighs by softmax; a score_mod cannot make sigmoid weights"
    if not isinstance(call.plan, Blocks | Dense):
        return f"flex runs Dense and Blocks plans, not {type(call.plan).__name__}"
    if call.m != call.n or not call.positions.aligned:
        return "flex runs self-contained prompts (M = N, no padding)"
    if call.softcap is not None or call.log_weight is not None or call.window is not None or call.sink is not None:
        return "flex runs without softcap, log_weight, window and sink here"
    if call.q.device.type == "cpu" and call.need_lse:
        return "flex returns no log-sum-exp on CPU"
    return None


def attend(call: Call) -> tuple[Tensor, Tensor | None]:
    """o [B, Hq, M, Dv]; lse [B, Hq, M] natural log when asked for (CUDA)."""
    from torch.nn.attention.flex_attention import flex_attention

    global _compiled
    if _compiled is None:
        _compiled = torch.compile(flex_attention, dynamic=False)
    grouped = call.q.shape[1] != call.k.shape[1]
    q, k, v = (each.contiguous() for each in (call.q, call.k, call.v))
    result = _compiled(
        q, k, v, block_mask=block_mask(call), scale=call.scale, enable_gqa=grouped, return_lse=call.need_lse
    )
    return result if call.need_lse else (result, None)


def block_mask(call: Call) -> Any:
    """The call's plan as torch's BlockMask, causal inside the partial blocks."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    if isinstance(call.plan, Dense):
        return create_block_mask(causal, None, None, call.m, call.n, device=str(call.q.device))
    assert isinstance(call.plan, Blocks)
    plan = call.plan
    tiles = plan.block_mask(-(-call.n // plan.block_n))
    counts = tiles.sum(-1).to(torch.int32)
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        counts, order, BLOCK_SIZE=(plan.block_m, plan.block_n), mask_mod=causal, seq_lengths=(call.m, call.n)
    )
