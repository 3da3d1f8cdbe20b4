"""foveate: efficient attention for the models people already use.

    import foveate as fv
    with fv.apply(model, "snapkv", budget=1024) as run:
        text = model.generate(**inputs)
    print(run.stats)

Names are loaded on first use, so that `import foveate` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> where it lives.
_HOMES = {
    "FoveateError": "foveate.errors",
    "Method": "foveate.methods",
    "Run": "foveate.hf",
    "apply": "foveate.hf",
    "attend": "foveate.attention",
    "calibrate": "foveate.hf.calibrate",
    "card": "foveate.registry",
    "compare": "foveate.compare",
    "create": "foveate.registry",
    "default_model": "foveate.hf.models",
    "explain": "foveate.attention",
    "HybridConfig": "foveate.lm",
    "HybridLM": "foveate.lm",
    "load_model": "foveate.hf.models",
    "names": "foveate.registry",
    "probe": "foveate.hf.probe",
    "register": "foveate.registry",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from foveate.attention import attend, explain
    from foveate.compare import compare
    from foveate.errors import FoveateError
    from foveate.hf.apply import Run, apply
    from foveate.hf.calibrate import calibrate
    from foveate.hf.models import default_model, load_model
    from foveate.hf.probe import probe
    from foveate.lm import HybridConfig, HybridLM
    from foveate.methods import Method
    from foveate.registry import card, create, names, register


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}; it has: {', '.join(__all__)}")
    # Sub-packages named like a public function (foveate.compare) must not shadow it.
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
