"""Nystromformer: softmax attention by way of landmarks, means of segments of queries and of keys.

    F = softmax(q K~^T), A = softmax(Q~ K~^T), B = softmax(Q~ K^T), logits over sqrt(D);   o = F A^+ (B V)
    A^+ by `iterations` of Z <- Z / 4 (13 - A Z (15 - A Z (7 - A Z))), from Z = A^T / (largest column sum of A)

With no more tokens than landmarks it is softmax attention. `kernel` adds a depthwise convolution of V along the tokens.

Paper: Xiong et al. 2021 (arXiv 2102.03902); segments as in CAB (2210.07661), where the first ones have one token less
if the length does not divide. `release=True` is CAB's code: logits over D, as it divides both sides by sqrt(D), and one
start of Z for all batch rows and heads, so that rows influence each other.

State: none; landmarks see all tokens. Cost: O(N m D + m^3) per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from foveate.mixers.base import MixerState
from foveate.mixers.linear.projected import ProjectedMixer
from foveate.registry import register


def segment_means(x: Tensor, segments: int) -> Tensor:
    """Means of consecutive tokens, [B, H, N, D] -> [B, H, segments, D]; x itself where N <= segments.

    N = segments s + r: the first segments - r have s tokens, the others s + 1.
    """
    N = x.shape[2]
    if segments >= N:
        return x
    size, rest = divmod(N, segments)
    short = (segments - rest) * size
    parts = [x[:, :, :short].unflatten(2, (-1, size)).mean(3)]
    if rest:
        parts.append(x[:, :, short:].unflatten(2, (-1, size + 1)).mean(3))
    return torch.cat(parts, 2)


def approximate_inverse(A: Tensor, iterations: int, *, shared_start: bool = False) -> Tensor:
    """The pseudo-inverse of matrices [..., m, m] with rows that sum to 1, by iteration.

    shared_start: divide the start by the largest column sum of all matrices, not by each one's own.
    """
    largest = A.sum(-2).amax(-1)
    Z = A.transpose(-1, -2) / (largest.max() if shared_start else largest[..., None, None])
    one = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    for _ in range(iterations):
        AZ = A @ Z
        Z = Z / 4 @ (13 * one - AZ @ (15 * one - AZ @ (7 * one - AZ)))
    return Z


@register(
    "nystromformer",
    kind="mixer",
    paper="Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention",
    arxiv="2102.03902",
    year=2021,
    applies_to="from scratch",
    small={"landmarks": 5},
    claim=(
        "Two seeds, 400 steps, softmax second: masked text 2.653 and 2.661 (perplexity per byte), super-resolution "
        "10.74 and 10.78 dB; less time than materialised softmax from 1265 tokens on "
        "(benchmarks/results/claims/cab.json)."
    ),
)
class NystromformerMixer(ProjectedMixer):
    """Softmax attention approximated through landmarks.

    landmarks: m.    iterations: of the inverse.    kernel: taps of the convolution of V (default: none).
    release: as CAB's code, see the module's docstring.
    """

    patterns = frozenset({"noncausal-self"})
    lacking: ClassVar[Mapping[str, str]] = {
        "causal-self": "a landmark is the mean of a segment that holds later tokens",
        "causal-cross": "landmarks of queries are means that hold later ones",
        "noncausal-cross": "queries and keys must be cut into the same segments",
    }
    causal = False
    packs = False

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        landmarks: int = 16,
        iterations: int = 6,
        kernel: int | None = None,
        release: bool = False,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(landmarks >= 1, f"landmarks={landmarks}, allowed: >= 1")
        self.require(iterations >= 0, f"iterations={iterations}, allowed: >= 0")
        self.require(kernel is None or (kernel >= 1 and kernel % 2 == 1), f"kernel={kernel}, allowed: odd, >= 1")
        self.landmarks, self.iterations, self.release = landmarks, iterations, release
        self.conv = (
            nn.Conv2d(heads, heads, (kernel, 1), padding=(kernel // 2, 0), groups=heads, bias=False) if kernel else None
        )

    def mix(
        self, x: Tensor, state: MixerState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        q, k, v = self.project(x, x)
        o = self._attend(q, k, v)
        return self.output(o if self.conv is None else o + self.conv(v)), state

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = self.head_dim ** (-1.0 if self.release else -0.5)
        few_q, few_k = segment_means(q, self.landmarks), segment_means(k, self.landmarks)
        if few_q.shape == q.shape:
            return (scale * q @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
        to_landmarks = (scale * q @ few_k.transpose(-1, -2)).softmax(-1)
        among = (scale * few_q @ few_k.transpose(-1, -2)).softmax(-1)
        read = (scale * few_q @ k.transpose(-1, -2)).softmax(-1)
        with torch.autocast(q.device.type, enabled=False):
            dtype = torch.promote_types(among.dtype, torch.float32)
            inverse = approximate_inverse(among.to(dtype), self.iterations, shared_start=self.release)
            found = inverse @ (read.to(dtype) @ v.to(dtype))
            return (to_landmarks.to(dtype) @ found).to(v.dtype)
