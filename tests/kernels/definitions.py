"""Definitions in float64 that judge the kernels, and the measure of error."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    *,
    scale: float | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    log_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """counts [B, Hq, M, N]: how often each query reads each key. Returns float64 o and natural-log lse."""
    G = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(G, 1), v.double().repeat_interleave(G, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if log_weight is not None:
        scores = scores + log_weight.double().repeat_interleave(q.shape[1] // log_weight.shape[1], 1)[:, :, None]
    scores = scores + counts.double().log()
    lse = scores.logsumexp(-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.double()[None, :, None].expand_as(lse))
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    # A key that is not read must not matter, whatever it holds.
    return weights @ v.nan_to_num(0.0), lse


def causal_counts(b: int, h: int, m: int, n: int, window: int | None = None, sinks: int = 0) -> Tensor:
    q, k = torch.arange(n - m, n)[:, None], torch.arange(n)[None]
    seen = k <= q
    if window is not None:
        seen = seen & ((q - k <= window) | (k < sinks))
    return seen.double().expand(b, h, m, n).to(DEVICE)


def error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref||; a NaN gives infinity."""
    value = ((out.double() - ref).norm() / ref.norm().clamp_min(1e-300)).item()
    return value if value == value else float("inf")


def lse_error(out: Tensor, ref: Tensor) -> float:
    """Largest absolute difference; infinity where one is -inf and the other not."""
    out = out.double()
    if not torch.equal(out == -torch.inf, ref == -torch.inf):
        return float("inf")
    finite = ref > -torch.inf
    return (out - ref)[finite].abs().max().item() if finite.any() else 0.0


GATES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}


def poison(monkeypatch, *modules) -> None:
    """Every buffer that the launchers of these modules ask for starts as NaN."""

    class Poisoned:
        def __getattr__(self, name):
            return empty if name == "empty" else getattr(torch, name)

    def empty(*size, **options):
        return torch.full(size, float("nan"), **options)

    for module in modules:
        monkeypatch.setattr(module, "torch", Poisoned())
