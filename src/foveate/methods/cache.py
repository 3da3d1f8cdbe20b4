"""LayerCache: one layer's stored keys, values, positions and method state.

It keeps two lengths: `seen`, the tokens that went by (what positions of new tokens follow), and `stored`, the slots
that are held. Padding and dropped tokens leave `seen` alone. Storage is uniform ([B, Hkv, n, D]) until heads keep
different numbers of tokens; then it is packed, and the bytes really go away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.attention.positions import Positions
from foveate.errors import StateError, UnsupportedCacheError
from foveate.methods.states import host_bytes, state_batch, state_bytes
from foveate.methods.storage import Rows, Segments


@dataclass(frozen=True)
class Keep:
    """The slots that stay: index int64 [B, Hkv, n], ascending, -1 for an empty slot."""

    index: Tensor


@dataclass(frozen=True)
class KeepRagged:
    """The slots that stay, a different number per head: mask bool [B, Hkv, stored]."""

    mask: Tensor


@dataclass(frozen=True)
class Drop:
    """One slot per head that goes: index int64 [B, Hkv, 1]. The last slot moves into its place."""

    index: Tensor


@dataclass(frozen=True)
class DropRagged:
    """Slots that go from some heads of a packed cache: (segment, row) pairs, segment = b * Hkv + h."""

    rows: tuple[tuple[int, int], ...]


Change = Keep | KeepRagged | Drop | DropRagged


class LayerCache:
    """Stored keys and values of one layer.

    keys, values: [B, Hkv, stored, D] views (uniform storage only; `packed` otherwise).
    extra: per-token tensors by name, [B, Hkv, stored, ...]; they follow every gather, reorder and crop, and are
        zero for appended tokens until written.
    states: each method's own state, a dataclass whose tensors are batch-first.
    version: counts changes other than appending, so that summaries of slots know when they are stale.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.version = 0
        self.holes = False
        self.ordered = True
        self.states: dict[Any, Any] = {}
        self.shape: tuple[int, int] = (0, 0)
        self._rows: dict[str, Rows] = {}
        self._next: Tensor | None = None
        self.packed: Segments | None = None

    @property
    def ragged(self) -> bool:
        return self.packed is not None

    @property
    def stored(self) -> int:
        """Slots per head; the longest head's when packed."""
        if self.packed is not None:
            return max(self.packed.length)
        return self._rows["keys"].length if self._rows else 0

    @property
    def keys(self) -> Tensor:
        return self._uniform("keys")

    @property
    def values(self) -> Tensor:
        return self._uniform("values")

    def _uniform(self, name: str) -> Tensor:
        if self.packed is not None:
            raise UnsupportedCacheError(
                "this layer's heads keep different numbers of tokens; read it through `packed` or Step.attend"
            )
        return self._rows[name].used

    @property
    def positions(self) -> Tensor | None:
        """[B, 1 or Hkv, stored] int32, -1 for an empty slot; None while slot j simply holds token j."""
        return self._rows["positions"].used if "positions" in self._rows else None

    @property
    def log_weight(self) -> Tensor | None:
        """[B, Hkv, stored] float32, added to the scores of merged keys."""
        return self._rows["log_weight"].used if "log_weight" in self._rows else None

    def extra(self, name: str) -> Tensor:
        return self._rows[f"extra.{name}"].used

    def has_extra(self, name: str) -> bool:
        return f"extra.{name}" in self._rows

    def set_extra(self, name: str, rows: Tensor) -> None:
        """Attach or overwrite a per-token tensor [B, Hkv, stored, ...]."""
        if rows.shape[2] != self.stored:
            raise StateError(f"extra {name!r} has {rows.shape[2]} rows, allowed: {self.stored}, one per slot")
        self._rows[f"extra.{name}"] = Rows.of(rows)

    def lengths(self) -> Tensor:
        """Tokens held per head: [B, Hkv] int64 on the host."""
        B, H = self.shape
        if self.packed is not None:
            return torch.tensor(self.packed.length).view(B, H)
        positions = self.positions
        if positions is None or not self.holes:
            return torch.full((B, H), self.stored)
        return (positions >= 0).sum(-1).expand(B, H).cpu()

    def kept_positions(self, row: int, head: int) -> Tensor:
        """Positions held by one head of one sequence, ascending, int64."""
        if self.packed is not None:
            held = self.packed.segment("positions", row * self.shape[1] + head)
        elif self.positions is None:
            held = torch.arange(self.stored)
        else:
            held = self.positions[row, min(head, self.positions.shape[1] - 1)]
        return held[held >= 0].long().sort().values

    def bytes(self) -> int:
        """Allocated bytes: keys, values, positions, weights, extras and states, the host's part included."""
        total = sum(rows.nbytes() for rows in self._rows.values())
        total += self.packed.nbytes() if self.packed is not None else 0
        return total + sum(state_bytes(state) for state in self.states.values())

    def host_bytes(self) -> int:
        """The part of `bytes` that lies in the host's memory: tiers of keys and values, and their indexes."""
        return sum(host_bytes(state) for state in self.states.values())

    def append(self, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> None:
        """Add M tokens: keys [B, Hkv, M, D], values [B, Hkv, M, Dv].

        positions: [B, M] int64, -1 for padding; None: they follow the tokens seen so far.
        """
        if not self.shape[0]:
            self.shape = (keys.shape[0], keys.shape[1])
        elif self.shape != (keys.shape[0], keys.shape[1]):
            raise StateError(
                f"new keys have batch and heads {tuple(keys.shape[:2])}, the cache holds {self.shape}; "
                "start a new cache for another batch"
            )
        M = keys.shape[2]
        if positions is not None and self.positions is None and self.packed is None:
            self._make_positions(keys)
        if positions is None and (self.packed is not None or self.positions is not None):
            positions = self.following(M, keys.device)
        if self.holes and positions is not None:
            self._next = positions.amax(1) + 1
        if self.packed is not None:
            self._append_packed(keys, values, positions)
        else:
            self._append_rows("keys", keys)
            self._append_rows("values", values)
            if positions is not None:
                heads = self._rows["positions"].buffer.shape[1]
                self._append_rows("positions", positions[:, None].expand(-1, heads, -1).to(torch.int32))
            for name, rows in self._rows.items():
                if rows.length < self._rows["keys"].length:
                    shape = (*rows.buffer.shape[:2], M, *rows.buffer.shape[3:])
                    self._append_rows(name, rows.buffer.new_zeros(shape))
        self.seen += M

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more, so that the buffers stay where they are while these come."""
        for rows in self._rows.values():
            rows.reserve(tokens)
        if self.packed is not None:
            self.packed.reserve(tokens)

    def buffers(self) -> tuple[dict[str, Tensor], list[int], list[int]]:
        """The storage as flat rows: name -> [R, ...], and where each segment b * Hkv + h starts and how long it is.

        For writers that count on the device, who then call `advance`. Fields that all heads share are left out.
        """
        if self.packed is not None:
            return dict(self.packed.fields), list(self.packed.start), list(self.packed.length)
        B, H = self.shape
        room = min(rows.buffer.shape[2] for rows in self._rows.values())
        flat = {}
        for name, rows in self._rows.items():
            if rows.buffer.shape[2] != room:
                rows.buffer = rows.buffer[:, :, :room].contiguous()
            if rows.buffer.shape[1] == H:
                flat[name.removeprefix("extra.")] = rows.buffer.view(B * H * room, *rows.buffer.shape[3:])
        return flat, [s * room for s in range(B * H)], [self.stored] * (B * H)

    def keys_at(self) -> int:
        """Where the keys' buffer lies in memory."""
        held = self.packed.fields["keys"] if self.packed is not None else self._rows["keys"].buffer
        return held.data_ptr()

    def advance(self, tokens: int) -> None:
        """`tokens` more were written into the reserved room of every head."""
        if self.packed is not None:
            self.packed.length = [n + tokens for n in self.packed.length]
        shared = self._rows.get("positions")
        if shared is not None and shared.buffer.shape[1] == 1:
            at = self.following(tokens, shared.buffer.device)
            shared.buffer[:, 0, shared.length : shared.length + tokens] = at.to(torch.int32)
        for rows in self._rows.values():
            rows.length += tokens
        self.seen += tokens
        if self._next is not None:
            self._next = self._next + tokens

    def following(self, m: int, device: torch.device) -> Tensor:
        """Positions [B, m] int64 of the next m tokens when none is padding."""
        ahead = torch.arange(m, device=device)[None]
        if self._next is None:
            return (ahead + self.seen).expand(self.shape[0], -1)
        return ahead + self._next[:, None]

    def mark_holes(self) -> None:
        """Some stored or coming slot is padding."""
        self.holes = True

    def _append_rows(self, name: str, rows: Tensor) -> None:
        if name in self._rows:
            self._rows[name].append(rows)
        else:
            self._rows[name] = Rows.of(rows)

    def _make_positions(self, like: Tensor) -> None:
        held = torch.arange(self.stored, dtype=torch.int32, device=like.device)
        self._rows["positions"] = Rows.of(held[None, None].expand(self.shape[0], 1, -1))

    def _append_packed(self, keys: Tensor, values: Tensor, positions: Tensor | None) -> None:
        assert self.packed is not None
        assert positions is not None
        B, H = self.shape
        rows = {"keys": keys.reshape(B * H, -1, keys.shape[-1]), "values": values.reshape(B * H, -1, values.shape[-1])}
        rows["positions"] = positions[:, None].expand(-1, H, -1).reshape(B * H, -1).to(torch.int32)
        M = keys.shape[2]
        for name, flat in self.packed.fields.items():
            if name not in rows:
                rows[name] = flat.new_zeros((B * H, M, *flat.shape[1:]))
        real = None
        if M > 1 and self.holes:
            real = (positions >= 0).sum(1).repeat_interleave(H).tolist()
        self.packed.append(rows, real)

    def apply(self, change: Change) -> None:
        """Carry out what a method's `keep` returned."""
        match change:
            case Keep(index):
                self.keep(index)
            case KeepRagged(mask):
                self.keep_ragged(mask)
            case Drop(index):
                self.drop(index)
            case DropRagged(rows):
                self.drop_ragged(rows)

    def keep(self, index: Tensor) -> None:
        """Hold only the slots index [B, Hkv, n] (int64, -1: an empty slot)."""
        if self.packed is not None:
            raise UnsupportedCacheError("a packed cache keeps by mask (KeepRagged), not by a uniform index")
        B, H = self.shape
        if index.dim() != 3 or index.shape[:2] != (B, H):
            raise StateError(f"keep: index {list(index.shape)}, allowed: [{B}, {H}, n]")
        if self.positions is None:
            self._make_positions(self.keys)
        absent = index < 0
        safe = index.clamp_min(0)
        for rows in self._rows.values():
            rows.take(safe)
        if bool(absent.any()):
            self._rows["positions"].used.masked_fill_(absent, -1)
            self.holes = True
        elif self.holes:
            self.holes = bool((self.positions_or_fail() < 0).any())
        self.version += 1

    def positions_or_fail(self) -> Tensor:
        held = self.positions
        assert held is not None
        return held

    def keep_ragged(self, mask: Tensor) -> None:
        """Hold only the slots where mask [B, Hkv, stored] is True, packed without gaps; padding always goes."""
        B, H = self.shape
        if self.packed is not None:
            keep: list[Tensor | None] = [mask[s // H, s % H, :n] for s, n in enumerate(self.packed.length)]
            self.packed.pick([rows.nonzero()[:, 0] for rows in keep if rows is not None])
        else:
            if self.positions is None:
                self._make_positions(self.keys)
            held = self.positions_or_fail().expand(B, H, -1)
            mask = mask & (held >= 0)
            fields = {name.removeprefix("extra."): rows.used for name, rows in self._rows.items()}
            fields["positions"] = held
            picks = [mask[b, h].nonzero()[:, 0] for b in range(B) for h in range(H)]
            parts = {
                name: [field.expand(B, H, *field.shape[2:])[s // H, s % H][rows] for s, rows in enumerate(picks)]
                for name, field in fields.items()
            }
            self.packed = Segments(parts)
            self._rows = {}
        self.version += 1

    def drop(self, index: Tensor) -> None:
        """Forget one slot per head, in place: index int64 [B, Hkv, 1]."""
        if self.positions is None:
            self._make_positions(self.keys)
        if self.positions_or_fail().shape[1] == 1 and self.shape[1] > 1:
            held = self.positions_or_fail().expand(-1, self.shape[1], -1)
            self._rows["positions"] = Rows.of(held)
        for rows in self._rows.values():
            rows.overwrite_from_end(index)
        self.ordered = False
        self.version += 1

    def drop_ragged(self, rows: tuple[tuple[int, int], ...]) -> None:
        assert self.packed is not None
        self.packed.remove(rows)
        self.ordered = False
        self.version += 1

    def replace(self, keys: Tensor, values: Tensor, positions: Tensor, log_weight: Tensor | None = None) -> None:
        """Hold other keys and values instead (merged or compensation tokens): [B, Hkv, n, D], positions [B, Hkv, n].

        log_weight: [B, Hkv, n], added to their scores (log of how many tokens a slot stands for).
        """
        self._rows = {
            "keys": Rows.of(keys),
            "values": Rows.of(values),
            "positions": Rows.of(positions.to(torch.int32)),
        }
        if log_weight is not None:
            self._rows["log_weight"] = Rows.of(log_weight.to(torch.float32))
        self.packed = None
        self.holes = bool((positions < 0).any())
        self.ordered = False
        self.version += 1

    def select_batch(self, index: Tensor) -> None:
        """Reorder, repeat or drop sequences: index int64 [new batch]."""
        if not self.shape[0]:
            return
        for rows in self._rows.values():
            rows.batch(index)
        if self.packed is not None:
            self.packed.batch(index.tolist(), self.shape[1])
        if self._next is not None:
            self._next = self._next.index_select(0, index.to(self._next.device))
        self.states = {key: state_batch(state, index, self.shape[0]) for key, state in self.states.items()}
        self.shape = (index.numel(), self.shape[1])

    def crop(self, tokens: int) -> None:
        """Take the last `tokens` tokens back; only while nothing but appending has happened to them."""
        if tokens == 0:
            return
        if self.packed is not None or not self.ordered or self.states or self.version:
            raise UnsupportedCacheError(
                "this cache has dropped or reordered tokens, or a method keeps state on it, so its last tokens "
                "cannot be taken back; use a method that keeps everything for assisted decoding"
            )
        for rows in self._rows.values():
            rows.length -= tokens
        self.seen -= tokens

    def latest(self, m: int, device: torch.device) -> Tensor:
        """Positions [B, m] int64 of the last m tokens when none of them is padding."""
        back = torch.arange(-m, 0, device=device)[None]
        if self._next is None:
            return (back + self.seen).expand(self.shape[0], -1)
        return back + self._next[:, None]

    def where(self, m: int, q_positions: Tensor | None) -> Positions:
        """Positions for the last `m` appended tokens as queries, over the stored slots."""
        held = self.positions
        if held is None:
            return Positions(q_positions, None, self.holes)
        if q_positions is None:
            q_positions = self.latest(m, held.device)
        return Positions(q_positions, held, self.holes, self.ordered)
