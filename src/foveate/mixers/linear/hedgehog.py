"""Hedgehog: linear attention whose feature maps are learned to give softmax's weights.

Good linear attention needs weights that are spiky and rise with q . k, which fixed feature maps lack. A small linear
map per head with exponentials of both signs can be trained to have them, by cross-entropy against the weights of a
softmax layer with the same projections; the layer then stands in for the softmax layer (`foveate.lm.convert`).

    q, k = rotate(x W_q), rotate(x W_k);  v = x W_v;   k and v repeated to the H query heads
    y = x' W_h of q and k, each with its own W [H, D, F]         (tied: one W;  skip: y = x' + x' W_h)
    phi = [softmax(y), softmax(-y)]  or  [exp(y - max y), exp(min y - y)], at least 1e-12
    o_i = sum_{j <= i} (phi(q_i) . phi(k_j)) v_j / (sum_{j <= i} phi(q_i) . phi(k_j) + eps);  y = o W_o

Paper: Zhang et al. 2024 (arXiv 2402.04347). Parameters are named as the softmax mixer's, so its weights fit. W starts
as the identity where F = D (the paper), at zero with `skip`, else uniform with unit gain (the authors' later code: a
smaller bound). Left out: that code's bias, one number per head, which cancels in both maps. Features are computed in
float32, where 1e-12 still counts, whatever the inputs' dtype. Without causality all tokens are read.

State: sums of phi(k)^T v and phi(k), [B, H, 2 F, D + 1] float32, per query head. Cost: O(N F D) per head;
`mimicry_loss` is quadratic in N, in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveate.attention import Rope
from foveate.attention.features import hedgehog_exp, hedgehog_softmax
from foveate.attention.linear import kv_matmul_attention
from foveate.attention.shapes import match
from foveate.errors import OptionError
from foveate.mixers.base import PATTERNS, Initialised, Mixer, exact, start_position
from foveate.mixers.linear.recurrence import LinearState, empty_memory, recur
from foveate.mixers.parts import RMSNorm
from foveate.registry import register

MAPS: dict[str, Callable[[Tensor], Tensor]] = {"softmax": hedgehog_softmax, "exp": hedgehog_exp}


class HedgehogMap(Initialised):
    """The learned feature map of one side: x [B, N, H, D] -> [B, N, H, 2 F] float32 (float64 for float64).

    weight: [H, D, F].
    """

    def __init__(self, heads: int, dim: int, features: int, *, kind: str = "softmax", skip: bool = False) -> None:
        super().__init__()
        if kind not in MAPS:
            raise OptionError(f"HedgehogMap: kind={kind!r}, allowed: {tuple(MAPS)}")
        if skip and features != dim:
            raise OptionError(f"HedgehogMap: features={features} with skip, allowed: dim = {dim}")
        self.kind, self.skip = kind, skip
        self.weight = nn.Parameter(torch.empty(heads, dim, features))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        heads, dim, features = self.weight.shape
        if self.skip:
            return {"weight": torch.zeros_like(self.weight)}
        if features == dim:
            return {"weight": torch.eye(dim).to(self.weight).expand(heads, -1, -1)}
        reach = (3 / dim) ** 0.5
        return {"weight": torch.empty_like(self.weight).uniform_(-reach, reach)}

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(exact(x))
        with torch.autocast(x.device.type, enabled=False):
            y = torch.einsum("bnhd,hdf->bnhf", wide, self.weight.to(wide.dtype))
            return MAPS[self.kind](wide + y if self.skip else y)


def mimicry_loss(
    q: Tensor,
    k: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    padding: Tensor | None = None,
    eps: float = 1e-12,
    block: int = 256,
) -> Tensor:
    """Cross-entropy of linear attention's weights against softmax attention's, the mean over rows.

        L = - mean over sequences, heads and rows i of sum_j p_ij log max(w_ij, 1e-12)
        p_i = softmax_j(scale q_i . k_j),  w_ij = phi_q_i . phi_k_j / (sum_l phi_q_i . phi_k_l + eps)

    Args:
        q, k: [B, N, H, D], as softmax attention reads them; they get no gradient.
        phi_q, phi_k: [B, N, H, E], their features.
        scale: default D ** -0.5.    causal: over keys j <= i alone.
        padding: [B, N] bool, True for real tokens; others are neither rows nor keys.
        block: rows at a time; the backward pass computes them again, so memory is O(B H block N).
    Returns:
        a scalar in nats, float32 (float64 for float64). At its least it is the entropy of softmax's weights.
    Raises:
        ShapeError, OptionError.
    """
    sizes = match(q=(q, "B N H D"), k=(k, "B N H D"), phi_q=(phi_q, "B N H E"), phi_k=(phi_k, "B N H E"))
    if block < 1:
        raise OptionError(f"mimicry_loss: block={block}, allowed: >= 1")
    if padding is not None:
        match(q=(q, "B N H D"), padding=(padding, "B N"))
    N, dtype = sizes["N"], exact(phi_q)
    scale = sizes["D"] ** -0.5 if scale is None else scale
    # [B, H, N, *]
    q, k, phi_q, phi_k = (each.to(dtype).transpose(1, 2) for each in (q.detach(), k.detach(), phi_q, phi_k))
    token = torch.arange(N, device=q.device)

    def rows_loss(rows: Tensor, phi_rows: Tensor, phi_k: Tensor) -> Tensor:
        """[B, H, rows] the cross-entropy of some rows."""
        seen = torch.ones(1, 1, rows.numel(), N, dtype=torch.bool, device=q.device)
        if causal:
            seen = seen & (token <= rows[:, None])
        if padding is not None:
            # Every row sees itself, so that no row is empty; padded ones are left out below.
            seen = (seen & padding[:, None, None]) | (token == rows[:, None])
        scores = (scale * q[:, :, rows]) @ k.transpose(-1, -2)
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        w = (phi_rows @ phi_k.transpose(-1, -2)).masked_fill(~seen, 0)
        w = w / (w.sum(-1, keepdim=True) + eps)
        return -(p * w.clamp(min=1e-12).log()).sum(-1)

    with torch.autocast(q.device.type, enabled=False):
        found = []
        for rows in token.split(block):
            given = (rows, phi_q[:, :, rows], phi_k)
            found.append(rows_loss(*given) if block >= N else checkpoint(rows_loss, *given, use_reentrant=False))
        loss = torch.cat(found, -1)
        return loss.mean() if padding is None else loss.transpose(1, 2)[padding].mean()


@register(
    "hedgehog",
    kind="mixer",
    paper="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
    arxiv="2402.04347",
    year=2024,
    applies_to="from scratch; pretrained causal LMs by `foveate convert`",
    claim=(
        "Half of the bundled model's layers, 200 steps of distillation: 0.357 nats from softmax's weights and the "
        "same key weighed most in 0.710 of rows, 2.992 and 0.114 of the fixed map elu + 1: learned maps come close, "
        "fixed ones do not (benchmarks/results/claims/hedgehog.json). Multi-query recall, 64 pairs in 256 tokens, two "
        "layers of width 64: 0.278 with 34 kB of state; softmax 1.000 with 132 kB, linear attention 0.658 with 17 kB "
        "(benchmarks/results/mqar.json)."
    ),
)
class HedgehogMixer(Mixer):
    """Linear attention with learned feature maps that mimic softmax attention.

    kv_heads: heads of k and v (default: heads).    head_dim: D (default: dim / heads).
    feature_dim: F, half the features (default: D).    feature_map: "softmax" or "exp".    tied: one map for q and k.
    skip: add q or k to its map.    rotary, rope_base, qk_norm: as of the softmax mixer.    eps: added to the sum of
    weights.    causal: a token reads no later one.    bias: of q, k and v.
    """

    patterns = PATTERNS

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        feature_dim: int | None = None,
        feature_map: str = "softmax",
        tied: bool = False,
        skip: bool = False,
        rotary: bool = True,
        rope_base: float = 10000.0,
        qk_norm: bool = False,
        eps: float = 1e-12,
        causal: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(head_dim is not None or dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.require(
            self.kv_heads >= 1 and heads % self.kv_heads == 0, f"kv_heads={kv_heads}, allowed: divisors of {heads}"
        )
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.require(self.head_dim >= 1, f"head_dim={head_dim}, allowed: >= 1")
        self.require(not rotary or self.head_dim % 2 == 0, f"head_dim={self.head_dim}, allowed with rotary: even")
        self.require(rope_base > 0, f"rope_base={rope_base}, allowed: > 0")
        self.feature_dim = self.head_dim if feature_dim is None else feature_dim
        self.require(self.feature_dim >= 1, f"feature_dim={feature_dim}, allowed: >= 1")
        self.require(feature_map in MAPS, f"feature_map={feature_map!r}, allowed: {tuple(MAPS)}")
        self.require(
            not skip or self.feature_dim == self.head_dim,
            f"feature_dim={feature_dim} with skip, allowed: the head width {self.head_dim}",
        )
        self.require(eps >= 0, f"eps={eps}, allowed: >= 0")
        # Without causality, packed sequences are read one by one.
        self.eps, self.causal, self.packs = eps, causal, causal
        self.rope = Rope(self.head_dim, rope_base) if rotary else None
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.q_map = HedgehogMap(heads, self.head_dim, self.feature_dim, kind=feature_map, skip=skip)
        own = not tied
        self.k_map = HedgehogMap(heads, self.head_dim, self.feature_dim, kind=feature_map, skip=skip) if own else None

    def start(self, batch: int, like: Tensor) -> LinearState:
        memory = empty_memory(batch, self.heads, 2 * self.feature_dim, self.head_dim + 1, like)
        return LinearState(owner=self.owner, position=start_position(batch, like), memory=memory)

    def queries_and_keys(self, x: Tensor, source: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """q of x and k of the source as softmax attention reads them, [B, N, H, D] each."""
        q, k = (each.unflatten(-1, (-1, self.head_dim)) for each in (self.q_proj(x), self.k_proj(source)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None and positions is not None:
            q, k = (self.rope.rotate(each.transpose(1, 2), positions).transpose(1, 2) for each in (q, k))
        return q, self._per_query_head(k)

    def _per_query_head(self, x: Tensor) -> Tensor:
        """[B, N, Hkv, D] -> [B, N, H, D]."""
        return x.repeat_interleave(self.heads // self.kv_heads, 2)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """phi(q), phi(k) [B, N, H, 2 F] of q, k [B, N, H, D], each side by its own map unless they are tied."""
        return self.q_map(q), (self.q_map if self.k_map is None else self.k_map)(k)

    def _operands(self, x: Tensor, source: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q), phi(k) [B, N, H, 2 F] and v [B, N, H, D], in the features' dtype."""
        q, k = self.queries_and_keys(x, source, positions)
        v = self._per_query_head(self.v_proj(source).unflatten(-1, (-1, self.head_dim)))
        phi_q, phi_k = self.features(q, k)
        return phi_q, phi_k, v.to(phi_q.dtype)

    def _output(self, o: Tensor, like: Tensor) -> Tensor:
        return self.o_proj(o.flatten(2).to(like.dtype))

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        q, k, v = self._operands(x, x, positions)
        if not self.causal:
            return self._output(kv_matmul_attention(q, k, v, normalizer="sum", eps=self.eps), x), state
        o, memory = recur(q, k, v, state.memory, scale=1.0, normalize=True, eps=self.eps, cu_seqlens=cu_seqlens)
        return self._output(o, x), replace(state, memory=memory)

    def cross(self, x: Tensor, context: Tensor, context_padding: Tensor | None) -> Tensor:
        q, k, v = self._operands(x, context, None)
        if context_padding is not None:
            gone = ~context_padding[..., None, None]
            k, v = k.masked_fill(gone, 0), v.masked_fill(gone, 0)
        return self._output(kv_matmul_attention(q, k, v, normalizer="sum", eps=self.eps), x)

    def mimicry(
        self, x: Tensor, *, positions: Tensor | None = None, padding: Tensor | None = None, block: int = 256
    ) -> Tensor:
        """`mimicry_loss` of this layer's maps against softmax attention with this layer's projections.

        Args:
            x: [B, N, C], what the layer is given.    positions: [B or 1, N] int64, default 0 to N - 1.
            padding, block: as of `mimicry_loss`.
        Returns:
            a scalar; only the maps get gradients.
        """
        match(x=(x, f"B N {self.dim}"))
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        with torch.no_grad():
            q, k = self.queries_and_keys(x, x, positions)
        return mimicry_loss(q, k, *self.features(q, k), causal=self.causal, padding=padding, eps=self.eps, block=block)
