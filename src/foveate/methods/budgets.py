"""Budgets: how many keys a head may keep. Counts are tokens per KV head, of one sequence without padding.

A method with a budget has the options of `Budgeted`. How its keys are shared between layers and heads is a `Budget`:

    Uniform     every head of every layer the same
    Pyramid     falling from the first layer to the last                       (PyramidKV)
    ByError     more for the layers that suffer more from eviction             (CompressKV)
    ByScore     a layer's keys go to the heads with the best scores            (Ada-KV)
    TwoClass    some heads keep everything, the others a fixed number          (DuoAttention, RazorAttention, Task-KV)

The functions below them are the arithmetic, each from its paper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foveate.attention.scoring import top_mask
from foveate.errors import OptionError, ShapeError
from foveate.methods.base import Method
from foveate.options import option

# Less than any difference of gates that means something; only orders equal gates.
TIE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Budgeted(Method):
    """A method with a budget: a number of tokens, or a share of the prompt to drop."""

    budget: int = option(1024, "keys kept per KV head", at_least=1)
    ratio: float | None = option(
        None, "share of the prompt to drop, instead of budget: int(N (1 - ratio)) keys stay", at_least=0, below=1
    )

    def count(self, tokens: int | Tensor) -> int | Tensor:
        """Keys to keep of a prompt of `tokens` (an int, or [B] for rows of different length)."""
        if self.ratio is None:
            return tokens.clamp(max=self.budget) if isinstance(tokens, Tensor) else min(self.budget, tokens)
        if isinstance(tokens, Tensor):
            kept = (tokens.double() * (1.0 - self.ratio)).long()
            return torch.where(tokens > 0, kept.clamp_min(1), 0)
        return max(1, int(tokens * (1.0 - self.ratio)))


class Budget(ABC):
    """How many keys the KV heads of a layer keep."""

    @abstractmethod
    def counts(self, layer: int, scores: Tensor) -> Tensor:
        """Keys to keep of each head's N, int64 [Hkv]; scores [Hkv, N], the higher the more wanted."""


class LayerBudget(Budget):
    """A budget that is the same for all heads of a layer."""

    @abstractmethod
    def of_layer(self, layer: int, tokens: int) -> int:
        """Keys to keep of `tokens`, at most all."""

    def counts(self, layer: int, scores: Tensor) -> Tensor:
        return torch.full(scores.shape[:1], self.of_layer(layer, scores.shape[-1]), device=scores.device)


@dataclass(frozen=True)
class Uniform(LayerBudget):
    """`keys` in every layer."""

    keys: int

    def of_layer(self, layer: int, tokens: int) -> int:
        return min(self.keys, tokens)


@dataclass(frozen=True)
class Pyramid(LayerBudget):
    """PyramidKV: a mean of `mean` keys, the window included, falling linearly over `layers`.

    beta: the last layer keeps 1 / beta of the mean, besides the window. real: kvpress's arithmetic, in which `mean` may
    be any real number (`real_budget`); else the original one (`pyramid_budget`).
    """

    layers: int
    mean: float
    window: int
    beta: int
    real: bool = False

    def of_layer(self, layer: int, tokens: int) -> int:
        if self.real:
            return min(tokens, real_budget(layer, self.layers, self.mean, self.window, self.beta, tokens))
        mean = int(self.mean)
        if tokens < mean:
            return tokens
        if mean <= self.window:
            return min(tokens, self.window)
        return min(tokens, pyramid_budget(layer, self.layers, mean, self.window, self.beta, tokens) + self.window)


@dataclass(frozen=True)
class ByError(LayerBudget):
    """CompressKV: `layer_budgets` of the layers' errors (NaN: the layer does not share, and has the mean)."""

    error: tuple[float, ...]
    mean: int
    least: int
    most: int

    @cached_property
    def keys(self) -> list[int]:
        """Per layer."""
        sharing = [layer for layer, each in enumerate(self.error) if each == each]
        found = layer_budgets([self.error[layer] for layer in sharing], self.mean, self.least, self.most)
        keys = [self.mean] * len(self.error)
        for layer, count in zip(sharing, found):
            keys[layer] = count
        return keys

    def of_layer(self, layer: int, tokens: int) -> int:
        return min(self.keys[layer], tokens)


