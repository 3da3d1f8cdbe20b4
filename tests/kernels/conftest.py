"""Kernels run in Triton's interpreter where there is no GPU; the switch must be set before triton is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
