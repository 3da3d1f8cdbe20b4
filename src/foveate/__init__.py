"""foveate: efficient attention for the models people already use."""

from __future__ import annotations

__version__ = "0.1.0"
