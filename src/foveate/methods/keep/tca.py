"""TCA-Attention: per head a mix of token counts per block, set offline, filled online.  (arXiv 2512.09238)

Heads differ in how much context they need, and within a head some stretches of text matter more than others. Offline
(`foveate calibrate tca`) every KV head gets a distribution over how many tokens blocks keep. Online its blocks are
ranked, the most informative get the large counts, and inside a block the most important tokens stay: at least one, so
that no stretch becomes invisible. The kept tokens serve the rest of the prompt's layer as well as decoding.

    counts      K = 1, 2, 4, .., b;  p_k = Phi(log2 k) / sum Phi,  Phi(x) = exp(-(x - mu)^2 / (2 sigma^2)), or all b
    importance  a_j = mean over the last `window` queries of softmax_j(q . k_j scale), the maximum over a KV head's
                query heads, normalised to sum 1                                                       float32
    blocks      the n = floor(N / b) whole blocks from position 0, in descending order of their sum of a (rank="mass")
                or of how little their keys resemble the block's mean key (rank="key": minus the mean cosine)
    allocation  the first floor(p_b n + 1/2) blocks keep b, the next, cumulatively, b/2, ..; each its best tokens by a
    forced      the first block, the last `recent_blocks` whole ones and the unfinished one stay whole
    prompt      a query reads kept tokens, its own block and the one before, causally
    decoding    a query reads what is kept; when one more than `recent_blocks` whole blocks are recent, the oldest is
                cut to the largest count whose least-ranked block of the prompt it equals, under the current query
    choice      per KV head the configuration with the least density sum p_k k / b whose calibrated loss is <= `tau`

Ties go to the earlier block and token. With 1 - d of a query's weight on kept tokens, |o - o'| <= 2 d max |v|.
Prompts of fewer than `least_blocks` blocks stay whole for good, as do layers with a sliding window of their own (loss
NaN). A chunked prompt is computed densely and cut at its end, by the queries of its last chunk. Selection costs
window x N scores per query head and a sort of N / b blocks; a closing block costs one look at the head's stored keys.

No official code exists, and the paper's redundancy measure, block size, forced tokens and decode schedule are not
known: all but the family of configurations is this library's reading. Query-aware: a prompt should end with its
question.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.plan import VerticalSlash
from foveate.attention.scoring import slots_of, top_mask
from foveate.attention.softmax import attend
from foveate.attention.statistics import attention_rows, by_group
from foveate.errors import OptionError, ProfileError
from foveate.methods.cache import Change, KeepRagged
from foveate.methods.calibrated import Calibrated, check_table, table_profile
from foveate.methods.profile import ModelIdentity, Profile, remake
from foveate.methods.step import Phase, Reading, Step
from foveate.options import option
from foveate.registry import register

SIGMAS = (0.5, 1.0, 2.0)


@dataclass
class Selected:
    """What a prompt keeps, between reading and keeping. mask: bool [B, Hkv, N]; levels: as in TCAState."""

    mask: Tensor
    levels: Tensor


@dataclass
class TCAState:
    """closed: int64 [B] on the host, blocks that have their final count; -1: the sequence stays whole.

    levels: [B, Hkv, log2 b + 1] float32, for the counts b, b/2, .., 1 what the rank of a block must reach.
    """

    closed: Tensor
    levels: Tensor


@register(
    "tca",
    kind="keep",
    paper="Training-free Context-adaptive Attention for Efficient Long Context Modeling",
    arxiv="2512.09238",
    year=2025,
    applies_to="pretrained, calibrated",
    exact={"tau": 0.0},
    small={"least_blocks": 4, "recent_blocks": 1},
    known={"causality": "the last queries of the prompt choose what all its queries read, by the paper's design"},
    calibration="tca",
    claim=(
        "Not reproduced: bundled model, 2k tokens, 2 seeds, calibrated mixes hold 0.30 and 0.20 of the keys at a KL "
        "divergence from dense of 0.32 and 0.45 on text, SnapKV with as many keys 0.06 and 0.08; equal counts of 16 "
        "in 64 (0.34 held) 0.19. On a needle 2.1 against 0.5, on variable tracking 3.1 against 3.1, equal counts 1.0 "
        "to 1.6 (benchmarks/results/claims/tca.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class TCA(Calibrated):
    """Heads keep calibrated mixes of token counts per block; informative blocks get the large counts."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"prefill"})
    evicts: ClassVar[bool] = True
    ragged: ClassVar[bool] = True
    calibration: ClassVar[str] = "tca"

    tau: float = option(0.05, "share of attention that a head may lose on the calibration prompts", at_least=0, below=1)
    window: int = option(1, "last queries of the prompt that say what is important", at_least=1)
    rank: str = option("mass", "how blocks are ranked: by attention, or by unlike keys", one_of=("mass", "key"))
    recent_blocks: int = option(2, "last whole blocks that stay whole", at_least=1)
    least_blocks: int = option(16, "shortest prompt that is cut, in blocks", at_least=1)

    @staticmethod
    def example_profile(model: ModelIdentity) -> Profile:
        """A made-up profile with blocks of 8: even heads lose little by the sparsest mixes, odd ones more."""
        proportions = configurations(8)
        loss = (1.1 - densities(proportions)).clamp_min(0) * 0.1
        loss = loss.expand(model.layers, model.kv_heads, -1).clone()
        loss[:, ::2] *= 0.1
        loss[..., -1] = 0.0
        return table_profile("tca", model, proportions=proportions, loss=loss)

    def check_profile(self, profile: Profile) -> None:
        proportions = profile.tensors.get("proportions")
        if proportions is None or proportions.dim() != 2:
            raise ProfileError(
                f"the 'tca' profile is damaged: its table 'proportions' is no [configurations, counts]; {remake('tca')}"
            )
        check_table(profile, "loss", (profile.model.layers, profile.model.kv_heads, len(proportions)))
        if not bool((proportions[:, -1] == 1).any()):
            raise ProfileError(f"the 'tca' profile is damaged: no configuration is dense; {remake('tca')}")

    @cached_property
    def block(self) -> int:
        """Tokens per block, b."""
        return 2 ** (self.table("proportions").shape[1] - 1)

    @cached_property
    def chosen(self) -> Tensor:
        """int64 [layers, Hkv]: the configuration of every KV head; of equal densities the first."""
        return choose_configurations(self.table("loss"), self.table("proportions"), self.tau)

    def head_proportions(self, layer: int) -> Tensor:
        """p of a layer's KV heads: float64 [Hkv, counts]."""
        return self.table("proportions").double()[self.chosen[layer]]

    def sparse_heads(self, layer: int) -> list[int]:
        """The KV heads that do not keep everything."""
        return (self.head_proportions(layer)[:, -1] < 1).nonzero()[:, 0].tolist()

    def attend(self, step: Step) -> Tensor:
        if step.phase != "prefill" or step.run.chunked:
            return step.attend()
        found = step.state = self.select(step)
        return step.attend() if found is None else self._attend_prompt(step, found.mask)

    def keep(self, step: Step) -> Change | None:
        if step.run.chunked:
            return None
        if step.phase != "prefill":
            return self._close(step)
        found = step.state if isinstance(step.state, Selected) else self.select(step)
        return self._hold(step, found)

    def prompt_ends(self, step: Step) -> Change | None:
        return self._hold(step, self.select(step))

    def _hold(self, step: Step, found: Selected | None) -> Change | None:
        if found is None:
            return None
        closed = [n // self.block - self.recent_blocks if self._cuts(n) else -1 for n in self._tokens(step)]
        step.state = TCAState(torch.tensor(closed), found.levels)
        return KeepRagged(found.mask)

    def _tokens(self, step: Step) -> list[int]:
        """Tokens of each sequence so far."""
        if step.cache.holes:
            latest: list[int] = (step.query_positions().amax(1) + 1).tolist()
            return latest
        return [step.cache.seen] * step.cache.shape[0]

    def _cuts(self, tokens: int) -> bool:
        return tokens // self.block > self.recent_blocks and tokens >= self.least_blocks * self.block

    def select(self, step: Step) -> Selected | None:
        """What a step that holds the whole prompt should keep; None: all of it."""
        tokens = self._tokens(step)
        if step.window is not None or not any(map(self._cuts, tokens)) or not self.sparse_heads(step.layer):
            return None
        if not step.cache.holes:
            return self.selection(step.q, step.k, step.scale, step.layer)
        B, H = step.cache.shape
        mask = torch.zeros(B, H, step.cache.stored, dtype=torch.bool, device=step.q.device)
        exact = torch.float64 if step.q.dtype == torch.float64 else torch.float32
        levels = torch.zeros(B, H, self.block.bit_length(), dtype=exact, device=step.q.device)
        for row, real in enumerate(step.cache.positions_or_fail()[:, 0] >= 0):
            if not self._cuts(tokens[row]):
                mask[row] = real
                continue
            own = self.selection(
                step.q[row : row + 1, :, -tokens[row] :], step.k[row : row + 1, :, real], step.scale, step.layer
            )
            mask[row][:, real], levels[row] = own.mask[0], own.levels[0]
        return Selected(mask, levels)

    def selection(self, q: Tensor, k: Tensor, scale: float, layer: int) -> Selected:
        """What a prompt without padding keeps: q [B, Hq, M, D], the last of N; k [B, Hkv, N, D]."""
        a = importance(q[:, :, -self.window :], k, scale)
        proportions = self.head_proportions(layer).to(k.device)
        mask, levels = select_tokens(a, k, proportions, self.rank)
        return Selected(force(mask, self.block, self.recent_blocks), levels)

    def _attend_prompt(self, step: Step, mask: Tensor) -> Tensor:
        if not step.cache.holes:
            return self._attend_rows(step, slice(None), step.m, mask)
        out = step.q.new_zeros(*step.q.shape[:3], step.v.shape[-1])
        for row, n in enumerate(self._tokens(step)):
            out[row, :, -n:] = self._attend_rows(step, slice(row, row + 1), n, mask)[0]
        return out

    def _attend_rows(self, step: Step, rows: slice, n: int, mask: Tensor) -> Tensor:
        """Sequences of n real tokens each: heads that keep everything are dense, the others sparse."""
        q, k, v = (each[rows, :, -n:] for each in (step.q, step.k, step.v))
        mask = mask[rows, :, -n:]
        sparse = self.sparse_heads(step.layer) if self._cuts(n) else []
        dense = [head for head in range(step.kv_heads) if head not in sparse]
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        for heads in (dense, sparse):
            if not heads:
                continue
            queries = [head * step.group + each for head in heads for each in range(step.group)]
            plan = prompt_plan(mask[:, heads], self.block) if heads is sparse else None
            sink = None if step.sink is None else step.sink[queries]
            out[:, queries] = attend(
                q[:, queries], k[:, heads], v[:, heads], plan, scale=step.scale, sink=sink, softcap=step.softcap
            )
        if step.run.record:
            share, visible = q.shape[0] / step.q.shape[0], n * (n + 1) / 2
            read = (len(dense) * visible + pairs_read(mask[:, sparse], self.block)) / step.kv_heads
            step.run.readings.append(Reading(step.layer, step.phase, read * share, visible * share))
        return out

    def _close(self, step: Step) -> Change | None:
        """Cut the blocks that are no longer recent."""
        state = step.state
        if not isinstance(state, TCAState):
            return None
        due = [
            max(0, n // self.block - self.recent_blocks - closed) if closed >= 0 else 0
            for n, closed in zip(self._tokens(step), state.closed.tolist())
        ]
        if not any(due):
            return None
        B, H = step.cache.shape
        mask = torch.ones(B, H, step.cache.stored, dtype=torch.bool, device=step.q.device)
        for row in range(B):
            for head in self.sparse_heads(step.layer) if due[row] else []:
                first = int(state.closed[row])
                own = self._cut(step, row, head, first, first + due[row], state.levels[row, head])
                mask[row, head, : own.shape[0]] = own
        state.closed += torch.tensor(due)
        return KeepRagged(mask)

    def _cut(self, step: Step, row: int, head: int, first: int, end: int, levels: Tensor) -> Tensor:
        """Which rows of a packed head stay when its blocks first..end - 1 are cut: bool [n]."""
        packed = step.cache.packed
        assert packed is not None
        segment = row * step.kv_heads + head
        held, keys = packed.segment("positions", segment), packed.segment("keys", segment)
        own = slice(head * step.group, (head + 1) * step.group)
        a = importance(step.q[row : row + 1, own, -1:], keys[None, None], step.scale)[0, 0]
        cut = (held >= first * self.block) & (held < end * self.block)
        masses = a[cut].view(-1, self.block)
        ranks = block_ranks(masses, keys[cut].view(-1, self.block, keys.shape[-1]), self.rank)
        # The last level is -inf, so that some level is always reached.
        level = (ranks[:, None] >= levels).int().argmax(-1)
        stays = torch.ones_like(cut)
        stays[cut] = top_mask(masses, self.block >> level).flatten()
        return stays


def configurations(block: int) -> Tensor:
    """The candidates: float64 [C, log2 block + 1], the share of blocks that keep 1, 2, 4, .., block tokens; the last is
    dense. OptionError unless block is a power of two above 1."""
    if block < 2 or block & (block - 1):
        raise OptionError(f"configurations: block={block}, allowed: a power of two above 1")
    x = torch.arange(block.bit_length(), dtype=torch.float64)
    mixes = [torch.softmax(-((x - mu) ** 2) / (2 * sigma**2), 0) for mu in x for sigma in SIGMAS]
    return torch.stack([*mixes, (x == x[-1]).double()])


def densities(proportions: Tensor) -> Tensor:
    """Share of a block's tokens that a configuration keeps, in the mean: [C, counts] -> [C]."""
    counts = 2.0 ** torch.arange(proportions.shape[-1], dtype=torch.float64, device=proportions.device)
    return (proportions.double() * counts).sum(-1) / counts[-1]


def choose_configurations(loss: Tensor, proportions: Tensor, tau: float) -> Tensor:
    """Per head the least dense configuration whose loss is <= tau; a dense one where there is none or loss is NaN.

    loss: [..., C].    proportions: [C, counts].    Returns int64 [...].
    """
    allowed = (loss.double() <= tau) | (proportions[:, -1] == 1)
    return torch.where(allowed, densities(proportions), torch.inf).argmin(-1)


def importance(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """a: [B, Hkv, N] float32 (float64 for float64), summing to 1, of the last queries q [B, Hq, w, D] of k."""
    a = by_group(attention_rows(q, k, scale=scale).mean(2), k.shape[1], "max")
    return a / a.sum(-1, keepdim=True)


def block_ranks(masses: Tensor, keys: Tensor, rank: str) -> Tensor:
    """How informative blocks are: masses [..., n, b] -> [..., n]; keys [..., n, b, D]."""
    if rank == "mass":
        return masses.sum(-1)
    keys = keys.to(masses.dtype)
    return -F.cosine_similarity(keys, keys.mean(-2, keepdim=True), dim=-1).mean(-1)


def block_counts(proportions: Tensor, blocks: int) -> Tensor:
    """Tokens that blocks keep in the order of their ranks: proportions float64 [H, counts] -> int64 [H, blocks]."""
    upto = _cumulative(proportions, blocks)
    order = torch.arange(blocks, device=proportions.device)
    index = (upto[:, None] <= order[:, None]).sum(-1)
    return 2 ** (proportions.shape[-1] - 1 - index)


def _cumulative(proportions: Tensor, blocks: int) -> Tensor:
    """How many blocks keep at least b, b/2, .., 1 tokens: int64 [H, counts]; the last is `blocks`."""
    upto = torch.floor(proportions.double().flip(-1).cumsum(-1) * blocks + 0.5).long()
    upto[..., -1] = blocks
    return upto


def select_tokens(a: Tensor, k: Tensor, proportions: Tensor, rank: str) -> tuple[Tensor, Tensor]:
    """The allocation, without forced tokens: a [B, Hkv, N], k [B, Hkv, N, D], proportions float64 [Hkv, counts].

    Returns bool [B, Hkv, N], False beyond the last whole block; and levels [B, Hkv, counts], the rank of the last block
    that keeps at least b, b/2, .., 1 tokens (inf: none does, -inf: all do).
    """
    block = 2 ** (proportions.shape[-1] - 1)
    n = a.shape[-1] // block
    masses = a[..., : n * block].unflatten(-1, (n, block))
    ranks = block_ranks(masses, k[:, :, : n * block].unflatten(2, (n, block)), rank)
    ordered = ranks.sort(dim=-1, descending=True, stable=True)
    counts = torch.empty_like(ordered.indices)
    counts.scatter_(-1, ordered.indices, block_counts(proportions, n).expand_as(counts))
    mask = F.pad(top_mask(masses, counts).flatten(-2), (0, a.shape[-1] - n * block))
    upto = _cumulative(proportions, n).expand(*ranks.shape[:-1], -1)
    levels = ordered.values.gather(-1, (upto - 1).clamp_min(0))
    levels = levels.masked_fill(upto == 0, torch.inf).masked_fill(upto == n, -torch.inf)
    return mask, levels


def force(mask: Tensor, block: int, recent: int) -> Tensor:
    """The mask, bool [..., N], with its first block, its last `recent` whole blocks and what follows them True."""
    first = max(0, mask.shape[-1] // block - recent) * block
    at = torch.arange(mask.shape[-1], device=mask.device)
    return mask | (at < block) | (at >= first)


def prompt_plan(mask: Tensor, block: int) -> VerticalSlash:
    """What a prompt's queries read: the kept tokens bool [B, H, N], their own block and the one before."""
    local = torch.tensor([0, 1], device=mask.device).expand(*mask.shape[:2], -1)
    return VerticalSlash(slots_of(mask), local, block)


def pairs_read(mask: Tensor, block: int) -> float:
    """Pairs of query and key that `prompt_plan` reads, summed over heads, in the mean over sequences."""
    B, H, N = mask.shape
    kept = F.pad(mask, (0, -N % block)).unflatten(-1, (-1, block)).sum((0, 1, 3)).double().cpu()
    # Kept tokens before the previous block, for every query of a block.
    before = F.pad(kept.cumsum(0), (2, 0))[: kept.shape[0]]
    size = torch.full_like(kept, block)
    size[-1] = N - block * (kept.shape[0] - 1)
    local = size * (size + 1) / 2
    local[1:] += size[1:] * block
    return float((B * H * local + size * before).sum()) / B