@dataclass(frozen=True)
class ByScore(Budget):
    """Ada-KV: the keys that `layer` gives a layer's heads go to those with the best scores (`head_budgets`).

    floor: share that every head gets in any case. normalize: weigh a head's scores by how concentrated they are.
    """

    layer: LayerBudget
    floor: float = 0.2
    normalize: bool = False

    def counts(self, layer: int, scores: Tensor) -> Tensor:
        return head_budgets(scores, self.layer.of_layer(layer, scores.shape[-1]), self.floor, self.normalize)


@dataclass(frozen=True)
class TwoClass(Budget):
    """Some heads keep everything, the others `rest` keys, or rest(N) of N.

    full: bool [layers, Hkv], on the CPU. One row serves all layers.
    """

    full: Tensor
    rest: int | Callable[[int], int]

    def of(self, layer: int) -> Tensor:
        """Bool [Hkv]: which heads of a layer keep everything."""
        return self.full[layer if self.full.shape[0] > 1 else 0]

    @cached_property
    def others(self) -> list[list[int]]:
        """Per row of `full`, the heads that do not."""
        return [(~full).nonzero()[:, 0].tolist() for full in self.full]

    def rest_of(self, tokens: int) -> int:
        """What the others keep of `tokens`."""
        return min(tokens, self.rest if isinstance(self.rest, int) else self.rest(tokens))

    def counts(self, layer: int, scores: Tensor) -> Tensor:
        N = scores.shape[-1]
        return torch.where(self.of(layer), N, self.rest_of(N)).to(scores.device)


def pyramid_budget(layer: int, layers: int, capacity: int, window: int, beta: int, prompt: int) -> int:
    """PyramidKV: keys a layer keeps besides its window, falling linearly from the first layer to the last.

    capacity: mean keys per layer, the window included. Where prompt < 2 (capacity - window) every layer gets
    capacity - window.
    """
    room = capacity - window
    if prompt < 2 * room:
        return room
    least = room // beta
    most = 2 * room - least
    if most >= prompt - window:
        most = prompt - window
        least = 2 * room - most
    step = (most - least) // max(1, layers - 1)
    return most - layer * step


def real_budget(layer: int, layers: int, mean: float, window: int, beta: int, prompt: int) -> int:
    """kvpress: keys a layer keeps, the window included, from a real-valued mean; rounded half to even."""
    most, least = levels(mean, prompt - window, mean / beta)
    if not prompt >= most >= least >= window:
        return max(1, round(mean))
    return round(most - layer * ((most - least) / max(1, layers - 1)))


