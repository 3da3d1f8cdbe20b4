"""NPRF with RPE: kernel attention on normalised queries and keys with a learned relative position bias.

Random features of softmax's kernel vary as exp(|q|^2), which keeps them from being trained from scratch; on vectors of
length tau they are stable, and a bias per distance gives back the sharpness that is lost. Since exp(q.k + b) is
exp(b) exp(q.k), and exp(b_{j - i}) is a Toeplitz matrix, both sums of kernel attention are Toeplitz products: FFTs.

    q, k = tau x W_q / |x W_q|, tau x W_k / |x W_k| per head;  v = x W_v
    phi(x)_r = exp(w_r . x - tau^2 / 2) / sqrt(m), r = 1 .. m, Gaussian w_r     (features "random"; "elu": elu + 1)
    o_i = sum_j exp(b_{j - i}) (phi(q_i) . phi(k_j)) v_j / sum_j exp(b_{j - i}) (phi(q_i) . phi(k_j)), causal: j <= i
    y = o W_o

Paper: Luo et al. 2021 (arXiv 2106.12566). b is learned per head for distances up to `reach`, beyond which it is the
last one's; it starts at 0. w is drawn once, orthogonal in blocks, and saved. Distances count tokens, whatever
`positions` say: the FFT needs the order. Left out: features drawn anew at every step, and two-dimensional biases. No
authors' code is public; the definition follows the paper.

A whole sequence without a state goes through the FFT (`foveate.attention.convolutions.toeplitz_attention`): O(N log N)
times m (V + 1) per head. Toeplitz weights have no recurrence, so tokens after a state read the stored features of all
keys directly: O(S (m + V)) per token.
State: phi(k) [B, H, S, m] float32 (float64 for float64) and v [B, H, S, V], S = length.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from foveate.attention.convolutions import toeplitz_attention
from foveate.attention.features import elu_plus_one, gaussian_projection, l2norm, positive_random
from foveate.mixers.base import Mixer, exact, start_position
from foveate.mixers.linear.recurrence import split_heads
from foveate.mixers.softmax.rotary import SoftmaxState
from foveate.registry import register

FEATURES = ("random", "elu")
# Rows of new tokens that read the stored keys at once; bounds memory at B H 256 S.
_ROWS = 256


@register(
    "nprf",
    kind="mixer",
    paper="Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding",
    arxiv="2106.12566",
    year=2021,
    applies_to="from scratch",
    claim=(
        "Bytes of text, 2 layers of width 64, 300 steps: loss 2.126 with a relative bias, 2.128 without it; "
        "without normalised queries and keys (tau 4) 2.156; linear attention 2.142, softmax 1.945. The "
        "Toeplitz product by FFT takes 4.3 ms at 16k tokens, directly 83 ms on one H100 "
        "(benchmarks/results/claims/nprf.json)."
    ),
)
class NPRFMixer(Mixer):
    """Kernel attention on normalised queries and keys, with a relative position bias by FFT.

    features: "random" or "elu".    feature_dim: m, random features per head.    tau: length of queries and keys.
    reach: distances with a bias of their own.    causal: a token reads no later one.
    """

    patterns = frozenset({"causal-self", "noncausal-self"})
    constant_state = False
    # The FFT runs over one sequence.
    packs = False

    projection: Tensor

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        features: str = "random",
        feature_dim: int = 32,
        tau: float = 1.0,
        reach: int = 512,
        causal: bool = True,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.require(features in FEATURES, f"features={features!r}, allowed: {FEATURES}")
        self.require(feature_dim >= 1, f"feature_dim={feature_dim}, allowed: >= 1")
        self.require(tau > 0, f"tau={tau}, allowed: > 0")
        self.require(reach >= 0, f"reach={reach}, allowed: >= 0")
        self.features, self.tau, self.reach, self.causal = features, tau, reach, causal
        self.head_dim = dim // heads
        self.feature_dim = feature_dim if features == "random" else self.head_dim
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        # Entry r + reach is of a key r tokens after the query.
        self.bias = nn.Parameter(torch.zeros(heads, reach + 1 if causal else 2 * reach + 1))
        if features == "random":
            self.register_buffer("projection", torch.empty(feature_dim, self.head_dim))
            self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        values = {"bias": torch.zeros_like(self.bias)}
        if self.features == "random":
            w = self.projection
            drawn = gaussian_projection(self.feature_dim, self.head_dim, orthogonal=True, device=w.device)
            values["projection"] = drawn.to(w.dtype)
        return values

    def start(self, batch: int, like: Tensor) -> SoftmaxState:
        position = start_position(batch, like)
        return SoftmaxState(
            owner=self.owner,
            position=position,
            keys=torch.zeros(batch, self.heads, 0, self.feature_dim, dtype=exact(like), device=like.device),
            values=like.new_zeros(batch, self.heads, 0, self.head_dim),
            length=torch.zeros_like(position),
        )

    def state_bytes(self, batch: int, length: int) -> int:
        if not self.causal:
            return 0
        start = self.start(batch, self.meta())
        widths = self.feature_dim * start.keys.element_size() + self.head_dim * start.values.element_size()
        return start.bytes() + batch * self.heads * length * widths

    def phi(self, x: Tensor) -> Tensor:
        """[B, N, H, D] -> [B, N, H, m] float32 (float64 for float64), of x at length tau."""
        with torch.autocast(x.device.type, enabled=False):
            scaled = self.tau * l2norm(x.to(exact(x)))
            if self.features == "elu":
                return elu_plus_one(scaled)
            return positive_random(scaled, self.projection.to(scaled.dtype))

    def biases(self, distances: Tensor) -> Tensor:
        """[H, *] the bias of keys at j - i = distances [*]."""
        bias = self.bias.to(exact(self.bias))
        return bias[:, (distances.clamp(-self.reach, 0 if self.causal else self.reach) + self.reach)]

    def mix(
        self, x: Tensor, state: SoftmaxState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, SoftmaxState]:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.phi(q), self.phi(k)
        N, S = x.shape[1], state.keys.shape[2]
        if S == 0:
            distances = torch.arange(1 - N, N, device=x.device)
            o = toeplitz_attention(q, k, v, self.biases(distances), causal=self.causal)
        if not self.causal:
            return self.o_proj(o.flatten(2)), state
        keys = torch.cat((state.keys, k.transpose(1, 2)), 2)
        values = torch.cat((state.values.to(v.dtype), v.transpose(1, 2)), 2)
        if S:
            o = self._read(q.transpose(1, 2), keys, values, state).transpose(1, 2)
        after = replace(state, keys=keys, values=values, length=state.length + N)
        return self.o_proj(o.flatten(2)), after

    def _read(self, q: Tensor, keys: Tensor, values: Tensor, state: SoftmaxState) -> Tensor:
        """N new tokens' features [B, H, N, m] read the last of which stand at the end of the keys [B, H, S, m]."""
        N, S = q.shape[2], keys.shape[2]
        slot = torch.arange(S, device=q.device)
        outputs = []
        with torch.autocast(q.device.type, enabled=False):
            for rows in slot[S - N :].split(_ROWS):
                distances = slot - rows[:, None]
                bias = self.biases(distances).masked_fill(distances > 0, -torch.inf)
                if state.ragged:
                    # Rows of fewer tokens have empty slots on the left.
                    empty = slot < (S - N - state.length)[:, None]
                    bias = bias.masked_fill(empty[:, None, None], -torch.inf)
                weights = (bias - bias.detach().amax(-1, keepdim=True)).exp() * (
                    q[:, :, rows - (S - N)] @ keys.transpose(-1, -2)
                )
                total = weights.sum(-1, keepdim=True)
                outputs.append((weights @ values.to(weights.dtype) / total).to(values.dtype))
        return torch.cat(outputs, 2)
