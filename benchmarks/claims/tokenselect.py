"""TokenSelect's claim in small: tokens chosen by soft votes stay close to the dense model, closer than when every head
adds one vote for each of its best, a choice kept while queries are alike costs little, and so do votes on keys in 8
bits; a passkey is found. Beyond the model's trained length (8192 tokens: --length 12288, minutes) the dense model's
perplexity rises and TokenSelect's does not.

    python benchmarks/claims/tokenselect.py [--length 2048] [--seeds 2]
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from claim import record
from keeping import arguments, load, next_token, retrieval
from selecting import divergence
from torch import Tensor

from foveate.attention.byte_keys import ByteKeys
from foveate.attention.scoring import query_scores, slots_of, top_mask
from foveate.methods.select.tokenselect import TokenSelect
from foveate.options import option
from foveate.registry import register
from foveate.tasks.passkey import Passkey
from foveate.tasks.perplexity import Perplexity


@register("tokenselect-hard", kind="select", paper="control", year=2024, applies_to="pretrained")
@dataclass(frozen=True, kw_only=True)
class HardVotes(TokenSelect):
    """The control: every head votes for its `budget` best tokens, each vote counts one."""

    bits: int | None = option(None, "keys in their own type", one_of=(None,))

    def votes_for(self, query: Tensor, k: Tensor | ByteKeys) -> Tensor:
        assert isinstance(k, Tensor)
        middle = k[:, :, self.sinks : k.shape[2] - self.local]
        votes = top_mask(query_scores(query.to(k.dtype), middle), self.budget).float().sum(1, keepdim=True)
        chosen = slots_of(top_mask(votes, self.budget))[:, 0] + self.sinks
        first = torch.arange(self.sinks, device=k.device).expand(k.shape[0], -1)
        return torch.cat((first, chosen), 1)


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=2048, seeds=2)
    model, tokenizer = load(given)
    budget, sizes = given.length // 8, "sinks=16,local=128,chunk=128"
    methods = [f"tokenselect:budget={budget},{sizes},reuse={reuse}" for reuse in ("none", 0.9, 0.8)]
    methods += [
        f"tokenselect:budget={budget},{sizes},reuse=none,bits=none",
        f"tokenselect:budget={budget},{sizes},reuse=none,scale=0.125",
        f"tokenselect-hard:budget={budget},{sizes},reuse=none",
        f"streaming-llm:sinks=16,window={budget + 128}",
    ]
    torch.manual_seed(0)
    found = retrieval(model, tokenizer, ["full", *methods], Passkey(), given, question_seen=True)
    if given.length > 8192:
        rows = next_token(model, tokenizer, ["full", *methods], Perplexity(target=64), given)
    else:
        rows = divergence(model, tokenizer, methods, given)
    record(
        "tokenselect" if given.length <= 8192 else "tokenselect_long",
        "soft votes choose tokens that matter, in and beyond the trained length",
        given,
        started,
        model=model,
        rows=rows,
        passkey=found,
    )


if __name__ == "__main__":
    main()
