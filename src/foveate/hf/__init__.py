"""The only code that touches transformers' internals."""

from foveate.hf.apply import Run, apply

__all__ = ["Run", "apply"]
