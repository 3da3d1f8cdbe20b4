"""The four patterns of attention as a capability that every mixer declares, and keeps to."""

from __future__ import annotations

import pytest
import torch

from foveate.compare.cab import pattern_errors
from foveate.errors import OptionError
from foveate.mixers.base import PATTERNS, Mixer
from foveate.registry import Card
from tests.mixers.build import build, conforming, inputs, tokens


def instances(card: Card) -> list[Mixer]:
    """The mixer with and without causality where it has that option."""
    if "causal" not in {option.name for option in card.options}:
        return [build(card)]
    # A window looks back only, and is refused without causality.
    both_ways = build(card, causal=False, **({"window": None} if "window" in (card.small or {}) else {}))
    return [build(card, causal=True), both_ways]


@conforming("patterns")
def test_every_declared_pattern_can_be_built_and_is_kept(card):
    shown = {}
    for mixer in instances(card):
        shown |= pattern_errors(mixer, inputs(mixer), tokens(length=10, seed=1))
    assert set(shown) == set(card.target.patterns)
    assert max(shown.values()) < 1e-9


@conforming("undeclared-patterns")
def test_every_other_pattern_is_refused_by_name(card):
    for mixer in instances(card):
        kind = "causal" if mixer.causal else "noncausal"
        for pattern in (f"{kind}-self", f"{kind}-cross"):
            if pattern not in mixer.patterns:
                context = {"context": tokens(length=10)} if pattern.endswith("cross") else {}
                with pytest.raises(OptionError, match=f"used as {pattern}, allowed: "):
                    mixer(inputs(mixer), **context)


@conforming("reasons")
def test_a_mixer_that_says_why_it_lacks_patterns_says_it_for_all(card):
    lacking = getattr(card.target, "lacking", None)
    if lacking:
        assert set(lacking) == PATTERNS - card.target.patterns
        assert all(len(reason) > 20 for reason in lacking.values())


class Cheating(Mixer):
    """Declares what it does not keep: every output is a mean over all tokens."""

    patterns = frozenset({"causal-self", "causal-cross"})

    def mix(self, x, state, positions, cu_seqlens):
        return x.mean(1, keepdim=True).expand_as(x), state

    def cross(self, x, context, context_padding):
        return self.mix(x, None, None, None)[0]


def test_a_mixer_that_looks_ahead_is_found_out():
    errors = pattern_errors(Cheating(dim=16), tokens(), tokens(length=10))
    assert set(errors) == {"causal-self", "causal-cross"}
    assert min(errors.values()) > 0.1


class Broken(Mixer):
    patterns = frozenset({"noncausal-self"})
    causal = False

    def mix(self, x, state, positions, cu_seqlens):
        return torch.full_like(x, torch.nan), state


def test_outputs_that_are_not_numbers_are_found_out():
    assert pattern_errors(Broken(dim=16), tokens(), tokens(length=10)) == {"noncausal-self": float("inf")}
