"""Grouped softmax: attention in which the landmark that closes a block gates the block's tokens.

    section of a token = landmarks before it (a landmark belongs to the section it closes)
    own      = regular tokens of the query's section, up to the query
    G_0      = own and the landmarks of all earlier sections;    G_b = the regular tokens of earlier section b
    P        = softmax inside each group, of z = scale q . k
    weight   = P_j for own tokens;  P_j P_landmark(b) for tokens of section b;  0 for landmarks, so a row sums to 1

Paper: Mohtashami and Jaggi 2023 (arXiv 2305.16300). Two forms: `grouped_attention`, which walks over tiles of queries
and computes each tile again in the backward pass, so that memory is O(N D) and one tile; and
`grouped_attention_reference`, the definition, with N x N weights. Both agree with the authors' code also where a
section is empty (two landmarks in a row): its landmark takes weight and gives nothing. A query that reads no key has
o = 0. The authors' limit of 64 groups does not exist here, and their dropout of landmark weights is left out.

Cost: O(M N D) per head, softmax in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.shapes import match, match_qkv
from foveate.errors import OptionError
from foveate.mixers.base import exact
from foveate.mixers.memory.tiles import over_tiles


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int | None = None,
    landmarks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention with grouped softmax; the queries are the last M of the N keys.

    Args:
        q: [B, Hq, M, D].    k, v: [B, Hkv, N, D], in q's dtype.
        block: every block-th token is a landmark, counted from the first key.
        landmarks: [B, N] bool, which tokens are landmarks instead, anywhere.
        scale: multiplies q once; default D ** -0.5.
    Returns: o [B, Hq, M, D] in q's dtype.
    Raises: ShapeError; OptionError unless exactly one of block and landmarks is given, and block >= 2.
    """
    sizes = match_qkv(q, k, v)
    N, M = sizes["N"], sizes["M"]
    sections = _sections(k, block, landmarks)
    keys, values = sections.lay_out(k), sections.lay_out(v)
    scale = sizes["D"] ** -0.5 if scale is None else scale

    def tile(rows: slice) -> Tensor:
        return grouped_tile(q, keys, values, sections, rows, N - M, scale)

    return over_tiles(tile, range(N - M, N), sizes["B"] * sizes["Hq"] * keys.shape[2], 2)


