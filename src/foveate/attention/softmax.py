"""Attention over a plan, with softmax or sigmoid weights: the one operator that methods and mixers read keys with."""

from __future__ import annotations

import math

from torch import Tensor

from foveate.attention import dispatch
from foveate.attention.call import Call
from foveate.attention.plan import Dense, Plan
from foveate.attention.positions import Positions
from foveate.attention.shapes import match, match_qkv
from foveate.errors import OptionError, PlanError, ShapeError

SCORES = ("softmax", "sigmoid")


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | None,
    scale: float | None,
    positions: Positions | None,
    window: int | None,
    causal: bool,
    log_weight: Tensor | None,
    sink: Tensor | None,
    softcap: float | None,
    return_lse: bool,
    score: str,
    bias: float | None,
) -> Call:
    sizes = match_qkv(q, k, v)
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(f"plan is a {type(plan).__name__}, allowed: a Plan (Dense, Window, Tokens, Blocks, ...)")
    if log_weight is not None:
        match(k=(k, "B Hkv N D"), log_weight=(log_weight, "B Hkv N"))
    if sink is not None:
        match(q=(q, "B Hq M D"), sink=(sink, "Hq"))
    if window is not None and window < 0:
        raise ShapeError(f"window={window}, allowed: >= 0 (it does not count the query itself)")
    _check_score(score, bias, sink, return_lse)
    if score == "sigmoid" and bias is None:
        bias = -math.log(max(1, sizes["N"]))
    return Call(
        q=q,
        k=k,
        v=v,
        plan=plan or Dense(),
        positions=positions or Positions(),
        scale=sizes["D"] ** -0.5 if scale is None else scale,
        window=window,
        causal=causal,
        log_weight=log_weight,
        sink=sink,
        softcap=softcap,
        need_lse=return_lse,
        bias=None if bias is None else float(bias),
    )


def _check_score(score: str, bias: float | None, sink: Tensor | None, return_lse: bool) -> None:
    if score not in SCORES:
        raise OptionError(f"score={score!r}, allowed: {SCORES}")
    if score == "softmax" and bias is not None:
        raise OptionError(
            f"bias={bias} with score='softmax', allowed: with 'sigmoid' alone (softmax weights do not change with it)"
        )
    if score == "softmax":
        return
    if bias is not None and not math.isfinite(bias):
        raise OptionError(f"bias={bias}, allowed: a finite number, or None for -log(N)")
    if return_lse:
        raise OptionError(
            "return_lse with score='sigmoid', allowed: without (sigmoid weights have no normaliser; outputs over "
            "disjoint keys add up)"
        )
    if sink is not None:
        raise OptionError(
            "sink with score='sigmoid', allowed: without (a sink takes its weight from the others through the "
            "normaliser, which sigmoid weights lack)"
        )


def attend(  # type: ignore[no-untyped-def]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | None = None,
    *,
    scale: float | None = None,
    positions: Positions | None = None,
    window: int | None = None,
    causal: bool = True,
    log_weight: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    score: str = "softmax",
    bias: float | None = None,
):
    """Attention of q over the keys that `plan` names and `positions` make visible.

    Args:
        q: [B, Hq, M, D], already rotated.    k: [B, Hkv, N, D], v: [B, Hkv, N, Dv], in q's dtype.
        plan: what each query reads; default Dense().
        scale: multiplies q once; default D ** -0.5.
        positions: where queries and keys stand; default: the queries are the last M of N keys.
        window: the model's own sliding window, not counting the query itself.
        causal: a query sees no later key.
        log_weight: [B, Hkv, N], added to a key's scores (a merged key of weight w has log w).
        sink: [Hq], a learned logit per query head that takes weight and gives no value.
        softcap: scores become softcap * tanh(scores / softcap), before masks.
        backend: "auto", "reference", "torch", "flex", "triton" or "cpp".
        score: "softmax": exp(scores) over their sum; "sigmoid": sigmoid(scores + bias), no sum over keys
            (arXiv 2409.04431). With "sigmoid" outputs over disjoint keys add up, and there is no sink and no lse.
        bias: of "sigmoid"; default -log(N), N the stored keys, so that weights of zero scores add up to about 1. A
            trained layer wants that of its training length, whatever N is now.
    Returns:
        o [B, Hq, M, Dv] in q's dtype; with return_lse also lse [B, Hq, M] float32, natural log.
        A query that reads no key has o = 0, lse = -inf.
    Raises:
        ShapeError, PlanError for inputs that do not fit; OptionError for a score, or a bias, sink or return_lse that it
        does not have; BackendError for a backend that cannot run the call.
    """
    call = _call(q, k, v, plan, scale, positions, window, causal, log_weight, sink, softcap, return_lse, score, bias)
    o, lse = dispatch.run(call, backend)
    return (o, lse) if return_lse else o


def explain(q: Tensor, k: Tensor, v: Tensor, plan: Plan | None = None, *, backend: str = "auto", **options):  # type: ignore[no-untyped-def]
    """Which backend `attend` would run for these arguments, and why not the others (a `dispatch.Choice`)."""
    given = {
        "scale": None,
        "positions": None,
        "window": None,
        "causal": True,
        "log_weight": None,
        "sink": None,
        "softcap": None,
        "return_lse": False,
        "score": "softmax",
        "bias": None,
        **options,
    }
    return dispatch.choose(_call(q, k, v, plan, **given), backend)
