"""EchoAtt: inner layers reuse the attention weights of the first layer of their group.  (arXiv 2409.14595)

Neighbouring inner layers put nearly the same weights on the same tokens. Layers are therefore grouped; the first of a
group, its leader, attends as usual, and the others, its followers, weigh values of their own with the leader's weights,
query head by query head. The first and last layers of a model are too unlike the rest and are left alone.

    leader l    A = softmax(q_l k_l^T scale + mask)      [B, Hq, M, N], after the mask
    follower f  o_f = A v_f                              no scores and no softmax of its own
    groups      of `size` neighbours among all but the `first` and `last` layers, in order; with `threshold` a group
                ends before the layer j with sim(leader, j) < threshold; or as listed, `groups="6-8/9-10"`
    sim(i, j)   mean over texts, query heads h and queries t of cos(A_i[h, t], A_j[h, t])  (`foveate calibrate echoatt`)

A decode step computes the row A once, float32, and each follower is one product with its values: half of what it would
read, and counted so. For several queries A is either kept as a matrix (`materialise`, the paper's way, O(Hq M N)
memory), or computed again by each follower from the leader's q and k, O(N) memory and no less arithmetic.

Without adjustment the model gets worse: foveate.lm.echoatt makes a student that has no query and key projections and
no key cache in its followers, and distils it. Here, on an unchanged model, the projections still run and the followers'
keys are still stored. Groups cannot hold layers with a sliding window of their own, and calls need a cache, by which
layers of one request know each other: UnsupportedModelError otherwise. Models with learned sinks compute A again.

No official code exists; the paper's layers are not known, so defaults leave four layers alone at either end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.attention.plan import Dense
from foveate.attention.positions import Positions
from foveate.attention.softmax import attend
from foveate.attention.statistics import attention_rows
from foveate.errors import OptionError, UnsupportedModelError
from foveate.methods.cache import LayerCache
from foveate.methods.calibrated import Calibrated, check_table
from foveate.methods.profile import Profile
from foveate.methods.select.scores import last_weights
from foveate.methods.step import Phase, Reading, Step
from foveate.options import option
from foveate.registry import register

Groups = tuple[tuple[int, ...], ...]


@dataclass
class Lead:
    """What a leader leaves for its followers within one step.

    seen: tokens seen by then. weights: A, [B, Hq, M, N], or None where followers compute it again from q [B, Hq, M, D]
    and the leader's stored keys.
    """

    seen: int
    weights: Tensor | None
    q: Tensor
    cache: LayerCache
    positions: Positions


@register(
    "echoatt",
    kind="select",
    paper="EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
    arxiv="2409.14595",
    year=2024,
    applies_to="pretrained, better after distillation",
    exact={"size": 1},
    small={"first": 0, "last": 0},
    calibration="echoatt",
    claim=(
        "Pairs of like layers that share weights cost perplexity 10.05 -> 22.5 in the first fifth, 14.0 to 16.8 in "
        "the middle, 10.8 in the last; a student sharing nine pairs in the middle has 54.1, distilled for 300 steps "
        "13.4, tuned after that 9.0 (the tuned teacher is not among the rows): distillation closes most of the gap "
        "(benchmarks/results/claims/echoatt.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class EchoAtt(Calibrated):
    """Groups of inner layers share the attention weights of their first layer, each with its own values."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"prefill", "extend", "decode"})
    alone: ClassVar[bool] = True
    calibration: ClassVar[str] = "echoatt"

    first: int = option(4, "first layers left alone", at_least=0)
    last: int = option(4, "last layers left alone", at_least=0)
    size: int = option(2, "most layers per group", at_least=1)
    threshold: float | None = option(
        None, "least similarity to the leader within a group, from the calibration profile; default: groups are full"
    )
    groups: str | None = option(None, "the groups themselves, as '6-8/9-10', instead of first, last and size")
    materialise: bool = option(False, "keep the weights of several queries as a matrix instead of computing them again")

    def check(self) -> None:
        if self.groups is not None:
            if self.threshold is not None:
                raise self.refuse("threshold", "None where groups are listed")
            self._listed()

    def check_profile(self, profile: Profile) -> None:
        check_table(profile, "similarity", (profile.model.layers, profile.model.layers))

    def for_model(self, identity: Any) -> EchoAtt:
        made = self if self.threshold is None else super().for_model(identity)
        layers = identity.layers
        if self.groups is not None:
            if max(max(group) for group in self._listed()) >= layers:
                raise self.refuse("groups", f"layers from 0 to {layers - 1}, this model's")
        elif self.size > 1 and layers - self.first - self.last < 2:
            raise self.refuse("first", f"with last={self.last}, at least two of this model's {layers} layers between")
        return made

    def sharing(self, layers: int) -> Groups:
        """The groups of a model with `layers` attention layers, leaders first; layers in none are not named."""
        if self.groups is not None:
            return self._listed()
        similarity = None if self.threshold is None else self.table("similarity").tolist()
        return sharing_groups(layers, self.first, self.last, self.size, similarity, self.threshold)

    def _listed(self) -> Groups:
        try:
            spans = [tuple(int(each) for each in part.split("-")) for part in str(self.groups).split("/")]
            listed = tuple(tuple(range(begin, end + 1)) for begin, end in spans)
        except ValueError:
            raise self.refuse("groups", "spans of layers as '6-8/9-10'") from None
        named = [layer for group in listed for layer in group]
        if any(len(group) < 2 for group in listed) or len(set(named)) < len(named) or min(named) < 0:
            raise self.refuse("groups", "spans of two and more different layers, as '6-8/9-10'")
        return listed

    def attend(self, step: Step) -> Tensor:
        for leader, *followers in self.sharing(step.layers):
            if step.layer == leader:
                return self._lead(step)
            if step.layer in followers:
                return self._follow(step, leader)
        return step.attend()

    def _lead(self, step: Step) -> Tensor:
        weights = self._weights(step)
        lead = Lead(step.cache.seen, weights, step.q, step.cache, step.positions)
        step.run.shared["echoatt", step.layer] = lead
        if weights is None:
            return step.attend()
        step.record(Dense())
        return weigh(weights, step.v)

    def _weights(self, step: Step) -> Tensor | None:
        """A, where it is worth keeping."""
        if step.sink is not None:
            return None
        if step.m == 1:
            return last_weights(step)[:, :, None]
        if not self.materialise:
            return None
        if step.softcap is not None:
            raise UnsupportedModelError("EchoAtt: materialise=True does not serve a logit softcap; leave it out")
        return attention_rows(step.q, step.k, scale=step.scale, positions=step.positions, window=step.window)

    def _follow(self, step: Step, leader: int) -> Tensor:
        lead: Lead | None = step.run.shared.get(("echoatt", leader))
        if lead is None or lead.seen != step.cache.seen:
            raise UnsupportedModelError(
                f"EchoAtt: layer {step.layer} finds no weights of its leader, layer {leader}: that layer has a "
                "sliding window of its own; choose other groups"
            )
        if lead.weights is None:
            step.record(Dense())
            o: Tensor = attend(
                lead.q,
                lead.cache.keys,
                step.v,
                scale=step.scale,
                positions=lead.positions,
                window=step.window,
                sink=step.sink,
                softcap=step.softcap,
            )
            return o
        self._record_values(step)
        return weigh(lead.weights, step.v)

    @staticmethod
    def _record_values(step: Step) -> None:
        """Values without keys are half of what a dense layer reads."""
        if step.run.record:
            M, seen = step.m, step.cache.seen
            visible = M * (seen - M) + M * (M + 1) / 2
            step.run.readings.append(Reading(step.layer, step.phase, visible / 2, visible))


