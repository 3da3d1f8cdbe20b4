"""Give calibrated methods a made-up profile, so that they meet the conformance suite like all others."""

from __future__ import annotations

import dataclasses
from typing import Any

from foveate.methods import Method
from foveate.methods.profile import ModelIdentity

FAKE = ModelIdentity("llama", 1, 4, 2, 16, "none")


def bind_profile(
    method: Method, model: Any, *, layers: int | None = None, heads: int | None = None, kv_heads: int | None = None
) -> Method:
    """A method whose class offers `example_profile(identity)` gets that profile; compositions member by member."""
    if model is not None:
        from foveate.hf.identity import identify

        identity = identify(model)
    else:
        identity = dataclasses.replace(FAKE, layers=layers or 1, heads=heads or 4, kv_heads=kv_heads or 2)
    if len(method.members) > 1:
        parts = tuple(
            bind_profile(part, model, layers=layers, heads=heads, kv_heads=kv_heads) for part in method.members
        )
        return dataclasses.replace(method, parts=parts)
    example = getattr(method, "example_profile", None)
    if example is None:
        return method
    bound = dataclasses.replace(method, profile=example(identity))
    return bound if model is not None else bound.for_model(identity)
