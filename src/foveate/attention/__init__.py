"""Attention operators: pure functions of tensors, each with an exact definition.

Shapes: q [B, Hq, M, D], k and v [B, Hkv, N, D], Hq a multiple of Hkv. LSE in natural log, float32.
"""

from foveate.attention.merge import apply_sink, merge, subtract
from foveate.attention.plan import Blocks, Dense, PerHead, Plan, Tokens, VerticalSlash, Window
from foveate.attention.positions import Positions, Rope, apply_rotary
from foveate.attention.softmax import attend, explain
from foveate.attention.sparse_plan import SparsePlan

__all__ = [
    "Blocks",
    "Dense",
    "PerHead",
    "Plan",
    "Positions",
    "Rope",
    "SparsePlan",
    "Tokens",
    "VerticalSlash",
    "Window",
    "apply_rotary",
    "apply_sink",
    "attend",
    "explain",
    "merge",
    "subtract",
]
