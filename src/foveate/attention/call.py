"""One attention call, as backends see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.attention.plan import Plan
from foveate.attention.positions import Positions


@dataclass(frozen=True)
class Call:
    """Arguments of `attend` after validation. Shapes as in `attend`.

    bias: of sigmoid weights; None: softmax weights.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: Plan
    positions: Positions
    scale: float
    window: int | None
    causal: bool
    log_weight: Tensor | None
    sink: Tensor | None
    softcap: float | None
    need_lse: bool
    bias: float | None = None

    @property
    def score(self) -> str:
        return "softmax" if self.bias is None else "sigmoid"

    @property
    def m(self) -> int:
        return self.q.shape[2]

    @property
    def n(self) -> int:
        return self.k.shape[2]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]
