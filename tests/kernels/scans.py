"""Calls of the linear family for the kernels' tests, beside the recurrence in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.backends.triton import scan
from foveate.attention.linear import linear_scan
from foveate.attention.linear_call import LinearCall, make_call
from tests.kernels.definitions import DEVICE, error

H, HV, K, V = 1, 2, 16, 24


def inputs(
    form: str, T: int, *, batch: int = 1, decay: float = 1.0, k: int = K, v: int = V, heads: tuple[int, int] = (H, HV)
) -> dict[str, Tensor]:
    """form: none, fixed, scalar or vector, and -delta. Keys have norm 1; strong and weak decays alternate."""
    h, hv = heads
    keys = torch.nn.functional.normalize(torch.randn(batch, T, h, k), dim=-1)
    found = {"q": torch.randn(batch, T, h, k), "k": keys, "v": torch.randn(batch, T, hv, v)}
    kind = form.removesuffix("-delta")
    shapes = {"fixed": (hv,), "scalar": (batch, T, hv), "vector": (batch, T, hv, k)}
    if kind in shapes:
        found["g"] = -decay * torch.rand(shapes[kind])
    if form.endswith("delta"):
        found["beta"] = torch.rand(batch, T, hv)
    return {name: x.to(DEVICE) for name, x in found.items()}


def make(tensors: dict[str, Tensor], **options) -> LinearCall:
    plain = dict.fromkeys(("g", "beta", "scale", "initial_state", "cu_seqlens"))
    flags = {"normalize": False, "eps": 1e-10, "qk_l2norm": False, "output_final_state": True, "chunk_size": 64}
    return make_call(**{**plain, **flags, **tensors, **options})


def run(tensors: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    o, final = scan.scan(make(tensors, **options))
    assert final is not None
    return o, final


def recurrence(tensors: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    start = options.pop("initial_state", None)
    if start is not None:
        start = start.double() if not start.requires_grad else start
    double = {name: x.double() for name, x in tensors.items()}
    o, final = linear_scan(**double, initial_state=start, output_final_state=True, backend="reference", **options)
    assert final is not None
    return o, final


def gradient_errors(
    tensors: dict[str, Tensor], start: Tensor | None, *, floor: float = 0.0, **options
) -> dict[str, float]:
    """Errors of outputs and of every gradient, for random cotangents of output and final state.

    A gradient smaller than `floor` times that of v is measured by the latter.
    """
    mine = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    theirs = {name: x.double().requires_grad_() for name, x in tensors.items()}
    starts = [None, None]
    if start is not None:
        starts = [start.clone().requires_grad_(), start.double().requires_grad_()]
    o, final = run(mine, initial_state=starts[0], **options)
    want_o, want_final = recurrence(theirs, initial_state=starts[1], **options)
    do, dfinal = torch.randn_like(want_o), torch.randn_like(want_final)
    torch.autograd.backward([want_o, want_final], [do, dfinal])
    torch.autograd.backward([o, final], [do.to(o.dtype), dfinal.float()])
    found = {"o": error(o.detach(), want_o.detach()), "final": error(final.detach(), want_final.detach())}
    for name, x in mine.items():
        want = theirs[name].grad
        least = floor * theirs["v"].grad.norm() / want.norm().clamp_min(1e-300)
        found[f"d{name}"] = error(x.grad, want) / max(1.0, float(least))
    if start is not None:
        found["dstart"] = error(starts[0].grad, starts[1].grad)
    return found
