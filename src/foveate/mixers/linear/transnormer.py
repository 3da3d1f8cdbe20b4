"""TransNormer: linear attention with a norm in place of the denominator, after layers of attention within blocks.

    transnormer-norm   q, k = R phi(x W_q), R phi(x W_k);  v = x W_v;  phi = elu ("elu") or elu + 1 ("elu+1")
                       y = norm(sum_{j <= i} (q_i . k_j) v_j) W_o                 no scale, no denominator
    transnormer-diag   tokens i, j of one block of w, s_ij = D^-0.5 q_i . k_j, j <= i
                       weights "relu":     y = norm(sum_j relu(s_ij) v_j) W_o
                       weights "softmax":  y = (sum_j softmax_j(s_ij) v_j) W_o

norm(o) = o / (rms(o) + 1e-8) over the heads together, without gain. R (LRPE) mirrors a head at a fixed random
direction and turns the pairs (2i, 2i + 1) by theta_i times the position; transnormer-diag has it with `lrpe`, and its
positions are those in the block.

Paper: Qin et al. 2022 (arXiv 2210.10340). Dividing by a sum of features makes gradients unbounded, the norm does not.
T1 is "elu" with "relu", T2 "elu+1" with "softmax"; the first half of the layers are transnormer-diag, the second half
transnormer-norm. Linear layers are initialised by the shell, not by Xavier with gain 1/sqrt(2) as theirs. The scale is
applied once, where one of their modules applies it twice.

State: transnormer-norm [B, H, D, D] float32; transnormer-diag the keys and values of the block so far, [B, H, w - 1, D]
each. Cost: O(N D^2) and O(N w D) per head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention import Positions, apply_rotary, attend
from foveate.attention.features import elu_plus_one
from foveate.attention.linear import kv_matmul_attention
from foveate.mixers.base import Initialised, Mixer, MixerState, exact, start_position
from foveate.mixers.linear.recurrence import LinearState, empty_memory, recur, split_heads
from foveate.registry import register

PAPER = "The Devil in Linear Transformer"
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"elu": F.elu, "elu+1": elu_plus_one}


def normed(x: Tensor) -> Tensor:
    """x / (rms(x) + 1e-8) over the last axis, in float32 (float64 for float64), in x's dtype; zeros stay zeros."""
    wide = x.to(exact(x))
    # The gradient of a norm at zero is zero, that of a square root is not.
    rms = wide.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return (wide / (rms + 1e-8)).to(x.dtype)


