"""What one request stored and read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.methods.cache import LayerCache
from foveate.methods.step import Reading


@dataclass
class Stats:
    """Figures of the latest request under `apply`.

    cache_bytes: allocated by the cache now, everything included. density: pairs of query and key that were read over
    those a dense model reads, over all steps (prefill_density, decode_density: per phase; extend counts as prefill).
    """

    stores: list[LayerCache] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    other_bytes: int = 0

    @property
    def cache_bytes(self) -> int:
        return self.other_bytes + sum(store.bytes() for store in self.stores)

    @property
    def seen(self) -> int:
        """Tokens that went by."""
        return max((store.seen for store in self.stores), default=0)

    @property
    def density(self) -> float | None:
        return _density(self.readings)

    @property
    def prefill_density(self) -> float | None:
        return _density([each for each in self.readings if each.phase != "decode"])

    @property
    def decode_density(self) -> float | None:
        return _density([each for each in self.readings if each.phase == "decode"])

    @property
    def lengths(self) -> list[list[float]]:
        """Tokens held per layer and KV head, the mean over the batch."""
        return [store.lengths().double().mean(0).tolist() for store in self.stores]

    def positions(self, layer: int, head: int, row: int = 0) -> Tensor:
        """Positions that one KV head holds, ascending, int64."""
        return self.stores[layer].kept_positions(row, head)

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens_seen": self.seen,
            "cache_bytes": self.cache_bytes,
            "density": self.density,
            "prefill_density": self.prefill_density,
            "decode_density": self.decode_density,
            "lengths": self.lengths,
        }

    def __str__(self) -> str:
        if not self.stores:
            return "no request has run yet"
        held = torch.tensor([sum(row) / max(1, len(row)) for row in self.lengths])
        shown = [
            f"{self.seen} tokens seen, {held.mean():.0f} held per head "
            f"(layers: {held.min():.0f} to {held.max():.0f}), {self.cache_bytes / 2**20:.2f} MiB"
        ]
        for name in ("prefill_density", "decode_density"):
            value = getattr(self, name)
            if value is not None:
                shown.append(f"{name.replace('_', ' ')} {value:.3f}")
        return "; ".join(shown)


def _density(readings: list[Reading]) -> float | None:
    visible = sum(each.visible for each in readings)
    return min(1.0, sum(float(each.read) for each in readings) / visible) if visible else None
