"""Golden adapters for the scorers of The Sparse Frontier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from foveate.tasks.scoring import mean_and_variance, numbered_pairs, set_overlap

Tensors = dict[str, Tensor]


def _scored(scores: Iterable[float]) -> Tensors:
    scores = list(scores)
    return {
        "scores": torch.tensor(scores, dtype=torch.float64),
        "mean_var": torch.tensor(mean_and_variance(scores), dtype=torch.float64),
    }


def ruler_niah_scorer(config: dict[str, Any], tensors: Tensors) -> Tensors:
    return _scored(numbered_pairs(each["prediction"], each["answers"]) for each in config["examples"])


def ruler_vt_scorer(config: dict[str, Any], tensors: Tensors) -> Tensors:
    return _scored(set_overlap(each["prediction"], each["gold"]) for each in config["examples"])


ADAPTERS: dict[str, Callable[[dict[str, Any], Tensors], Tensors]] = {
    "sparse-frontier/ruler-niah-scorer": ruler_niah_scorer,
    "sparse-frontier/ruler-vt-scorer": ruler_vt_scorer,
}
