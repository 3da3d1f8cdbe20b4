"""Attention in groups of tokens, half of the heads shifted by half a group: how a pretrained model is tuned to longer
texts at the price of short ones. Only for training; the tuned model attends to everything.

    group_h(t) = floor((t + d_h) / G),  d_h = G / 2 in shifted heads, else 0
    query i of head h reads key j  iff  j <= i and (group_h(i) = group_h(j) or j < sinks)

Of H heads the last H - H // 2 are S, the shifted ones. In shifted heads neighbouring groups of the others meet, so that
information crosses every border.
    "s2-attn" (LongLoRA)    all of S stays shifted, no sinks
    "sinklora"              a share `returned` of S, its last heads, goes back to plain groups, and everyone reads the
                            first tokens, on which pretrained models lean
Cost O(T (G + sinks) D) time and, with a fused kernel, O(T D) memory: groups are rows of a batch, no mask is made.

Papers: LongLoRA, Chen et al. 2023 (arXiv 2309.12307); SinkLoRA, Zhang 2024 (arXiv 2406.05678). Differs from them:
    a length that G does not divide ends in a shorter group; the authors of LongLoRA refuse it.
    SinkLoRA's code does not hold its attention. Which heads return (the last), their share (half), the number of sinks
    (4) and that sinks are read by all but read causally themselves are this library's reading of the paper.
    variant="roll" is LongLoRA's path without its kernel: groups are cut from the rolled text, so that the last one
    holds the text's end and beginning, and the first G / 2 tokens read FUTURE tokens. For comparison only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.shapes import match_qkv
from foveate.attention.softmax import attend
from foveate.errors import OptionError, ShapeError
from foveate.options import check_fields, option
from foveate.registry import register


def shifted_mask(
    tokens: int, heads: int, *, group: int, shifted: range, sinks: int = 0, variant: str = "segment"
) -> Tensor:
    """The definition: bool [heads, T, T], True where a query reads a key. Options as in `shifted_attention`."""
    at = torch.arange(tokens)
    if variant == "roll":
        _check_roll(tokens, group, sinks)
    # A token's place in the order that groups are cut from.
    place = at + group // 2 if variant == "segment" else (at - group // 2) % tokens
    places = torch.stack([place if head in shifted else at for head in range(heads)])
    same = places[:, :, None] // group == places[:, None, :] // group
    own = same & (places[:, None, :] <= places[:, :, None])
    return own | ((at < sinks) & (at <= at[:, None]))


def shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: int,
    shifted: range,
    sinks: int = 0,
    variant: str = "segment",
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Causal attention within groups, some heads' groups shifted.

    Args:
        q: [B, Hq, T, D], already rotated.    k: [B, Hkv, T, D], v: [B, Hkv, T, Dv], in q's dtype.
        group: G, tokens of a group, even.    shifted: the query heads whose groups begin G / 2 earlier.
        sinks: first tokens that every later query reads, at most G / 2; none with variant="roll".
        variant: "segment", or "roll" (T a multiple of G; reads the future, see the module's docstring).
        scale, softcap, sink: as in `attend`.
    Returns:
        o [B, Hq, T, Dv] in q's dtype.
    Raises:
        ShapeError, OptionError.
    """
    sizes = match_qkv(q, k, v)
    heads, T = sizes["Hq"], sizes["M"]
    if sizes["N"] != T:
        raise ShapeError(f"q has {T} tokens and k {sizes['N']}, allowed: a whole text at once, without a cache")
    _check_group(group, sinks)
    if not (shifted.step == 1 and 0 <= shifted.start <= shifted.stop <= heads):
        raise OptionError(f"shifted_attention: shifted={shifted}, allowed: a range within the {heads} heads")
    if variant == "roll":
        _check_roll(T, group, sinks)
    outputs = []
    for first, last, moved in (
        (0, shifted.start, False),
        (shifted.start, shifted.stop, True),
        (shifted.stop, heads, False),
    ):
        if first == last:
            continue
        own = _Heads(q, k, v, first, last, sinks, scale, softcap, sink)
        if moved and variant == "roll":
            outputs.append(own.rolled(group // 2).segments(group, group).roll(group // 2, 2))
        else:
            outputs.append(own.segments(group // 2 if moved else group, group))
    return torch.cat(outputs, 1)


class _Heads:
    """Some query heads with the keys and values they read."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: int,
        last: int,
        sinks: int,
        scale: float | None,
        softcap: float | None,
        sink: Tensor | None,
    ) -> None:
        share = q.shape[1] // k.shape[1]
        if first % share == 0 and last % share == 0:
            k, v = (each[:, first // share : last // share] for each in (k, v))
        else:
            k, v = (each.repeat_interleave(share, 1)[:, first:last] for each in (k, v))
        self.qkv = [q[:, first:last], k, v]
        self.sinks = sinks
        self.options = {"scale": scale, "softcap": softcap, "sink": None if sink is None else sink[first:last]}

    def rolled(self, by: int) -> _Heads:
        self.qkv = [each.roll(-by, 2) for each in self.qkv]
        return self

    def segments(self, first: int, size: int) -> Tensor:
        """Attention within [0, first), then within every `size` tokens; the last segment may be shorter."""
        T = self.qkv[0].shape[2]
        first = min(first, T)
        whole = (T - first) // size
        end = first + whole * size
        outputs = [attend(*(each[:, :, :first] for each in self.qkv), **self.options)]  # type: ignore[arg-type]
        if whole:
            outputs.append(self._behind_sinks(first, end, whole))
        if end < T:
            outputs.append(self._behind_sinks(end, T, 1))
        return torch.cat(outputs, 2)

    def _behind_sinks(self, start: int, stop: int, count: int) -> Tensor:
        """Tokens [start, stop) as `count` segments of a batch, each behind the sinks.

        The sinks come with their own queries, whose outputs are dropped: so all is plain causal attention, which every
        fused kernel has.
        """
        folded = []
        for each in self.qkv:
            cut = each[:, :, start:stop].unflatten(2, (count, -1)).transpose(1, 2)
            front = each[:, None, :, : self.sinks].expand(-1, count, -1, -1, -1)
            folded.append(torch.cat((front, cut), 3).flatten(0, 1))
        o = attend(*folded, **self.options)[:, :, self.sinks :]  # type: ignore[arg-type]
        return o.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)


def _check_group(group: int, sinks: int) -> None:
    if group < 2 or group % 2:
        raise OptionError(f"shifted attention: group={group}, allowed: an even number of tokens, at least 2")
    if not 0 <= sinks <= group // 2:
        raise OptionError(f"shifted attention: sinks={sinks}, allowed: 0 to half a group, {group // 2}")


def _check_roll(tokens: int, group: int, sinks: int) -> None:
    if tokens % group or sinks:
        raise OptionError(
            f"shifted attention: variant='roll' with {tokens} tokens, group={group} and sinks={sinks}, allowed: whole "
            "groups and no sinks; use variant='segment'"
        )


def group_of(tokens: int, group: int | None, ratio: float) -> int:
    """G for a text: `group`, or the even number next above ratio * tokens."""
    return group if group is not None else max(2, 2 * math.ceil(ratio * tokens / 2))


@register(
    "s2-attn",
    kind="finetune",
    paper="LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",
    arxiv="2309.12307",
    year=2023,
    applies_to="pretrained models, while they are tuned to longer texts",
    claim=(
        "SmolLM2 tuned to 16384 tokens for 60 steps, read with full attention: perplexity 14.81 in shifted groups, "
        "12.38 with full attention, 26.56 before: 83 % of the gain; a step took 0.94 s against 1.09 (one text held "
        "out; benchmarks/results/claims/sinklora.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class S2Attention:
    """Attention in groups of tokens, half of the heads shifted by half a group (LongLoRA)."""

    group: int | None = option(None, "tokens of a group, even; none: a share of the text", at_least=2)
    ratio: float = option(0.25, "the group's share of the text, where `group` is not given", above=0, at_most=1)
    variant: str = option("segment", "'roll' wraps around and reads the future", one_of=("segment", "roll"))

    def __post_init__(self) -> None:
        check_fields(self)
        if self.group is not None:
            _check_group(self.group, 0)

    def shifted(self, heads: int, layer: int = 0) -> range:
        """The shifted query heads of a layer."""
        return range(heads // 2, heads)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int = 0,
        scale: float | None = None,
        softcap: float | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """q [B, Hq, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv] -> o [B, Hq, T, Dv]; see `shifted_attention`."""
        heads = self.shifted(q.shape[1], layer)
        group = group_of(q.shape[2], self.group, self.ratio)
        own = {"scale": scale, "softcap": softcap, "sink": sink}
        return shifted_attention(q, k, v, group=group, shifted=heads, variant=self.variant, **own)  # type: ignore[arg-type]


@register(
    "sinklora",
    kind="finetune",
    paper="SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
    arxiv="2406.05678",
    year=2024,
    applies_to="pretrained models, while they are tuned to longer texts",
    claim=(
        "SmolLM2 tuned to 16384 tokens for 60 steps: perplexity 12.48 in sink-fixed groups, 12.38 with full "
        "attention, 13.23 without sinks, 14.81 in shifted groups, 26.56 before: 99 % of full tuning's gain, and 83 % "
        "of it with shifted groups (one text held out; benchmarks/results/claims/sinklora.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class SinkFixedAttention:
    """Attention in groups of tokens, a quarter of the heads shifted, the first tokens read by all (SF-Attn)."""

    group: int | None = option(None, "tokens of a group, even; none: a share of the text", at_least=2)
    ratio: float = option(0.25, "the group's share of the text, where `group` is not given", above=0, at_most=1)
    returned: float = option(0.5, "share of the shifted heads that go back to plain groups", at_least=0, at_most=1)
    sinks: int = option(4, "first tokens that every query reads, at most half a group", at_least=0)
    alternate: bool = option(False, "odd layers return the first of the shifted heads instead of the last")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.group is not None:
            _check_group(self.group, self.sinks)

    def shifted(self, heads: int, layer: int = 0) -> range:
        """The heads of a layer that stay shifted."""
        first = heads // 2
        kept = heads - first - round(self.returned * (heads - first))
        if self.alternate and layer % 2:
            return range(heads - kept, heads)
        return range(first, first + kept)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int = 0,
        scale: float | None = None,
        softcap: float | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """q [B, Hq, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv] -> o [B, Hq, T, Dv]; see `shifted_attention`."""
        heads = self.shifted(q.shape[1], layer)
        group = group_of(q.shape[2], self.group, self.ratio)
        own = {"scale": scale, "softcap": softcap, "sink": sink}
        return shifted_attention(q, k, v, group=group, shifted=heads, sinks=self.sinks, **own)  # type: ignore[arg-type]
