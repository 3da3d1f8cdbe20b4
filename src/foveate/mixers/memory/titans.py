"""Titans' neural memory: a small MLP per head that is trained, one gradient step per token, while it reads.

What surprises the memory (the gradient of how badly it maps k to v) is carried on by momentum and written into its
weights, which a data-dependent decay forgets; a query reads it by a forward pass.

    q, k, v = silu(conv(x W)) each;  q, k of unit length per head
    alpha, eta = sigmoid(x W + b);  theta = max_rate sigmoid(x W + b)          one of each per token and head
    S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2;  W_t = (1 - alpha_t) W_{t-1} + S_t;  o_t = M_{W_t}(q_t)
    y = (RMSNorm(o) per head * silu(x W_g)) W_o

Gradients are taken at the weights of the start of each chunk of `chunk` tokens, in training and decoding alike, and
summed over the features, not averaged; chunk=1 is the recurrence above to the letter. The forward pass is
differentiable, inner steps included.

Paper: Behrouz et al. 2024 (arXiv 2501.00663). No code of the authors is public. The paper's memory is the MLP itself,
form="plain"; by default it is M(x) = x + LayerNorm(MLP(x)), as in the open implementation and in TTT, because steps of
a chunk's like keys add up: the plain form diverges once theta times the chunk's length times |activation|^2 exceeds 1,
and so does a written gain ("residual-gain"), while behind a LayerNorm steps shrink as weights grow. Starting values are
free too: here alpha near 0, theta a tenth of max_rate, eta near 0. Four matrices and long chunks make outer gradients
that need clipping. Gates of one value per chunk are in `titans-memory-chunked`.

State: per head W, S and the chunk's base weights in float32, 3 |W| numbers, and the last inputs of three
convolutions. Cost: O(N (|W| + C D)) per head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.delta import Weights, WeightState, weight_state_read
from foveate.attention.features import l2norm
from foveate.attention.memories import ACTIVATIONS, FORMS, MLPMemory
from foveate.attention.weight_states import MemoryState, memory_scan
from foveate.mixers.base import Initialised, Mixer, MixerState, exact, start_position
from foveate.mixers.linear.recurrence import split_heads
from foveate.mixers.parts import GatedRMSNorm, ShortConvolution
from foveate.registry import register

# Logits of alpha, theta / max_rate and eta before training.
GATE_BIASES = (-5.0, -2.2, -2.2)


class InitialWeights(Initialised):
    """A memory's weights before the first token, per head: w0 .. [H, I, O], and `gain` [H, D] of a form with a gain."""

    def __init__(self, memory: MLPMemory, heads: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.memory, self.sizes = memory, (heads, dim, hidden)
        self.names = [f"w{n}" for n in range(memory.depth)] + ["gain"] * (memory.form == "residual-gain")
        for name, value in zip(self.names, memory.initial(*self.sizes)):
            self.register_parameter(name, nn.Parameter(value))

    def initial_values(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.memory.initial(*self.sizes)))

    def forward(self, like: Tensor) -> Weights:
        """The weights in the dtype that recurrences keep, on like's device."""
        return tuple(getattr(self, name).to(like.device, exact(like)) for name in self.names)


@dataclass(frozen=True)
class NeuralMemoryState:
    """memory: the weights, see `MemoryState`.    convolutions: the last inputs of q's, k's and v's, [B, W - 1, C]."""

    memory: MemoryState
    convolutions: tuple[Tensor, ...]


