"""Small instances of every registered mixer, and what the conformance suite needs to know of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.mixers.base import Mixer, create_mixer
from foveate.registry import Card, cards

DIM, HEADS, TOKENS = 16, 2, 24
MIXERS = cards(kind="mixer")
# Options that make another layer of a mixer, for the suite to run as well.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax-window": ("softmax", {"window": 5}),
    "softmax-grouped": ("softmax", {"kv_heads": 1, "qk_norm": True}),
    "baseconv-long": ("baseconv", {"kernel": None, "max_length": 400}),
    "lookups-two-way": ("lookups", {"selection": "two-way"}),
    "mamba2-groups": ("mamba2", {"groups": 2, "state_dim": 4}),
    "titans-plain": ("titans-memory", {"chunk": 5, "form": "plain"}),
    "titans-gain": ("titans-memory", {"chunk": 5, "form": "residual-gain"}),
    "miras-kl": ("miras", {"chunk": 5, "retention": "kl", "bias": "lp", "rank": None}),
    "landmark-all": ("landmark", {"block": 4, "chunk": 2}),
    "landmark-host": ("landmark", {"block": 5, "retrieve": 1, "chunk": 1, "host": True, "placement": "anchored"}),
    "hcam-slots": ("hcam", {"chunk": 2, "slots": 2, "detach": False}),
    "rat-attention": ("rat", {"chunk": 1}),
    "transnormer-diag-softmax": ("transnormer-diag", {"block": 5, "weights": "softmax", "lrpe": True}),
    "qlstm-plain": ("qlstm", {"reverse": False}),
}


def build(card: Card, dtype: torch.dtype = torch.float64, **options: Any) -> Mixer:
    """The mixer in the middle of a model of three layers, with the options its card gives for small inputs.

    Vectors and gains that start at 0 or 1 are moved, so that leaving one out is seen.
    """
    torch.manual_seed(3)
    given = {"dim": DIM, "heads": HEADS, "layer": 1, "layers": 3, **(card.small or {}), **options}
    mixer = create_mixer(card.name, **given).to(dtype).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def tokens(rows: int = 3, length: int = TOKENS, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(rows, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(mixer: Mixer, rows: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Tokens in the number that the mixer takes."""
    return tokens(rows, mixer.length or TOKENS, dtype, seed)


def any_length(card: Card) -> bool:
    return build(card).length is None


def conforming(check: str, *, having: Callable[[Card], bool] = lambda card: True) -> pytest.MarkDecorator:
    """Parametrise over the mixers that a check applies to; one whose card says that it fails it must fail."""
    chosen = []
    named = {card.name: card for card in MIXERS}
    variants = {name: replace(named[mixer], small=options) for name, (mixer, options) in VARIANTS.items()}
    for name, card in {**named, **variants}.items():
        if having(card):
            marks = [pytest.mark.xfail(reason=card.known[check], strict=True)] if check in card.known else []
            chosen.append(pytest.param(card, id=name, marks=marks))
    return pytest.mark.parametrize("card", chosen)


def has(pattern: str) -> Callable[[Card], bool]:
    return lambda card: pattern in card.target.patterns  # type: ignore[attr-defined]


def run(mixer: Mixer, x: Tensor, sizes: list[int], **options: Any) -> tuple[Tensor, Any]:
    """The outputs of consecutive calls, joined, and the last state."""
    state, outputs = options.pop("state", None), []
    for piece in x.split(sizes, 1):
        y, state = mixer(piece, state=state, **options)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def tensors_of(state: Any) -> list[Tensor]:
    found: list[Tensor] = []
    state.map(lambda each: found.append(each) or each)
    return found
