"""The block memory of Landmark Attention: complete blocks of keys and values, and which of them a query reads.

The landmark keys stay on the device, where they are scored; the blocks' tokens may lie in the host's memory, and only
chosen blocks cross over. Keys are held turned to their place inside the block (token j by j), not in the text: a block
that is read elsewhere then needs no turning, the query is turned by its distance to the block's first slot.

Positions, with Nb stored blocks of s tokens, K = min(k, Nb), `full` tokens in complete blocks ever seen:
    "true"       prefix = full - (K + 1) s, the chunk stands at full       (LLaMA code)
    "anchored"   prefix = 0, the chunk stands at min(blocks ever seen, k + 1) s     (lm_benchmark code)
    to be chosen   landmark of the K newest blocks at prefix + u s + s - 1, u = 1 .. K; of all older ones with u = 0
    to be read     the r-th chosen block, in order of age, at prefix + r s, and s later if it is one of the K newest
So whatever is retrieved stands in the K + 1 blocks before the chunk, where training has seen it.

Paper: Mohtashami and Jaggi 2023 (arXiv 2305.16300). "anchored" with fewer than k stored blocks, where the authors' code
stops, has them at their true places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.attention import Rope, apply_rotary
from foveate.mixers.memory.grouped import Retrieved, scores

SELECTIONS = ("per_token_and_head", "max_over_tokens", "max_over_heads")
PLACEMENTS = ("true", "anchored")


@dataclass(frozen=True)
class BlockMemory:
    """Complete blocks, oldest first.

    landmarks: [B, Hkv, n, D] keys of the landmarks.    keys, values: [B, Hkv, n, l, D] of the l = s - 1 tokens before
    each, on the host with `host`. A landmark's value is read by nobody and not kept.
    """

    landmarks: Tensor
    keys: Tensor
    values: Tensor
    host: bool = False

    @classmethod
    def empty(cls, like: Tensor, block: int, host: bool) -> BlockMemory:
        """No blocks of keys and values like [B, Hkv, any, D]."""
        B, H, _, D = like.shape
        tokens = like.new_zeros(B, H, 0, block - 1, D)
        tokens = tokens.cpu() if host and not tokens.is_meta else tokens
        return cls(like.new_zeros(B, H, 0, D), tokens, tokens, host)

    @property
    def count(self) -> int:
        return self.landmarks.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> BlockMemory:
        """With the blocks of keys, values [B, Hkv, m s, D] behind the old ones. Copies what is held: O(n s D)."""
        if keys.shape[2] == 0:
            return self
        block = self.keys.shape[3] + 1
        keys, values = keys.unflatten(2, (-1, block)), values.unflatten(2, (-1, block))
        return replace(
            self,
            landmarks=torch.cat((self.landmarks.to(keys.dtype), keys[:, :, :, -1]), 2),
            keys=_joined(self.keys, keys[:, :, :, :-1]),
            values=_joined(self.values, values[:, :, :, :-1]),
        )

    def between(self, first: int, last: int) -> BlockMemory:
        """Blocks first .. last - 1, as views."""
        held = slice(max(first, 0), last)
        return replace(
            self, landmarks=self.landmarks[:, :, held], keys=self.keys[:, :, held], values=self.values[:, :, held]
        )

    def newest(self, count: int) -> BlockMemory:
        """The newest `count` blocks and no others, so that the rest is freed."""
        if count >= self.count:
            return self
        kept = self.between(self.count - count, self.count)
        return replace(kept, landmarks=kept.landmarks.clone(), keys=kept.keys.clone(), values=kept.values.clone())

    def tokens(self) -> tuple[Tensor, Tensor]:
        """All keys and values [B, Hkv, n s, D] on the landmarks' device; values of landmarks are 0."""
        marks = self.landmarks[:, :, :, None]
        keys, values = (each.to(marks.device) for each in (self.keys, self.values))
        return tuple(torch.cat(pair, 3).flatten(2, 3) for pair in ((keys, marks), (values, torch.zeros_like(marks))))  # type: ignore[return-value]

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, R, K, l, D] of blocks index [B, Hkv, R, K], on the index's device."""
        B, H = index.shape[:2]
        held = index.to(self.keys.device)
        row = torch.arange(B, device=held.device)[:, None, None, None]
        head = torch.arange(H, device=held.device)[:, None, None]
        keys, values = self.keys[row, head, held], self.values[row, head, held]
        return keys.to(index.device), values.to(index.device)


