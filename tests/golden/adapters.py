"""One adapter per (system, function) of the golden vectors: `ADAPTERS["<system>/<function>"](config, tensors)`.

Tensors are given with their `in.` and `param.` prefixes, or stripped of them; outputs come back without `out.`.
The adapters live in one file per group; each calls the public API only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

GROUPS = (
    "kv_keep",
    "kv_select",
    "kv_heads",
    "kv_memory",
    "sparse",
    "tasks",
    "linear_primitives",
    "mixers_linear",
    "kv_landmark",
    "kv_sinklora",
    "kv_retrieval",
    "kv_hcam",
    "mixers_softmaxlike",
    "mixers_features",
    "mixers_titans",
    "mixers_dsf",
    "mixers_linear_vision",
    "mixers_spikingbrain",
    "mixers_cab",
)
Adapter = Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Tensor]]


def _strip(adapter: Adapter) -> Adapter:
    @wraps(adapter)
    def stripped(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        plain = {}
        for name, tensor in tensors.items():
            for prefix in ("in.", "param."):
                name = name.removeprefix(prefix)
            plain[name] = tensor
        made = adapter(config, plain)
        return {name if name.startswith("out.") else f"out.{name}": tensor for name, tensor in made.items()}

    return stripped


def _collect() -> dict[str, Adapter]:
    found: dict[str, Adapter] = {}
    for group in GROUPS:
        try:
            module = importlib.import_module(f"tests.golden.{group}")
        except ModuleNotFoundError as error:
            if error.name != f"tests.golden.{group}":
                raise
            continue
        for key, adapter in module.ADAPTERS.items():
            if key in found:
                raise ValueError(f"two adapters for {key}")
            found[key] = _strip(adapter)
    return found


ADAPTERS = _collect()
