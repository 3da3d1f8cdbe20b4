"""The channel blocks of HybridLM: a dense SwiGLU, and experts that are upcycled from it.

    SwiGLU(x) = (silu(x W_gate) * x W_up) W_down
    p = softmax(x W_router) over N experts;  y = sum over S shared of E_j(x) + sum over the k largest p_i of p_i E_i(x)

Upcycling (SpikingBrain, arXiv 2509.05276): every expert starts as a copy of the trained dense block and the router at
random, so that y is about (S + k / N) SwiGLU(x); the copies are scaled to undo it.

| scale | each of the three matrices of an expert is multiplied by | y against SwiGLU(x) where p = 1/N |
|---|---|---|
| cube-root | (S + k / N)^(-1/3): the report's, 0.98 for N = 16, k = S = 1 | the same but for silu's bend |
| down | W_down by 1 / (S + k / N), the others by 1 | the same |
| none | 1 | (S + k / N) times it |

Papers: Shazeer 2020 (arXiv 2002.05202); SpikingBrain Technical Report, Pan et al. 2025. p is not normalised again over
the k experts, as the scale above has it. The report breaks the experts' symmetry by noise in routing and does not say
which: here it is normal, on the router's logits, in training. It names no balancing loss, and there is none.

Cost: k + S blocks per token; the experts run one after another, each on its own tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import OptionError
from foveate.mixers.base import exact

SCALES = ("cube-root", "down", "none")
MATRICES = ("gate_proj", "up_proj", "down_proj")


class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class UpcycledMLP(nn.Module):
    """N routed and S shared SwiGLU blocks; a token reads the shared ones and its `top` best.

    dim: C.    width: hidden width of each.    experts: N.    top: k.    shared: S.    noise: std of what training
    adds to the router's logits.
    """

    def __init__(
        self, dim: int, width: int, *, experts: int, top: int = 1, shared: int = 1, noise: float = 0.0
    ) -> None:
        super().__init__()
        self.top, self.noise = top, noise
        self.router = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(dim, width) for _ in range(experts))
        self.shared = nn.ModuleList(SwiGLU(dim, width) for _ in range(shared))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the experts that tokens x [T, C] are sent to, both [T, k]; weights in float32."""
        logits = self.router(x)
        logits = logits.to(exact(logits))
        if self.training and self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        best = logits.softmax(-1).topk(self.top, -1)
        return best.values, best.indices

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C] in x's dtype."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(tokens)
        y = torch.zeros_like(tokens)
        for block in self.shared:
            y = y + block(tokens)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if token.numel():
                read = weights[token, place, None].to(y.dtype) * expert(tokens[token])
                y = y.index_add(0, token, read.to(y.dtype))
        return y.view(x.shape)


def upcycled_weights(
    dense: dict[str, Tensor], *, experts: int, top: int, shared: int, scale: str, router: Tensor
) -> dict[str, Tensor]:
    """The tensors of an UpcycledMLP by name, from a SwiGLU's: copies, scaled as the module's docstring says.

    dense: "gate_proj.weight", "up_proj.weight" [width, C] and "down_proj.weight" [C, width].    router: [N, C].
    """
    if scale not in SCALES:
        raise OptionError(f"upcycle: scale={scale!r}, allowed: {SCALES}")
    total = shared + top / experts
    factors = {"cube-root": dict.fromkeys(MATRICES, total ** (-1 / 3)), "down": {"down_proj": 1 / total}, "none": {}}
    made = {"router.weight": router}
    for kind, count in (("experts", experts), ("shared", shared)):
        for number in range(count):
            for matrix in MATRICES:
                made[f"{kind}.{number}.{matrix}.weight"] = (
                    factors[scale].get(matrix, 1.0) * dense[f"{matrix}.weight"].detach()
                ).clone()
    return made
