"""Break-even: below which prompt length the dense model is the faster one.

    t(N) = time to first token(N) + generated / decode speed(N)

for the dense model and for a method, N the prompt's tokens. Both are fitted by least squares on relative errors:
a line through two lengths; a parabola through three or more, where its curvature is not negative (attention costs
N^2), else a line. The sign of the difference of the two fits is read from a quarter of the shortest to four times the
longest measured length, never beyond. Where the measured times differ by no more than 3 % everywhere, there is no
difference to speak of. Cost: nothing; it is arithmetic on a handful of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

GENERATED = 128
_REACH = 4.0
_SAME = 0.03
_ROUGH = 0.1
_GRID = 513


@dataclass(frozen=True)
class BreakEven:
    """One method's verdict.

    verdict: "below" (dense is faster below `tokens`), "above" (dense is faster above `tokens`), "always" (the method
        is faster all over the range), "never", "same" (within 3 %), "mixed" (more than one crossing) or "unknown".
    tokens: the crossing. extrapolated: whether it lies outside the measured lengths.
    measured: shortest and longest measured prompt.
    fit_error: the largest relative error of the fits at the measured lengths.
    """

    method: str
    verdict: str
    tokens: int | None
    extrapolated: bool
    measured: tuple[int, int] | None
    generated: int
    fit_error: float | None
    text: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Point:
    """Measured seconds of one request at one prompt length."""

    tokens: int
    seconds: float
    dense_seconds: float


def points_of(rows: Sequence[dict[str, Any]], method: str, generated: int = GENERATED) -> list[Point]:
    """The method's measured requests from rows that have all four speeds."""
    points = []
    for row in rows:
        speeds = [
            row.get(name) for name in ("ttft_s", "decode_tokens_per_s", "dense_ttft_s", "dense_decode_tokens_per_s")
        ]
        if row["method"] == method and row.get("prompt_tokens") and all(speeds):
            ttft, speed, dense_ttft, dense_speed = map(float, speeds)  # type: ignore[arg-type]
            points.append(Point(row["prompt_tokens"], ttft + generated / speed, dense_ttft + generated / dense_speed))
    return points


def break_even(method: str, points: Sequence[Point], generated: int = GENERATED) -> BreakEven:
    """The verdict from measured requests; "unknown" below two different lengths."""
    lengths = sorted({point.tokens for point in points})
    if len(lengths) < 2 or lengths[-1] < 1.25 * lengths[0]:
        return BreakEven(
            method, "unknown", None, False, None, generated, None, "unknown: measure at two lengths or more"
        )
    measured = (lengths[0], lengths[-1])
    tokens = torch.tensor([float(point.tokens) for point in points], dtype=torch.float64)
    ours = torch.tensor([point.seconds for point in points], dtype=torch.float64)
    dense = torch.tensor([point.dense_seconds for point in points], dtype=torch.float64)
    degree = 2 if len(lengths) > 2 else 1
    fits = [_fit(tokens, seconds, degree) for seconds in (ours, dense)]
    if degree == 2 and any(fit[2] < 0 for fit in fits):
        fits = [_fit(tokens, seconds, 1) for seconds in (ours, dense)]
    error = max(float((_at(fit, tokens) / seconds - 1).abs().max()) for fit, seconds in zip(fits, (ours, dense)))
    verdict, at = _read(fits, ours, dense, measured)
    outside = at is not None and not measured[0] <= at <= measured[1]
    text = _text(verdict, at, outside, measured, float((dense / ours).mean()))
    if error > _ROUGH:
        text += f"; rough: the fits miss by up to {error:.0%}"
    return BreakEven(method, verdict, at, outside, measured, generated, round(error, 4), text)


def _fit(tokens: torch.Tensor, seconds: torch.Tensor, degree: int) -> torch.Tensor:
    """Polynomial coefficients [3], lowest first, of the least relative squares."""
    unit = tokens.max()
    powers = torch.stack([(tokens / unit) ** power for power in range(degree + 1)], 1) / seconds[:, None]
    found = torch.linalg.lstsq(powers, torch.ones_like(seconds)[:, None], driver="gelsd").solution[:, 0]
    scaled = found / unit ** torch.arange(degree + 1)
    return torch.nn.functional.pad(scaled, (0, 2 - degree))


def _at(fit: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return fit[0] + fit[1] * tokens + fit[2] * tokens**2


def _read(
    fits: list[torch.Tensor], ours: torch.Tensor, dense: torch.Tensor, measured: tuple[int, int]
) -> tuple[str, int | None]:
    if bool(((ours - dense).abs() <= _SAME * dense).all()):
        return "same", None
    low, high = measured[0] / _REACH, measured[1] * _REACH
    tokens = low * (high / low) ** torch.linspace(0, 1, _GRID, dtype=torch.float64)
    slower = _at(fits[0], tokens) > _at(fits[1], tokens)
    changes = (slower[1:] != slower[:-1]).nonzero()[:, 0].tolist()
    if not changes:
        return ("never" if bool(slower[0]) else "always"), None
    if len(changes) > 1:
        return "mixed", None
    crossing = _cross(fits[0] - fits[1], float(tokens[changes[0]]), float(tokens[changes[0] + 1]))
    return ("below" if bool(slower[0]) else "above"), round(crossing)


def _cross(gap: torch.Tensor, low: float, high: float) -> float:
    """The root between two lengths whose gaps have opposite signs, by bisection."""

    def value(tokens: float) -> float:
        return float(_at(gap, torch.tensor(tokens, dtype=torch.float64)))

    rising = value(high) > 0
    for _ in range(60):
        middle = (low + high) / 2
        if (value(middle) > 0) == rising:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def _text(verdict: str, at: int | None, outside: bool, measured: tuple[int, int], speed_up: float) -> str:
    span = f"{measured[0]:,} to {measured[1]:,} tokens"
    beyond = " (extrapolated)" if outside else ""
    return {
        "below": f"dense is faster below {at:,} tokens{beyond}" if at is not None else "",
        "above": f"dense is faster above {at:,} tokens{beyond}" if at is not None else "",
        "always": f"faster than dense all over {span} ({speed_up:.2f} x)",
        "never": f"never faster than dense in {span} ({speed_up:.2f} x)",
        "same": f"as fast as dense within {_SAME:.0%} ({span})",
        "mixed": f"now faster, now slower than dense in {span}",
    }[verdict]
