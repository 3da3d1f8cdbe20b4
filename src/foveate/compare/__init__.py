"""Methods against the dense model on the same work: quality, latency, memory, cache bytes and density.

`foveate.compare(...)` is this room's `compare` function: the room and the function share their name, so the module
can be called.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from foveate.compare.breakeven import BreakEven
from foveate.compare.results import SCHEMA_VERSION, Comparison
from foveate.compare.runner import compare


class _Room(types.ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Comparison:
        return compare(*args, **options)


_Room.__call__.__doc__ = compare.__doc__
sys.modules[__name__].__class__ = _Room

__all__ = ["SCHEMA_VERSION", "BreakEven", "Comparison", "compare"]
