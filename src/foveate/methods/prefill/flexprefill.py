"""FlexPrefill: each head of a long prompt chooses its own sparse pattern and its own budget.  (arXiv 2502.20766)

The last block of queries gives the true distribution over key blocks, and a cheap pooled estimate of it. Where the
two agree, the head takes a map of pooled queries against pooled keys for every row; elsewhere it extends the
columns and diagonals that the last block attends to. Blocks are taken until their estimated mass reaches `gamma`.

    P = softmax(scale Qhat K^T), Qhat the last `block` queries; v[j] = column means; s[c] = sums along diagonals / block
    vb, sb: v and s summed over blocks; kb, qb: mean keys and queries per block
    a = softmax over blocks of mean_r(scale Qhat_r) . kb;  d = sqrt(JSD(a, vb)), natural log
    query-aware (d < tau): map softmax(scale qb kb^T) over all rows, entries until their sum exceeds gamma n, together
        with the minimum of columns and diagonals; else: columns and diagonals until gamma of v and of s

Shapes: q [B, Hq, N, D] -> a Blocks plan of Hq heads. Estimation costs O(block N D + n^2 D) per head, n = N / block;
P is formed head by head. Follows the authors' code where it differs from the paper: query-aware heads also read the
minimum of columns and diagonals, the budget of tokens becomes blocks by // 128 + 1 whatever the block size, and a
diagonal's offset covers one block diagonal only. Differs from the code: zero probabilities count as 0 log 0 = 0 in
the divergence (there they make NaN and the head falls to columns and diagonals). Serves prompts that stand alone
(nothing stored before; each row of a left-padded batch by itself); other steps, layers with a sliding window, and
prompts of at most max(2 block, min_budget) tokens, are dense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import attend
from foveate.attention.plan import Blocks, Dense, Plan
from foveate.attention.statistics import block_means
from foveate.methods.base import Method
from foveate.methods.step import Phase, Step
from foveate.options import option
from foveate.registry import register

# The authors' code divides token budgets by this, whatever the block size.
BUDGET_TOKENS_PER_BLOCK = 128


@register(
    "flexprefill",
    kind="prefill",
    paper="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
    arxiv="2502.20766",
    year=2025,
    applies_to="pretrained",
    exact={"gamma": 1.0, "min_budget": 10**6},
    small={"gamma": 0.5, "block": 16, "min_budget": 32, "tau": 0.0},
    known={"causality": "the last queries of the prompt choose the blocks of all rows, by the paper's design"},
)
@dataclass(frozen=True, kw_only=True)
class FlexPrefill(Method):
    """Computes, of a long prompt, the key blocks that each head's own last queries say it needs."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"prefill"})
    steady: ClassVar[bool] = True

    gamma: float = option(0.9, "share of attention mass that the chosen blocks must reach", above=0, at_most=1)
    tau: float = option(0.1, "greatest divergence at which a head is query-aware; 0: never", at_least=0)
    block: int = option(128, "tokens per block", one_of=(16, 32, 64, 128))
    min_budget: int = option(512, "least tokens per pattern", at_least=1)
    max_budget: int | None = option(None, "most tokens per pattern; none: no limit", at_least=1)

    def plan(self, step: Step) -> Plan:
        alone = step.phase == "prefill" and step.cache.stored == step.m and step.positions.aligned
        if not alone or self._short(step.m) or step.window is not None:
            return Dense()
        return self.block_plan(step.q, step.k, step.scale)

    def _short(self, tokens: int) -> bool:
        return tokens <= max(2 * self.block, math.ceil(self.min_budget / self.block) * self.block)

    def attend(self, step: Step) -> Tensor:
        if step.phase == "prefill" and step.cache.holes and step.cache.stored == step.m and step.window is None:
            return self._attend_rows(step)
        return step.attend(self.plan(step))

    def _attend_rows(self, step: Step) -> Tensor:
        """A left-padded batch: each row's real tokens are a prompt of their own."""
        out = step.q.new_zeros(*step.q.shape[:3], step.v.shape[-1])
        for b, at in enumerate(step.query_positions()):
            real = slice(int((at < 0).sum()), None)
            q, k, v = (each[b : b + 1, :, real] for each in (step.q, step.k, step.v))
            plan = Dense() if self._short(q.shape[2]) else self.block_plan(q, k, step.scale)
            step.record(plan, m=q.shape[2], share=1 / step.q.shape[0])
            out[b : b + 1, :, real] = attend(q, k, v, plan, scale=step.scale, sink=step.sink, softcap=step.softcap)
        return out

    def block_plan(self, q: Tensor, k: Tensor, scale: float) -> Blocks:
        """The blocks of q [B, Hq, N, D] and k [B, Hkv, N, D], rotated: a plan of Hq heads, exact causal inside."""
        return Blocks.from_mask(self.block_map(q, k, scale), block_m=self.block, block_n=self.block)

    def block_map(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Bool [B, Hq, n, n], n = ceil(N / block)."""
        B, Hq, _, _ = q.shape
        group = Hq // k.shape[1]
        keys = block_means(k.float(), self.block)
        queries = block_means(q.float(), self.block)
        maps = [
            self._head_map(q[b, h], k[b, h // group], queries[b, h], keys[b, h // group], scale)
            for b in range(B)
            for h in range(Hq)
        ]
        return torch.stack(maps).unflatten(0, (B, Hq))

    def _head_map(self, q: Tensor, k: Tensor, qb: Tensor, kb: Tensor, scale: float) -> Tensor:
        last = q[-self.block :]
        vertical, slash = column_and_diagonal_mass(last, k, scale)
        vb, sb = _block_sums(vertical, self.block), _block_sums(slash, self.block)
        estimate = torch.softmax(last.float().mean(0) * scale @ kb.T, dim=-1)
        aware = bool(divergence(estimate, vb) < self.tau)
        n = kb.shape[0]
        least = min(math.ceil(self.min_budget / self.block), n)
        counts = [least if aware else self._blocks(mass, n, least) for mass in (vertical, slash)]
        chosen = columns_and_diagonals(vb, sb, counts[0], counts[1])
        return chosen | self._pooled_map(qb, kb, scale) if aware else chosen

    def _blocks(self, mass: Tensor, n: int, least: int) -> int:
        tokens = int(covering_count(mass, self.gamma))
        most = n if self.max_budget is None else min(math.ceil(self.max_budget / self.block), n)
        return max(least, min(most, tokens // BUDGET_TOKENS_PER_BLOCK + 1))

    def _pooled_map(self, qb: Tensor, kb: Tensor, scale: float) -> Tensor:
        n = kb.shape[0]
        scores = (qb * scale @ kb.T).masked_fill(
            ~torch.ones(n, n, dtype=torch.bool, device=kb.device).tril(), -torch.inf
        )
        weights = torch.softmax(scores, dim=-1)
        return covering(weights.flatten(), self.gamma * n).view(n, n) & (weights > 0)


def column_and_diagonal_mass(last: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Means over the last queries [m, D] of the weight on each key (columns) and along each diagonal: both [N].

    Entry c of the second is the diagonal whose keys lie N - 1 - c back, so the last entry is the main diagonal.
    """
    m, N = last.shape[0], k.shape[0]
    scores = (last @ k.T).float() * scale
    future = torch.ones(m, m, dtype=torch.bool, device=k.device).triu(1)
    scores[:, N - m :].masked_fill_(future, -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    return weights.mean(0), diagonal_sums(weights) / m


def diagonal_sums(weights: Tensor) -> Tensor:
    """Sums of weights [..., m, N] along diagonals: entry c holds the entries N - 1 - c columns left of the main
    diagonal, which ends in the last corner; entries right of it are not counted."""
    return _shear(weights).sum(-2)


def _shear(weights: Tensor) -> Tensor:
    """Row r of [m, N] moved right by m - 1 - r, what leaves on the right being the (zero) future."""
    m, N = weights.shape[-2:]
    row = torch.arange(m, device=weights.device)[:, None]
    source = torch.arange(N, device=weights.device)[None] - (m - 1 - row)
    moved = weights.gather(-1, source.clamp_min(0).expand_as(weights))
    return torch.where(source >= 0, moved, 0.0)


def _block_sums(mass: Tensor, block: int) -> Tensor:
    return F.pad(mass, (0, -mass.shape[0] % block)).view(-1, block).sum(1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of two distributions, natural log: at most sqrt(ln 2)."""
    middle = (p + q) / 2

    def kl(x: Tensor) -> Tensor:
        return (torch.xlogy(x, x) - torch.xlogy(x, middle)).sum(-1)

    return (0.5 * kl(p) + 0.5 * kl(q)).clamp_min(0).sqrt()


def columns_and_diagonals(vb: Tensor, sb: Tensor, columns: int, diagonals: int) -> Tensor:
    """Bool [n, n]: the best `columns` key blocks of vb and `diagonals` of sb; the first and the main always."""
    n = vb.shape[0]
    vb, sb = vb.clone(), sb.clone()
    vb[0], sb[-1] = torch.inf, torch.inf
    rows = torch.arange(n, device=vb.device)
    chosen = torch.zeros(n, n, dtype=torch.bool, device=vb.device)
    chosen[:, vb.topk(min(columns, n)).indices] = True
    offsets = n - 1 - sb.topk(min(diagonals, n)).indices
    chosen |= (rows[:, None] - rows[None])[..., None].eq(offsets).any(-1)
    return chosen & (rows[:, None] >= rows[None])


def covering_count(weights: Tensor, mass: float) -> Tensor:
    """How many of the largest entries of [..., n] it takes to exceed `mass`, the crossing one included."""
    return 1 + (weights.sort(dim=-1, descending=True).values.cumsum(-1) <= mass).sum(-1)


def covering(weights: Tensor, mass: float) -> Tensor:
    """Bool like weights [..., n]: the largest entries while their running sum is at most `mass`."""
    order = weights.sort(dim=-1, descending=True)
    taken = order.values.cumsum(-1) <= mass
    return torch.zeros_like(taken).scatter(-1, order.indices, taken)
