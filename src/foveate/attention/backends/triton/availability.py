"""Whether the Triton kernels serve a tensor: asked here by everything that may use them, without importing triton."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Asked once: torch.compile cannot trace the question.
INSTALLED = importlib.util.find_spec("triton") is not None


@functools.lru_cache(maxsize=16)
def _has_tensor_cores(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index)[0] >= 8


def why_not_device(x: Tensor) -> str | None:
    """Why kernels cannot run where x lies: no CUDA, no triton, or a GPU before compute capability 8.0."""
    if x.device.type != "cuda":
        return f"q is on {x.device.type}; the Triton kernels need CUDA"
    if not INSTALLED:
        return "the package triton is not installed"
    if not _has_tensor_cores(x.device.index):
        return "the kernels need compute capability 8.0 or later"
    return None


def why_not_dtypes(*tensors: Tensor) -> str | None:
    """Why kernels cannot read these tensors together: other dtypes than FLOATS, or several."""
    for x in tensors:
        if x.dtype not in FLOATS:
            return f"the kernels read float32, bfloat16 and float16, not {x.dtype}"
        if x.dtype != tensors[0].dtype:
            return f"the kernels read tensors of one dtype, not {tensors[0].dtype} and {x.dtype}"
    return None


def learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient will be wanted of one of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def serves(*tensors: Tensor, gradients: bool = False) -> bool:
    """Whether kernels can read these tensors where they lie: one device, one of FLOATS, unit last strides.

    gradients: whether the kernels meant have some; without them, tensors that want one are not served.
    """
    if why_not_device(tensors[0]) is not None or why_not_dtypes(*tensors) is not None:
        return False
    if any(x.device != tensors[0].device or (x.stride(-1) != 1 and x.shape[-1] != 1) for x in tensors):
        return False
    return gradients or not learns(*tensors)
