"""Linear attention: one matrix state per head, updated by every token.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t                                         beta None
    S_t = S' + k_t^T beta_t (v_t - k_t S'),  S' = diag(exp(g_t)) S_{t-1}             beta given
    o_t = scale q_t S_t

| g | beta | systems |
|---|---|---|
| None | None | linear attention, BASED, Hedgehog |
| [HV] | None | RetNet, Lightning Attention |
| [B, T, HV] | None | Mamba-2 (q = C, k = B, v = dt x, g = -exp(A_log) dt, scale = 1), simple GLA |
| [B, T, HV, K] | None | GLA, HGRN2 |
| None | given | DeltaNet |
| [HV] or [B, T, HV] | given | Gated DeltaNet |
| [B, T, HV, K] | given | KDA |

`kv_matmul_attention` is the non-causal form, for images.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from foveate.attention.backends import linear_reference, linear_torch
from foveate.attention.backends.triton import availability
from foveate.attention.dispatch import Choice
from foveate.attention.linear_call import LinearCall, make_call
from foveate.attention.shapes import match
from foveate.errors import BackendError, OptionError, ShapeError

NAMES = ("auto", "reference", "torch", "triton")
PREFERENCE = {"cuda": ("triton", "torch"), "cpu": ("torch",)}
# Asked once: torch.compile cannot trace the question.
Result = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Backend:
    """Says why it cannot run a call, or None; runs a scan or one step."""

    why_not: Callable[[LinearCall], str | None]
    scan: Callable[[LinearCall], Result]
    step: Callable[[LinearCall], Result]
    # Why "auto" passes it over although it could run the call.
    unchecked: Callable[[LinearCall], str | None] = lambda call: None


def _triton() -> ModuleType:
    from foveate.attention.backends.triton import scan

    return scan


def _why_not_triton(call: LinearCall) -> str | None:
    return availability.why_not_device(call.q) or _triton().why_not(call)


BACKENDS = {
    "reference": Backend(linear_reference.why_not, linear_reference.scan, linear_reference.step),
    "torch": Backend(linear_torch.why_not, linear_torch.scan, linear_torch.step),
    "triton": Backend(
        _why_not_triton,
        lambda call: _triton().scan(call),
        lambda call: _triton().step(call),
        lambda call: _triton().unchecked(call),
    ),
}


def choose(call: LinearCall, backend: str = "auto") -> Choice:
    """Pick a backend for a call; a named one that cannot run it raises BackendError with its reason.

    "auto" follows the variable FOVEATE_BACKEND where it names a backend of this operator.
    """
    if backend == "auto" and os.environ.get("FOVEATE_BACKEND") in BACKENDS:
        backend = os.environ["FOVEATE_BACKEND"]
    if backend not in NAMES:
        raise BackendError(f"backend={backend!r}, allowed: {NAMES}")
    if backend != "auto":
        reason = BACKENDS[backend].why_not(call)
        if reason is not None:
            raise BackendError(f"backend={backend!r} cannot run this call: {reason}; use backend='auto'")
        return Choice(backend)
    passed_over: list[tuple[str, str]] = []
    for name in PREFERENCE.get(call.q.device.type, ("torch",)):
        reason = BACKENDS[name].why_not(call) or BACKENDS[name].unchecked(call)
        if reason is None:
            return Choice(name, tuple(passed_over))
        passed_over.append((name, reason))
    raise BackendError(f"no backend can run this call: {passed_over}; use backend='reference'")


_warned: set[str] = set()


def _run(call: LinearCall, backend: str, entry: Literal["scan", "step"]) -> Result:
    choice = choose(call, backend)
    if choice.passed_over and choice.name not in _warned and not torch.compiler.is_compiling():
        _warned.add(choice.name)
        why = "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over)
        warnings.warn(
            f"linear_scan was asked for backend='auto' and ran the slower {choice.name!r} ({why}). "
            f"Ask for backend={choice.name!r} to accept this silently.",
            stacklevel=3,
        )
    chosen = BACKENDS[choice.name]
    return chosen.scan(call) if entry == "scan" else chosen.step(call)


def linear_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-10,
    qk_l2norm: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Result:
    """Causal linear attention of T tokens, with decay and delta rule; the recurrence is in the module's docstring.

    Args:
        q, k: [B, T, H, K].    v: [B, T, HV, V], one dtype; value head h reads q/k head h // (HV / H).
        g: decay in natural log, <= 0 (-inf wipes the state): [HV], [B, T, HV] or [B, T, HV, K]; default: none.
            Its sign is checked on the CPU; on a GPU with FOVEATE_CHECK_VALUES=1, as that makes every call wait.
        beta: [B, T, HV], the strength of a delta-rule write; default: plain writes. Wants keys of norm <= 1.
        scale: multiplies q once; default K ** -0.5. The state is not scaled.
        normalize: divide o by scale q . (decayed sum of k) + eps. The state then has one more column, that sum.
        qk_l2norm: first q / sqrt(|q|^2 + 1e-6), and k alike.
        initial_state: [N, HV, K, V] (V + 1 with normalize), N = B or the number of packed sequences; default 0.
        output_final_state: return the state after the last token too.
        cu_seqlens: [N + 1] int32 or int64, boundaries of sequences packed into B = 1; empty ones are allowed.
        chunk_size: tokens per chunk, a power of two; no result depends on it beyond rounding.
        backend: "auto", "reference", "torch" or "triton".
    Returns:
        o [B, T, HV, V] in q's dtype; the final state [N, HV, K, V], float32 (float64 for float64 inputs), or None.
        An empty sequence returns its initial state.
    Raises:
        ShapeError for shapes, dtypes, T = 0 or cu_seqlens that do not fit; OptionError for g > 0, a bad chunk_size,
        or normalize with beta; StateError for an initial state of another shape; BackendError.
    Cost: see the backends' docstrings; "torch" reads cu_seqlens and the largest g on the host.
    """
    call = make_call(
        q,
        k,
        v,
        g=g,
        beta=beta,
        scale=scale,
        normalize=normalize,
        eps=eps,
        qk_l2norm=qk_l2norm,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
    )
    return _run(call, backend, "scan")


def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-10,
    qk_l2norm: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `linear_scan`, for decoding: the same arguments with T = 1, and the state always returned.

    Args:
        q, k: [B, 1, H, K].    v: [B, 1, HV, V].    state: [B, HV, K, V] (V + 1 with normalize), or None for zeros.
        The rest as in `linear_scan`.
    Returns:
        o [B, 1, HV, V] in q's dtype, state after the token (a new tensor).
    Raises:
        ShapeError also for more than one token; otherwise as `linear_scan`.
    """
    call = make_call(
        q,
        k,
        v,
        g=g,
        beta=beta,
        scale=scale,
        normalize=normalize,
        eps=eps,
        qk_l2norm=qk_l2norm,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=None,
        chunk_size=1,
    )
    if q.shape[1] != 1:
        raise ShapeError(f"q {list(q.shape)} has T = {q.shape[1]}, allowed: one token; use linear_scan for more")
    o, after = _run(call, backend, "step")
    assert after is not None
    return o, after


