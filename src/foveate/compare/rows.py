"""From cells (one seed each) to rows (one method, task and length): the documented part of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from foveate.compare.matrix import Group
from foveate.tasks.base import perplexity_from_nll

# Figures that every row also has of the dense model, as dense_*.
COMPARED = ("score", "perplexity", "ttft_s", "decode_tokens_per_s", "peak_bytes", "cache_bytes", "density")
Cell = Mapping[str, Any]


def row_of(group: Group, cells: Mapping[int, Cell], depths: Mapping[int, float | None], query_aware: bool) -> dict:
    """One row from its cells by seed.

    Scores, bytes, densities and recall are means over the seeds that have them, times and peak bytes medians;
    perplexity is that of all seeds' tokens together. Kept shares and lengths are the first seed's.
    """
    some = list(cells.values())
    first = some[0]["figures"]
    return {
        **_empty(group, list(cells), query_aware),
        "score": _mean(cell["score"] for cell in some),
        "perplexity": _perplexity(some),
        "ttft_s": _median(cell["ttft_s"] for cell in some),
        "decode_tokens_per_s": _median(cell["decode_tokens_per_s"] for cell in some),
        "peak_bytes": _whole(_median(cell["peak_bytes"] for cell in some)),
        "cache_bytes": _whole(_mean(cell["figures"]["cache_bytes"] for cell in some)),
        "host_bytes": _whole(_mean(cell["figures"]["host_bytes"] for cell in some)),
        "density": _mean(cell["figures"]["density"] for cell in some),
        "prefill_density": _mean(cell["figures"]["prefill_density"] for cell in some),
        "decode_density": _mean(cell["figures"]["decode_density"] for cell in some),
        "recall": _mean(cell["figures"]["recall"] for cell in some),
        "prompt_tokens": _whole(_mean(cell["prompt_tokens"] for cell in some)),
        "depths": [
            {
                "seed": seed,
                "depth": depths.get(seed),
                "score": cell["score"],
                "perplexity": _perplexity([cell]),
            }
            for seed, cell in cells.items()
        ],
        "lengths_kept": first["lengths"],
        "tokens_seen": first["tokens_seen"],
        "kept": first["kept"],
    }


def refused_row(group: Group, seeds: Sequence[int], query_aware: bool, error: Exception) -> dict:
    """The row of a method that could not run here: no figures, and why."""
    return {**_empty(group, seeds, query_aware), "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def with_dense(row: dict, dense: Mapping[str, Any]) -> dict:
    """The row with the dense model's figures on the same task and length."""
    return {**row, **{f"dense_{name}": dense.get(name) for name in COMPARED}}


def _empty(group: Group, seeds: Sequence[int], query_aware: bool) -> dict[str, Any]:
    return {
        "method": group.method,
        "task": group.task,
        "length": group.length,
        "seeds": list(seeds),
        "query_aware": query_aware,
        "score": None,
        "perplexity": None,
        "ttft_s": None,
        "decode_tokens_per_s": None,
        "peak_bytes": None,
        "cache_bytes": None,
        "host_bytes": None,
        "density": None,
        "prefill_density": None,
        "decode_density": None,
        "recall": None,
        "prompt_tokens": None,
        "depths": [],
        "lengths_kept": None,
        "tokens_seen": None,
        "kept": None,
        "needles": [],
        "error": None,
    }


def needles_of(example: Any, tokens_seen: int) -> list[float]:
    """Where the answers lie in the whole text that went by, 0 to 1, for the report."""
    depths = example.meta.get("depths") or ([] if example.depth is None else [example.depth])
    return [round(depth * len(example.context) / max(1, tokens_seen), 4) for depth in depths]


def _perplexity(cells: Sequence[Cell]) -> float | None:
    scored = [cell for cell in cells if cell["nll_sum"] is not None]
    if not scored:
        return None
    return perplexity_from_nll(sum(cell["nll_sum"] for cell in scored), sum(cell["nll_count"] for cell in scored))


def _known(values: Any) -> list[float]:
    return [each for each in values if each is not None]


def _mean(values: Any) -> float | None:
    known = _known(values)
    return fmean(known) if known else None


def _median(values: Any) -> float | None:
    known = _known(values)
    return median(known) if known else None


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