class NeuralMemory(Initialised):
    """x [B, N, C] -> what the memory returns for it after each token was written, [B, N, H D].

    Options as in `TitansMemoryMixer`, which checks them.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
        memory: MLPMemory,
        hidden: int,
        kernel: int,
        chunk: int,
        max_rate: float,
        momentum: bool,
    ) -> None:
        super().__init__()
        self.memory, self.heads, self.chunk, self.max_rate, self.momentum = memory, heads, chunk, max_rate, momentum
        inner = heads * head_dim
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.q_conv = ShortConvolution(inner, kernel)
        self.k_conv = ShortConvolution(inner, kernel)
        self.v_conv = ShortConvolution(inner, kernel)
        self.step_proj = nn.Linear(dim, (2 + momentum) * heads, bias=False)
        self.step_bias = nn.Parameter(torch.empty((2 + momentum) * heads))
        self.weights = InitialWeights(memory, heads, head_dim, hidden)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        biases = torch.tensor(GATE_BIASES[: 2 + self.momentum])
        return {"step_bias": biases.repeat_interleave(self.heads)}

    def start(self, batch: int, like: Tensor) -> NeuralMemoryState:
        return NeuralMemoryState(
            MemoryState.start(self.weights(like), batch, momentum=self.momentum),
            tuple(each.start(batch, like) for each in (self.q_conv, self.k_conv, self.v_conv)),
        )

    def forward(
        self, x: Tensor, state: NeuralMemoryState, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        layers = ((self.q_proj, self.q_conv), (self.k_proj, self.k_conv), (self.v_proj, self.v_conv))
        convolved = [
            conv(proj(x), cache, cu_seqlens) for (proj, conv), cache in zip(layers, state.convolutions, strict=True)
        ]
        q, k, v = (split_heads(y, self.heads) for y, _ in convolved)
        logits = self.step_proj(x)
        logits = (logits.to(exact(logits)) + self.step_bias.to(exact(logits))).unflatten(-1, (-1, self.heads))
        o, memory = memory_scan(
            self.memory,
            state.memory,
            l2norm(q),
            l2norm(k),
            v,
            rate=self.max_rate * logits[..., 1, :].sigmoid(),
            g=F.logsigmoid(-logits[..., 0, :]),
            momentum_g=F.logsigmoid(logits[..., 2, :]) if self.momentum else None,
            chunk_size=self.chunk,
            cu_seqlens=cu_seqlens,
        )
        return o.flatten(2), NeuralMemoryState(memory, tuple(cache for _, cache in convolved))

    def recall(self, q: Tensor, weights: Weights) -> Tensor:
        """M(q) with given weights: q [B, N, H D], convolved -> [B, N, H D]; nothing is written."""
        with torch.autocast(q.device.type, enabled=False):
            held = WeightState(weights, weights)
            return weight_state_read(self.memory, held, l2norm(split_heads(q, self.heads))).flatten(2)


@dataclass(frozen=True, kw_only=True)
class TitansMemoryState(MixerState):
    """memory: see `NeuralMemoryState`."""

    memory: NeuralMemoryState


def make_memory(
    mixer: Mixer,
    head_dim: int,
    *,
    depth: int,
    expansion: float,
    activation: str,
    form: str,
    kernel: int,
    chunk: int,
    max_rate: float,
    momentum: bool,
) -> NeuralMemory:
    """The memory of a mixer, with its options checked; raises OptionError in the mixer's name."""
    mixer.require(head_dim >= 1, f"head_dim={head_dim}, allowed: >= 1")
    mixer.require(depth >= 1, f"depth={depth}, allowed: >= 1")
    hidden = int(expansion * head_dim)
    mixer.require(hidden >= 1, f"expansion={expansion}, allowed: > 0, at least one hidden channel")
    mixer.require(activation in ACTIVATIONS, f"activation={activation!r}, allowed: {ACTIVATIONS}")
    mixer.require(form in FORMS, f"form={form!r}, allowed: {FORMS}")
    mixer.require(kernel >= 1, f"kernel={kernel}, allowed: >= 1")
    mixer.require(chunk >= 1, f"chunk={chunk}, allowed: >= 1")
    mixer.require(max_rate > 0, f"max_rate={max_rate}, allowed: > 0")
    return NeuralMemory(
        mixer.dim,
        mixer.heads,
        head_dim,
        memory=MLPMemory(depth, activation, form),
        hidden=hidden,
        kernel=kernel,
        chunk=chunk,
        max_rate=max_rate,
        momentum=momentum,
    )


@register(
    "titans-memory",
    kind="mixer",
    paper="Titans: Learning to Memorize at Test Time",
    arxiv="2501.00663",
    year=2024,
    applies_to="from scratch",
    small={"chunk": 5, "expansion": 1.5},
    claim=(
        "Trained on 128 tokens with 8 pairs at the start, asked after 0, 128, 384, 896 and 1920 tokens of noise: "
        "1.000, 0.998, 0.670, 0.018 and 0.005; softmax 1.000, 0.985, 0.802, 0.144 and 0.067, a window of 32 tokens "
        "nothing after 0, gated-deltanet 0.997 to 0.963: it outlasts its training by three times, not by sixteen "
        "(benchmarks/results/claims/titans.json). Multi-query recall, 64 pairs: 0.468 (benchmarks/results/mqar.json)."
    ),
)
class TitansMemoryMixer(Mixer):
    """A neural memory alone (the paper's LMM), trained by gradient steps with momentum and decay while it reads.

    head_dim: D (default dim / heads).    depth: matrices of the memory's MLP.    expansion: its hidden width over D.
    activation: "silu" or "gelu".    form: "plain", "residual" or "residual-gain".    kernel: taps of the short
    convolutions.    chunk: tokens whose gradients are taken at one set of weights.    max_rate: largest inner
    learning rate.    momentum: keep S.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        head_dim: int | None = None,
        depth: int = 2,
        expansion: float = 4.0,
        activation: str = "silu",
        form: str = "residual",
        kernel: int = 4,
        chunk: int = 64,
        max_rate: float = 0.1,
        momentum: bool = True,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        width = dim // heads if head_dim is None else head_dim
        self.memory = make_memory(
            self,
            width,
            depth=depth,
            expansion=expansion,
            activation=activation,
            form=form,
            kernel=kernel,
            chunk=chunk,
            max_rate=max_rate,
            momentum=momentum,
        )
        self.g_proj = nn.Linear(dim, heads * width, bias=False)
        self.o_norm = GatedRMSNorm(width)
        self.o_proj = nn.Linear(heads * width, dim, bias=False)

    def start(self, batch: int, like: Tensor) -> TitansMemoryState:
        return TitansMemoryState(
            owner=self.owner, position=start_position(batch, like), memory=self.memory.start(batch, like)
        )

    def mix(
        self, x: Tensor, state: TitansMemoryState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, TitansMemoryState]:
        o, memory = self.memory(x, state.memory, cu_seqlens)
        o = self.o_norm(split_heads(o, self.heads), split_heads(self.g_proj(x), self.heads))
        return self.o_proj(o.flatten(2)), replace(state, memory=memory)
