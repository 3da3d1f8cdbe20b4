"""DELTA: a few layers read everything and choose the pages that the layers after them read.  (arXiv 2510.09883)

Neighbouring layers put their weight on nearly the same tokens. Some layers therefore attend densely and, as a
by-product, score every page of the cache; each layer after such a planner reads only the chosen pages, the same for
all heads, until the next planner chooses anew. The choice is made for every token, and nothing is evicted.

    planner: a layer of `full_layers` whose next layer is not one. At a decode step with N tokens, T = ceil(N / page):
    s[j] = max over all query heads h of softmax_j(q_h . k_j / sqrt(D))                  float32, before any sum
    S[p] = sum of s over page p, less 1e-7 p;  the last `recent_pages` pages always count as best
    the layers after it read the `pages` best pages, in order; all of them, when T <= pages

Pages are runs of `page` positions, so they mean the same tokens in every layer, also beside a method that evicts; the
page of the new token is among the last ones. A row whose T / pages is no more than `least_gain` is dense (the authors
sum both over the batch). Prompts and layers with a sliding window of their own are dense; where a planner is such a
layer, the next other layer takes its place. No sink is forced: sinks score high.

`full_layers` names layers as "0/1/2/14/22" (the authors' list for 28 layers; the default scales it to the model's
depth) and must begin with 0, for a sparse layer needs a planner before it; "all": every layer is full.
Cost: planners O(N D) twice (weights are computed apart from the attention), the others O(pages x page D). State: one
list of slots per step, shared by the layers. OptionError for a list that does not fit the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.plan import Dense, Plan, Tokens
from foveate.attention.scoring import slots_of, top_mask
from foveate.errors import OptionError
from foveate.methods.base import Method
from foveate.methods.select.scores import last_votes, last_weights
from foveate.methods.step import Phase, Step
from foveate.options import option
from foveate.registry import register

TIE = 1e-7
SHIPPED, SHIPPED_DEPTH = (0, 1, 2, 14, 22), 28


@dataclass
class Choice:
    """What a planner chose at one step.

    seen: tokens seen by then. pages: bool [B, T], over positions. slots: int64 [B, 1, n], where a cache of `stored`
    slots that nothing was dropped from holds them.
    """

    seen: int
    pages: Tensor
    stored: int
    slots: Tensor | None


@register(
    "delta",
    kind="select",
    paper="DELTA: Dynamic Layer-Aware Token Attention for Efficient Long-Context Reasoning",
    arxiv="2510.09883",
    year=2025,
    applies_to="pretrained",
    exact={"pages": 10**6},
    small={"full_layers": "0", "page": 4, "pages": 4, "recent_pages": 2},
    claim=(
        "Bundled model, 2k tokens of text, 2 windows of 64 steps: with 16 pages chosen by the default "
        "layers the KL divergence from dense is 0.157 and perplexity 12.92 (dense 11.91) at density 0.27; "
        "with recent pages only, 1.155 and 45.6; quest with 256 tokens 0.135 at density 0.21, so it is not "
        "beaten here; choosing in the first three layers alone fails (0.817) "
        "(benchmarks/results/claims/delta.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class Delta(Method):
    """A few full layers choose, at every step, the pages that the layers after them read."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"decode"})

    full_layers: str | int | None = option(
        None, "layers that read everything, as '0/1/2/14/22', or 'all'; default: that list, for 28 layers, scaled"
    )
    page: int = option(16, "tokens per page", at_least=1)
    pages: int = option(64, "pages read by the other layers", at_least=1)
    recent_pages: int = option(8, "last pages, always among them", at_least=1)
    least_gain: float = option(1.0, "sparse only where all pages over chosen pages exceeds this", at_least=1)

    def check(self) -> None:
        if self.recent_pages > self.pages:
            raise self.refuse("recent_pages", f"<= pages={self.pages}, of which they are part")
        if self.full_layers is None or self.full_layers == "all":
            return
        try:
            listed = self._listed()
        except ValueError:
            raise self.refuse("full_layers", "layer numbers as '0/1/2/14/22', 'all' or None") from None
        if 0 not in listed or min(listed) < 0:
            raise self.refuse("full_layers", "a list with 0: a sparse layer needs a full one before it")

    def for_model(self, identity: Any) -> Method:
        beyond = [each for each in self.full(identity.layers) if each >= identity.layers]
        if beyond:
            raise OptionError(
                f"Delta: full_layers={self.full_layers!r} names layer {beyond[0]}, allowed: 0 to {identity.layers - 1}"
            )
        return self

    def full(self, layers: int) -> frozenset[int]:
        """The full layers of a model with `layers` attention layers."""
        if self.full_layers == "all":
            return frozenset(range(layers))
        if self.full_layers is not None:
            return frozenset(self._listed())
        scaled = {each if each < 3 else each * layers // SHIPPED_DEPTH for each in SHIPPED}
        return frozenset(each for each in scaled if each < layers)

    def _listed(self) -> list[int]:
        return [int(each) for each in str(self.full_layers).split("/")]

    def attend(self, step: Step) -> Tensor:
        if step.phase != "decode":
            return step.attend()
        full = self.full(step.layers)
        choice = self._choice(step)
        if step.layer not in full and choice is not None:
            return step.attend(self._plan(step, choice))
        plans = step.layer not in full or (step.layer + 1 < step.layers and step.layer + 1 not in full)
        if plans:
            step.run.shared[self, step.member] = self._choose(step)
        return step.attend()

    def _choice(self, step: Step) -> Choice | None:
        """What a planner of this very step chose."""
        choice: Choice | None = step.run.shared.get((self, step.member))
        return choice if choice is not None and choice.seen == step.cache.seen else None

    def _choose(self, step: Step) -> Choice:
        if step.cache.positions is None:
            token = last_votes(step, 1, "max")[:, 0]
            tokens = torch.full((token.shape[0],), step.cache.stored, device=token.device)
        else:
            token, tokens = self._by_position(step, last_weights(step)), step.query_positions().amax(1) + 1
        pages = self.choose(page_scores(token, self.page), tokens)
        choice = Choice(step.cache.seen, pages, step.cache.stored, None)
        if not step.cache.version:
            choice.slots = self._slots(step, pages)
        return choice

    @staticmethod
    def _by_position(step: Step, weights: Tensor) -> Tensor:
        """The greatest weight on every position, 0 where no head holds it: [B, Hq, N] -> [B, positions]."""
        at = step.cache.positions_or_fail().long()
        per_head = weights.unflatten(1, (at.shape[1], -1)).amax(2)
        token = weights.new_zeros(weights.shape[0], int(at.max()) + 1)
        best = torch.where(at >= 0, per_head, 0.0).flatten(1)
        return token.scatter_reduce_(1, at.clamp_min(0).flatten(1), best, "amax")

    def choose(self, scores: Tensor, tokens: Tensor) -> Tensor:
        """Which pages are read, bool [B, T]: scores [B, T] as from `page_scores`, tokens [B] of each row."""
        order = torch.arange(scores.shape[1], device=scores.device)
        own = (-(-tokens // self.page))[:, None]
        ranked = scores.masked_fill(scores.isnan(), -torch.inf) - TIE * order
        ranked = ranked.masked_fill(order >= own - self.recent_pages, torch.inf).masked_fill(order >= own, -torch.inf)
        gain = own / own.clamp(max=self.pages)
        return top_mask(ranked, torch.where(gain > self.least_gain, self.pages, own)[:, 0])

    def _plan(self, step: Step, choice: Choice) -> Plan:
        alike = not step.cache.version and step.cache.stored == choice.stored
        slots = choice.slots if alike and choice.slots is not None else self._slots(step, choice.pages)
        if slots.shape[-1] == step.cache.stored:
            return Dense()
        return Tokens(slots.expand(-1, step.kv_heads, -1))

    def _slots(self, step: Step, pages: Tensor) -> Tensor:
        """Slots of the chosen pages: int64 [B, 1 or Hkv, n] ascending, -1 absent."""
        held = step.cache.positions
        if held is not None:
            chosen = F.pad(pages, (0, 1))[:, None].expand(-1, held.shape[1], -1)
            page = torch.where(held >= 0, held // self.page, pages.shape[1]).long()
            return slots_of(chosen.gather(2, page))
        index = slots_of(pages[:, None])
        slots = (index[..., None] * self.page + torch.arange(self.page, device=pages.device)).flatten(2)
        # The last page is the only one that is not full, and it is always chosen.
        return slots[..., : slots.shape[-1] - (-step.cache.stored % self.page)]


def page_scores(token: Tensor, page: int) -> Tensor:
    """Sums of token scores [B, N] over pages of `page`: [B, ceil(N / page)]."""
    return F.pad(token, (0, -token.shape[1] % page)).unflatten(1, (-1, page)).sum(-1)
