"""S4D: a diagonal state-space layer, one long convolution per channel that is also a recurrence.

    A_n = -exp(a_n) + i w_n,  dt = exp(log_dt) per channel;   S/2 complex states stand for S real ones
    K_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l)
    z_t = sum over s <= t of K_{t-s} x_s + D x_t;   y = gelu(z) W_o + b, all `channels` copies of z side by side

Not causal: a second kernel set reads the later tokens, z_t += sum over s > t of K'_{s-t-1} x_s. It is no attention, but
the strongest causal layer of CAB.

Paper: Gu et al. 2022 (arXiv 2206.11893), as in CAB (2210.07661): A shared by channels, real parts start at -1/2,
imaginary ones at (S/pi) (S / (2 n + 1) - 1), dt log-uniform from 1e-3 to 0.1. The head count is not used.

State: the S/2 complex states of each channel, [B, C, S/2, 2] float32. Cost: O(N C (S + log 1024)), in chunks of 1024
tokens whose states are carried on; not causal O(N C (S + log N)), with N C S / 2 complex numbers held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.convolutions import toeplitz_matmul
from foveate.mixers.base import Mixer, MixerState, exact, start_position
from foveate.registry import register

# Tokens convolved at once when causal; the powers of all states are held for so many.
CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class DiagonalState(MixerState):
    """states: [B, C, S/2, 2], real and imaginary parts."""

    states: Tensor


@register(
    "s4d",
    kind="mixer",
    paper="On the Parameterization and Initialization of Diagonal State Space Models",
    arxiv="2206.11893",
    year=2022,
    applies_to="from scratch",
    small={"state_dim": 6, "channels": 2},
    claim=(
        "Two seeds, 400 steps, softmax second: causal text behind a short convolution 4.03 and 4.29, masked text "
        "2.878 and 2.661 (perplexity per byte), super-resolution 10.68 and 10.78 dB: ahead of softmax in causal-self, "
        "where long-short attention leads here and S4D on the leaderboard (benchmarks/results/claims/cab.json)."
    ),
)
class S4DMixer(Mixer):
    """A diagonal state-space layer.

    state_dim: S, even.    channels: convolutions per input channel.    causal: without it, a second set of kernels
    reads the later tokens.    heads: not used.
    """

    patterns = frozenset({"causal-self", "noncausal-self"})
    lacking: ClassVar[Mapping[str, str]] = {
        "causal-cross": "a convolution is along one sequence; it has no queries for another",
        "noncausal-cross": "a convolution is along one sequence; it has no queries for another",
    }
    packs = False

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        state_dim: int = 64,
        channels: int = 1,
        causal: bool = True,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(state_dim >= 2 and state_dim % 2 == 0, f"state_dim={state_dim}, allowed: even, >= 2")
        self.require(channels >= 1, f"channels={channels}, allowed: >= 1")
        self.state_dim, self.channels, self.causal = state_dim, channels, causal
        states = state_dim // 2
        self.log_dt = nn.Parameter(torch.empty(dim))
        self.log_real = nn.Parameter(torch.empty(1, states))
        self.imaginary = nn.Parameter(torch.empty(1, states))
        self.C = nn.Parameter(torch.empty(channels if causal else 2 * channels, dim, states, 2))
        self.D = nn.Parameter(torch.empty(channels, dim))
        self.o_proj = nn.Linear(channels * dim, dim)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        low, high = math.log(1e-3), math.log(0.1)
        n = torch.arange(self.state_dim // 2, dtype=self.imaginary.dtype, device=self.imaginary.device)
        return {
            "log_dt": torch.rand_like(self.log_dt) * (high - low) + low,
            "log_real": torch.full_like(self.log_real, math.log(0.5)),
            "imaginary": (self.state_dim / math.pi * (self.state_dim / (2 * n + 1) - 1))[None],
            # A complex normal number has variance 1/2 in each part.
            "C": torch.randn_like(self.C) * 0.5**0.5,
            "D": torch.randn_like(self.D),
        }

    def start(self, batch: int, like: Tensor) -> MixerState:
        if not self.causal:
            return super().start(batch, like)
        states = torch.zeros(batch, self.dim, self.state_dim // 2, 2, dtype=exact(like), device=like.device)
        return DiagonalState(owner=self.owner, position=start_position(batch, like), states=states)

    def mix(
        self, x: Tensor, state: MixerState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(exact(x))
            rate, C = self._dynamics(u)
            if not self.causal:
                z = self._both_ways(u, rate, C)
            else:
                assert isinstance(state, DiagonalState)
                z, states = self._advanced(u, rate, C, torch.view_as_complex(state.states.contiguous()))
                state = replace(state, states=torch.view_as_real(states))
            skip = u.unsqueeze(2) * self.D.to(u.dtype)
            z = F.gelu(z + skip).flatten(2)
        return self.o_proj(z.to(x.dtype)), state

    def _dynamics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """dt A [C, S/2] complex, and the output's weights with the step folded in [channels, C, S/2]."""
        log_dt, log_real, imaginary, C = (
            each.to(like.dtype) for each in (self.log_dt, self.log_real, self.imaginary, self.C)
        )
        A = torch.complex(-log_real.exp(), imaginary)
        rate = log_dt.exp()[:, None] * A
        return rate, torch.view_as_complex(C.contiguous()) * (rate.exp() - 1) / A

    def _kernel(self, C: Tensor, powers: Tensor) -> Tensor:
        """K [channels, C, L] from exp(dt A l) [C, S/2, L]."""
        return 2 * torch.einsum("hcn,cnl->hcl", C, powers).real

    def _convolved(self, u: Tensor, taps: Tensor) -> Tensor:
        """z [B, N, channels, C] of u [B, N, C], taps as `toeplitz_matmul` takes them, [channels, C, ...]."""
        repeated = u.unsqueeze(2).expand(-1, -1, self.channels, -1).flatten(2)
        z = toeplitz_matmul(taps.flatten(0, 1), repeated, causal=self.causal)
        return z.unflatten(2, (self.channels, -1))

    def _both_ways(self, u: Tensor, rate: Tensor, C: Tensor) -> Tensor:
        N = u.shape[1]
        kernel = self._kernel(C, _powers(rate, N))
        earlier, later = kernel[: self.channels], kernel[self.channels :, :, : N - 1]
        return self._convolved(u, torch.cat((earlier.flip(-1), later), -1))

    def _advanced(self, u: Tensor, rate: Tensor, C: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, N, channels, C] and the states [B, C, S/2] after the last token, a chunk at a time."""
        if u.shape[1] == 1:
            states = rate.exp() * states + u[:, 0, :, None]
            return 2 * torch.einsum("hcn,bcn->bhc", C, states).real[:, None], states
        powers = _powers(rate, min(u.shape[1], CHUNK) + 1)
        kernel = self._kernel(C, powers[..., :-1])
        outputs = []
        for piece in u.split(CHUNK, 1):
            n = piece.shape[1]
            read = C * states.unsqueeze(1)
            carried = 2 * torch.einsum("bhcn,cnl->blhc", read, powers[..., 1 : n + 1]).real
            outputs.append(self._convolved(piece, kernel[..., :n].flip(-1)) + carried)
            written = torch.einsum("cnl,blc->bcn", powers[..., :n].flip(-1), piece.to(powers.dtype))
            states = powers[..., n] * states + written
        return torch.cat(outputs, 1), states


def _powers(rate: Tensor, length: int) -> Tensor:
    """exp(dt A l) for l = 0 .. length - 1, [C, S/2, length]."""
    return (rate[..., None] * torch.arange(length, dtype=rate.real.dtype, device=rate.device)).exp()
