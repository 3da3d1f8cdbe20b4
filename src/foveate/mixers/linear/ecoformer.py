"""EcoFormer: linear attention on binary codes, from hash functions that are learned on a Gaussian kernel.

Codes that agree where attention is high make attention a count of agreeing bits, which is an inner product: linear in
the tokens, and with codes of +-1 its products are additions.

    x = X W_qk / |X W_qk| per head, for queries and keys alike;  v = X W_v
    kappa_j = exp(-|x - a_j|^2 / (2 sigma)) - mu_j against anchors a_1 .. a_m, sigma the mean of |x - a|^2 over the
        sequence's tokens and the anchors
    h = sign(kappa A^T) in {-1, +1}^b;  its gradient is passed on where |kappa A^T| < 1
    o_i = sum_j (h_i . h_j + c) v_j / sum_j (h_i . h_j + c), c = b + 1                       profile "exact"
    o_i = (sum_j (h_i . h_j) v_j + c v_i) / sum_j (h_i . h_j + c)                            profile "official"
    y = o W_o

Paper: Liu et al. 2022 (arXiv 2209.09004). "official" is what the authors' code computes, for its weights. Anchors, mu
and A are buffers: they are learned once, from the first input in training (`learn_codes`), and stay. Until then
anchors and A are random, and mu is exp(-1/2), kappa's value at the mean distance.

    Learning: S_ij = b for the `topk` most similar tokens of row i, -b for the least, else 0. Bit by bit, gradient steps
    on -mean y^T S y / (N b), y = 2 sigmoid(kappa a) - 1; the new a is kept if its hard bits are strictly
    better; then S <- S - y y^T with hard bits.

Hashing is float32 (float64 for float64), also under autocast. Not causal, no state. The gradient through sign is passed
on by convention; numerically it is 0. Processes that train together must share the buffers, as DDP does.
Cost: O(N (m D + b D)) per head; learning is O(N^2) per step, once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.features import l2norm
from foveate.attention.linear import kv_matmul_attention
from foveate.attention.shapes import match
from foveate.errors import OptionError, ShapeError
from foveate.mixers.base import Mixer, exact
from foveate.mixers.linear.recurrence import split_heads
from foveate.registry import register

PROFILES = ("exact", "official")


class _Sign(torch.autograd.Function):
    """x > 0 -> 1, else -1; the gradient is passed on where |x| < 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _hard(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 1)


