"""Drive a method over one layer without a model: what tests, goldens and studies of selection use."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.methods.base import Method, execute, finish_prompt
from foveate.methods.cache import LayerCache
from foveate.methods.step import RopeLike, RunState, Step


class SingleLayer:
    """One attention layer under a method.

    Call it with rotated q [B, Hq, M, D] and new k, v [B, Hkv, M, D]; it stores, attends and keeps as inside a model,
    and returns o [B, Hq, M, Dv]. `cache` and `run` are there to be looked at.
    """

    def __init__(
        self,
        method: Method,
        *,
        layer: int = 0,
        layers: int = 1,
        rope: RopeLike | None = None,
        scale: float | None = None,
        chunked: bool = False,
    ) -> None:
        self.method = method
        self.layer, self.layers = layer, layers
        self.rope, self.scale = rope, scale
        self.cache = LayerCache()
        self.run = RunState(chunked=chunked)
        self.last: Step | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, positions: Tensor | None = None, hidden: Tensor | None = None
    ) -> Tensor:
        """positions: [B, M] int64, -1 for padding; None: they follow."""
        self.last = self.step(q, k, v, positions=positions, hidden=hidden)
        return execute(self.method, self.last)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, *, positions: Tensor | None = None, hidden: Tensor | None = None
    ) -> Step:
        """Store k and v and make the step, without attending."""
        seen, M = self.cache.seen, q.shape[2]
        if self.run.chunked and seen and M == 1 and self.last is not None:
            self.finish_prefill()
        if positions is not None and bool((positions < 0).any()):
            self.cache.mark_holes()
        self.cache.append(k, v, positions)
        return Step(
            layer=self.layer,
            layers=self.layers,
            phase="prefill" if not seen else ("decode" if M == 1 else "extend"),
            q=q,
            cache=self.cache,
            scale=q.shape[-1] ** -0.5 if self.scale is None else self.scale,
            run=self.run,
            q_positions=positions,
            rope=self.rope,
            hidden=hidden,
        )

    def finish_prefill(self) -> None:
        """The prompt is over: prompt-end methods decide what stays."""
        if self.run.chunked and self.last is not None:
            finish_prompt(self.method, self.last)
            self.run.chunked = False


def masked_reference(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float | None = None) -> Tensor:
    """Dense attention of the last M queries with a keep mask bool [B, Hkv, N]: what evicting methods must equal."""
    from foveate.attention.plan import Tokens
    from foveate.attention.softmax import attend

    slots = torch.arange(k.shape[2], device=k.device).expand_as(keep)
    plan = Tokens(torch.where(keep, slots, -1))
    return attend(q, k, v, plan, scale=scale, backend="reference")
