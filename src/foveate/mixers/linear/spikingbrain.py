"""SpikingBrain: the two layers that a pretrained transformer's projections are reused in.

    q = relu(x W_q), k = relu(x W_k), v = x W_v with biases, G query heads to a KV head;  no rotation
    g = logsigmoid(x W_1 W_2 + b) / 16 per KV head and key channel;  S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t
    o_t = D^-0.5 q_t S_t;   y = RMSNorm(o) per head, times W_o

"spikingbrain" is that linear layer, "spikingbrain-window" softmax attention with rotary positions over a sliding
window, which stands in every other layer (odd ones, from 0) of the 7B model. Coding of activations as spikes is in
`foveate.mixers.linear.spikes`.

Paper: SpikingBrain Technical Report, Pan et al. 2025 (arXiv 2509.05276). gate="tied" is the 76B model's: k =
sigmoid(x W_k), q alike, and g = log(1 - k), without W_1 and W_2. The state is kept once per KV head, not repeated for
its query heads as in the authors' code, where k, v and g are repeated. `window` counts the tokens before the query,
4096 as their flash-attention path passes it (their SDPA path shows 4095). New linear layers start as torch's, not with
Xavier's gain of 2^-2.5.

State: linear [B, Hkv, D, D] float32; window keys and values [B, Hkv, window, D]. Cost: O(N D^2) and O(N window D) per
query head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.mixers.base import Mixer, exact, start_position
from foveate.mixers.linear.recurrence import LinearState, empty_memory, recur, split_heads
from foveate.mixers.parts import RMSNorm
from foveate.mixers.softmax.rotary import SoftmaxMixer
from foveate.registry import register

PAPER = "SpikingBrain Technical Report: Spiking Brain-inspired Large Models"
DECODER_ONLY = {
    "noncausal-self": "its layers stand in a decoder; 'linear' and 'softmax' have a form without causality",
    "causal-cross": "its layers stand in a decoder without an encoder; 'softmax' has cross attention",
    "noncausal-cross": "its layers stand in a decoder without an encoder; 'softmax' has cross attention",
}


@register(
    "spikingbrain",
    kind="mixer",
    paper=PAPER,
    arxiv="2509.05276",
    year=2025,
    applies_to="from scratch, or pretrained projections",
    small={"kv_heads": 1},
    claim=(
        "Text, four layers, 400 steps: perplexity per byte 4.02 of linear layers, 3.77 with windows between and 3.37 "
        "with the gate tied, full attention 3.17, windows alone 3.07; recall of 16 pairs 0.995, with windows between "
        "0.995, windows alone 0.396, full 1.000; the state does not grow "
        "(benchmarks/results/claims/spikingbrain_window.json). The coding: 8-bit weights and spikes with k = 3 change "
        "the perplexity of the bundled model by 3.4 %, k = 6 by 0.7 %, with 85 % of the steps silent "
        "(benchmarks/results/claims/spikingbrain.json). Multi-query recall, 64 pairs: 0.903, linear attention 0.658 "
        "(benchmarks/results/mqar.json)."
    ),
)
class SpikingBrainMixer(Mixer):
    """Gated linear attention on non-negative queries and keys, with grouped heads.

    kv_heads: heads of k, v and the decay (default: heads).    head_dim: D (default: dim / heads).    gate: "low-rank",
    or "tied", the decay 1 - k.    gate_rank: of the decay's projection.    temperature: what log-sigmoid is divided by.
    bias: of q, k and v.    norm_eps: of the norm of o.
    """

    lacking: ClassVar[Mapping[str, str]] = DECODER_ONLY

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        gate: str = "low-rank",
        gate_rank: int = 16,
        temperature: float = 16.0,
        bias: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(head_dim is not None or dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.require(
            self.kv_heads >= 1 and heads % self.kv_heads == 0, f"kv_heads={kv_heads}, allowed: divisors of {heads}"
        )
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.require(self.head_dim >= 1, f"head_dim={head_dim}, allowed: >= 1")
        self.require(gate in ("low-rank", "tied"), f"gate={gate!r}, allowed: 'low-rank', 'tied'")
        self.require(gate_rank >= 1, f"gate_rank={gate_rank}, allowed: >= 1")
        self.require(temperature > 0, f"temperature={temperature}, allowed: > 0")
        self.require(norm_eps > 0, f"norm_eps={norm_eps}, allowed: > 0")
        self.gate, self.temperature = gate, temperature
        width = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, width, bias=bias)
        self.v_proj = nn.Linear(dim, width, bias=bias)
        self.decay_proj = (
            nn.Sequential(nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, width))
            if gate == "low-rank"
            else None
        )
        self.o_norm = RMSNorm(self.head_dim, norm_eps)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=False)

    def start(self, batch: int, like: Tensor) -> LinearState:
        memory = empty_memory(batch, self.kv_heads, self.head_dim, self.head_dim, like)
        return LinearState(owner=self.owner, position=start_position(batch, like), memory=memory)

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        q, k, v = self.q_proj(x), self.k_proj(x), split_heads(self.v_proj(x), self.kv_heads)
        if self.decay_proj is not None:
            raw = self.decay_proj(x)
            g = F.logsigmoid(raw.to(exact(raw))) / self.temperature
            q, k = F.relu(q), F.relu(k)
        else:
            g = F.logsigmoid(-k.to(exact(k)))
            q, k = q.sigmoid(), k.sigmoid()
        q, k, g = split_heads(q, self.heads), split_heads(k, self.kv_heads), split_heads(g, self.kv_heads)
        read = self._step if x.shape[1] == 1 and cu_seqlens is None else self._scan
        o, memory = read(q, k, v, g, state.memory, cu_seqlens)
        return self.o_proj(self.o_norm(o).flatten(2).to(x.dtype)), replace(state, memory=memory)

    def _scan(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, memory: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        group = self.heads // self.kv_heads
        k, v, g = (each.repeat_interleave(group, 2) for each in (k, v, g))
        o, memory = recur(q, k, v, memory.repeat_interleave(group, 1), g=g, cu_seqlens=cu_seqlens)
        # All query heads of a group end with one state.
        return o, memory[:, ::group].clone()

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, memory: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One token: the state moves once, and all query heads of a group read it."""
        group = self.heads // self.kv_heads
        _, memory = recur(q[:, :, ::group], k, v, memory, g=g)
        queries = q[:, 0].unflatten(1, (self.kv_heads, group)).to(memory.dtype)
        with torch.autocast(q.device.type, enabled=False):
            o = self.head_dim**-0.5 * queries @ memory
        return o.flatten(1, 2)[:, None].to(q.dtype), memory


