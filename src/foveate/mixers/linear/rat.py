"""RAT: a gated recurrence sums up each chunk of tokens, and softmax attention reads the sums.

    z, v, g, q, k = split(x W_in);  g = sigmoid(g + b);  q, k have `groups` heads, head h takes number h mod groups
    k'_t = g_t k'_{t-1} + (1 - g_t) k_t;  v'_t alike with the same g;  both start from 0 in every chunk of L tokens
    o_t = softmax over [K_0 .. K_{c-1}, R_c k'_t] of D^-0.5 (R_c q_t) . key, times [V_0 .. V_{c-1}, v'_t]
    y = (sigmoid(z) * o) W_o

c = t // L is the token's chunk, K_j = R_j k' and V_j = v' at the last token of chunk j, R_j a rotary turn by j. L = 1
is attention, L as long as the text a recurrence.

Paper: Wei et al. 2025 (arXiv 2507.04416). The layer's own norm and residual are left to the shell. Chunks are counted
by the order of tokens, so `positions` change nothing. The recurrence is float32, its results are in x's dtype.

State: keys and values of finished chunks, [B, heads, length // L, D] each, and the running k' and v', [B, 2, dim]
float32. Cost: O(N dim) for the recurrence, O(N^2 / L dim) for the attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention import Positions, Rope, attend, merge
from foveate.attention.scans import elementwise_scan
from foveate.mixers.base import Mixer, MixerState, exact, start_position
from foveate.registry import register


@dataclass(frozen=True, kw_only=True)
class RATState(MixerState):
    """keys (rotated), values: [B, H, chunks, D] of finished chunks.    running: [B, 2, dim] float32, k' and v' of the
    last token, not rotated.    seen: tokens so far, the same for all rows."""

    keys: Tensor
    values: Tensor
    running: Tensor
    seen: int = 0


@register(
    "rat",
    kind="mixer",
    paper="RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling",
    arxiv="2507.04416",
    year=2025,
    applies_to="from scratch",
    small={"chunk": 5},
    claim=(
        "Text, four layers, 400 steps: perplexity per byte 3.33 with chunks of 16 and 3.29 with 64, against 3.60 of "
        "attention in the same block and 7.88 of the recurrence alone; the state is 135 kB against 2101 kB "
        "(benchmarks/results/claims/rat.json). Multi-query recall, 64 pairs in 256 tokens, one head: 1.000, 0.953 and "
        "0.084 with chunks of 2, 4 and 16 tokens; linear attention 0.658 to 0.906 (benchmarks/results/mqar.json, "
        "mqar_long.json): above it up to chunks of 4."
    ),
)
class RATMixer(Mixer):
    """Softmax attention over chunks that a gated recurrence has summed up.

    chunk: L, tokens per chunk.    groups: different queries and keys, a divisor of heads (the gates differ per head).
    rope_base: theta of the rotary angles.
    """

    constant_state = False
    # Rows go through their chunks together; those of other lengths are run one by one.
    packs = False

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        chunk: int = 16,
        groups: int = 2,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % (2 * heads) == 0, f"dim={dim} with heads={heads}, allowed: a multiple of {2 * heads}")
        self.require(chunk >= 1, f"chunk={chunk}, allowed: >= 1")
        self.require(groups >= 1 and heads % groups == 0, f"groups={groups}, allowed: divisors of heads = {heads}")
        self.require(rope_base > 0, f"rope_base={rope_base}, allowed: > 0")
        self.chunk, self.groups, self.head_dim = chunk, groups, dim // heads
        self.rope = Rope(self.head_dim, rope_base)
        self.in_proj = nn.Linear(dim, 3 * dim + 2 * groups * self.head_dim, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(dim))
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        # sigmoid(log u) = u / (1 + u): memories of u tokens, spread over the chunk.
        memory = torch.empty_like(self.gate_bias).uniform_(1, max(self.chunk - 1, 1))
        return {"gate_bias": memory.log()}

    def start(self, batch: int, like: Tensor) -> RATState:
        empty = like.new_zeros(batch, self.heads, 0, self.head_dim)
        running = torch.zeros(batch, 2, self.dim, dtype=exact(like), device=like.device)
        return RATState(
            owner=self.owner, position=start_position(batch, like), keys=empty, values=empty, running=running
        )

    def state_bytes(self, batch: int, length: int) -> int:
        start = self.start(batch, self.meta())
        return start.bytes() + 2 * batch * (length // self.chunk) * self.dim * start.keys.element_size()

    def mix(self, x: Tensor, state: RATState, positions: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, RATState]:
        few = self.groups * self.head_dim
        z, v, gate, q, k = self.in_proj(x).split([self.dim, self.dim, self.dim, few, few], -1)
        summed, running = self._recurrence(self._per_head(k).flatten(2), v, gate, state)
        at = torch.arange(state.seen, state.seen + x.shape[1], device=x.device)
        chunk = (at // self.chunk)[None]
        q, own_k, own_v = (
            each.transpose(1, 2) for each in (self._per_head(q), *summed.to(q.dtype).unflatten(-1, (self.heads, -1)))
        )
        q, own_k = self.rope.rotate(q, chunk), self.rope.rotate(own_k, chunk)
        keys, values = self._finished(own_k, own_v, state)
        # A single token that ends its chunk does not read the chunk's sum beside its own.
        known = state.seen // self.chunk if x.shape[1] == 1 else keys.shape[2]
        o = self._read(q, keys[:, :, :known], values[:, :, :known], own_k, own_v, chunk)
        y = self.o_proj(torch.sigmoid(z) * o.transpose(1, 2).flatten(2))
        return y, replace(state, keys=keys, values=values, running=running, seen=state.seen + x.shape[1])

    def _per_head(self, x: Tensor) -> Tensor:
        """[B, N, groups D] -> [B, N, H, D], the groups in turn."""
        return x.unflatten(-1, (self.groups, -1)).repeat(1, 1, self.heads // self.groups, 1)

    def _recurrence(self, k: Tensor, v: Tensor, gate: Tensor, state: RATState) -> tuple[Tensor, Tensor]:
        """k' and v' of every token, [2, B, N, C] float32, and of the last, [B, 2, C]."""
        wide = exact(gate)
        raw = gate.to(wide) + self.gate_bias.to(wide)
        written = torch.stack((k, v), 2).to(wide) * torch.sigmoid(-raw)[:, :, None]
        h, last = elementwise_scan(
            written,
            F.logsigmoid(raw)[:, :, None].expand_as(written),
            initial_state=state.running,
            reset_every=self.chunk,
            offset=state.seen,
        )
        return h.movedim(2, 0), last

    def _finished(self, k: Tensor, v: Tensor, state: RATState) -> tuple[Tensor, Tensor]:
        """Keys and values of all chunks that end in or before these tokens."""
        first = -(state.seen + 1) % self.chunk
        ends = k[:, :, first :: self.chunk], v[:, :, first :: self.chunk]
        if ends[0].shape[2] == 0:
            return state.keys, state.values
        old = state.keys.to(k.dtype), state.values.to(v.dtype)
        return torch.cat((old[0], ends[0]), 2), torch.cat((old[1], ends[1]), 2)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, chunk: Tensor) -> Tensor:
        """Attention of q [B, H, N, D] over the chunks before its own (k, v) and its own running sum."""
        own = (q.to(exact(q)) * own_k).sum(-1)
        # Log-sum-exps of fused kernels have no gradient.
        if q.shape[2] > 1 or torch.is_grad_enabled():
            return self._read_masked(q, k, v, own, own_v, chunk)
        if k.shape[2] == 0:
            return own_v
        # One token needs no mask, and this way stored keys are not copied.
        scale = self.head_dim**-0.5
        o, lse = attend(q, k.to(q.dtype), v.to(q.dtype), scale=scale, return_lse=True)
        return merge([o, own_v], [lse, own.to(lse.dtype) * scale])[0]

    def _read_masked(self, q: Tensor, k: Tensor, v: Tensor, own: Tensor, own_v: Tensor, chunk: Tensor) -> Tensor:
        """The same in one call: the own sum is a key 0 that every query sees, its score handed over in two more
        features of q (the second for what the first rounds off); the weight it gets is a feature of the output."""
        high = own.to(q.dtype)
        low = (own - high).to(q.dtype)
        # Widths that are multiples of 8 keep fused kernels from padding.
        spare = -(self.head_dim + 2) % 8
        q = F.pad(torch.cat((q, high[..., None], low[..., None]), -1), (0, spare))
        k, v = (F.pad(each.to(q.dtype), (0, 2 + spare, 1, 0)) for each in (k, v))
        D = self.head_dim
        marks = torch.arange(D + 2 + spare, device=q.device)
        k[:, :, 0] = ((marks == D) | (marks == D + 1)).to(k.dtype)
        v[:, :, 0] = (marks == D).to(v.dtype)
        o = attend(q, k, v, scale=D**-0.5, positions=Positions(chunk.expand(q.shape[0], -1)))
        return o[..., :D] + o[..., D : D + 1] * own_v
