"""Launchers become operators of torch (`torch.ops.foveate.*`): registered with their shapes, and with a refusal where
they have no gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.errors import BackendError

LIBRARY = torch.library.Library("foveate", "FRAGMENT")


def operator(fake: Callable[..., Any], *, gradients: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Registers a launcher under its name without the underscore, for CUDA and, where Triton interprets, the CPU.

    fake: results of the right shapes, dtypes and strides, without data. Without `gradients` a backward pass raises.
    """

    def register(launch: Callable[..., Any]) -> Any:
        name = launch.__name__.strip("_")
        LIBRARY.define(name + torch.library.infer_schema(launch, mutates_args=()))
        for key in ("CUDA", "CPU"):
            LIBRARY.impl(name, launch, key)
        torch.library.register_fake(f"foveate::{name}", fake, lib=LIBRARY)
        if not gradients:
            torch.library.register_autograd(f"foveate::{name}", refusal(name), lib=LIBRARY)
        return getattr(torch.ops.foveate, name).default

    return register


def refusal(name: str) -> Callable[..., Any]:
    """The backward pass of an operator that has none."""

    def refuse(ctx: Any, *gradients: Tensor) -> Any:
        raise BackendError(f"{name} has no gradients; use backend='torch' where you need them")

    return refuse