def _hard(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


def kernel_features(x: Tensor, anchors: Tensor, centre: Tensor | None = None) -> Tensor:
    """Gaussian kernel of tokens with anchors, less the centre: x [B, N, H, D], anchors [H, m, D] -> [B, N, H, m].

    The width is the mean squared distance of each sequence and head. centre: [H, m].
    """
    match(x=(x, "B N H D"), anchors=(anchors, "H m D"), **({} if centre is None else {"centre": (centre, "H m")}))
    crossed = torch.einsum("bnhd,hmd->bnhm", x, anchors)
    squares = x.square().sum(-1, keepdim=True) + anchors.square().sum(-1) - 2 * crossed
    squares = squares.clamp(min=0)
    kappa = torch.exp(-squares / (2 * squares.mean((1, 3), keepdim=True)))
    return kappa if centre is None else kappa - centre


def binary_codes(x: Tensor, anchors: Tensor, centre: Tensor, hashes: Tensor) -> Tensor:
    """Codes of +-1: x [B, N, H, D] unit vectors, anchors [H, m, D], centre [H, m], hashes [H, b, m] -> [B, N, H, b]."""
    match(anchors=(anchors, "H m D"), hashes=(hashes, "H b m"))
    codes: Tensor = _Sign.apply(torch.einsum("bnhm,hrm->bnhr", kernel_features(x, anchors, centre), hashes))
    return codes


def similarity_targets(x: Tensor, topk: int) -> Tensor:
    """[B, H, N, N] 1 for the most similar tokens of each row (itself among them), -1 for the least, else 0.

    x: [B, N, H, D] unit vectors.    topk: how many of each; at most half of the tokens are.
    """
    B, N, H, _ = match(x=(x, "B N H D")).values()
    count = min(topk, N // 2)
    similar = torch.einsum("bnhd,bmhd->bhnm", x, x)
    order = similar.argsort(-1, descending=True)
    target = x.new_zeros(B, H, N, N)
    return target.scatter(-1, order[..., :count], 1.0).scatter(-1, order[..., N - count :], -1.0)


def learn_hashes(
    x: Tensor,
    anchors: Tensor,
    start: Tensor,
    target: Tensor,
    *,
    steps: int = 100,
    rate: float = 5e-4,
    momentum: float = 0.9,
) -> tuple[Tensor, Tensor, list[bool]]:
    """Learn hash functions whose codes agree where the target is high, bit by bit.

    Args:
        x: [B, N, H, D] unit vectors.    anchors: [H, m, D].    start: [H, b, m], where the hashes start.
        target: [B, H, N, N], see `similarity_targets`; multiplied by b here.
        steps, rate, momentum: of SGD with Nesterov's momentum, new for each bit.
    Returns:
        hashes [H, b, m]; centre [H, m], the mean kernel features of x; per bit, whether the learned row was kept.
    Raises:
        ShapeError; OptionError where a hash or the loss is not finite.
    """
    match(x=(x, "B N H D"), anchors=(anchors, "H m D"), start=(start, "H b m"), target=(target, "B H N N"))
    bits, wide = start.shape[1], exact(x)
    with torch.autocast(x.device.type, enabled=False):
        x, anchors, hashes = (each.detach().to(wide) for each in (x, anchors, start.clone()))
        residual = bits * target.detach().to(wide)
        kappa = kernel_features(x, anchors)
        centre = kappa.mean((0, 1))
        kappa = (kappa - centre).transpose(1, 2)
        kept = []
        for bit in range(bits):
            row, better = _learn_bit(kappa, hashes[:, bit], residual, bits, steps, rate, momentum)
            kept.append(better)
            hashes[:, bit] = row
            y = _hard(_project(kappa, row))
            residual = residual - y.unsqueeze(-1) * y.unsqueeze(-2)
    return hashes, centre, kept


def _project(kappa: Tensor, row: Tensor) -> Tensor:
    """[B, H, N, m] by [H, m] -> [B, H, N]."""
    return torch.einsum("bhnm,hm->bhn", kappa, row)


def _learn_bit(
    kappa: Tensor, start: Tensor, residual: Tensor, bits: int, steps: int, rate: float, momentum: float
) -> tuple[Tensor, bool]:
    """One bit's hash [H, m] for all heads: the learned one where its hard bits are strictly better than the start's."""

    def loss(y: Tensor) -> Tensor:
        return -((residual @ y.unsqueeze(-1)).squeeze(-1) * y).sum(-1).mean() / (y.shape[-1] * bits)

    # Hashing may run where gradients are off; learning it needs them.
    with torch.enable_grad():
        row = start.clone().requires_grad_()
        optimiser = torch.optim.SGD([row], lr=rate, momentum=momentum, nesterov=momentum > 0)
        for _ in range(steps):
            optimiser.zero_grad()
            loss(2 * torch.sigmoid(_project(kappa, row)) - 1).backward()
            optimiser.step()
    learned = row.detach()
    before, after = (float(loss(_hard(_project(kappa, each)))) for each in (start, learned))
    if not (math.isfinite(after) and bool(learned.isfinite().all())):
        raise OptionError(
            f"ecoformer: learning the codes met values that are not finite with rate={rate}, allowed: finite inputs "
            "and a rate that does not overflow"
        )
    return (learned, True) if after < before else (start, False)


def code_attention(codes: Tensor, v: Tensor, *, profile: str = "exact") -> Tensor:
    """Attention by agreeing bits: codes [B, N, H, b] of queries and keys, v [B, N, H, V] -> [B, N, H, V]."""
    match(codes=(codes, "B N H b"), v=(v, "B N H V"))
    if profile not in PROFILES:
        raise OptionError(f"code_attention: profile={profile!r}, allowed: {PROFILES}")
    values = v.to(codes.dtype)
    c, N = codes.shape[-1] + 1, codes.shape[1]
    counted = torch.cat((values, torch.ones_like(values[..., :1])), -1)
    sums = kv_matmul_attention(codes, codes, counted, scale=1.0)
    own = values.sum(1, keepdim=True) if profile == "exact" else values
    return ((sums[..., :-1] + c * own) / (sums[..., -1:] + N * c)).to(v.dtype)


@register(
    "ecoformer",
    kind="mixer",
    paper="EcoFormer: Energy-Saving Attention with Linear Complexity",
    arxiv="2209.09004",
    year=2022,
    applies_to="from scratch; pretrained vision transformers with shared query and key projections",
    small={"anchors": 4, "bits": 6, "topk": 3, "hash_steps": 5},
    claim=(
        "Bundled model's queries and keys: rank correlation of code and true similarity 0.55, 0.64 and 0.73 "
        "with 8, 16 and 32 learned bits, 0.49, 0.62 and 0.71 with random ones; the best keys are told from "
        "the worst no better (benchmarks/results/claims/ecoformer.json)."
    ),
)
class EcoFormerMixer(Mixer):
    """Non-causal linear attention on learned binary codes.

    bits: b, of a code.    anchors: m, of the kernel.    profile: "exact" or "official" numerator.    learn: learn the
    codes from the first input in training.    topk, hash_steps, hash_rate: of that.
    """

    patterns = frozenset({"noncausal-self"})
    causal = False
    # The kernel's width is a mean over one sequence.
    packs = False

    anchors: Tensor
    hashes: Tensor
    centre: Tensor
    learned: Tensor

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        bits: int = 16,
        anchors: int = 25,
        profile: str = "exact",
        learn: bool = True,
        topk: int = 10,
        hash_steps: int = 100,
        hash_rate: float = 5e-4,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        for name, value in (("bits", bits), ("anchors", anchors), ("topk", topk), ("hash_steps", hash_steps)):
            self.require(value >= 1, f"{name}={value}, allowed: >= 1")
        self.require(profile in PROFILES, f"profile={profile!r}, allowed: {PROFILES}")
        self.require(hash_rate > 0, f"hash_rate={hash_rate}, allowed: > 0")
        self.profile, self.learn = profile, learn
        self.topk, self.hash_steps, self.hash_rate = topk, hash_steps, hash_rate
        self.qk_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.register_buffer("anchors", torch.empty(heads, anchors, dim // heads))
        self.register_buffer("hashes", torch.empty(heads, bits, anchors))
        self.register_buffer("centre", torch.empty(heads, anchors))
        self.register_buffer("learned", torch.empty((), dtype=torch.bool))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        return {
            "anchors": F.normalize(torch.randn_like(self.anchors), dim=-1),
            "hashes": torch.randn_like(self.hashes),
            "centre": torch.full_like(self.centre, math.exp(-0.5)),
            "learned": torch.zeros_like(self.learned),
        }

    def _unit(self, x: Tensor) -> Tensor:
        """[B, N, H, D] queries and keys of unit length."""
        wide = exact(x)
        return l2norm(split_heads(F.linear(x.to(wide), self.qk_proj.weight.to(wide)), self.heads))

    @torch.no_grad()
    def learn_codes(self, x: Tensor) -> list[bool]:
        """Take anchors from the first sequence of x [B, N, C], and learn the hashes on all of x.

        Returns per bit whether learning improved it. Raises ShapeError for fewer tokens than anchors.
        """
        match(x=(x, f"B N {self.dim}"))
        H, m, _ = self.anchors.shape
        if x.shape[1] < m:
            raise ShapeError(f"{self.owner}: learning codes from N = {x.shape[1]} tokens, allowed: >= anchors = {m}")
        with torch.autocast(x.device.type, enabled=False):
            unit = self._unit(x)
            chosen = torch.stack([torch.randperm(x.shape[1], device=x.device)[:m] for _ in range(H)])
            anchors = unit[0].transpose(0, 1).gather(1, chosen[..., None].expand(-1, -1, unit.shape[-1]))
            hashes, centre, kept = learn_hashes(
                unit,
                anchors,
                self.hashes,
                similarity_targets(unit, self.topk),
                steps=self.hash_steps,
                rate=self.hash_rate,
            )
        self.anchors.copy_(anchors)
        self.hashes.copy_(hashes)
        self.centre.copy_(centre)
        self.learned.fill_(True)
        return kept

    def mix(self, x: Tensor, state: Any, positions: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        if self.training and self.learn and not bool(self.learned):
            self.learn_codes(x)
        with torch.autocast(x.device.type, enabled=False):
            unit = self._unit(x)
            tables = (each.to(unit.dtype) for each in (self.anchors, self.centre, self.hashes))
            codes = binary_codes(unit, *tables)
        o = code_attention(codes, split_heads(self.v_proj(x), self.heads), profile=self.profile)
        return self.o_proj(o.flatten(2)), state
