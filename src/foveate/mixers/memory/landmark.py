"""Landmark Attention: a landmark token closes every block and gates it; later, landmarks alone find the blocks to read.

    every `block`-th token of a sequence is a landmark (`foveate.lm.landmarks` puts them into data)
    training     softmax in groups over all blocks, see `foveate.mixers.memory.grouped`
    evaluation   with `retrieve`: the text goes by in chunks; a chunk's queries score the landmarks of the blocks before
                 the chunk, read the best `retrieve` blocks, placed just before the chunk, and the chunk itself

Paper: Mohtashami and Jaggi 2023 (arXiv 2305.16300). Training teaches landmark keys to say "this block matters", in
short contexts and with gradients through all blocks; retrieval then reads contexts of any length with fixed work and
positions that training has seen. Blocks may lie in the host's memory.

Differs from the authors' code: chunks are fixed stretches of the sequence (`chunk` blocks), so that outputs do not
depend on how the text is split over calls; `chunk=None` is theirs, where each call is a chunk. "max_over_tokens" lets
the queries of one call choose together (theirs, of one chunk), so there outputs do depend on the split. Rotary angles
count a sequence's tokens, landmarks included, and the caller's `positions` are not read. Fewer heads of keys than of
queries are allowed. Dropout of landmark weights is left out.

State: keys and values of the current chunk [B, Hkv, < chunk s + 1, D] and the block memory, see
`foveate.mixers.memory.blocks`. Cost: training O(N^2 D) per head; per retrieved token O((N / s + (k + chunk) s) D).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from foveate.attention import Rope
from foveate.mixers.base import Mixer, MixerState, start_position
from foveate.mixers.memory.blocks import PLACEMENTS, SELECTIONS, BlockMemory, Retrieval
from foveate.mixers.memory.grouped import Sections, grouped_attention, grouped_tile
from foveate.mixers.memory.tiles import over_tiles
from foveate.registry import register


@dataclass(frozen=True, kw_only=True)
class LandmarkState(MixerState):
    """keys, values: [B, Hkv, L, D] of the tokens after the last stored block, keys not rotated.    memory: the stored
    blocks.    seen: how many blocks were ever stored."""

    keys: Tensor
    values: Tensor
    memory: BlockMemory
    seen: int = 0


@register(
    "landmark",
    kind="mixer",
    paper="Random-Access Infinite Context Length for Transformers",
    arxiv="2305.16300",
    year=2023,
    applies_to="from scratch",
    small={"block": 4, "retrieve": 1, "chunk": 2},
    claim=(
        "Recall of 16 pairs, trained at 240 tokens, noise put in between, a convolution and two layers of width 64: "
        "reading 2 blocks of 16 tokens answers 0.983 at 240 tokens and 0.981 at 4,080, where rotary softmax falls from "
        "1.000 to 0.034 and a window of 64 from 0.300 to 0.011, as in the paper; softmax without positions stays at "
        "1.000, against it (benchmarks/results/claims/landmark.json)."
    ),
)
class LandmarkMixer(Mixer):
    """Softmax attention gated by a landmark per block, which retrieves blocks of unlimited contexts.

    block: s, tokens of a block, the landmark included.    retrieve: k, blocks that a query reads outside training
    (default: all, at their own positions).    chunk: blocks that are read whole at the end of the text (None: all that
    one call brings).    memory: the newest so many blocks are kept (default: all).    selection:
    "per_token_and_head", "max_over_tokens" or "max_over_heads".    placement: positions of retrieved blocks, "true" or
    "anchored".    host: keep the blocks in the host's memory.    kv_heads, head_dim, rope_base: as in `softmax`.
    rope_style: "half" or "interleaved".
    """

    constant_state = False
    packs = False

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        block: int = 64,
        retrieve: int | None = None,
        chunk: int | None = 4,
        memory: int | None = None,
        selection: str = "per_token_and_head",
        placement: str = "true",
        host: bool = False,
        rope_base: float = 10000.0,
        rope_style: str = "half",
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(head_dim is not None or dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.require(
            self.kv_heads >= 1 and heads % self.kv_heads == 0, f"kv_heads={kv_heads}, allowed: divisors of {heads}"
        )
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.require(self.head_dim >= 2 and self.head_dim % 2 == 0, f"head_dim={self.head_dim}, allowed: even, >= 2")
        self.require(block >= 2, f"block={block}, allowed: >= 2 (a token and its landmark)")
        for name, value in (("retrieve", retrieve), ("chunk", chunk), ("memory", memory)):
            self.require(value is None or value >= 1, f"{name}={value}, allowed: >= 1")
        self.require(selection in SELECTIONS, f"selection={selection!r}, allowed: {SELECTIONS}")
        self.require(placement in PLACEMENTS, f"placement={placement!r}, allowed: {PLACEMENTS}")
        self.require(rope_base > 0, f"rope_base={rope_base}, allowed: > 0")
        self.require(
            rope_style in ("half", "interleaved"), f"rope_style={rope_style!r}, allowed: 'half', 'interleaved'"
        )
        self.block, self.chunk, self.memory, self.host = block, chunk, memory, host
        self.rope = Rope(self.head_dim, rope_base, rope_style)
        self.retrieval = (
            None
            if retrieve is None
            else Retrieval(retrieve, block, self.rope, self.head_dim**-0.5, selection, placement)
        )
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=False)

    def start(self, batch: int, like: Tensor) -> LandmarkState:
        none = like.new_zeros(batch, self.kv_heads, 0, self.head_dim)
        memory = BlockMemory.empty(none, self.block, self.host)
        position = start_position(batch, like)
        return LandmarkState(owner=self.owner, position=position, keys=none, values=none, memory=memory)

    def state_bytes(self, batch: int, length: int) -> int:
        start = self.start(batch, self.meta())
        moved = self._complete(length)
        blocks = moved // self.block if self.memory is None else min(moved // self.block, self.memory)
        numbers = 2 * (length - moved) + blocks * (2 * self.block - 1)
        return start.bytes() + batch * self.kv_heads * self.head_dim * numbers * start.keys.element_size()

    def _complete(self, length: int) -> int:
        """How many of the tokens after the last stored block can be stored."""
        unit = self.block * (self.chunk or 1)
        return length // unit * unit

    def mix(
        self, x: Tensor, state: LandmarkState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LandmarkState]:
        q, k, v = (
            each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for each in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        if state.keys.shape[2]:
            k, v = (torch.cat((old.to(new.dtype), new), 2) for old, new in ((state.keys, k), (state.values, v)))
        moved = self._complete(k.shape[2])
        memory = state.memory.append(self._turned(k[:, :, :moved]), v[:, :, :moved])
        if self.training or self.retrieval is None:
            o = self._read_all(q, k, v, state)
        else:
            o = self._read_chunks(q, k, v, state, memory, self.retrieval)
        if self.memory is not None:
            memory = memory.newest(self.memory)
        after = replace(
            state,
            # Clones, so that a long prompt is freed.
            keys=k[:, :, moved:].clone(),
            values=v[:, :, moved:].clone(),
            memory=memory,
            seen=state.seen + moved // self.block,
        )
        return self.o_proj(o.transpose(1, 2).flatten(2)), after

    def _turned(self, k: Tensor) -> Tensor:
        """Keys of whole blocks, rotated by their place in the block."""
        return self.rope.rotate(k, torch.arange(k.shape[2], device=k.device)[None] % self.block)

    def _read_all(self, q: Tensor, k: Tensor, v: Tensor, state: LandmarkState) -> Tensor:
        """Grouped softmax over every stored block and the tokens after them, at their own positions."""
        at = torch.arange(k.shape[2], device=k.device)[None] + state.seen * self.block
        q, k = self.rope.rotate(q, at[:, -q.shape[2] :]), self.rope.rotate(k, at)
        if state.memory.count:
            keys, values = state.memory.tokens()
            first = state.seen - state.memory.count
            bases = torch.arange(keys.shape[2], device=k.device) // self.block + first
            keys = self.rope.rotate(keys, bases[None] * self.block)
            k, v = torch.cat((keys.to(k.dtype), k), 2), torch.cat((values.to(v.dtype), v), 2)
        return grouped_attention(q, k, v, block=self.block)

    def _read_chunks(
        self, q: Tensor, k: Tensor, v: Tensor, state: LandmarkState, memory: BlockMemory, retrieval: Retrieval
    ) -> Tensor:
        """Each chunk with what it retrieves; k, v are of all tokens after the last block stored before this call."""
        length, first = k.shape[2], k.shape[2] - q.shape[2]
        size = length if self.chunk is None else self.chunk * self.block
        outputs = []
        for begin in range(first // size * size, length, size):
            end, asked = min(begin + size, length), max(begin, first)
            before = state.memory.count + begin // self.block
            oldest = 0 if self.memory is None else before - self.memory
            outputs.append(
                _read_chunk(
                    q[:, :, asked - first : end - first],
                    k[:, :, begin:end],
                    v[:, :, begin:end],
                    memory.between(oldest, before),
                    state.seen + begin // self.block,
                    retrieval,
                )
            )
        return torch.cat(outputs, 2)


def _read_chunk(q: Tensor, k: Tensor, v: Tensor, memory: BlockMemory, seen: int, retrieval: Retrieval) -> Tensor:
    """The last M tokens of a chunk read the chunk so far and the blocks they choose.

    q: [B, Hq, M, D].    k, v: [B, Hkv, L, D] of the chunk so far; none rotated.    seen: blocks before the chunk.
    """
    length, first = k.shape[2], k.shape[2] - q.shape[2]
    at = torch.arange(length, device=k.device) + retrieval.start(seen)
    sections = Sections.blocks(length, retrieval.block, k.device)
    keys, values = sections.lay_out(retrieval.rope.rotate(k, at[None])), sections.lay_out(v)
    rotated = retrieval.rope.rotate(q, at[None, first:])
    index = retrieval.choose(rotated, memory, seen) if memory.count else None

    def tile(rows: slice) -> Tensor:
        found = None
        if index is not None:
            mine = slice(rows.start - first, rows.stop - first)
            chosen = index[:, :, :, mine] if index.shape[3] > 1 else index
            found = retrieval.retrieve(q[:, :, mine], at[rows], chosen, memory, seen)
        return grouped_tile(rotated, keys, values, sections, rows, first, retrieval.scale, found)

    # Where queries choose for themselves, each has 2 k s D numbers of blocks beside its logits.
    gathered = 2 * retrieval.blocks * retrieval.block * q.shape[3] if index is not None and index.shape[3] > 1 else 0
    return over_tiles(tile, range(first, length), q.shape[0] * q.shape[1] * (keys.shape[2] + gathered), 2)
