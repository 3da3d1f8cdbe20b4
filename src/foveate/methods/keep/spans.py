"""Elastic spans: what masking an attention entry costs, candidate rules for spans, and the choice among them.

The calibration side of MoA (moa.py). A rule (alpha, beta) gives a head the span alpha + beta N at N tokens. All
functions are pure; lengths and spans count tokens, layouts count blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import OptionError, ShapeError


def influence(q: Tensor, k: Tensor, v: Tensor, grad_o: Tensor, *, scale: float | None = None) -> Tensor:
    """How much the loss is expected to fall when one entry of the weights A is masked and its row renormalised, with
    the sign turned: E [B, Hq, N, N], 0 above the diagonal, in float32 (float64 for float64). O(N^2) memory.

        E_ij = -A_ij (GA_ij - sum_k GA_ik A_ik) / (1 - A_ij + eps),  GA = grad_o v^T;  row 0: -A_00 GA_00

    q: [B, Hq, N, D], k, v: [B, Hkv, N, D], rotated; grad_o: [B, Hq, N, Dv], gradient of the loss with respect to the
    attention output. First order: exact for a loss that is linear in A. eps is float32's.
    """
    N, D = q.shape[2:]
    G = q.shape[1] // k.shape[1]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v, grad_o = (
        q.to(exact),
        k.to(exact).repeat_interleave(G, 1),
        v.to(exact).repeat_interleave(G, 1),
        grad_o.to(exact),
    )
    causal = torch.ones(N, N, dtype=torch.bool, device=q.device).tril()
    scores = q @ k.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    slope = grad_o @ v.transpose(-1, -2)
    change = slope - (slope * weights).sum(-1, keepdim=True)
    made = -weights * change / (1 - weights + torch.finfo(torch.float32).eps)
    # A first query has one key only: without it nothing is left to renormalise.
    made[:, :, 0] = -weights[:, :, 0] * slope[:, :, 0]
    return made.masked_fill(~causal, 0.0)


def block_influence(signed: Tensor, block: int) -> Tensor:
    """Sums of |E| over block x block tiles: [B, H, N, N] -> [B, H, N / block, N / block]; N a multiple of block."""
    N = signed.shape[-1]
    if N % block:
        raise ShapeError(f"influence over {N} tokens does not divide into blocks of {block}; profile another length")
    return signed.abs().unflatten(-1, (-1, block)).sum(-1).unflatten(-2, (-1, block)).sum(-2)


@dataclass(frozen=True)
class Rules:
    """Candidate rules, ordered by their span at the greatest target length: alpha, beta float64 [R]."""

    alpha: Tensor
    beta: Tensor

    def blocks(self, length: int, block: int) -> Tensor:
        """Blocks of the band at `length`, the diagonal one included: int64 [R], at least 1."""
        span = torch.floor(self.alpha / block) + self.beta * (length / block)
        return span.trunc().long().clamp_min(1)

    def layouts(self, length: int, block: int) -> Tensor:
        """Bool [R, n, n], n = length / block: query block i reads key block j <= i when i - j < blocks or j = 0."""
        n = length // block
        row, col = torch.arange(n)[:, None], torch.arange(n)
        return (col <= row) & ((row - col < self.blocks(length, block)[:, None, None]) | (col == 0))


def candidate_rules(alphas: Tensor, betas: Tensor, *, profiled: int, target: int, least: int) -> Rules:
    """The pairs whose span fits the lengths `profiled` and `target` and is positive at `least` tokens.

    alphas, betas: the grids, [A] and [B]. Ordered by the span at `target`, equal ones as in the grid, alpha first.
    """
    alpha, beta = (each.flatten() for each in torch.meshgrid(alphas.double(), betas.double(), indexing="ij"))
    fits = (alpha + beta * profiled <= profiled) & (alpha + beta * target <= target) & (alpha + beta * least > 0)
    alpha, beta = alpha[fits], beta[fits]
    order = (alpha + beta * target).argsort(stable=True)
    return Rules(alpha[order], beta[order])


def default_grid(*, profiled: int, least: int) -> tuple[Tensor, Tensor]:
    """The published grids: alpha from -least to `profiled` in steps of about 1024, nine beta in [0, 1]."""
    steps = (profiled + least) // 1024 + 1
    return torch.linspace(-least, profiled, steps, dtype=torch.float64), torch.linspace(0, 1, 9, dtype=torch.float64)


def masked_loss(blocks: Tensor, layouts: Tensor) -> Tensor:
    """Influence of the causal blocks that each rule leaves out: blocks [..., n, n], layouts [R, n, n] -> [..., R]."""
    causal = torch.ones(layouts.shape[-2:], dtype=torch.bool, device=layouts.device).tril()
    left_out = (causal & ~layouts).to(blocks.dtype)
    return torch.einsum("...ij,rij->...r", blocks, left_out.to(blocks.device))


def densities(layouts: Tensor) -> Tensor:
    """Share of the keys that must be stored: the greatest number of blocks in a row over all: [R] float64."""
    return layouts.sum(-1).amax(-1).double() / layouts.shape[-1]


def allocate(loss: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """One rule per head with the least total loss within a budget: int64 [heads]. Exact.

    loss: [heads, R]; sizes: int64 [R], what a rule costs, e.g. blocks stored; budget: what all heads may cost together.
    O(heads R budget) time, O(heads budget) memory. One length, no limit on rules per layer (the authors solve for
    several lengths at once, with at most two rules per layer). Ties go to the lower rule.
    """
    heads, count = loss.shape
    if sizes.shape != (count,) or int(sizes.min()) < 0:
        raise ShapeError(f"sizes {list(sizes.shape)} do not fit loss {list(loss.shape)}: [R], none below 0")
    if heads * int(sizes.min()) > budget:
        raise OptionError(
            f"budget={budget}, allowed: >= {heads * int(sizes.min())}, which {heads} heads cost with the cheapest rule"
        )
    best = torch.zeros(budget + 1, dtype=torch.float64)
    taken = []
    for own in loss.double().cpu():
        options = torch.full((count, budget + 1), torch.inf, dtype=torch.float64)
        for rule, size in enumerate(sizes.tolist()):
            if size <= budget:
                options[rule, size:] = best[: budget + 1 - size] + own[rule]
        best, choice = options.min(0)
        taken.append(choice)
    chosen, left = [], budget
    for choice in reversed(taken):
        chosen.append(int(choice[left]))
        left -= int(sizes[chosen[-1]])
    return torch.tensor(chosen[::-1])