def grouped_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, landmarks: Tensor, scale: float | None = None
) -> Tensor:
    """The definition, with all weights at once and one group after the other; arguments as in `grouped_attention`."""
    sizes = match_qkv(q, k, v)
    match(k=(k, "B Hkv N D"), landmarks=(landmarks, "B N"))
    N, M = sizes["N"], sizes["M"]
    k, v = (each.repeat_interleave(sizes["Hq"] // sizes["Hkv"], 1) for each in (k, v))
    z = (q @ k.mT).to(exact(q)) * (sizes["D"] ** -0.5 if scale is None else scale)
    closes = landmarks.bool()
    section = (closes.long().cumsum(1) - closes.long())[:, None, None, :]
    closes = closes[:, None, None, :]
    at = torch.arange(N, device=q.device)
    seen = at <= at[N - M :, None]
    mine = section[..., N - M :].mT
    own = seen & (section == mine) & ~closes
    gates = seen & closes & (section < mine)
    first = _softmax(z.masked_fill(~(own | gates), -math.inf))
    weights = first * own
    for number in range(int(section.max()) + 1):
        inside = seen & (section == number) & (section < mine) & ~closes
        gate = (first * (gates & (section == number))).sum(-1, keepdim=True)
        weights = weights + _softmax(z.masked_fill(~inside, -math.inf)) * gate
    return (weights.to(v.dtype) @ v).to(q.dtype)


@dataclass(frozen=True)
class Sections:
    """The sections of N tokens, each laid out over s slots, its landmark in the last one.

    section: [B or 1, N] int64, each token's section.    places: [B or 1, S, s] int64, the token in each slot, N for
    none.    regular: sections are s consecutive tokens each; else any slot may be empty.
    """

    section: Tensor
    places: Tensor
    regular: bool

    @classmethod
    def blocks(cls, length: int, block: int, device: torch.device) -> Sections:
        """Every block-th token is a landmark; the last section may lack tokens."""
        count = -(-length // block)
        slots = torch.arange(count * block, device=device)
        return cls(slots[None, :length] // block, slots.clamp(max=length).view(1, count, block), True)

    @classmethod
    def marked(cls, landmarks: Tensor) -> Sections:
        """Landmarks [B, N] bool anywhere (one copy to the host)."""
        marks = landmarks.bool()
        B, N = marks.shape
        at = torch.arange(N, device=marks.device).expand(B, N)
        section = marks.long().cumsum(1) - marks.long()
        last = at.masked_fill(~marks, -1).cummax(1).values
        inside = (at - last - 1).masked_fill(marks, 0)
        count, width = int(section.max()) + 1, int(inside.max()) + 2
        slot = section * width + inside.masked_fill(marks, width - 1)
        places = torch.full((B, count * width), N, device=marks.device).scatter(1, slot, at)
        return cls(section, places.view(B, count, width), False)

    def lay_out(self, x: Tensor) -> Tensor:
        """[B, H, N, D] -> [B, H, S * s, D], zeros in empty slots; x itself where no slot is empty."""
        slots = self.places[0].numel()
        if self.regular:
            return F.pad(x, (0, 0, 0, slots - x.shape[2])) if slots > x.shape[2] else x
        index = self.places.flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return F.pad(x, (0, 0, 0, 1)).gather(2, index)

    def until(self, row: int) -> Sections:
        """The sections that queries up to `row` may read."""
        return replace(self, places=self.places[:, : row // self.places.shape[2] + 1]) if self.regular else self


@dataclass(frozen=True)
class Retrieved:
    """Blocks that T queries read from elsewhere, as further earlier sections.

    inside: [B, Hkv, G, T, K, l] logits of their tokens.    gates: [B, Hkv, G, T, K] logits of their landmarks.
    values: [B, Hkv, G, T or 1, K, l, D].
    """

    inside: Tensor
    gates: Tensor
    values: Tensor

    def read(self, weights: Tensor) -> Tensor:
        """Weights [B, Hkv, G, T, K, l] -> [B, Hkv, G, T, D]."""
        weights, values = weights.flatten(-2).to(self.values.dtype), self.values.flatten(-3, -2)
        if values.shape[3] == 1:
            return weights @ values[:, :, :, 0]
        return (weights[..., None, :] @ values)[..., 0, :]


def grouped_tile(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    sections: Sections,
    rows: slice,
    first: int,
    scale: float,
    retrieved: Retrieved | None = None,
) -> Tensor:
    """The outputs [B, Hq, T, D] of tokens `rows`, counted from the first key.

    q: [B, Hq, M, D] of tokens first, first + 1, ....    keys, values: [B, Hkv, S * s, D], laid out by `sections`.
    """
    q = q[:, :, rows.start - first : rows.stop - first]
    sections = sections.until(rows.stop - 1)
    section, places = sections.section[:, rows], sections.places
    count, width = places.shape[1:]
    keys, values = keys[:, :, : count * width], values[:, :, : count * width]
    z = scores(q, keys, scale).unflatten(-1, (count, width))
    inside, gates = z[..., :-1], z[..., -1]
    if not sections.regular:
        inside = inside.masked_fill((places == sections.section.shape[1])[:, None, None, None, :, :-1], -math.inf)
    earlier = torch.arange(count, device=q.device) < section[..., None]
    gates = gates.masked_fill(~earlier[:, None, None], -math.inf)
    index = section[:, None, None, :, None, None].expand(*inside.shape[:-2], 1, width - 1)
    standing = places.expand(section.shape[0], -1, -1).gather(1, section[..., None].expand(-1, -1, width))[..., :-1]
    hidden = standing > torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    own = inside.gather(-2, index).squeeze(-2).masked_fill(hidden[:, None, None], -math.inf)
    if retrieved is None:
        weights, mine = grouped_weights(inside, gates, own)
        o = None
    else:
        inside, gates = torch.cat((retrieved.inside, inside), -2), torch.cat((retrieved.gates, gates), -1)
        weights, mine = grouped_weights(inside, gates, own)
        elsewhere, weights = weights.split((retrieved.gates.shape[-1], count), -2)
        o = retrieved.read(elsewhere)
    weights = F.pad(weights.scatter(-2, index, mine.unsqueeze(-2)), (0, 1)).flatten(-2).to(values.dtype)
    local = (weights.flatten(2, 3) @ values).unflatten(2, weights.shape[2:4])
    return (local if o is None else local + o).flatten(1, 2)


def grouped_weights(inside: Tensor, gates: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the tokens of S earlier sections and of the query's own section.

    inside: [..., S, l] logits of the sections' tokens.    gates: [..., S] logits of their landmarks.    own: [..., l]
    logits of own tokens. -inf for what is not read.
    """
    first = _softmax(torch.cat((gates, own), -1))
    return _softmax(inside) * first[..., : gates.shape[-1], None], first[..., gates.shape[-1] :]


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q [B, Hq, T, D], k [B, Hkv, N, D] -> scaled products [B, Hkv, G, T, N] in float32 (float64)."""
    groups = q.shape[1] // k.shape[1]
    z = q.unflatten(1, (k.shape[1], groups)).flatten(2, 3) @ k.mT
    return z.to(exact(z)).unflatten(2, (groups, q.shape[2])) * scale


def _sections(k: Tensor, block: int | None, landmarks: Tensor | None) -> Sections:
    if (block is None) == (landmarks is None):
        raise OptionError("grouped_attention takes block or landmarks, allowed: exactly one of them")
    if landmarks is not None:
        match(k=(k, "B Hkv N D"), landmarks=(landmarks, "B N"))
        return Sections.marked(landmarks)
    assert block is not None
    if block < 2:
        raise OptionError(f"grouped_attention: block={block}, allowed: >= 2 (a token and its landmark)")
    return Sections.blocks(k.shape[2], block, k.device)


def _softmax(z: Tensor) -> Tensor:
    """Softmax over the last axis; 0 where all is -inf, also in the gradient."""
    empty = (z == -math.inf).all(-1, keepdim=True)
    return z.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