def falling_budget(layer: int, layers: int, room: int, free: int, beta: int) -> int:
    """Ada-Pyramid: keys of a layer besides its window, of `free` ones; no prompt is too short for the slope."""
    most, least = levels(room, free, room // beta)
    return int(most - layer * ((most - least) // max(1, layers - 1)))


def levels(room: float, free: float, least: float) -> tuple[float, float]:
    """Most and least keys of a layer around a mean of `room`, none above `free`."""
    most = 2 * room - least
    return (free, 2 * room - free) if most >= free else (most, least)


def layer_budgets(error: Sequence[float], mean: int, least: int, most: int) -> list[int]:
    """Keys per layer, mean * layers in all, each between least and most; layers with more error get more.

    error: one number per layer, summing to 1. Rounds half to even. What rounding and bounds leave over is given out
    one by one: additions to layers below `most` in descending order of error, removals from layers above `least` in
    ascending order, as many rounds as it takes.
    """
    layers = len(error)
    if not least <= mean <= most:
        raise OptionError(f"layer_budgets: mean={mean}, allowed: between least={least} and most={most}")
    total = mean * layers
    budgets = [min(max(least + round(each * (total - least * layers)), least), most) for each in error]
    # Stable, so that equal errors are served in order of the layer.
    order = sorted(range(layers), key=lambda layer: error[layer], reverse=True)
    missing = total - sum(budgets)
    while missing:
        step = 1 if missing > 0 else -1
        for layer in order if missing > 0 else _ascending(error):
            if missing and least <= budgets[layer] + step <= most:
                budgets[layer] += step
                missing -= step
    return budgets


def _ascending(error: Sequence[float]) -> list[int]:
    return sorted(range(len(error)), key=lambda layer: error[layer])


def head_budgets(scores: Tensor, base: int, floor: float, normalize: bool) -> Tensor:
    """Share base * Hkv keys between heads by their scores [Hkv, n]: int64 [Hkv]."""
    if normalize:
        if bool((scores < 0).any()):
            raise OptionError("AdaKV: normalize=True, allowed: only with a base whose scores are shares, never below 0")
        top = scores.topk(min(base, scores.shape[-1]), dim=-1).values.sum(-1, keepdim=True)
        scores = scores * (top / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny))
    counts = best_of_layer(scores, base).sum(-1)
    return torch.round(counts.double() * (1 - floor) + int(floor * base)).long()


def best_of_layer(scores: Tensor, count: int) -> Tensor:
    """Bool like scores [Hkv, n]: the layer's best count * Hkv; of equals the earliest keys, then the lowest heads."""
    by_key = scores.T
    return top_mask(by_key.flatten(), count * scores.shape[0]).view_as(by_key).T


def prune_lowest(scores: Tensor, count: int, floor: float) -> Tensor:
    """kvpress: bool like scores [Hkv, N] without the layer's lowest Hkv (N - count), each head's best ones safe."""
    safe = top_mask(scores, max(1, int(count * floor)) if floor > 0 else 0)
    return best_of_layer(scores.masked_fill(safe, torch.inf), count)


def sparsify_heads(alpha: Tensor, sparsity: float) -> Tensor:
    """The heads that keep everything: bool like alpha [layers, Hkv]; True iff alpha >= quantile(alpha, sparsity).

    The quantile runs over all gates and interpolates linearly; NaN gates do not count and are full. sparsity <= 0: all
    are full, >= 1: none. Equal gates: the lower layer and head stays full first.
    """
    gates = alpha.double()
    if gates.dim() != 2:
        raise ShapeError(f"alpha {list(alpha.shape)} does not fit [layers, Hkv]")
    if sparsity <= 0:
        return torch.ones_like(gates, dtype=torch.bool)
    if sparsity >= 1:
        return gates.isnan()
    order = torch.arange(gates.numel(), device=gates.device).view_as(gates) / gates.numel()
    ordered = gates - TIE * order
    return (ordered >= torch.nanquantile(ordered, sparsity)) | gates.isnan()


def lowest_stream(alpha: Tensor, sparsity: float) -> Tensor:
    """The heads that keep everything when the round(heads x sparsity) lowest gates stream: bool [layers, Hkv]."""
    gates = alpha.double().flatten()
    if not 0 <= sparsity <= 1:
        raise OptionError(f"sparsity={sparsity}, allowed: >= 0 and <= 1")
    count = round(int((~gates.isnan()).sum()) * sparsity)
    # Backwards, so that of equal gates the lower layer and head stays full.
    lowest = gates.nan_to_num(torch.inf).flip(0).argsort(stable=True)[:count]
    full = torch.ones_like(gates, dtype=torch.bool)
    full[gates.numel() - 1 - lowest] = False
    return full.view_as(alpha)


def top_share(scores: Tensor, share: float) -> Tensor:
    """Bool like scores [layers, H]: the round(share x heads) highest over all layers, at least one unless share is 0.

    NaN is never taken and does not count. Ties go to the lower layer and head.
    """
    flat = scores.nan_to_num(-torch.inf).flatten()
    measured = int((~scores.isnan()).sum())
    count = min(measured, max(1, round(share * measured))) if share > 0 else 0
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:count]] = True
    return chosen.view_as(scores)


def affordable(total: int, tokens: int, heads: int, whole: int, least: int) -> tuple[int, int]:
    """Two classes within `total` keys of a layer: how many of `heads` keep all `tokens`, at most `whole` and not all,
    and how many keys each other keeps, at least `least`. (0, least) where even that is too much."""
    for count in range(min(whole, heads - 1), -1, -1):
        rest = (total - tokens * count) // (heads - count)
        if rest >= least:
            return count, rest
    return 0, least
