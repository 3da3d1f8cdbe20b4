"""Keys coded in 8 bits for the softmax votes of selections: a quarter of the bytes of float32 keys to read.

    key j   ~ mean + spread * step[j] * codes[j]         codes int8, |codes| <= 127; mean, spread per head and channel
    query r ~ query_step[r] * whole numbers of 16 bits, of query * spread
    score   = query_step[r] * step[j] * (a sum of whole numbers, exact)

The mean adds the same to every product of a query, which a softmax does not feel, and is left out. Channels of equal
spread share the 8 bits fairly, whatever outliers a model has: of keys like those that mean and spread were taken from,
a score is off by about 1 % of the scores' own standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.attention.shapes import match

KEY_TOP, QUERY_TOP = 127, 32639
# Keys whose codes are widened at once.
STRETCH = 1 << 15


def _coded(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """x [..., D] float32 as whole numbers (float32) of at most top, and their step [...]; not finite: 0 and NaN."""
    high = x.abs().amax(-1)
    step = high / high.new_full((), top)
    codes = (x / torch.where(step > 0, step, 1.0)[..., None]).round_()
    finite = high <= torch.finfo(torch.float32).max
    return torch.where(finite[..., None], codes, 0.0), torch.where(finite, step, torch.nan)


@dataclass(frozen=True)
class Coding:
    """How a layer's keys are coded: mean and spread [B, H, D] float32, spread above 0."""

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, keys: Tensor) -> Coding:
        """From sample keys [B, H, n, D]."""
        sample = keys.float()
        spread, mean = torch.std_mean(sample, 2, correction=0)
        return cls(mean.contiguous(), torch.where(spread > 0, spread, 1.0))

    def encode(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, H, N, D] -> codes int8 [B, H, N, D], steps float32 [B, H, N]. O(N H D)."""
        codes, step = _coded((keys.float() - self.mean[:, :, None]) / self.spread[:, :, None], KEY_TOP)
        return codes.to(torch.int8), step


@dataclass(frozen=True)
class ByteKeys:
    """Coded keys: codes int8 [B, H, N, D], step float32 [B, H, N], and the spread [B, H, D] of their `Coding`."""

    codes: Tensor
    step: Tensor
    spread: Tensor

    def __post_init__(self) -> None:
        match(codes=(self.codes, "B H N D"), step=(self.step, "B H N"), spread=(self.spread, "B H D"))

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def between(self, start: int, stop: int) -> ByteKeys:
        return replace(self, codes=self.codes[:, :, start:stop], step=self.step[:, :, start:stop])

    def scaled(self, q: Tensor) -> Tensor:
        """q [B, Hq, D] as it meets the codes: [B, H, G, D] float32."""
        B, H, _, D = self.codes.shape
        return q.float().view(B, H, -1, D) * self.spread[:, :, None]

    def scores(self, q: Tensor) -> Tensor:
        """q . key, less a number per query: q [B, Hq, D] -> [B, Hq, N] float32. O(N Hq D)."""
        codes, step = _coded(self.scaled(q), QUERY_TOP)
        parts = [
            (codes @ some.float().transpose(-1, -2)) * (step[..., None] * by[:, :, None])
            for some, by in zip(self.codes.split(STRETCH, 2), self.step.split(STRETCH, 2))
        ]
        return torch.cat(parts, -1).flatten(1, 2)
