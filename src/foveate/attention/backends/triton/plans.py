"""The Triton backend: a few queries over all or listed keys by `gather_decode`, block plans by `block_flash`.

Block and vertical-slash plans have gradients, the others none here. With sigmoid weights, for which torch has no fused
attention, dense prompts are block plans too, and few queries are left to torch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from foveate.attention.backends.triton import availability
from foveate.attention.call import Call
from foveate.attention.plan import Blocks, Dense, Plan, Tokens, VerticalSlash, Window
from foveate.attention.sparse_plan import SparsePlan, made_once

MAX_QUERIES = 16
MAX_WIDTH = 256
# Queries and keys of a block where a dense prompt is a plan of blocks.
DENSE_BLOCK = 128


def why_not(call: Call) -> str | None:
    q, k, v = call.q, call.k, call.v
    # On the CPU, which the dispatcher has refused by now, Triton's interpreter runs them.
    reason = availability.why_not_device(q) if q.is_cuda else None
    reason = reason or availability.why_not_dtypes(q)
    if reason is not None:
        return reason
    if max(q.shape[-1], v.shape[-1]) > MAX_WIDTH:
        return f"the kernels hold heads of at most {MAX_WIDTH} features, not {max(q.shape[-1], v.shape[-1])}"
    if _learns(call) and not isinstance(call.plan, Blocks | VerticalSlash) and not _dense_prompt(call):
        return f"the kernels have no gradients for {type(call.plan).__name__} plans"
    if k.stride(-1) != 1 or v.stride(-1) != 1 or call.m > call.n:
        return "keys and values need a unit last stride, and queries must not outnumber them"
    if isinstance(call.plan, Blocks | VerticalSlash) or _dense_prompt(call):
        return _why_not_blocks(call, call.plan)
    return _why_not_decode(call)


def _dense_prompt(call: Call) -> bool:
    """Whether all keys are read as a plan of blocks."""
    return call.bias is not None and isinstance(call.plan, Dense) and call.m > MAX_QUERIES


def _learns(call: Call) -> bool:
    return availability.learns(call.q, call.k, call.v, call.sink, call.log_weight)


def _why_not_decode(call: Call) -> str | None:
    plan = call.plan
    if call.bias is not None:
        return "few queries and token lists are weighed by softmax here; sigmoid weights need a prompt or a block plan"
    if not isinstance(plan, Dense | Tokens | Window):
        return f"there is no kernel for {type(plan).__name__} plans"
    if call.m > MAX_QUERIES:
        return (
            "dense prompts are left to torch's own fused attention"
            if isinstance(plan, Dense)
            else f"{type(plan).__name__} plans of more than {MAX_QUERIES} queries have no kernel"
        )
    if call.log_weight is not None and call.log_weight.stride(-1) != 1:
        return "log_weight needs a unit last stride"
    if isinstance(plan, Tokens):
        if plan.index.dim() == 4 and call.m > 1:
            return "the kernel reads one token list for all queries, not one each"
        if plan.index.shape[1] not in (1, call.k.shape[1]):
            return "the kernel reads one token list per KV head, not per query head"
    if isinstance(plan, Window) and plan.sinks and call.window is not None and call.window > plan.left:
        return "a plan with sinks inside a wider window of the model has no kernel"
    return None


def _why_not_blocks(call: Call, plan: Plan) -> str | None:
    if call.log_weight is not None or call.window is not None or not call.positions.aligned:
        return "block kernels serve aligned positions (no padding) without a window and log weights"
    if call.scale <= 0:
        return f"block kernels need scale > 0, not {call.scale}"
    if isinstance(plan, VerticalSlash):
        if call.m != call.n or plan.vertical.shape[:2] != plan.slash.shape[:2]:
            return "vertical-slash plans need M = N, and as many heads of columns as of diagonals"
        sizes, block_sizes = (plan.slash.shape[0], plan.slash.shape[1]), (plan.block, plan.block)
    elif isinstance(plan, Dense):
        return None
    else:
        assert isinstance(plan, Blocks)
        sizes, block_sizes = (plan.batch, plan.heads), (plan.block_m, plan.block_n)
        if plan.rows != -(-call.m // plan.block_m):
            return f"the plan's {plan.rows} rows of {plan.block_m} queries do not cover M = {call.m}"
    if min(size & -size for size in block_sizes) < 16:
        return f"block kernels need block sizes that 16 divides, not {block_sizes}"
    B, Hq = call.q.shape[:2]
    if sizes[0] not in (1, B) or sizes[1] not in (1, call.k.shape[1], Hq):
        return f"a plan for batch {sizes[0]} and {sizes[1]} heads does not fit batch {B} and {Hq} heads"
    return None


def attend(call: Call) -> tuple[Tensor, Tensor | None]:
    """o [B, Hq, M, Dv] in q's dtype; lse [B, Hq, M] float32 when asked for."""
    q = call.q if call.q.stride(-1) == 1 else call.q.contiguous()
    plan = None
    if isinstance(call.plan, Blocks | VerticalSlash):
        plan = lowered(call.plan, call.m, call.n)
    elif _dense_prompt(call):
        plan = every_block(call.m, call.n, call.causal, q.device)
    if plan is None:
        return _decode(call, q)
    from foveate.attention.backends.triton import ops

    return ops.block_flash(
        q,
        call.k,
        call.v,
        plan,
        scale=call.scale,
        causal=call.causal,
        sink=call.sink,
        softcap=call.softcap,
        bias=call.bias,
    )


