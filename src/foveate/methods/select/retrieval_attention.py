"""RetrievalAttention: old keys lie in host memory, and an index finds the few that a query wants.  (arXiv 2409.10516)

The first and the last tokens stay on the device. All others go to the host, keys and values, with an index over the
keys that is built from the prompt's own queries, because queries are distributed differently from keys and ordinary
indexes must scan a third of them. A decode step reads both parts and merges them by their log-sum-exps.

    hot      sinks j < `sinks`, and the last `window` tokens, the new one included
    cold     the `budget` keys with the largest q . k of all others, per query head, by the index
    o        softmax over hot and cold together = merge of the two parts, each exact over its keys, lse float32
    insert   the token that leaves the window enters the tier and the index, so that the next step can retrieve it;
             without it only the prompt is cold, and all later tokens stay hot

Prompts attend exactly, and so do later pieces of text (M > 1), over hot and all cold keys, which come to the device in
pieces. Keys are indexed rotated, at true positions. Prompts of at most sinks + window tokens, and the first
`dense_layers` layers, are dense. Each sequence of a batch has its own tier rows and graphs; padding never leaves.
A step moves q to the host and `budget` keys and values per query head to the device: O(budget D) and the search. The
host holds the cold keys and values, and 4 `degree` bytes per key and KV head for the graph; `RetrievalAttention.memory`
and `LayerCache.host_bytes` tell the two memories apart. The host's part goes with the request's cache. Statistics tell
which share of the indexed keys was scanned and, every `recall` tokens, which share of the best ones was found.

Differs from the authors' code: the retrieved set is read on the device, in the model's dtype (theirs: on the host);
one graph per KV head, made by all query heads of its group and searched by each (`per_query_head`: one each); 100 keys
as in the paper (their code: 2000, exactly). The graph is described in `foveate.methods.index.attention_graph`.
Alone: what is cold cannot be evicted or selected by another method. Errors: HostMemoryError when the host is full;
StateError for a cache whose cold part or index is missing or stale; MissingPackageError for index="usearch".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.attention import Positions, apply_sink, attend, merge
from foveate.attention.scoring import slots_of
from foveate.errors import StateError
from foveate.methods.base import Method
from foveate.methods.cache import Change, Drop, Keep, LayerCache
from foveate.methods.host import HostTier, TierBytes
from foveate.methods.index import AttentionGraph, FlatIndex, Found, GraphOptions, KeyIndex, UsearchIndex, recall_of
from foveate.methods.index.hnsw import check_installed
from foveate.methods.index.linking import TREE
from foveate.methods.step import Phase, Reading, Step
from foveate.options import option
from foveate.registry import register

PIECE = 4096


@dataclass
class Offloaded:
    """The cold part of one layer: token j of the tier stands at position sinks + j."""

    tier: HostTier
    index: KeyIndex


@dataclass
class Asked:
    """Queries of an unfinished prompt, those at every `stride`-th position.

    q: [B, Hq, m, D]. real: bool [B, m], which of them are a sequence's own choice. positions: [B, m].
    """

    q: Tensor
    real: Tensor
    positions: Tensor
    stride: int


@register(
    "retrieval-attention",
    kind="select",
    paper="RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval",
    arxiv="2409.10516",
    year=2024,
    applies_to="pretrained",
    exact={"budget": 10**6, "sinks": 4, "window": 16, "index": "flat"},
    small={"budget": 6, "sinks": 2, "window": 8, "beam": 8, "neighbours": 8, "fresh": 4},
    claim=(
        "Synthetic keys, 200k of 64 features, queries distributed differently: recall of the true best 100 "
        "keys 0.952 at 1.80 % of the keys scanned; the ordinary index (usearch) 0.446 at 1.74 %, a graph of "
        "keys alone 0.250 at 1.98 % (benchmarks/results/retrieval_recall.json). On the bundled model: not "
        "measured at full size."
    ),
)
@dataclass(frozen=True, kw_only=True)
class RetrievalAttention(Method):
    """Keeps old keys and values in host memory; a step retrieves the few that its query wants through an index."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"extend", "decode"})
    evicts: ClassVar[bool] = True
    alone: ClassVar[bool] = True

    budget: int = option(100, "cold keys retrieved per query head and step", at_least=0)
    sinks: int = option(128, "first tokens that stay on the device", at_least=0)
    window: int = option(512, "last tokens that stay on the device, the new one included", at_least=1)
    index: str = option("attention-graph", "how cold keys are found", one_of=("attention-graph", "flat", "usearch"))
    beam: int = option(200, "candidates that a search keeps; at least budget", at_least=1)
    insert: bool = option(True, "tokens that leave the window while decoding become cold; off: they stay hot")
    dense_layers: int = option(0, "first layers that read everything, on the device", at_least=0)
    sample: int | None = option(1024, "prompt queries per query head that make the graph; none: all", at_least=1)
    neighbours: int = option(100, "nearest keys of a query that the graph links", at_least=2)
    pivots: int = option(4, "how many of them are linked to all the others", at_least=1)
    degree: int = option(32, "links per key", at_least=TREE + 1)
    fresh: int = option(1024, "new cold keys that are scanned one by one until they are linked", at_least=1)
    per_query_head: bool = option(False, "one graph per query head instead of one per KV head")
    recall: int = option(
        0,
        "every so many tokens a decode step also searches exactly, and statistics tell which share of the best keys "
        "the index found; 0: never",
        at_least=0,
    )
    host_limit: int | None = option(
        None, "most bytes of cold keys and values, all layers; none: what the machine has", at_least=0
    )

    def check(self) -> None:
        if self.index == "usearch":
            check_installed()

    def attend(self, step: Step) -> Tensor:
        state = step.state
        if not isinstance(state, Offloaded):
            if step.cache.version and step.phase != "prefill" and step.layer >= self.dense_layers:
                raise StateError(
                    f"layer {step.layer}: this cache has dropped tokens and holds no host tier and no index for them; "
                    "continue it with the method that filled it, or start a new cache"
                )
            return step.attend()
        self._check_current(step, state)
        parts = [self._read(step, step.k, step.v, step.positions)]
        if step.m > 1:
            parts += self._all_cold(step, state.tier)
        elif self.budget:
            parts.append(self._retrieved(step, state))
        o, lse = merge([o for o, _ in parts], [lse for _, lse in parts])
        return o if step.sink is None else apply_sink(o, lse, step.sink)[0]

    def _check_current(self, step: Step, state: Offloaded) -> None:
        hot = step.real_tokens()
        cold = (step.query_positions()[:, -1] + 1 - hot).cpu()
        if not torch.equal(cold, state.tier.length):
            raise StateError(
                f"layer {step.layer}: stale host tier: it holds {state.tier.length.tolist()} tokens per sequence, and "
                f"{cold.tolist()} have left the cache; start a new cache"
            )

    def _all_cold(self, step: Step, tier: HostTier) -> list[tuple[Tensor, Tensor]]:
        at, parts = step.query_positions(), []
        self._record(step, float(tier.length.double().mean()))
        for start, keys, values in tier.pieces(PIECE):
            row = torch.arange(start, start + keys.shape[2])
            held = torch.where(row < tier.length[:, None], row + self.sinks, -1).to(at.device)
            parts.append(self._read(step, keys, values, Positions(at, held[:, None], True)))
        return parts

    def _retrieved(self, step: Step, state: Offloaded) -> tuple[Tensor, Tensor]:
        tier, at = state.tier, step.query_positions()
        found = state.index.search(step.q[:, :, -1].cpu(), tier.keys, tier.length, count=self.budget, beam=self.beam)
        keys, values = tier.gather(found.index)
        held = torch.where(found.index >= 0, found.index + self.sinks, -1).to(at.device)
        self._record(step, float((found.index >= 0).sum(-1).double().mean()), self._search(step, state, found))
        return self._read(step, keys, values, Positions(at, held, True))

    @staticmethod
    def _read(step: Step, k: Tensor, v: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        o, lse = attend(
            step.q,
            k,
            v,
            scale=step.scale,
            positions=positions,
            window=step.window,
            softcap=step.softcap,
            return_lse=True,
        )
        return o, lse

    def _search(self, step: Step, state: Offloaded, found: Found) -> dict[str, float | None]:
        """What statistics tell about a search."""
        if not step.run.record:
            return {}
        tier = state.tier
        told: dict[str, float | None] = {
            "scanned": float(found.scanned.double().mean()),
            "indexed": float(tier.length.double().mean()),
        }
        if self.recall and step.cache.seen % self.recall == 0:
            best = FlatIndex.build(tier.keys, tier.length).search(
                step.q[:, :, -1].cpu(), tier.keys, tier.length, count=self.budget
            )
            told["recall"] = recall_of(found, best)
        return told

    @staticmethod
    def _record(step: Step, cold: float, search: dict[str, float | None] | None = None) -> None:
        """Note that each query reads what is hot and `cold` keys more."""
        if step.run.record:
            M, seen = step.m, step.cache.seen
            own = M * (M + 1) / 2
            read = M * (step.cache.stored - M + cold) + own
            step.run.readings.append(Reading(step.layer, step.phase, read, M * (seen - M) + own, **(search or {})))

    def keep(self, step: Step) -> Change | None:
        if step.layer < self.dense_layers:
            return None
        if step.run.chunked:
            if step.phase != "decode":
                self._note(step)
            return None
        if step.phase != "prefill" and not self.insert:
            return None
        return self._offload(step, step.q, step.query_positions() >= 0)

    def prompt_ends(self, step: Step) -> Change | None:
        asked = step.state
        if not isinstance(asked, Asked):
            return None
        step.cache.states.pop(step.member)
        return self._offload(step, asked.q, asked.real)

    def _note(self, step: Step) -> None:
        """Carry queries of a chunked prompt, at most twice the sample, chosen by position: padding changes nothing."""
        held = step.state
        q, at, stride = step.q, step.query_positions(), 1
        if isinstance(held, Asked):
            q, at, stride = torch.cat((held.q, q), 2), torch.cat((held.positions, at), 1), held.stride
        real = (at >= 0) & (at % stride == 0)
        while self.sample is not None and int(real.sum(1).max()) > 2 * self.sample:
            stride *= 2
            real = real & (at % stride == 0)
        some = real.any(0)
        step.state = Asked(q[:, :, some], real[:, some], at[:, some], stride)

    def _offload(self, step: Step, q: Tensor, real: Tensor) -> Change | None:
        """Bring what has left the window to the host, and say what stays. Changes nothing if the host has no room."""
        cache, kept = step.cache, self.window - 1 if self.insert else self.window
        if not cache.holes and cache.seen - kept <= self.sinks:
            return None
        at = torch.arange(cache.stored, device=q.device)[None] if cache.positions is None else cache.positions[:, 0]
        end = step.query_positions()[:, -1:] + 1 - kept
        leaving = ((at >= self.sinks) & (at < end)).expand(q.shape[0], -1)
        counts = leaving.sum(1).cpu()
        widest = int(counts.max())
        if not widest:
            return None
        order = torch.where(leaving, at, torch.iinfo(torch.int32).max)
        slots = order.argsort(1)[:, None, :widest].expand(-1, step.kv_heads, -1)
        keys, values = (x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[3])) for x in (step.k, step.v))
        self._take_in(step, keys, values, counts, q, real)
        if step.phase == "decode" and bool((counts == 1).all()):
            return Drop(slots)
        stays = (at >= 0) & ~leaving
        return Keep(slots_of(stays[:, None].expand(-1, step.kv_heads, -1)))

    def _take_in(self, step: Step, keys: Tensor, values: Tensor, counts: Tensor, q: Tensor, real: Tensor) -> None:
        state = step.state
        # A row none of whose tokens leaves takes no part, so that it fares in a batch as it does alone.
        real = real & (counts > 0)[:, None].to(real.device)
        if isinstance(state, Offloaded):
            state.tier.append(keys, values, counts)
            state.index.append(state.tier.keys, state.tier.length, q, real)
            return
        limit = None if self.host_limit is None else self.host_limit // step.layers
        tier = HostTier.put(keys, values, counts, limit=limit)
        step.state = Offloaded(tier, self._build(tier, q, real))

    def _build(self, tier: HostTier, q: Tensor, real: Tensor) -> KeyIndex:
        match self.index:
            case "flat":
                return FlatIndex.build(tier.keys, tier.length)
            case "usearch":
                return UsearchIndex.build(tier.keys, tier.length, degree=self.degree)
        options = GraphOptions(
            neighbours=self.neighbours,
            pivots=self.pivots,
            degree=self.degree,
            sample=self.sample,
            fresh=self.fresh,
            per_query_head=self.per_query_head,
        )
        return AttentionGraph.build(tier.keys, tier.length, q, options, real=real)

    @staticmethod
    def memory(cache: LayerCache) -> TierBytes:
        """Bytes that one layer takes on the device (hot tokens and the last retrieved set) and on the host."""
        held = [cache.keys, cache.values, *([] if cache.positions is None else [cache.positions])]
        hot, cold = sum(each.untyped_storage().nbytes() for each in held), 0
        for state in cache.states.values():
            if isinstance(state, Offloaded):
                tier = state.tier.bytes()
                hot, cold = hot + tier.hot, cold + tier.cold + state.index.nbytes
        return TierBytes(hot, cold)
