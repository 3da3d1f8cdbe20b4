"""Quest: a decode step reads only the pages of the cache that could hold keys it wants.  (arXiv 2406.10774)

The cache stays whole. For every page of `page` tokens the greatest and the least value of each key feature are kept;
with them a query bounds its highest score inside the page without reading it. The pages with the highest bounds are
read, exactly; which ones is decided anew for every token.

    bound(page) = sum over d of max(q_d greatest_d, q_d least_d)  >=  max over its keys of q . k      unscaled
    read the max(min_pages, min(N, budget) // page) pages with the highest bound, at most all

Keys are rotated at true positions. Ties go to the earlier page. The first `dense_layers` layers, prompts, and rows of
at most `budget` tokens are dense. The page of the new token always is among the read ones (`force_last`; the authors'
evaluation code does not force it). One choice per KV head, by the highest bound of its query heads, as the authors'
kernels do; `per_query_head` chooses as their evaluation code does, and on most backends repeats the keys.
Differs from that code: there a budget of N tokens or more drops the lowest page when N is no multiple of `page`.
State: 2 D numbers per page and KV head, 1 / page of the cache's bytes. Step: O(N / page D) for the bounds, then the
pages. Bad options raise OptionError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.attention.plan import Dense, Plan, Tokens
from foveate.attention.statistics import by_group
from foveate.methods.base import Method
from foveate.methods.select.pages import Pages, best_pages, spread
from foveate.methods.step import Phase, Step
from foveate.options import option
from foveate.registry import register


@register(
    "quest",
    kind="select",
    paper="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    arxiv="2406.10774",
    year=2024,
    applies_to="pretrained",
    exact={"budget": 10**6},
    small={"budget": 16, "page": 4, "dense_layers": 0},
    claim=(
        "Bundled model, reading half of the cache, question known, 20 seeds, 2k and 4k tokens: "
        "passkey 0.60 and 0.55, single needle 0.95 and 1.00; "
        "dense passkey 0.70 and 0.60, single needle 0.95 and 1.00 "
        "(benchmarks/results/needles_0.5_aware.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class Quest(Method):
    """Reads the pages whose bounds on the query's scores are highest; the cache stays whole."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"decode"})

    budget: int = option(1024, "tokens read per KV head and step", at_least=1)
    page: int = option(16, "tokens per page", at_least=1)
    min_pages: int = option(3, "pages read at least", at_least=1)
    dense_layers: int = option(2, "first layers that read everything", at_least=0)
    force_last: bool = option(True, "the page of the new token is always read")
    per_query_head: bool = option(False, "each query head chooses its own pages")

    def plan(self, step: Step) -> Plan:
        if step.phase != "decode" or step.layer < self.dense_layers or step.cache.stored <= self.budget:
            return Dense()
        chosen = self.choose(step)
        return Dense() if chosen is None else Tokens(step.state.slots(chosen, ends=self.force_last))

    def choose(self, step: Step) -> Tensor | None:
        """Pages that the step's query reads: int64 [B, Hkv or Hq, n] ascending, -1 absent; None: all of every row.

        The number of pages follows the formula, also where the budget is no less than N.
        """
        if step.state is None:
            step.state = Pages("bounds", self.page)
        pages: Pages = step.state
        pages.update(step.cache)
        scores = pages.upper_bounds(step.q[:, :, -1])
        if not self.per_query_head:
            scores = by_group(scores, step.kv_heads, "max")
        count = scores.shape[-1]
        tokens = pages.tokens
        if isinstance(tokens, int):
            wanted = self.pages_for(tokens)
            if wanted >= count:
                return None
            if self.force_last:
                scores[..., -1] = torch.inf
            return best_pages(scores, wanted)
        tokens = spread(tokens, scores.shape[1])
        own = -(-tokens // self.page)
        order = torch.arange(count, device=scores.device)
        scores = scores.masked_fill(order >= own[..., None], -torch.inf)
        if self.force_last:
            scores = scores.masked_fill(order == own[..., None] - 1, torch.inf)
        wanted_by_row = (tokens.clamp(max=self.budget) // self.page).clamp_min(self.min_pages)
        return best_pages(scores, torch.where(tokens <= self.budget, own, wanted_by_row))

    def pages_for(self, tokens: int) -> int:
        return max(self.min_pages, min(tokens, self.budget) // self.page)
