"""full: dense attention through foveate's own cache and operators, the baseline of every comparison.

Reads every stored key and keeps every one. Differs from the untouched model only in how it is computed: the cache
grows in place instead of being copied for each token, and the query heads of a KV group are folded into rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.methods.base import Method
from foveate.registry import register


@register(
    "full",
    kind="dense",
    paper="Attention Is All You Need",
    arxiv="1706.03762",
    year=2017,
    applies_to="pretrained",
    exact={},
    small={},
)
@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Dense attention over everything that was said, through foveate's cache: nothing is dropped.

    Time O(M N), memory O(N).
    """

    steady: ClassVar[bool] = True
