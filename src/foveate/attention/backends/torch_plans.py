"""The torch backend: one function per kind of plan, none of which computes what the plan does not read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foveate.attention.backends.torch_blocks import attend_blocks, attend_vertical_slash
from foveate.attention.backends.torch_dense import attend_masked, attend_tokens, finish
from foveate.attention.backends.torch_window import attend_window
from foveate.attention.call import Call
from foveate.attention.plan import Blocks, Dense, PerHead, Tokens, VerticalSlash, Window
from foveate.attention.positions import Positions


def why_not(call: Call) -> str | None:
    blocky = isinstance(call.plan, Blocks | VerticalSlash)
    if blocky and (call.softcap is not None or call.log_weight is not None):
        return "block plans with softcap or log_weight run on the reference only"
    if not isinstance(call.plan, Dense | Window | Tokens | Blocks | VerticalSlash | PerHead):
        return f"it has no path for {type(call.plan).__name__}"
    return None


def attend(call: Call) -> tuple[Tensor, Tensor | None]:
    """o [B, Hq, M, Dv] in q's dtype; lse [B, Hq, M] float32 when asked for."""
    return finish(call, *_by_plan(call))


def _by_plan(call: Call) -> tuple[Tensor, Tensor | None]:
    match call.plan:
        case Dense():
            return attend_masked(call, call.k, call.v, call.positions)
        case Window() as plan:
            return attend_window(call, plan)
        case Tokens() as plan:
            return attend_tokens(call, plan)
        case Blocks() as plan:
            return attend_blocks(call, plan)
        case VerticalSlash() as plan:
            return attend_vertical_slash(call, plan)
        case PerHead() as plan:
            return _per_head(call, plan)
    raise AssertionError(f"why_not let {type(call.plan).__name__} through")


def _per_head(call: Call, plan: PerHead) -> tuple[Tensor, Tensor | None]:
    outputs, lses = [], []
    for head, own in enumerate(plan.plans):
        queries = slice(head * call.group, (head + 1) * call.group)
        k_at = call.positions.k
        positions = call.positions
        if k_at is not None and k_at.shape[1] > 1:
            positions = Positions(positions.q, k_at[:, head][:, None], positions.holes, positions.ordered)
        weight = None if call.log_weight is None else call.log_weight[:, head : head + 1]
        part = replace(
            call,
            q=call.q[:, queries],
            k=call.k[:, head : head + 1],
            v=call.v[:, head : head + 1],
            plan=own,
            positions=positions,
            log_weight=weight,
            sink=None,
            need_lse=call.bias is None,
        )
        o, lse = _by_plan(part)
        outputs.append(o)
        if lse is not None:
            lses.append(lse)
    return torch.cat(outputs, 1), torch.cat(lses, 1) if lses else None
