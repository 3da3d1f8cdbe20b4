"""Convolutions along the sequence: the short causal one of linear layers, and Toeplitz products by FFT.

causal_conv, conv_step     y_t = act(b + sum_i w_i x_{t - W + 1 + i}), per channel; tap W - 1 is the current token
toeplitz_matmul            y_i = sum_j t_{j - i} x_j in O(T log T)
toeplitz_attention         kernel attention with a relative position bias (arXiv 2106.12566)
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.chunks import power_of_two, read_offsets
from foveate.attention.linear_call import check_state
from foveate.attention.shapes import match
from foveate.errors import OptionError, ShapeError

_ACTIVATIONS = {None: lambda y: y, "silu": F.silu}


def causal_conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    activation: str | None = None,
    cache: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over tokens.

    Args:
        x: [B, T, C].
        w: [C, W] or [C, 1, W] (a Conv1d's); w[:, W - 1] multiplies the current token, w[:, 0] the oldest.
        b: [C].    activation: None or "silu".
        cache: [N, W - 1, C], the inputs before the first token, oldest first; default zeros.
        cu_seqlens: [N + 1], boundaries of sequences packed into B = 1.
    Returns:
        y [B, T, C] in x's dtype, summed in float32 (float64 for float64); the cache after the last token, x's dtype.
        An empty sequence returns its cache.
    Raises:
        ShapeError, OptionError (activation), StateError (cache).
    Cost: O(T C W), for short W.
    """
    if activation not in _ACTIVATIONS:
        raise OptionError(f"activation={activation!r}, allowed: None, 'silu'")
    if w.dim() == 3 and w.shape[1] == 1:
        w = w[:, 0]
    sizes = match(x=(x, "B T C"), w=(w, "C W"), **({} if b is None else {"b": (b, "C")}))
    B, T, C, W = (sizes[letter] for letter in "BTCW")
    if T == 0 or W == 0:
        raise ShapeError(f"x has T = {T} and w has W = {W}, allowed: at least one token and one tap")
    offsets = None if cu_seqlens is None else read_offsets(cu_seqlens, B, T)
    N = B if offsets is None else len(offsets) - 1
    if cache is None:
        cache = x.new_zeros(N, W - 1, C)
    else:
        check_state(cache, (N, W - 1, C), "N, W - 1, C")
    if offsets is None:
        row = torch.cat([cache.to(x.dtype), x], 1)
        y = _taps([row[:, i : i + T] for i in range(W)], w, b)
        after = row[:, T:]
    else:
        row, oldest, last = _interleave(x[0], cache.to(x.dtype), offsets)
        y = _taps([row[oldest + i] for i in range(W)], w, b)[None]
        after = row[last]
    return _ACTIVATIONS[activation](y).to(x.dtype), after


def _taps(shifted: list[Tensor], w: Tensor, b: Tensor | None) -> Tensor:
    dtype = torch.float64 if shifted[0].dtype == torch.float64 else torch.float32
    taps = w.to(dtype).unbind(1)
    y = shifted[0].to(dtype) * taps[0]
    for each, tap in zip(shifted[1:], taps[1:]):
        y = torch.addcmul(y, each.to(dtype), tap)
    return y if b is None else y + b.to(dtype)