def explain_scan(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", **options) -> Choice:  # type: ignore[no-untyped-def]
    """Which backend `linear_scan` would run for these arguments, and why not the others."""
    defaults = dict.fromkeys(("g", "beta", "scale", "initial_state", "cu_seqlens"))
    plain = {"normalize": False, "eps": 1e-10, "qk_l2norm": False, "output_final_state": False, "chunk_size": 64}
    return choose(make_call(q, k, v, **{**defaults, **plain, **options}), backend)


Normalizer = Literal["none", "sum", "subtractive", "affine", "clamp"]


def kv_matmul_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalizer: Normalizer = "none",
    scale: float | Tensor | None = None,
    eps: float = 1e-6,
    floor: float = 100.0,
    rotated: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Non-causal linear attention, o_i = sum_j w_ij v_j by K^T V, with s = scale and N keys:

        none         w_ij = s q_i.k_j
        sum          w_ij = q_i.k_j / (sum_l q_i.k_l + eps)
        subtractive  w_ij = (s / N) q_i.k_j - (1 / N) sum_l (s / N) q_i.k_l + 1 / N      (InLine, arXiv 2412.06590)
        affine       w_ij = (1 + 1 / (z_i + eps)) (s / N) q'_i.k'_j - z_i / N            (MALA, arXiv 2507.00698)
                     with z_i = (s / N) sum_l q_i.k_l
        clamp        w_ij = s q_i.k_j / max(sum_l q_i.k_l, floor)                        (L2ViT, arXiv 2501.16182)

    Rows of "subtractive", and of "affine" without rotation, sum to 1; their weights may be negative.

    Args:
        q: [B, M, H, K].    k: [B, N, H, K], v: [B, N, H, V], one dtype; feature maps already applied.
        scale: a number, or [H] (L2ViT's learned temperature); default K ** -0.5.
        rotated: q' and k', rotated after the feature map, for "affine"; z is of q and k. Default: q and k.
        mask: [B, N] bool, False leaves a key out, of N too.
    Returns:
        o [B, M, H, V] in q's dtype; computed in float32, or float64 for float64 inputs. A row without keys is 0,
        or 0 / eps.
    Raises:
        ShapeError; OptionError for an unknown normalizer, or `rotated` with another one than "affine".
    Cost: O((M + N) H K V), no M x N array.
    """
    sizes = match(q=(q, "B M H K"), k=(k, "B N H K"), v=(v, "B N H V"))
    if normalizer not in ("none", "sum", "subtractive", "affine", "clamp"):
        raise OptionError(f"normalizer={normalizer!r}, allowed: 'none', 'sum', 'subtractive', 'affine', 'clamp'")
    if rotated is not None and normalizer != "affine":
        raise OptionError(f"rotated with normalizer={normalizer!r}, allowed: normalizer='affine'")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    s = _per_head(sizes["K"] ** -0.5 if scale is None else scale, sizes["H"], q, dtype)
    query, key = rotated or (q, k)
    match(q=(q, "B M H K"), k=(k, "B N H K"), rotated_q=(query, "B M H K"), rotated_k=(key, "B N H K"))
    with torch.autocast(q.device.type, enabled=False):
        # [B, H, tokens, channels]
        qh, kh, vh, query, key = (x.to(dtype).transpose(1, 2) for x in (q, k, v, query, key))
        count: float | Tensor = float(sizes["N"])
        if mask is not None:
            match(k=(k, "B N H K"), mask=(mask, "B N"))
            gone = ~mask[:, None, :, None]
            kh, vh, key = (x.masked_fill(gone, 0) for x in (kh, vh, key))
            count = mask.sum(-1).clamp(min=1).to(dtype)[:, None, None, None]
        o = query @ (key.transpose(-1, -2) @ vh)
        if normalizer == "none":
            o = s * o
        else:
            total = qh @ kh.sum(-2).unsqueeze(-1)
            o = _normalize(o, total, vh.sum(-2, keepdim=True), s, count, normalizer, eps, floor)
        return o.transpose(1, 2).to(q.dtype)


def _normalize(
    o: Tensor,
    total: Tensor,
    v_sum: Tensor,
    s: Tensor,
    count: float | Tensor,
    normalizer: Normalizer,
    eps: float,
    floor: float,
) -> Tensor:
    if normalizer == "sum":
        return o / (total + eps)
    if normalizer == "clamp":
        return s * o / total.clamp(min=floor)
    z = s * total / count
    if normalizer == "subtractive":
        return s * o / count + (1 - z) * v_sum / count
    return (1 + 1 / (z + eps)) * s * o / count - z * v_sum / count


def _per_head(scale: float | Tensor, heads: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(scale, Tensor):
        return torch.tensor(scale, dtype=dtype, device=like.device)
    if scale.numel() == 1:
        return scale.to(dtype).reshape(())
    if tuple(scale.shape) != (heads,):
        raise ShapeError(f"scale {list(scale.shape)} does not fit [H]: H is {heads} in q")
    return scale.to(dtype)[:, None, None]


def head_decay(
    heads: int,
    scheme: Literal["alibi", "lightning", "retnet"] = "alibi",
    *,
    layer: int | None = None,
    layers: int | None = None,
) -> Tensor:
    """Fixed decays per head as g [H] float32, natural log, <= 0.

        alibi      -slope_h, slope_h = 2^(-8 (h + 1) / H); for H not a power of two, the slopes of the next lower one,
                   then every second slope of twice that. With a layer: times 1 - layer / (layers - 1) + 1e-5, so the
                   last of the layers hardly forgets (the Lightning Attention code).
        lightning  -(8 h / H) (1 - layer / layers); head 0 never forgets (the Lightning Attention paper).
        retnet     log(1 - 2^(-5 - h))                                     (arXiv 2307.08621)

    Raises OptionError for an unknown scheme, heads < 1, or layer without layers.
    """
    if heads < 1 or (layer is None) != (layers is None):
        raise OptionError(f"heads={heads}, layer={layer}, layers={layers}, allowed: heads >= 1; both or neither")
    if layer is not None and layers is not None and not 0 <= layer < layers:
        raise OptionError(f"layer={layer}, allowed: 0 to layers - 1 = {layers - 1}")
    head = torch.arange(heads, dtype=torch.float64)
    if scheme == "retnet":
        return torch.log1p(-(2.0 ** (-5 - head))).float()
    if scheme == "lightning":
        depth = 1.0 if layer is None or layers is None else 1 - layer / layers
        return (-8 * head / heads * depth).float()
    if scheme != "alibi":
        raise OptionError(f"scheme={scheme!r}, allowed: 'alibi', 'lightning', 'retnet'")
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8 * (torch.arange(power, dtype=torch.float64) + 1) / power)
    between = 2.0 ** (-4 * (2 * torch.arange(heads - power, dtype=torch.float64) + 1) / power)
    depth = 1.0 if layer is None or layers is None else 1 - layer / max(layers - 1, 1) + 1e-5
    return (-torch.cat([slopes, between]) * depth).float()
