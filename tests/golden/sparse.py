"""Golden adapters of the sparse group."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.attention import attend
from foveate.methods.prefill.flexprefill import FlexPrefill, covering, covering_count, diagonal_sums


def flexprefill_helpers(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    x, mat = tensors["x"], tensors["mat"]
    cover = covering(x, config["score"])
    cover[..., 0] |= ~cover.all(-1)
    return {
        "cover_count": covering_count(x, config["score"]),
        "cover_mask": cover,
        "diag_sum": diagonal_sums(mat.flip(-2)),
    }


def flexprefill_blocks(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    method = FlexPrefill(
        gamma=config["gamma"],
        tau=config["tau"],
        block=config["block_size"],
        min_budget=config["min_budget"],
        max_budget=config["max_budget"],
    )
    mask = method.block_map(q, k, config["scale"])
    o = attend(q, k, v, method.block_plan(q, k, config["scale"]), scale=config["scale"])
    return {"block_mask": mask, "o": o}


ADAPTERS = {
    "flexprefill/score-cover-topk-crossing-kept": flexprefill_helpers,
    "flexprefill/active-block-map-block-sparse-output": flexprefill_blocks,
}
