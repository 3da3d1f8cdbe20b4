"""What one request stored and read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.methods.cache import LayerCache
from foveate.methods.step import Reading, mean_recall, scanned_share


@dataclass
class Stats:
    """Figures of the latest request under `apply`.

    cache_bytes: allocated by the cache now, everything included; host_bytes of them in host memory beside the model's
    device, device_bytes the rest. scanned_share: of methods with an index, the pairs of query and key that it scored
    over those it holds. recall: of their searches against exact ones, where that was measured. density: pairs of query
    and key that were read over those a dense model reads, over all steps (prefill_density, decode_density: per phase;
    extend counts as prefill).
    """

    stores: list[LayerCache] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    other_bytes: int = 0

    @property
    def cache_bytes(self) -> int:
        return self.other_bytes + sum(store.bytes() for store in self.stores)

    @property
    def host_bytes(self) -> int:
        return sum(store.host_bytes() for store in self.stores)

    @property
    def device_bytes(self) -> int:
        return self.cache_bytes - self.host_bytes

    @property
    def scanned_share(self) -> float | None:
        return scanned_share(self.readings)

    @property
    def recall(self) -> float | None:
        return mean_recall(self.readings)

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
            "host_bytes": self.host_bytes,
            "device_bytes": self.device_bytes,
            "density": self.density,
            "prefill_density": self.prefill_density,
            "decode_density": self.decode_density,
            "scanned_share": self.scanned_share,
            "recall": self.recall,
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
        if self.host_bytes:
            shown[0] += f", {self.host_bytes / 2**20:.2f} MiB of them in host memory"
        for name in ("prefill_density", "decode_density", "scanned_share", "recall"):
            value = getattr(self, name)
            if value is not None:
                shown.append(f"{name.replace('_', ' ')} {value:.3f}")
        return "; ".join(shown)


def _density(readings: list[Reading]) -> float | None:
    visible = sum(each.visible for each in readings)
    return min(1.0, sum(float(each.read) for each in readings) / visible) if visible else None