def _joined(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat((old.to(new.dtype), new.to(old.device)), 2)


@dataclass(frozen=True)
class Retrieval:
    """How blocks are chosen and where they are placed.

    blocks: k.    block: s.    selection: "per_token_and_head": each query head and token its own; "max_over_tokens":
    one set per head for all queries of a chunk, by the largest weight any of them gives; "max_over_heads": one set per
    token. The maxima are of softmax weights over the stored blocks.    placement: "true" or "anchored".
    """

    blocks: int
    block: int
    rope: Rope
    scale: float
    selection: str = "per_token_and_head"
    placement: str = "true"

    def start(self, seen: int) -> int:
        """The position of a chunk's first token after `seen` complete blocks."""
        return self.block * (seen if self.placement == "true" else min(seen, self.blocks + 1))

    def prefix(self, stored: int, seen: int) -> int:
        """The first of the positions that retrieved blocks take."""
        if self.placement == "anchored":
            return 0 if stored >= self.blocks else -self.block
        return self.block * (seen - min(self.blocks, stored) - 1)

    def choose(self, q: Tensor, memory: BlockMemory, seen: int) -> Tensor:
        """Indices [B, Hkv, G, M or 1, K] of the blocks that queries [B, Hq, M, D], rotated, read; in order of age.

        M is 1 in the result when all queries read one set.
        """
        stored = memory.count
        taken = min(self.blocks, stored)
        slots = (torch.arange(stored, device=q.device) - (stored - taken) + 1).clamp(min=0)
        places = self.prefix(stored, seen) + slots * self.block
        found = scores(q, self.rope.rotate(memory.landmarks, places[None]), self.scale)
        if self.selection == "max_over_tokens":
            found = found.softmax(-1).amax(3, keepdim=True)
        elif self.selection == "max_over_heads":
            found = found.softmax(-1).amax((1, 2), keepdim=True).expand_as(found)
        return found.topk(taken, -1).indices.sort(-1).values

    def retrieve(self, q: Tensor, at: Tensor, index: Tensor, memory: BlockMemory, seen: int) -> Retrieved:
        """What queries q [B, Hq, T, D], not rotated, at positions [T] read of blocks index [B, Hkv, G, T or 1, K]."""
        H, G, rows = index.shape[1:4]
        keys, values = (each.unflatten(2, (G, rows)) for each in memory.gather(index.flatten(2, 3)))
        marks = _taken(memory.landmarks, index)
        newest = index >= memory.count - index.shape[-1]
        ranks = torch.arange(index.shape[-1], device=q.device) + newest
        distance = at[:, None] - self.prefix(memory.count, seen) - ranks * self.block
        cos, sin = self.rope.tables(distance, q.dtype if q.dtype == torch.float64 else torch.float32)
        turned = apply_rotary(q.unflatten(1, (H, G))[..., None, :], cos, sin, self.rope.style)
        tokens = torch.cat((keys, marks[..., None, :]), -2)
        if rows == 1:
            z = (turned.transpose(-3, -2) @ tokens[:, :, :, 0].mT).transpose(-3, -2)
        else:
            z = (turned[..., None, :] @ tokens.mT)[..., 0, :]
        z = z.to(cos.dtype) * self.scale
        return Retrieved(z[..., :-1], z[..., -1], values)


def _taken(landmarks: Tensor, index: Tensor) -> Tensor:
    """Landmark keys [B, Hkv, G, R, K, D] of blocks index [B, Hkv, G, R, K]."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, landmarks.shape[-1])
    return landmarks.gather(2, flat).unflatten(2, index.shape[2:])
