"""Flow-Attention: linear attention in which values compete and outputs are allotted, by conservation of flow.

Attention is seen as flow from sources j (keys and values) to sinks i (queries) of capacity phi(q_i) . phi(k_j). Softmax
fixes the sum that flows into a sink, so sources compete; linear attention lost that. Here the flow out of every source
is fixed to 1 to see how much a sink really gets, and the flow into every sink to see how much a source really gives.

    q, k = sigmoid(x W_q + b_q), sigmoid(x W_k + b_k);  v = x W_v + b_v;  a . b below stands for (a + eps) . (b + eps)
    I_i = q_i . sum_j k_j                        O_j = k_j . sum_i q_i                       what flows in and out
    I'_i = q_i . sum_j k_j / O_j                 O'_j = clamp(k_j . sum_i q_i / I_i, -1, 1)
    o_i = sigmoid(I'_i L / S) (q_i / I_i) sum_j k_j^T c_j v_j,   c_j = S softmax_j(O')_j     L sinks, S sources

Causal, every sum runs over tokens up to t, and with n_t = t + 1

    I_t, O_t, I'_t, O'_t as above, each over n_t;  c_t = n_t exp(O'_t) / sum_{s <= t} exp(O'_s)
    o_t = sigmoid(I'_t) (q_t / (n_t I_t)) sum_{s <= t} k_s^T c_s v_s

so a token's c is fixed when it is read, and all is prefix sums and one scan. Then y = o W_o + b_o.

Paper: Wu et al. 2022 (arXiv 2202.06258). All from the sigmoid on is float32 (float64 for float64): half precision stops
counting at 256. Padding is left out of every sum and of L and S, where the authors' code has no masks. Left out: the
dropout after W_o (the shell's), and cross attention as a mixer, where padding among the sinks must be known: use
`flow_attention`.

State: prefix sums of k, q, 1, k / O, q / I, exp(O'), and of k^T c v: [B, H, 1, 2 D + 1], [B, H, 1, 2 D], [B, H, 1, 1]
and [B, H, D, D] float32. Cost: O(N D^2) per head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from foveate.attention.linear import kv_matmul_attention
from foveate.attention.shapes import match
from foveate.errors import OptionError
from foveate.mixers.base import Mixer, MixerState, exact, start_position
from foveate.mixers.linear.recurrence import empty_memory, recur, split_heads
from foveate.registry import register


@dataclass(frozen=True, kw_only=True)
class FlowState(MixerState):
    """Sums over the tokens so far, float32 (float64 for float64): [B, H, 1, *], and the memory [B, H, D, V].

    flows: of k, q and 1.    conserved: of k / O and q / I.    competition: of exp(O').    memory: of k^T c v.
    """

    flows: Tensor
    conserved: Tensor
    competition: Tensor
    memory: Tensor


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-6,
    sinks: Tensor | None = None,
    sources: Tensor | None = None,
) -> Tensor:
    """Flow-Attention without causality; the definition is in the module's docstring.

    Args:
        q: [B, L, H, D], k: [B, S, H, D], v: [B, S, H, V], before the sigmoid.
        eps: added to both factors of a capacity.
        sinks: [B, L] bool, sources: [B, S] bool, True for real tokens; default: all.
    Returns:
        o [B, L, H, V] in v's dtype; 0 for sinks that are left out. A row needs a real source and a real sink.
    Raises:
        ShapeError, OptionError (eps).
    """
    match(q=(q, "B L H D"), k=(k, "B S H D"), v=(v, "B S H V"))
    _check_eps(eps)
    wide = exact(v)
    with torch.autocast(v.device.type, enabled=False):
        count_q, q_gone = _left_out(sinks, "sinks", q)
        count_k, k_gone = _left_out(sources, "sources", k)
        # What is left out may hold anything.
        q, k, values = (_zero(x.to(wide), gone) for x, gone in ((q, q_gone), (k, k_gone), (v, k_gone)))
        q, k = q.sigmoid(), k.sigmoid()
        incoming = _capacity(q, _total(k, k_gone), eps)
        outgoing = _capacity(k, _total(q, q_gone), eps)
        conserved_in = _capacity(q, _total(k / outgoing, k_gone), eps)
        conserved_out = _capacity(k, _total(q / incoming, q_gone), eps).clamp(-1, 1)
        given = _zero(conserved_out.exp(), k_gone)
        competition = count_k * given / given.sum(1, keepdim=True)
        o = kv_matmul_attention(q / incoming, k, values * competition, scale=1.0)
        return _zero(o * (conserved_in * count_q / count_k).sigmoid(), q_gone).to(v.dtype)


def causal_flow_attention(
    q: Tensor, k: Tensor, v: Tensor, state: FlowState, *, eps: float = 1e-6, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, FlowState]:
    """Flow-Attention of tokens on themselves and all before, with the state before them.

    Args:
        q, k: [B, N, H, D], v: [B, N, H, V], before the sigmoid.    state: R rows, R = B or the number of packed
            sequences.    eps: added to both factors of a capacity.    cu_seqlens: [R + 1], with B = 1.
    Returns:
        o [B, N, H, V] in v's dtype; the state after the last token.
    Raises:
        ShapeError, StateError, OptionError (eps).
    """
    match(q=(q, "B N H D"), k=(k, "B N H D"), v=(v, "B N H V"))
    _check_eps(eps)
    wide = exact(v)

    def prefix_sum(x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(x[..., :1])
        return recur(one, one, x, before, scale=1.0, cu_seqlens=cu_seqlens)

    with torch.autocast(v.device.type, enabled=False):
        q, k, values = q.to(wide).sigmoid(), k.to(wide).sigmoid(), v.to(wide)
        summed, flows = prefix_sum(torch.cat((k, q, torch.ones_like(k[..., :1])), -1), state.flows)
        sum_k, sum_q, n = summed.split((k.shape[-1], q.shape[-1], 1), -1)
        incoming, outgoing = _capacity(q, sum_k, eps) / n, _capacity(k, sum_q, eps) / n
        summed, conserved = prefix_sum(torch.cat((k / outgoing, q / incoming), -1), state.conserved)
        sum_k, sum_q = summed.chunk(2, -1)
        conserved_in = _capacity(q, sum_k, eps) / n
        given = (_capacity(k, sum_q, eps) / n).clamp(-1, 1).exp()
        total, competition = prefix_sum(given, state.competition)
        o, memory = recur(
            q / (incoming * n), k, values * (given / total * n), state.memory, scale=1.0, cu_seqlens=cu_seqlens
        )
        o = (conserved_in.sigmoid() * o).to(v.dtype)
    return o, replace(state, flows=flows, conserved=conserved, competition=competition, memory=memory)


def flow_start(batch: int, heads: int, key_dim: int, value_dim: int, like: Tensor, owner: str = "flow") -> FlowState:
    """The state of `batch` sequences before their first token, for `causal_flow_attention`."""
    D = key_dim
    flows, conserved, competition = (empty_memory(batch, heads, 1, width, like) for width in (2 * D + 1, 2 * D, 1))
    memory = empty_memory(batch, heads, D, value_dim, like)
    return FlowState(
        owner=owner,
        position=start_position(batch, like),
        flows=flows,
        conserved=conserved,
        competition=competition,
        memory=memory,
    )


def _check_eps(eps: float) -> None:
    if eps < 0:
        raise OptionError(f"flow attention: eps={eps}, allowed: >= 0")


def _left_out(mask: Tensor | None, name: str, x: Tensor) -> tuple[Tensor | float, Tensor | None]:
    """How many tokens are real, a number or [B, 1, 1, 1], and which are not, None or [B, N, 1, 1]."""
    if mask is None:
        return float(x.shape[1]), None
    match(x=(x, "B N H D"), **{name: (mask, "B N")})
    return mask.sum(1).clamp(min=1).to(exact(x))[:, None, None, None], ~mask[..., None, None]


def _zero(x: Tensor, gone: Tensor | None) -> Tensor:
    return x if gone is None else x.masked_fill(gone, 0)


def _total(x: Tensor, gone: Tensor | None) -> Tensor:
    """[B, 1, H, D] the sum over the tokens that are not left out."""
    return _zero(x, gone).sum(1, keepdim=True)


def _capacity(x: Tensor, total: Tensor, eps: float) -> Tensor:
    """[..., 1] (x + eps) . (total + eps)."""
    return ((x + eps) * (total + eps)).sum(-1, keepdim=True)


@register(
    "flow",
    kind="mixer",
    paper="Flowformer: Linearizing Transformers with Conservation Flows",
    arxiv="2202.06258",
    year=2022,
    applies_to="from scratch",
    claim=(
        "Text, four layers, 400 steps: held-out loss 1.954 nats per byte against 1.963 of linear attention and 1.937 "
        "of softmax without positions: a third of the gap (benchmarks/results/claims/flow.json). Multi-query recall, "
        "64 pairs: 0.014, linear attention 0.658 (benchmarks/results/mqar.json)."
    ),
)
class FlowMixer(Mixer):
    """Linear attention with competition among values and allocation to outputs, by conserved flows.

    eps: added to both factors of a capacity.    causal: a token reads no later one.
    """

    patterns = frozenset({"causal-self", "noncausal-self"})

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        eps: float = 1e-6,
        causal: bool = True,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.require(eps >= 0, f"eps={eps}, allowed: >= 0")
        # Without causality, packed sequences are read one by one.
        self.eps, self.causal, self.packs = eps, causal, causal
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def start(self, batch: int, like: Tensor) -> FlowState:
        width = self.dim // self.heads
        return flow_start(batch, self.heads, width, width, like, self.owner)

    def mix(
        self, x: Tensor, state: FlowState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, FlowState]:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.causal:
            o, state = causal_flow_attention(q, k, v, state, eps=self.eps, cu_seqlens=cu_seqlens)
        else:
            o = flow_attention(q, k, v, eps=self.eps)
        return self.o_proj(o.flatten(2)), state
