"""How the lists of keys of a decode step are cut into pieces of about equal work, on the device.

A segment is one KV head of one sequence. With host-known lengths every segment has the same number of pieces. With
lengths in a device tensor, all thread blocks share the tiles of all segments: a piece has
ceil(tiles / (blocks - segments)) tiles, which never makes more pieces than blocks, whatever the lengths are.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a list names. RANGES: the first `sinks` keys and the last ones inside a window, computed and not stored.
DENSE, TOKENS, PAGES, RANGES = 0, 1, 2, 3


@triton.jit
def list_entries(count, window, sinks, KIND: tl.constexpr, M: tl.constexpr, PAGE: tl.constexpr):
    """Entries of a list, from its length as the caller gives it (keys, index entries or pages)."""
    if KIND == 2:
        return count * PAGE
    elif KIND == 3:
        first = tl.minimum(count, sinks)
        return first + count - tl.maximum(first, count - M - window)
    else:
        return count


@triton.jit
def list_of_segment(LENGTH, segment, count, LISTED: tl.constexpr):
    """The segment's length: from the tensor, never beyond `count` where `count` is the room there is."""
    if LENGTH is not None:
        given = tl.load(LENGTH + segment).to(tl.int32)
        return tl.maximum(tl.minimum(given, count), 0)
    else:
        return count


@triton.jit
def pieces_of_all(
    LENGTH,
    segments,
    blocks,
    count,
    window,
    sinks,
    KIND: tl.constexpr,
    M: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Tiles per piece, and the pieces of every segment [SEGMENTS]."""
    s = tl.arange(0, SEGMENTS)
    given = tl.load(LENGTH + s, mask=s < segments, other=0).to(tl.int32)
    given = tl.maximum(tl.minimum(given, count), 0)
    tiles = tl.cdiv(list_entries(given, window, sinks, KIND, M, PAGE), BLOCK_N)
    tiles = tl.where(s < segments, tiles, 0)
    per_piece = tl.maximum(tl.cdiv(tl.sum(tiles, 0), tl.maximum(blocks - segments, 1)), 1)
    return per_piece, tl.cdiv(tiles, per_piece)
