"""The host tier: old keys and values in host memory, a few of them brought to the device for a step.

A layer's hot tokens stay in its LayerCache, on the device. The cold ones lie here, per KV head, in the order in which
they left: row j of sequence b is its j-th cold token. `gather` brings chosen rows to the device, `pieces` brings all
of them, a piece at a time.

    tier = HostTier.put(k, v)            k [B, Hkv, n, D], v [B, Hkv, n, Dv], from any device, copied
    tier.append(k, v)                    M more; counts [B]: only the first counts[b] rows of sequence b
    k, v = tier.gather(index)            index [B, Hkv or Hq, K] int64, -1 absent (zeros)
    tier = tier.reorder(batch)           sequences reordered, repeated or dropped
    tier.bytes()                         hot (the last gathered set), cold (the host's buffers)

Buffers are page-locked when the tokens come from a CUDA device, and grow by a 64th. They belong to the tier alone:
they are free when the tier is, and a tier lives in its layer's state, so it goes with its request.
Errors: HostMemoryError, before anything has changed, when the buffers would exceed `limit` or what the machine has;
ShapeError for tokens of another batch, width or dtype; StateError for rows that are not held.
Costs: put, append O(tokens) copies; gather O(B H K D).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.errors import HostMemoryError, ShapeError, StateError
from foveate.methods.storage import slack

CPU = torch.device("cpu")


class TierBytes(NamedTuple):
    """Bytes on the device (hot) and in host memory (cold)."""

    hot: int
    cold: int


@dataclass
class HostTier:
    """Cold keys and values of one layer, in host memory.

    keys, values: host buffers [B, Hkv, capacity, D], [B, Hkv, capacity, Dv].
    length: int64 [B] on the host, rows in use per sequence; beyond, the buffers hold nothing.
    device: where gathered rows go. limit: most bytes for keys and values; None: what the machine has.
    gathered: bytes of the last gathered set.
    """

    keys: Tensor
    values: Tensor
    length: Tensor
    device: torch.device = CPU
    limit: int | None = None
    gathered: int = 0

    @classmethod
    def put(cls, keys: Tensor, values: Tensor, counts: Tensor | None = None, *, limit: int | None = None) -> HostTier:
        """A tier that holds a copy of keys [B, Hkv, n, D] and values [B, Hkv, n, Dv] (counts as in `append`)."""
        none = [torch.empty(*x.shape[:2], 0, x.shape[3], dtype=x.dtype) for x in (keys, values)]
        tier = cls(none[0], none[1], torch.zeros(keys.shape[0], dtype=torch.int64), keys.device, limit)
        tier.append(keys, values, counts)
        return tier

    @property
    def longest(self) -> int:
        """Rows of the longest sequence."""
        return int(self.length.max()) if self.length.numel() else 0

    def append(self, keys: Tensor, values: Tensor, counts: Tensor | None = None) -> None:
        """Add the first counts[b] (default: all) rows of keys [B, Hkv, M, D], values [B, Hkv, M, Dv]."""
        self._check(keys, values)
        B, M = keys.shape[0], keys.shape[2]
        counts = torch.full((B,), M) if counts is None else counts.cpu()
        if counts.shape != (B,) or bool(((counts < 0) | (counts > M)).any()):
            raise ShapeError(f"host tier: counts {counts.tolist()}, allowed: one of 0 to {M} for each of {B} sequences")
        end = int((self.length + counts).max())
        if end > self.keys.shape[2]:
            self._grow(end)
        if bool((self.length == self.length[0]).all()) and bool((counts == counts[0]).all()):
            start, count = int(self.length[0]), int(counts[0])
            self.keys[:, :, start : start + count].copy_(keys[:, :, :count])
            self.values[:, :, start : start + count].copy_(values[:, :, :count])
        else:
            for b, (start, count) in enumerate(zip(self.length.tolist(), counts.tolist())):
                self.keys[b, :, start : start + count].copy_(keys[b, :, :count])
                self.values[b, :, start : start + count].copy_(values[b, :, :count])
        self.length = self.length + counts

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows index [B, H, K] (int64, -1 absent; H = Hkv or a multiple, query heads of a group side by side) on the
        device: keys [B, H, K, D], values [B, H, K, Dv], zeros where absent."""
        index = index.cpu()
        B, heads = self.keys.shape[:2]
        if index.dim() != 3 or index.shape[0] != B or index.shape[1] % heads:
            raise ShapeError(f"gather: index {list(index.shape)}, allowed: [{B}, a multiple of {heads}, K]")
        if bool((index >= self.length[:, None, None]).any()):
            raise StateError(
                f"gather: row {int(index.max())} is not held, allowed: below {self.length.tolist()} per sequence; "
                "the index is of another tier, or newer than this one"
            )
        H = index.shape[1]
        owner = torch.arange(B)[:, None] * heads + torch.arange(H) // (H // heads)
        rows = (owner[..., None] * self.keys.shape[2] + index.clamp_min(0)).flatten()
        absent = (index < 0)[..., None]
        # An empty tier has no row that could stand for an absent one.
        held = self.keys.shape[2] > 0
        keys, values = (
            self._pick(x, rows if held else rows[:0], index.shape, absent) for x in (self.keys, self.values)
        )
        self.gathered = _nbytes(keys) + _nbytes(values)
        return keys, values

    def _pick(self, buffer: Tensor, rows: Tensor, shape: torch.Size, absent: Tensor) -> Tensor:
        out = torch.zeros(shape.numel(), buffer.shape[3], dtype=buffer.dtype, pin_memory=self._pinned)
        if rows.numel():
            torch.index_select(buffer.flatten(0, 2), 0, rows, out=out)
        out = out.view(*shape, -1).masked_fill_(absent, 0)
        return out.to(self.device, non_blocking=True)

    def pieces(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """All rows, `size` at a time: the first row's number, keys and values [B, Hkv, <= size, D] on the device.

        Rows at and beyond a sequence's own length are zeros, and must be masked.
        """
        for start in range(0, self.longest, size):
            span = slice(start, min(start + size, self.longest))
            keys, values = (x[:, :, span].to(self.device, non_blocking=True) for x in (self.keys, self.values))
            beyond = (torch.arange(span.start, span.stop) >= self.length[:, None])[:, None, :, None]
            if bool(beyond.any()):
                # What was never written may be NaN, and a weight of 0 would not hide it.
                beyond = beyond.to(self.device)
                keys, values = keys.masked_fill(beyond, 0), values.masked_fill(beyond, 0)
            yield start, keys, values

    def reorder(self, batch: Tensor) -> HostTier:
        """A tier with the sequences batch int64 [new B]."""
        batch = batch.cpu()
        made = self._room(batch.numel(), self.keys.shape[2])
        for buffer, new in zip((self.keys, self.values), made):
            torch.index_select(buffer, 0, batch, out=new)
        return HostTier(*made, self.length[batch], self.device, self.limit)

    @property
    def host_bytes(self) -> int:
        """What a layer's cache counts: the host's buffers and the lengths."""
        return self.bytes().cold + _nbytes(self.length)

    def bytes(self) -> TierBytes:
        return TierBytes(self.gathered, _nbytes(self.keys) + _nbytes(self.values))

    @property
    def _pinned(self) -> bool:
        return self.device.type == "cuda"

    def _check(self, keys: Tensor, values: Tensor) -> None:
        for name, held, new in (("keys", self.keys, keys), ("values", self.values, values)):
            B, H, _, D = held.shape
            if new.dim() != 4 or new.shape[:2] != (B, H) or new.shape[3] != D or new.dtype != held.dtype:
                raise ShapeError(
                    f"host tier: new {name} {list(new.shape)} {new.dtype}, allowed: [{B}, {H}, M, {D}] {held.dtype}"
                )
        if keys.shape[2] != values.shape[2]:
            raise ShapeError(f"host tier: {keys.shape[2]} new keys and {values.shape[2]} new values")

    def _grow(self, rows: int) -> None:
        """Room for `rows` rows; both buffers are made before either is replaced."""
        made = self._room(self.keys.shape[0], rows + slack(rows))
        for buffer, grown in zip((self.keys, self.values), made):
            grown[:, :, : buffer.shape[2]] = buffer
        self.keys, self.values = made

    def _room(self, batch: int, rows: int) -> tuple[Tensor, Tensor]:
        """Empty buffers for keys and values, or HostMemoryError."""
        shapes = [(batch, buffer.shape[1], rows, buffer.shape[3]) for buffer in (self.keys, self.values)]
        needed = sum(math.prod(shape) for shape in shapes) * self.keys.element_size()
        what = f"host tier: {needed} bytes are needed for {rows} cold keys and values of {batch} sequences"
        cure = "shorten the prompt, lower the batch, or free memory"
        if self.limit is not None and needed > self.limit:
            raise HostMemoryError(f"{what}, allowed: {self.limit}; raise the limit, or {cure}")
        free = available_bytes()
        if free is not None and needed > free:
            raise HostMemoryError(f"{what}, and the host has {free} left; {cure}")
        try:
            keys, values = (torch.empty(x, dtype=self.keys.dtype, pin_memory=self._pinned) for x in shapes)
        except RuntimeError as error:
            raise HostMemoryError(f"{what}, and the allocator refused: {error}; {cure}") from error
        return keys, values


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def available_bytes() -> int | None:
    """Host memory that can be had without swapping; None where the system does not tell.

    Asked before allocating, because Linux hands out memory that it may not have, and kills whoever touches it.
    """
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    most, used = group / "memory.max", group / "memory.current"
    if most.exists() and used.exists() and (allowed := most.read_text().strip()) != "max":
        free = min(free, int(allowed) - int(used.read_text()))
    return free