@functools.lru_cache(maxsize=8)
def every_block(m: int, n: int, causal: bool, device: torch.device) -> SparsePlan:
    """All blocks of DENSE_BLOCK keys that a block of as many queries sees, the queries being the last M of N keys."""
    # Kept over calls, so that it must serve training even where inference made it.
    with torch.inference_mode(False):
        rows = -(-m // DENSE_BLOCK)
        # Known here too, so that nothing waits for the device.
        ends = [min((row + 1) * DENSE_BLOCK, m) + (n - m) if causal else n for row in range(rows)]
        blocks = sum(-(-end // DENSE_BLOCK) for end in ends)
        last = (torch.arange(rows, device=device) + 1).mul_(DENSE_BLOCK).clamp_(max=m) + (n - m)
        counts = -(-(last if causal else torch.full_like(last, n)) // DENSE_BLOCK)
        row_ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        row = torch.repeat_interleave(torch.arange(rows, device=device), counts, output_size=blocks)
        col = (torch.arange(row.numel(), device=device) - row_ptr[row]).to(torch.int32)
        return SparsePlan.from_csr(
            row_ptr, col, batch=1, heads=1, m=m, n=n, block_m=DENSE_BLOCK, block_n=DENSE_BLOCK
        )  # fmt: skip


def lowered(plan: Blocks | VerticalSlash, m: int, n: int) -> SparsePlan:
    """`plan.lower`, made once per plan object and size; diagonals become blocks without an [R, R] intermediate."""
    if isinstance(plan, VerticalSlash):

        def diagonals() -> SparsePlan:
            return SparsePlan.from_diagonals(plan.slash, n=n, block=plan.block, spare=True).with_columns(plan.vertical)

        return made_once(plan, ("lowered", m, n), diagonals, plan.slash, plan.vertical)
    return plan.lowered(m, n)


def _decode(call: Call, q: Tensor) -> tuple[Tensor, Tensor | None]:
    from foveate.attention.backends.triton import ops

    plan = call.plan
    B, Hkv = call.k.shape[:2]
    index = length = None
    window, sinks = call.window, 0
    if isinstance(plan, Tokens):
        index = plan.index if plan.index.dim() == 3 else plan.index[:, :, 0]
        index = index if index.stride(-1) == 1 else index.contiguous()
        length = None if plan.length is None else plan.length.expand(B, Hkv).contiguous()
    elif isinstance(plan, Window) and (window is None or plan.left < window):
        window, sinks = plan.left, plan.sinks
    # A single query that stands last sees every key that is there: then only holes matter.
    positions = call.positions
    k_at, q_at = positions.k, positions.q
    if call.m == 1 and window is None and not positions.holes:
        k_at = q_at = None
    return ops.gather_decode(
        q,
        call.k,
        call.v,
        index=index,
        length=length,
        scale=call.scale,
        causal=call.causal,
        window=window,
        sinks=sinks,
        sink=call.sink,
        softcap=call.softcap,
        log_weight=call.log_weight,
        k_positions=k_at if k_at is None or k_at.stride(-1) == 1 else k_at.contiguous(),
        q_positions=None if q_at is None else q_at.expand(B, call.m).contiguous(),
    )
