"""`linear_scan` and `linear_step` by the Triton kernels: which calls they can run, and how a call becomes operators.

Half precision is multiplied in half precision with float32 sums, states and decays; float32 is exact. `chunk_size` is
not used: the table of `scan_configs` decides. With `normalize` a second scan, of ones, sums the keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.backends.triton import runtime, scan_ops
from foveate.attention.features import l2norm
from foveate.attention.linear_call import LinearCall

# The widest head: a thread block holds all key channels of its state (in the gradients, all value channels).
WIDEST = 256


def why_not(call: LinearCall) -> str | None:
    if call.q.dtype not in runtime.FLOATS:
        return f"q is {call.q.dtype}; the kernels take float32, bfloat16 and float16"
    for name, width in (("K", call.q.shape[-1]), ("V", call.v.shape[-1])):
        if width > WIDEST:
            return f"{name} = {width}; the kernels take heads of at most {WIDEST} channels"
    if call.beta is not None and call.g is not None and call.g.dim() == 4:
        return "a decay per key channel with beta; the kernels have scalar decays there"
    if call.scale == 0:
        return "scale = 0; the gradients divide by it"
    return None


def unchecked(call: LinearCall) -> str | None:
    """Why backend="auto" leaves a call to torch although the kernels could run it: it was found over its gate on a GPU,
    or not tried (benchmarks/results/gpu_scan_checks_h200.json)."""
    step, K = call.k.shape[1] == 1, call.q.shape[-1]
    half = call.q.dtype != torch.float32
    if call.normalize and K > 128:
        return f"normalisation with K = {K} > 128 was not checked on a GPU; backend='triton' runs it"
    if half and call.beta is not None and not step and K < 32:
        return f"the delta rule in half precision with K = {K} < 32 errs by more than 5e-3; backend='triton' runs it"
    decays = call.g is not None and call.g.requires_grad and torch.is_grad_enabled()
    # Widths that are no power of two: 2.2e-2 by the gated delta rule, 5.0e-2 with normalisation.
    if half and decays and K & (K - 1) and (call.beta is not None or call.normalize):
        return f"gradients of decays in half precision with K = {K} err by more than 2e-2; backend='triton' makes them"
    return None


def _wants_gradient(call: LinearCall) -> bool:
    inputs = (call.q, call.k, call.v, call.g, call.beta, call.initial_state)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def scan(call: LinearCall) -> tuple[Tensor, Tensor | None]:
    """o [B, T, HV, V] in q's dtype, and the final state or None."""
    q, k, v = call.q, call.k, call.v
    if call.qk_l2norm:
        q, k = (l2norm(x.float()).to(x.dtype) for x in (q, k))
    start = call.initial_state
    if start is not None:
        start = start.float().contiguous()
    offsets = None if call.offsets is None else list(call.offsets)
    grad = _wants_gradient(call)
    gate = grad and call.g is not None and call.g.requires_grad
    options = (call.scale, offsets, gate)
    if call.beta is not None:
        o, final, *_ = scan_ops.delta_scan(q, k, v, call.beta, call.g, start, *options, grad)
    elif call.normalize:
        values = v.shape[-1]
        # 16 columns alike: rows of 32 bytes are read at once, rows of 2 are not.
        ones = v.new_ones(*v.shape[:-1], 16)
        sums = None if start is None else start[..., values:].expand(*start.shape[:-1], 16).contiguous()
        start = None if start is None else start[..., :values].contiguous()
        o, final, _ = scan_ops.linear_scan(q, k, v, call.g, start, *options, True)
        mass, total, _ = scan_ops.linear_scan(q, k, ones, call.g, sums, *options, True)
        o = torch.cat([o, mass[..., :1]], -1)
        final = torch.cat([final, total[..., :1]], -1)
    else:
        o, final, _ = scan_ops.linear_scan(q, k, v, call.g, start, *options, False)
    return call.output(o), (final if call.output_final_state else None)


def step(call: LinearCall) -> tuple[Tensor, Tensor | None]:
    """One token; the state after it is a new tensor."""
    if _wants_gradient(call):
        return scan(call)
    state = None if call.initial_state is None else call.initial_state.float().contiguous()
    return scan_ops.linear_step(
        call.q, call.k, call.v, call.g, call.beta, state, call.scale, call.normalize, call.eps, call.qk_l2norm
    )