def _interleave(x: Tensor, cache: Tensor, offsets: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Each sequence's cache before its tokens, in one row.

    x [T, C], cache [N, W - 1, C] -> row [T + N (W - 1), C]; for each token the place of its oldest tap [T];
    for each sequence the places of its last W - 1 inputs [N, W - 1].
    """
    N, past, _ = cache.shape
    bounds = torch.tensor(offsets, device=x.device)
    lengths = bounds.diff()
    token = torch.arange(x.shape[0], device=x.device)
    sequence = torch.repeat_interleave(torch.arange(N, device=x.device), lengths, output_size=x.shape[0])
    oldest = token + sequence * past
    slots = torch.arange(past, device=x.device)
    head = bounds[:-1, None] + past * torch.arange(N, device=x.device)[:, None] + slots
    place = torch.cat([head.flatten(), oldest + past])
    source = torch.cat([cache.flatten(0, 1), x])
    return source[place.argsort()], oldest, head + lengths[:, None]


def conv_step(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    activation: str | None = None,
    cache: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv`: x [B, 1, C], cache [B, W - 1, C] -> y [B, 1, C], new cache."""
    if x.dim() != 3 or x.shape[1] != 1:
        raise ShapeError(f"x {list(x.shape)} does not fit [B, 1, C]: conv_step takes one token; use causal_conv")
    return causal_conv(x, w, b, activation=activation, cache=cache)


def toeplitz_matmul(t: Tensor, x: Tensor, *, causal: bool = False) -> Tensor:
    """y_i = sum_j t[j - i] x_j, by FFT.

    Args:
        t: [H, 2 T - 1], entry r + T - 1 for r = j - i from -(T - 1) to T - 1. With causal, [H, T] will do (r <= 0).
        x: [B, T, H, ...].
        causal: only j <= i.
    Returns:
        [B, T, H, ...] in x's dtype. The FFT is float32 (float64 for float64 x): its error is about
        1e-7 of the largest |y| of a channel, whatever the size of an entry.
    Raises:
        ShapeError.
    Cost: O(T log T) per channel, with transforms of length L = 2^ceil(log2(2 T - 1)).
    """
    if x.dim() < 3 or x.shape[1] == 0:
        raise ShapeError(f"x {list(x.shape)} does not fit [B, T, H, ...] with T >= 1")
    T, H, *rest = x.shape[1:]
    allowed = [(H, 2 * T - 1)] + ([(H, T)] if causal else [])
    if tuple(t.shape) not in allowed:
        raise ShapeError(f"t {list(t.shape)} does not fit x {list(x.shape)}, allowed: {allowed}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    L = power_of_two(2 * T - 1)
    t = t.to(dtype)
    # Column of the circulant: offsets i - j = 0 .. T - 1 first, the negative ones from the end.
    past, future = t[:, :T].flip(-1), t[:, T:].flip(-1)
    if causal:
        future = future.new_zeros(H, T - 1)
    column = torch.cat([past, t.new_zeros(H, L - 2 * T + 1), future], -1)
    spectrum = torch.fft.rfft(column).T.reshape(-1, H, *[1] * len(rest))
    y = torch.fft.irfft(torch.fft.rfft(x.to(dtype), L, 1) * spectrum, L, 1)
    return y[:, :T].to(x.dtype)


# Above this ratio of weights, rows whose sum is small drown in the FFT's rounding (see toeplitz_matmul).
_LARGEST_RATIO = 1e5


def toeplitz_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    causal: bool = False,
    method: Literal["auto", "fft", "direct"] = "auto",
    eps: float = 1e-6,
    block: int = 8,
) -> Tensor:
    """Kernel attention with a relative position bias: w_ij = exp(bias[j - i]) q_i.k_j, rows divided by their sum.

    Args:
        q, k: [B, T, H, m], non-negative features (see `features.positive_random`).    v: [B, T, H, V].
        bias: [H, 2 T - 1] added to the logit, entry r + T - 1 for r = j - i; -inf hides.
        causal: only j <= i.
        method: "fft", O(T log T); "direct", O(T^2), exact; "auto" is "fft" unless the largest finite weight exp(bias)
            exceeds 1e5 times the smallest, where it warns and is "direct".
        eps: with "fft", row sums are at least eps times the largest row sum of their head.
        block: features transformed at once with "fft"; bounds memory at B T H block (V + 1).
    Returns:
        o [B, T, H, V] in v's dtype, computed in float32 (float64 for float64).
    Raises:
        ShapeError, OptionError.
    """
    sizes = match(q=(q, "B T H m"), k=(k, "B T H m"), v=(v, "B T H V"))
    T = sizes["T"]
    if tuple(bias.shape) != (sizes["H"], 2 * T - 1):
        raise ShapeError(f"bias {list(bias.shape)} does not fit [H, 2 T - 1] = {[sizes['H'], 2 * T - 1]}")
    if method not in ("auto", "fft", "direct"):
        raise OptionError(f"method={method!r}, allowed: 'auto', 'fft', 'direct'")
    if block < 1:
        raise OptionError(f"block={block}, allowed: >= 1")
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k, values, bias = (x.to(dtype) for x in (q, k, v, bias))
    if causal:
        future = torch.arange(2 * T - 1, device=bias.device) >= T
        bias = bias.masked_fill(future, -torch.inf)
    if method == "auto":
        method = _toeplitz_method(bias)
    # The largest weight of a head becomes 1; it cancels in the division.
    top = bias.detach().amax(-1, keepdim=True)
    weight = (bias - top.masked_fill(top == -torch.inf, 0)).exp()
    with torch.autocast(v.device.type, enabled=False):
        if method == "direct":
            return _toeplitz_direct(q, k, values, weight).to(v.dtype)
        ones = torch.cat([values, torch.ones_like(values[..., :1])], -1)
        total = torch.zeros_like(ones)
        for f in range(0, sizes["m"], block):
            outer = k[..., f : f + block, None] * ones.unsqueeze(-2)
            total = total + (q[..., f : f + block, None] * toeplitz_matmul(weight, outer)).sum(-2)
        least = eps * total[..., -1:].detach().amax(1, keepdim=True)
        return (total[..., :-1] / torch.maximum(total[..., -1:], least)).to(v.dtype)


def _toeplitz_method(bias: Tensor) -> Literal["fft", "direct"]:
    finite = bias.detach().isfinite()
    lowest = bias.detach().masked_fill(~finite, torch.inf).amin(-1)
    spread = float((bias.detach().amax(-1) - lowest).amax())
    if spread <= math.log(_LARGEST_RATIO):
        return "fft"
    warnings.warn(
        f"toeplitz_attention was asked for method='auto' and ran the quadratic 'direct' (biases span {spread:.1f} "
        f"nats, and the FFT loses rows above {math.log(_LARGEST_RATIO):.1f}). "
        "Ask for method='direct' to accept this silently.",
        stacklevel=3,
    )
    return "direct"


def _toeplitz_direct(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    T = q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    token = torch.arange(T, device=q.device)
    outputs = []
    for rows in token.split(256):
        offset = token - rows[:, None] + T - 1
        scores = (q[:, :, rows] @ k.transpose(-1, -2)) * weight[:, offset]
        outputs.append(scores @ v / scores.sum(-1, keepdim=True))
    return torch.cat(outputs, 2).transpose(1, 2)
