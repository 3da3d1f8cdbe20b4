"""Step: what one attention layer sees in one forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from foveate.attention.plan import Blocks, Counted, Dense, Plan, Tokens
from foveate.attention.positions import Positions
from foveate.attention.ragged import attend_ragged
from foveate.attention.softmax import attend
from foveate.errors import UnsupportedModelError
from foveate.methods.cache import LayerCache

Phase = Literal["prefill", "extend", "decode"]


class RopeLike(Protocol):
    """Rotary embedding of a model: x [B, H, N, D], positions [B or 1, N] or [B or 1, H or 1, N]."""

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor: ...

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor: ...


@dataclass
class Reading:
    """What one layer read in one step: pairs of query and key per query head, and what a dense model reads.

    A number that is still being computed on a GPU stays there until statistics are asked for.
    scanned, indexed: where an index chose the keys, pairs whose score it computed, and pairs it could have; else None.
    recall: the share of the truly best keys that it found, where that was measured in this step; else None.
    """

    layer: int
    phase: Phase
    read: float | Tensor | Counted
    visible: float
    scanned: float | None = None
    indexed: float | None = None
    recall: float | None = None


def scanned_share(readings: Iterable[Reading]) -> float | None:
    """Pairs whose score an index computed over all pairs it searched, over all steps; None: nothing was searched."""
    some = [(each.scanned, each.indexed) for each in readings if each.scanned is not None and each.indexed]
    return sum(scanned for scanned, _ in some) / sum(indexed for _, indexed in some) if some else None


def mean_recall(readings: Iterable[Reading]) -> float | None:
    """The mean recall over the searches in which it was measured; None: in none."""
    measured = [each.recall for each in readings if each.recall is not None]
    return sum(measured) / len(measured) if measured else None


@dataclass
class RunState:
    """State shared by the layers of one request.

    shared: for methods (layer routers, indices that several layers use), by a key of the method's own.
    readings: what was read, for statistics.
    chunked: the prompt comes in several pieces; prompt-end methods wait for `finish_prefill` or the first decode.
    """

    shared: dict[Any, Any] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    chunked: bool = False
    record: bool = True


@dataclass
class Step:
    """One layer's forward pass. q [B, Hq, M, D] is rotated; the cache already holds the new keys.

    layer, layers: this layer's number and how many attention layers there are.
    phase: "prefill" (nothing was stored before), "extend" (something was, M > 1), "decode" (something was, M = 1).
    q_positions: [B, M] int64, -1 for padding; None: the last M tokens, no padding.
    window: the model's own sliding window, not counting the query itself.
    hidden: [B, M, C], the input of the q, k, v projections, for methods that declare `needs = {"hidden"}`.
    """

    layer: int
    layers: int
    phase: Phase
    q: Tensor
    cache: LayerCache
    scale: float
    run: RunState = field(default_factory=RunState)
    q_positions: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    sink: Tensor | None = None
    rope: RopeLike | None = None
    hidden: Tensor | None = None
    member: int = 0

    @property
    def k(self) -> Tensor:
        """Stored keys [B, Hkv, N, D], the new ones last unless slots were dropped."""
        return self.cache.keys

    @property
    def v(self) -> Tensor:
        return self.cache.values

    @property
    def m(self) -> int:
        return self.q.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.cache.shape[1]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.kv_heads

    @property
    def positions(self) -> Positions:
        return self.cache.where(self.m, self.q_positions)

    @property
    def state(self) -> Any:
        """This method's own state on this layer's cache; None until set."""
        return self.cache.states.get(self.member)

    @state.setter
    def state(self, value: Any) -> None:
        self.cache.states[self.member] = value

    def real_tokens(self) -> int | Tensor:
        """Stored tokens per sequence: an int, or [B] int64 where padding makes them differ."""
        held = self.cache.positions
        if held is None or not self.cache.holes:
            return self.cache.stored
        return (held >= 0).sum(-1).amax(1)

    def query_positions(self) -> Tensor:
        """[B, M] int64."""
        if self.q_positions is not None:
            return self.q_positions
        return self.cache.latest(self.m, self.q.device)

    def unrotated(self) -> tuple[Tensor, Tensor]:
        """The step's q and new k before rotary embedding: [B, Hq, M, D], [B, Hkv, M, D].

        Works in "prefill" and "extend" and "decode" while the new keys are the last slots.
        """
        if self.rope is None:
            raise UnsupportedModelError(
                "this method needs queries before rotary embedding, and this model's rotary embedding is not known; "
                "see foveate.hf.rope for the kinds that are"
            )
        at = self.query_positions().clamp_min(0)
        return self.rope.unrotate(self.q, at), self.rope.unrotate(self.k[:, :, -self.m :], at)

    def attend(self, plan: Plan | None = None) -> Tensor:
        """Softmax attention over `plan` (default dense): o [B, Hq, M, Dv]; what was read is recorded."""
        plan = plan or Dense()
        self.record(plan)
        packed = self.cache.packed
        if packed is None:
            return attend(
                self.q,
                self.k,
                self.v,
                plan,
                scale=self.scale,
                positions=self.positions,
                window=self.window,
                log_weight=self.cache.log_weight,
                sink=self.sink,
                softcap=self.softcap,
            )
        if not isinstance(plan, Dense):
            raise UnsupportedModelError(f"a {type(plan).__name__} plan cannot read a cache with ragged heads")
        if self.softcap is not None:
            raise UnsupportedModelError("a model with a logit softcap cannot be served with ragged heads")
        needs_positions = self.m > 1 or self.window is not None
        o = attend_ragged(
            self.q,
            packed.fields["keys"],
            packed.fields["values"],
            packed.start,
            packed.length,
            scale=self.scale,
            k_positions=packed.fields["positions"] if needs_positions else None,
            q_positions=self.query_positions() if needs_positions else None,
            window=self.window,
            log_weight=packed.fields.get("log_weight"),
            sink=self.sink,
        )
        assert isinstance(o, Tensor)
        return o

    def record(self, plan: Plan, *, m: int | None = None, share: float = 1.0) -> None:
        """Note how much of what a dense model reads this step reads (per query head).

        m: the real tokens, when the call covers one row of a padded batch; share: that row's part of the batch.
        """
        if not self.run.record:
            return
        M, seen, stored = self.m, self.cache.seen, float(self.cache.stored)
        if m is not None:
            seen, stored, M = seen - M + m, stored - M + m, m
        if self.cache.ragged:
            stored = float(self.cache.lengths().double().mean())
        dense = M * (stored - M) + M * (M + 1) / 2
        read: float | Tensor | Counted
        if isinstance(plan, Dense):
            read = dense
        elif isinstance(plan, Tokens) and M == 1:
            read = min(float(plan.index.shape[-1]), stored)
        elif isinstance(plan, Blocks):
            read = plan.share(M, int(stored)) * dense
        else:
            read = plan.density(M, int(stored)) * dense
        visible = M * (seen - M) + M * (M + 1) / 2
        self.run.readings.append(Reading(self.layer, self.phase, read * share, visible * share))
