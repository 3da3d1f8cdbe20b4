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
P is formed for a few heads at a time. Follows the authors' code where it differs from the paper: query-aware heads also
read the minimum of columns and diagonals, the budget of tokens becomes blocks by // 128 + 1 whatever the block size,
and a diagonal's offset covers one block diagonal only. Differs from the code: zero probabilities count as 0 log 0 = 0
in the divergence (there they make NaN and the head falls to columns and diagonals). Serves prompts that stand alone
(nothing stored before; each row of a left-padded batch by itself); other steps, layers with a sliding window, and
prompts of at most max(2 block, min_budget) tokens, are dense. On a GPU with Triton, kernels compute v and s in float32
(attention/backends/triton/last_queries.py) and list the blocks (block_lists.py); with tau = 0 and least and most budget
equal the host never waits for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import attend
from foveate.attention.backends.triton import availability
from foveate.attention.plan import Blocks, Dense, Plan
from foveate.attention.scoring import top_mask
from foveate.attention.summaries import in_chunks, mean
from foveate.methods.base import Method
from foveate.methods.step import Phase, Step
from foveate.options import option
from foveate.registry import register

# The authors' code divides token budgets by this, whatever the block size.
BUDGET_TOKENS_PER_BLOCK = 128
# Weights of the last queries that are held at once.
PIECE_BYTES = 1 << 29


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
    claim=(
        "Random weights of SmolLM2's shape, one H200, density 0.08: first token after 32k and 128k tokens 2.0 "
        "and 4.5 times as early as the stock model's (benchmarks/results/gpu_end_to_end_h200.json). Bundled "
        "model, 2k and 4k tokens, 20 seeds, defaults and then snapkv with half of the cache: densities 0.51 "
        "and 0.39, single needle 0.40 and 0.55, snapkv alone 0.55 and 0.65, dense 0.95 and 1.00 "
        "(benchmarks/results/needles_0.5_aware_duo.json)."
    ),
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
        choice = self._choice(q, k, scale)
        if choice.maps or not has_triton(k):
            return Blocks.from_mask(choice.mask(q.shape[0]), block_m=self.block, block_n=self.block, own_last=True)
        from foveate.attention.backends.triton import block_lists

        lists = block_lists.columns_and_diagonals(
            choice.pooled, choice.counts, most=choice.most, batch=q.shape[0], tokens=q.shape[2], block=self.block
        )
        return Blocks.from_lowered(lists, own_last=True)

    def block_map(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Bool [B, Hq, n, n], n = ceil(N / block)."""
        return self._choice(q, k, scale).mask(q.shape[0])

    def _choice(self, q: Tensor, k: Tensor, scale: float) -> Choice:
        n = math.ceil(k.shape[2] / self.block)
        least = min(math.ceil(self.min_budget / self.block), n)
        most = n if self.max_budget is None else min(math.ceil(self.max_budget / self.block), n)
        most = max(least, most)
        last = q[:, :, -self.block :]
        counts: int | Tensor = least
        if least == most:
            pooled = pooled_mass(last, k, scale, self.block)
        else:
            mass = column_and_diagonal_mass(last, k, scale).flatten(1, 2)
            pooled = sums_of_blocks(mass, self.block)
            counts = covering_count(mass, self.gamma) // BUDGET_TOKENS_PER_BLOCK + 1
            counts = counts.clamp(min=least, max=most)
        if not self.tau:
            return Choice(pooled, counts, most)
        keys = mean(*in_chunks(k.float(), self.block)).repeat_interleave(q.shape[1] // k.shape[1], 1).flatten(0, 1)
        estimate = last.flatten(0, 1).float().mean(1, keepdim=True) * scale @ keys.transpose(1, 2)
        aware = divergence(torch.softmax(estimate[:, 0], dim=-1), pooled[0]) < self.tau
        if isinstance(counts, Tensor):
            counts = counts.masked_fill(aware, least)
        heads = aware.nonzero()[:, 0].tolist()
        queries = mean(*in_chunks(q.float(), self.block)).flatten(0, 1) if heads else keys
        maps = {head: self._pooled_map(queries[head], keys[head], scale) for head in heads}
        return Choice(pooled, counts, most, maps)

    def _pooled_map(self, qb: Tensor, kb: Tensor, scale: float) -> Tensor:
        n = kb.shape[0]
        scores = (qb * scale @ kb.T).masked_fill(
            ~torch.ones(n, n, dtype=torch.bool, device=kb.device).tril(), -torch.inf
        )
        weights = torch.softmax(scores, dim=-1)
        return covering(weights.flatten(), self.gamma * n).view(n, n) & (weights > 0)


@dataclass(frozen=True)
class Choice:
    """What every head of every sequence reads.

    pooled: [2, B * Hq, n] float32, masses of block columns and of block diagonals; counts: how many of each are taken,
    one number or int64 [2, B * Hq], at most `most`; maps: bool [n, n] of each query-aware head, read besides.
    """

    pooled: Tensor
    counts: int | Tensor
    most: int
    maps: dict[int, Tensor] = field(default_factory=dict)

    def mask(self, batch: int) -> Tensor:
        """Bool [B, Hq, n, n]."""
        chosen = columns_and_diagonals(self.pooled, self.counts)
        for head, read in self.maps.items():
            chosen[head] |= read
        return chosen.unflatten(0, (batch, -1))


def has_triton(x: Tensor) -> bool:
    return availability.why_not_device(x) is None


def has_kernels(last: Tensor, k: Tensor) -> bool:
    """Whether Triton computes the masses of these last queries."""
    if not has_triton(k):
        return False
    from foveate.attention.backends.triton import last_queries

    return last_queries.why_not(last, k) is None


def sums_of_blocks(mass: Tensor, block: int) -> Tensor:
    """[..., N] -> [..., ceil(N / block)]."""
    return F.pad(mass, (0, -mass.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def pooled_mass(last: Tensor, k: Tensor, scale: float, block: int) -> Tensor:
    """`column_and_diagonal_mass` summed over blocks: [2, B * Hq, ceil(N / block)]."""
    if last.shape[2] == block and has_kernels(last, k):
        from foveate.attention.backends.triton import last_queries

        return last_queries.column_and_diagonal_mass(last, k, scale=scale, pooled=True).flatten(1, 2)
    return sums_of_blocks(column_and_diagonal_mass(last, k, scale), block).flatten(1, 2)


def column_and_diagonal_mass(last: Tensor, k: Tensor, scale: float) -> Tensor:
    """Means over the last queries [B, Hq, m, D] of the weight on each of k [B, Hkv, N, D], and of the weight along each
    diagonal: [2, B, Hq, N] float32, made for some KV heads at a time.

    Entry c of the second is the diagonal whose keys lie N - 1 - c back, so the last entry is the main diagonal.
    """
    if has_kernels(last, k):
        from foveate.attention.backends.triton import last_queries

        return last_queries.column_and_diagonal_mass(last, k, scale=scale)
    B, Hq, m, D = last.shape
    H, N = k.shape[1], k.shape[2]
    group = Hq // H
    made = torch.empty(2, B, Hq, N, dtype=torch.float32, device=k.device)
    # The last query first: what `diagonal_sums` wants.
    future = torch.ones(m, m, dtype=torch.bool, device=k.device).triu(1).flip(0)
    backwards = last.flip(2)
    step = max(1, PIECE_BYTES // (4 * B * group * m * N))
    for first in range(0, H, step):
        keys = k[:, first : first + step]
        heads = slice(first * group, (first + keys.shape[1]) * group)
        rows = backwards[:, heads].reshape(B, keys.shape[1], group * m, D)
        scores = (rows @ keys.transpose(-1, -2)).float().mul_(scale).view(B, -1, m, N)
        scores[..., N - m :].masked_fill_(future, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        made[0, :, heads] = weights.mean(2)
        made[1, :, heads] = diagonal_sums(weights) / m
    return made


def diagonal_sums(backwards: Tensor) -> Tensor:
    """Sums of weights [..., m, N], the last row first, along diagonals: entry c holds the entries N - 1 - c columns
    left of the main diagonal, which ends in the last corner; entries right of it are not counted."""
    m, N = backwards.shape[-2:]
    # Rows of N + m read as rows of N + m - 1: each starts one column further right than the one before.
    sheared = F.pad(backwards, (0, m)).flatten(-2)[..., : m * (N + m - 1)]
    return sheared.unflatten(-1, (m, N + m - 1))[..., :N].sum(-2)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of two distributions, natural log: at most sqrt(ln 2)."""
    middle = (p + q) / 2

    def kl(x: Tensor) -> Tensor:
        return (torch.xlogy(x, x) - torch.xlogy(x, middle)).sum(-1)

    return (0.5 * kl(p) + 0.5 * kl(q)).clamp_min(0).sqrt()


def columns_and_diagonals(pooled: Tensor, counts: int | Tensor) -> Tensor:
    """Bool [H, n, n]: of each head the best key blocks of pooled[0] [H, n] for every row, and the best block diagonals
    of pooled[1], as many as counts, a number or [2, H], says; the first column and the main diagonal always."""
    n = pooled.shape[-1]
    pooled = pooled.clone()
    pooled[0, :, 0] = pooled[1, :, -1] = torch.inf
    columns, diagonals = top_mask(pooled, counts)
    rows = torch.arange(n, device=pooled.device)
    offset = rows[:, None] - rows[None]
    return (columns[:, None] | diagonals[:, (n - 1 - offset).clamp_max(n - 1)]) & (offset >= 0)


def covering_count(weights: Tensor, mass: float) -> Tensor:
    """How many of the largest entries of [..., n] it takes to exceed `mass`, the crossing one included."""
    return 1 + (weights.sort(dim=-1, descending=True).values.cumsum(-1) <= mass).sum(-1)


def covering(weights: Tensor, mass: float) -> Tensor:
    """Bool like weights [..., n]: the largest entries while their running sum is at most `mass`."""
    order = weights.sort(dim=-1, descending=True)
    taken = order.values.cumsum(-1) <= mass
    return torch.zeros_like(taken).scatter(-1, order.indices, taken)
