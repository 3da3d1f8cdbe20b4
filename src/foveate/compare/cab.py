"""CAB's view of attention: four patterns, a score over many metrics, and the length from which a mixer pays.

    pattern     tokens attend to           out(x)_t may depend on
    causal-self    x                       x_s for s <= t
    noncausal-self x                       all of x
    causal-cross   a context, another length   x_s for s <= t, all of the context
    noncausal-cross a context              all of x, all of the context

    compositional index = mean over tasks of the mean over a task's metrics of sign (value - mean) / deviation
    efficiency length   = the larger root of a N^2 + b N + c = d N + e, dense and efficient costs fitted over N

Paper: Zhang et al. 2023 (arXiv 2210.07661). Means and deviations are the released ones, of the attentions on its
leaderboard; the sign is - where less is better. Metrics: MCD, MSD (speech), ROUGE (summaries), PSNR, SSIM
(super-resolution), PPL (language models), CD, F (point clouds, CD times 1000), MSE, MAE (time series, means over the
univariate and the multivariate task).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import OptionError, ShapeError
from foveate.mixers.base import PATTERNS, Mixer


@dataclass(frozen=True)
class Metric:
    """One column of the leaderboard: a value z = sign (value - mean) / deviation counts for its task."""

    task: str
    name: str
    sign: int
    mean: float
    deviation: float

    def score(self, value: float) -> float:
        return self.sign * (value - self.mean) / self.deviation


METRICS: dict[str, tuple[Metric, ...]] = {
    "noncausal-self": (
        Metric("speech", "FastSpeech2 MCD", -1, 3.4245, 0.06832),
        Metric("speech", "FastSpeech2 MSD", -1, 1.97429, 0.0361768),
        Metric("speech", "Transformer-TTS MCD", -1, 4.06947, 0.09422),
        Metric("speech", "Transformer-TTS MSD", -1, 2.19021, 0.03866),
        Metric("summaries", "R-1", 1, 34.88667, 1.39697),
        Metric("summaries", "R-2", 1, 6.79333, 1.41078),
        Metric("summaries", "R-L", 1, 31.96889, 1.31499),
        Metric("super-resolution", "PSNR", 1, 23.208, 0.27499),
        Metric("super-resolution", "SSIM", 1, 0.6758, 0.01557),
        Metric("masked-lm", "PPL", -1, 36.292, 62.30827),
    ),
    "causal-self": (
        Metric("speech", "MCD", -1, 4.08325, 0.04529),
        Metric("speech", "MSD", -1, 2.20085, 0.01372),
        Metric("summaries", "R-1", 1, 32.9575, 1.92754),
        Metric("summaries", "R-2", 1, 6.0925, 0.41007),
        Metric("summaries", "R-L", 1, 30.2575, 1.61951),
        Metric("lm", "PPL", -1, 22.26, 8.29944),
    ),
    "noncausal-cross": (
        Metric("point-clouds", "CD-l1", -1, 7.7025, 0.64789),
        Metric("point-clouds", "CD-l2", -1, 0.24775, 0.03366),
        Metric("point-clouds", "F-score", 1, 0.7625, 0.03906),
        Metric("time-series", "ETT MSE", -1, 1.18933, 0.05615),
        Metric("time-series", "ETT MAE", -1, 0.80625, 0.02193),
        Metric("time-series", "ECL MSE", -1, 0.47575, 0.01057),
        Metric("time-series", "ECL MAE", -1, 0.511, 0.00601),
        Metric("time-series", "Weather MSE", -1, 0.62025, 0.18948),
        Metric("time-series", "Weather MAE", -1, 0.58075, 0.10312),
    ),
    "causal-cross": (
        Metric("speech", "MCD", -1, 5.5037, 1.29239),
        Metric("speech", "MSD", -1, 2.6278, 0.42726),
        Metric("summaries", "R-1", 1, 31.35, 3.77103),
        Metric("summaries", "R-2", 1, 5.26, 1.26028),
        Metric("summaries", "R-L", 1, 28.8, 3.28638),
    ),
}


@dataclass(frozen=True)
class CompositionalIndex:
    """total: the mean over tasks.    tasks: the mean score of each task, in the order of the table."""

    total: float
    tasks: Mapping[str, float]


def compositional_index(pattern: str, values: Sequence[float]) -> CompositionalIndex:
    """The score of one attention in one pattern from its values, in the order of `METRICS[pattern]`.

    Raises OptionError for an unknown pattern, ShapeError for another number of values, or values that are not finite.
    """
    if pattern not in METRICS:
        raise OptionError(f"pattern={pattern!r}, allowed: {tuple(METRICS)}")
    metrics = METRICS[pattern]
    if len(values) != len(metrics) or not all(math.isfinite(value) for value in values):
        raise ShapeError(
            f"compositional_index: {list(values)} for {pattern!r}, allowed: {len(metrics)} finite values, of "
            f"{[each.name for each in metrics]}"
        )
    scores: dict[str, list[float]] = {}
    for metric, value in zip(metrics, values):
        scores.setdefault(metric.task, []).append(metric.score(value))
    tasks = {task: sum(each) / len(each) for task, each in scores.items()}
    return CompositionalIndex(sum(tasks.values()) / len(tasks), tasks)


def efficiency_length(lengths: Sequence[int], dense: Sequence[float], efficient: Sequence[float]) -> float | None:
    """From which length on an efficient mixer costs less than dense attention; None if from none on.

    lengths: at least three different ones, in tokens.    dense, efficient: cost at each (seconds, or bytes), fitted by
    a parabola and by a line. Raises ShapeError for lists of other sizes.
    """
    if len(set(lengths)) < 3 or not len(lengths) == len(dense) == len(efficient):
        raise ShapeError(
            f"efficiency_length: {len(lengths)} lengths, {len(dense)} and {len(efficient)} costs, allowed: one cost "
            "for each length, of three different ones at least"
        )
    # Lengths in units of the longest keep the fit well conditioned.
    longest = max(lengths)
    n = torch.tensor([each / longest for each in lengths], dtype=torch.float64)
    c, b, a = _fitted(n, dense, 2)
    e, d = _fitted(n, efficient, 1)
    inside = (b - d) ** 2 - 4 * a * (c - e)
    if a <= 0:
        return None
    if inside < 0:
        return 0.0
    return max(0.0, longest * (d - b + math.sqrt(inside)) / (2 * a))


def _fitted(n: Tensor, costs: Sequence[float], degree: int) -> list[float]:
    """Least-squares coefficients, the constant first."""
    powers = torch.stack([n**power for power in range(degree + 1)], -1)
    target = torch.tensor(costs, dtype=torch.float64)[:, None]
    return torch.linalg.lstsq(powers, target).solution[:, 0].tolist()


@torch.no_grad()
def pattern_errors(mixer: Mixer, x: Tensor, context: Tensor) -> dict[str, float]:
    """How far a mixer is from each pattern that it declares and can show as it is built, largest absolute difference.

    causal-self: outputs of a longer input against those of its beginning, and of one token at a time.    causal-cross:
    the same over queries, with all of the context.    The others: nan and missing outputs count as infinite, and
    attention to a context of another length must run.

    Args:
        mixer: causal or not, which decides between the patterns.    x: [B, N, C].    context: [B, M, C], M not N.
    """
    half = x.shape[1] // 2
    errors = {}
    for pattern in sorted(mixer.patterns & PATTERNS):
        causal, cross = pattern.startswith("causal"), pattern.endswith("cross")
        if causal != mixer.causal:
            continue
        given = {"context": context} if cross else {}
        whole = mixer(x, **given)[0]
        if not causal:
            fits = whole.shape == x.shape and bool(whole.isfinite().all())
            errors[pattern] = 0.0 if fits else math.inf
            continue
        differences = [
            (mixer(x[:, : last + 1], **given)[0][:, last] - whole[:, last]) for last in range(half, x.shape[1])
        ]
        if not cross:
            state, steps = None, []
            for token in x.split(1, 1):
                y, state = mixer(token, state=state)
                steps.append(y)
            differences.append(torch.cat(steps, 1) - whole)
        errors[pattern] = max(float(each.abs().max()) for each in differences)
    return errors