def sharing_groups(
    layers: int,
    first: int,
    last: int,
    size: int,
    similarity: Sequence[Sequence[float]] | None = None,
    threshold: float | None = None,
) -> Groups:
    """Groups of up to `size` neighbours among layers first .. layers - last - 1, in order; groups of one are left out.

    With a similarity [layers][layers] and a threshold, a group ends before a layer that is less similar to its leader;
    NaN is less similar.
    """
    groups: list[list[int]] = []
    for layer in range(first, layers - last):
        open_group = groups[-1] if groups and len(groups[-1]) < size else None
        if open_group is not None and threshold is not None:
            if similarity is None:
                raise OptionError("sharing_groups: threshold without similarity, allowed: both or none")
            if not similarity[open_group[0]][layer] >= threshold:
                open_group = None
        if open_group is None:
            groups.append([layer])
        else:
            open_group.append(layer)
    return tuple(tuple(group) for group in groups if len(group) > 1)


def weigh(weights: Tensor, v: Tensor) -> Tensor:
    """A v: weights [B, Hq, M, N], v [B, Hkv, N, Dv] -> [B, Hq, M, Dv] in v's dtype."""
    B, Hq, M, N = weights.shape
    rows = weights.to(v.dtype).reshape(B, v.shape[1], Hq // v.shape[1] * M, N)
    return (rows @ v).view(B, Hq, M, v.shape[-1])


def layer_similarity(weights: Tensor) -> Tensor:
    """Mean cosine of the rows of every two layers' weights [L, ..., N], head with head: float64 [L, L]."""
    flat = weights.flatten(1, -2)
    flat = flat / flat.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    flat = flat.flatten(1)
    return (flat @ flat.T).double() / weights[0, ..., 0].numel()
