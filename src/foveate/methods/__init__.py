"""Training-free methods: ways of attending that act on a pretrained model while it runs."""

from foveate.methods.base import Composed, Method, create, describe, execute, method_names
from foveate.methods.cache import Drop, DropRagged, Keep, KeepRagged, LayerCache
from foveate.methods.single import SingleLayer
from foveate.methods.step import RunState, Step

__all__ = [
    "Composed",
    "Drop",
    "DropRagged",
    "Keep",
    "KeepRagged",
    "LayerCache",
    "Method",
    "RunState",
    "SingleLayer",
    "Step",
    "create",
    "describe",
    "execute",
    "method_names",
]
