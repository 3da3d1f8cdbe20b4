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
    """Why backend="auto" leaves a call to torch although the kernels could run it: its kind was not found correct on a
    GPU (`benchmarks/gpu_scans.py` and `gpu_scan_checks.py`)."""
    step, dtype = call.k.shape[1] == 1, call.q.dtype
    if dtype == torch.float32 or (dtype == torch.float16 and (step or call.normalize)):
        what = "single steps" if step else "normalisation" if call.normalize else "scans"
        return f"{what} in {dtype} were not checked on a GPU; backend='triton' runs them all the same"
    if call.beta is not None and not step and call.q.shape[-1] < 32:
        return f"the delta rule with K = {call.q.shape[-1]} < 32 errs by more than 5e-3; backend='triton' runs it"
    if call.normalize and call.q.shape[-1] > 128:
        return f"normalisation with K = {call.q.shape[-1]} > 128 was not checked on a GPU; backend='triton' runs it"
    if call.normalize and call.g is not None and call.g.dim() == 1 and call.g.requires_grad and torch.is_grad_enabled():
        return "gradients of fixed decays with normalisation err by up to 5e-2; backend='triton' makes them"
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