@register(
    "spikingbrain-window",
    kind="mixer",
    paper=PAPER,
    arxiv="2509.05276",
    year=2025,
    applies_to="from scratch, or pretrained projections",
    small={"kv_heads": 1, "window": 5},
    claim=(
        "Windows of 64 and linear layers in turn: perplexity per byte 3.37 to 3.77, full attention 3.17, windows "
        "alone 3.07, linear layers alone 4.02; recall of 16 pairs 0.995, windows alone 0.396, full 1.000; 164 kB of "
        "state from 512 to 131072 tokens, full attention 2.1 to 537 MB "
        "(benchmarks/results/claims/spikingbrain_window.json). Multi-query recall, 64 pairs: 1.000 in a window that "
        "holds the whole text (benchmarks/results/mqar.json)."
    ),
)
class SpikingBrainWindowMixer(SoftmaxMixer):
    """Softmax attention over a sliding window, with rotary positions and biased queries, keys and values.

    kv_heads, head_dim, window, rope_base: as in "softmax".    bias: of q, k and v.
    """

    patterns = frozenset({"causal-self"})
    lacking: ClassVar[Mapping[str, str]] = DECODER_ONLY
    constant_state = True

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 4096,
        rope_base: float = 1e6,
        bias: bool = True,
    ) -> None:
        super().__init__(
            dim=dim,
            layer=layer,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=window,
            rope_base=rope_base,
            bias=bias,
        )
