"""What a layer's keys are voted on by: unrotated keys beside the cache, in 8 bits or in their own type.

They are there from the first step on that a sequence has more than `most` tokens, so short texts pay nothing. What
codes are taken from is the first `most` tokens, however the text came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.byte_keys import ByteKeys, Coding
from foveate.methods.step import RopeLike, Step

KEYS, STEPS = "ballots.keys", "ballots.steps"


@dataclass
class Codings:
    """of: mean and spread [B, Hkv, D] of each sequence's keys; made: bool [B] on the host, whether they are known."""

    of: Coding
    made: Tensor

    @classmethod
    def empty(cls, step: Step) -> Codings:
        B, H, _, D = step.k.shape
        zeros = torch.zeros(B, H, D, dtype=torch.float32, device=step.k.device)
        return cls(Coding(zeros, torch.ones_like(zeros)), torch.zeros(B, dtype=torch.bool))


def present(step: Step) -> bool:
    return step.cache.has_extra(KEYS)


def store(step: Step, rope: RopeLike, most: int, codings: Codings | None) -> None:
    """Bring the stored unrotated keys up to date with the step's; codings: None keeps them in the cache's own type.

    Sequences of at most `most` tokens are left until they have more.
    """
    cache, fresh = step.cache, not present(step)
    if cache.stored <= most:
        return
    if fresh:
        B, H, N, D = step.k.shape
        kind = step.k.dtype if codings is None else torch.int8
        cache.set_extra(KEYS, torch.zeros(B, H, N, D, dtype=kind, device=step.k.device))
        if codings is not None:
            cache.set_extra(STEPS, torch.zeros(B, H, N, dtype=torch.float32, device=step.k.device))
    if not cache.holes:
        known = not fresh if codings is None else bool(codings.made.all())
        _write(step, rope, slice(None), cache.stored - step.m if known else 0, codings, None if known else slice(most))
        return
    held = cache.positions_or_fail()[:, 0]
    for row in range(held.shape[0]):
        real = (held[row] >= 0).nonzero()[:, 0]
        if real.numel() > most:
            known = not fresh if codings is None else bool(codings.made[row])
            first = int(real[0])
            start = max(first, cache.stored - step.m) if known else first
            _write(step, rope, slice(row, row + 1), start, codings, None if known else real[:most] - first)


def _write(
    step: Step, rope: RopeLike, rows: slice, start: int, codings: Codings | None, sample: Tensor | slice | None
) -> None:
    """Unrotate and store the keys from slot `start` on of some rows; sample: which of them the coding is taken from."""
    cache = step.cache
    at = step.positions.keys(cache.stored, step.q.device)[rows, 0, start:].clamp_min(0)
    bare = rope.unrotate(step.k[rows, :, start:], at)
    if codings is None:
        cache.extra(KEYS)[rows, :, start:] = bare
        return
    mean, spread = codings.of.mean[rows], codings.of.spread[rows]
    if sample is not None:
        made = Coding.of(bare[:, :, sample])
        mean.copy_(made.mean), spread.copy_(made.spread)
        codings.made[rows] = True
    codes, steps = Coding(mean, spread).encode(bare)
    cache.extra(KEYS)[rows, :, start:] = codes
    cache.extra(STEPS)[rows, :, start:] = steps


def ballots(step: Step, rows: slice, held: Callable[[Tensor], Tensor], codings: Codings | None) -> Tensor | ByteKeys:
    """The stored unrotated keys of some rows; held: takes a row's own slots of a tensor [B, Hkv, N, ...]."""
    keys = held(step.cache.extra(KEYS))
    return keys if codings is None else ByteKeys(keys, held(step.cache.extra(STEPS)), codings.of.spread[rows])