class MirroredRotary(Initialised):
    """LRPE: a reflection at a fixed direction, then a turn of each pair of channels by theta times the position.

    mirror: [D], the direction, a buffer of any length but 0.    theta: [D / 2], learned with `learned`, from
    base^(-2 i / D).
    """

    def __init__(self, dim: int, *, base: float = 10000.0, learned: bool = True) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("mirror", torch.empty(dim))
        self.mirror: Tensor
        self.theta = nn.Parameter(torch.empty(dim // 2)) if learned else None
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        mirror = {"mirror": F.normalize(torch.randn_like(self.mirror), dim=0)}
        return mirror if self.theta is None else mirror | {"theta": self._rates()}

    def _rates(self) -> Tensor:
        D = self.mirror.shape[0]
        pair = torch.arange(0, D, 2, dtype=exact(self.mirror), device=self.mirror.device)
        return self.base ** (-pair / D)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, N, H, D] at positions [B, N]."""
        wide = exact(x)
        u = F.normalize(self.mirror.to(wide), dim=0)
        mirrored = x.to(wide) - 2 * (x.to(wide) @ u)[..., None] * u
        theta = self._rates() if self.theta is None else self.theta
        angle = positions[..., None, None].to(wide) * theta.to(wide)
        return apply_rotary(mirrored, angle.cos(), angle.sin(), "interleaved").to(x.dtype)


@register(
    "transnormer-norm",
    kind="mixer",
    paper=PAPER,
    arxiv="2210.10340",
    year=2022,
    applies_to="from scratch",
    claim=(
        "Text, four layers, 400 steps: perplexity per byte 6.95 (8.32 without rotations) against 7.42 of linear "
        "attention and 3.17 of rotary softmax. That it trains at higher rates is not reproduced: at 0.003, 0.01 and "
        "0.03 linear attention has 7.16, 7.82 and 7.84, the norm 8.14, 7.92 and 8.34, the flattest of the two "
        "(benchmarks/results/claims/transnormer.json)."
    ),
)
class NormAttentionMixer(Mixer):
    """Linear attention without a denominator, its output normed.

    feature_map: "elu" (signed) or "elu+1".    lrpe: give positions by LRPE.    learned_angles: learn its angles.
    causal: a token reads no later one.
    """

    patterns = frozenset({"causal-self", "noncausal-self"})

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        feature_map: str = "elu",
        lrpe: bool = True,
        learned_angles: bool = True,
        causal: bool = True,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.head_dim = dim // heads
        self.require(feature_map in FEATURES, f"feature_map={feature_map!r}, allowed: {tuple(FEATURES)}")
        self.require(not lrpe or self.head_dim % 2 == 0, f"head width {self.head_dim}, allowed with lrpe: even")
        self.feature_map, self.causal, self.packs = feature_map, causal, causal
        self.lrpe = MirroredRotary(self.head_dim, learned=learned_angles) if lrpe else None
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def start(self, batch: int, like: Tensor) -> LinearState:
        memory = empty_memory(batch, self.heads, self.head_dim, self.head_dim, like)
        return LinearState(owner=self.owner, position=start_position(batch, like), memory=memory)

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        phi = FEATURES[self.feature_map]
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = phi(q), phi(k)
        if self.lrpe is not None:
            q, k = self.lrpe(q, positions), self.lrpe(k, positions)
        if self.causal:
            o, memory = recur(q, k, v, state.memory, scale=1.0, cu_seqlens=cu_seqlens)
            state = replace(state, memory=memory)
        else:
            o = kv_matmul_attention(q, k, v, scale=1.0)
        return self.o_proj(normed(o.flatten(2))), state


@dataclass(frozen=True, kw_only=True)
class BlockState(MixerState):
    """keys, values: [B, H, w - 1, D], the tokens of the block so far and zeros after them.    length: [B] int64, how
    many these are."""

    keys: Tensor
    values: Tensor
    length: Tensor


@register(
    "transnormer-diag",
    kind="mixer",
    paper=PAPER,
    arxiv="2210.10340",
    year=2022,
    applies_to="from scratch",
    small={"block": 5},
    claim=(
        "Text, four layers, 400 steps: two layers of softmax in blocks before two of norm attention have perplexity "
        "6.19 per byte, after them 7.17, norm attention alone 6.95: blocks first, as the paper says; rotary softmax "
        "has 3.17 (benchmarks/results/claims/transnormer.json)."
    ),
)
class DiagAttentionMixer(Mixer):
    """Attention within blocks that do not overlap.

    block: w, tokens per block.    weights: "relu" with a norm of the output, or "softmax".    lrpe: positions within
    the block by LRPE.    learned_angles: learn its angles.    causal: a token reads no later one.    fill_keys: without
    causality, softmax also reads the zeros that fill up a last block, as the authors' code does.
    """

    patterns = frozenset({"causal-self", "noncausal-self"})
    packs = False

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        block: int = 64,
        weights: str = "relu",
        lrpe: bool = False,
        learned_angles: bool = True,
        causal: bool = True,
        fill_keys: bool = False,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.head_dim = dim // heads
        self.require(block >= 1, f"block={block}, allowed: >= 1")
        self.require(weights in ("relu", "softmax"), f"weights={weights!r}, allowed: 'relu', 'softmax'")
        self.require(not lrpe or self.head_dim % 2 == 0, f"head width {self.head_dim}, allowed with lrpe: even")
        self.require(not (fill_keys and causal), "fill_keys with causal=True, allowed: causal=False")
        self.block, self.weights, self.causal, self.fill_keys = block, weights, causal, fill_keys
        self.lrpe = MirroredRotary(self.head_dim, learned=learned_angles) if lrpe else None
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def start(self, batch: int, like: Tensor) -> BlockState:
        keys = like.new_zeros(batch, self.heads, self.block - 1, self.head_dim)
        position = start_position(batch, like)
        return BlockState(
            owner=self.owner, position=position, keys=keys, values=keys, length=torch.zeros_like(position)
        )

    def mix(
        self, x: Tensor, state: BlockState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, BlockState]:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.lrpe is not None:
            at = (state.length[:, None] + torch.arange(x.shape[1], device=x.device)) % self.block
            q, k = self.lrpe(q, at), self.lrpe(k, at)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        if x.shape[1] == 1 and self.causal:
            o, state = self._step(q, k, v, state)
        else:
            o, state = self._blocks(q, k, v, state)
        o = o.transpose(1, 2).flatten(2)
        return self.o_proj(normed(o) if self.weights == "relu" else o), state

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """One token of each row, against the slots of its block."""
        slots = torch.arange(self.block, device=q.device)
        here = (slots == state.length[:, None])[:, None, :, None]
        k, v = (torch.where(here, new, F.pad(old, (0, 0, 0, 1))) for old, new in ((state.keys, k), (state.values, v)))
        filled = slots.masked_fill(slots > state.length[:, None], -1)[:, None]
        o = self._weigh(q, k, v, Positions(state.length[:, None], filled, holes=True))
        length = (state.length + 1) % self.block
        kept = (length > 0)[:, None, None, None]
        keys, values = (each[:, :, : self.block - 1] * kept for each in (k, v))
        return o, replace(state, keys=keys, values=values, length=length)

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """Tokens laid out in whole blocks, each row from where its block stands; then all blocks at once."""
        B, H, N, D = q.shape
        w, past = self.block, self.block - 1
        count = -(-(past + N) // w)
        slots = torch.arange(count * w, device=q.device)
        laid = [
            _laid_out(old, new, state.length, slots).unflatten(2, (count, w)).transpose(1, 2).flatten(0, 1)
            for old, new in ((torch.zeros_like(state.keys), q), (state.keys, k), (state.values, v))
        ]
        o = self._weigh(laid[0], laid[1], laid[2], self._visible(state.length + N, slots))
        o = o.unflatten(0, (B, count)).transpose(1, 2).flatten(2, 3)
        new = state.length[:, None] + torch.arange(N, device=q.device)
        o = o.gather(2, new[:, None, :, None].expand(-1, H, -1, D))
        total = state.length + N
        rest = (total // w * w)[:, None] + torch.arange(past, device=q.device)
        keys, values = (_laid_out(a, b, state.length, rest) for a, b in ((state.keys, k), (state.values, v)))
        return o, replace(state, keys=keys, values=values, length=total % w)

    def _visible(self, total: Tensor, slots: Tensor) -> Positions:
        """Where the tokens of every block stand in it, when row b fills its first total[b] slots."""
        if self.causal or self.fill_keys:
            return Positions()
        place = (slots % self.block).expand(total.shape[0], -1)
        filled = place.masked_fill(slots >= total[:, None], -1).unflatten(1, (-1, self.block)).flatten(0, 1)
        return Positions(place.unflatten(1, (-1, self.block)).flatten(0, 1), filled[:, None], holes=True)

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """q [n, H, M, D] against the w slots of its block, k and v [n, H, w, D]."""
        k, v = k.to(q.dtype), v.to(q.dtype)
        if self.weights == "softmax":
            return attend(q, k, v, positions=positions, causal=self.causal)
        scores = F.relu(q @ k.transpose(-1, -2)) * self.head_dim**-0.5
        # Slots that are not filled hold zeros, and weigh nothing.
        if self.causal:
            scores = scores * positions.visible(q.shape[2], k.shape[2], q.device)
        return scores @ v


def _laid_out(past: Tensor, new: Tensor, length: Tensor, slots: Tensor) -> Tensor:
    """Row b's first length[b] entries of past [B, H, P, D], then new [B, H, N, D], then zeros, read at slots [S] or
    [B, S]."""
    B, H, P, D = past.shape
    source = torch.cat((past.to(new.dtype), new, torch.zeros_like(new[:, :, :1])), 2)
    slots, filled = slots.expand(B, -1), length[:, None]
    place = torch.where(slots < filled, slots, P + slots - filled)
    place = torch.where(slots < filled + new.shape[2], place, P + new.shape[2])
    return source.gather(2, place[:, None, :, None].expand(-1, H, -1, D))
