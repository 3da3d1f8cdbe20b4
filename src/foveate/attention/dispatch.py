"""Which backend runs a call, and why.

Each backend answers `why_not(call) -> str | None` without running. One loop chooses; `explain` prints the loop's
own record, so it cannot disagree with what runs.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from foveate.attention.backends.triton import availability
from foveate.attention.call import Call
from foveate.attention.plan import Blocks, Dense, VerticalSlash
from foveate.errors import BackendError, PlanError

PREFERENCE = {"cuda": ("triton", "torch", "reference"), "cpu": ("cpp", "torch", "reference")}
NAMES = ("auto", "reference", "torch", "flex", "triton", "cpp")


@dataclass(frozen=True)
class Backend:
    """A module that offers `attend(call)`, and what must hold before it is imported."""

    module: str
    precondition: Callable[[Call], str | None] = lambda call: None

    def why_not(self, call: Call) -> str | None:
        reason = self.precondition(call)
        if reason is None:
            reason = importlib.import_module(self.module).why_not(call)
        return reason

    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]:
        run: Callable[[Call], tuple[Tensor, Tensor | None]] = importlib.import_module(self.module).attend
        return run(call)


def _triton_needs(call: Call) -> str | None:
    return availability.why_not_device(call.q)


def _cpp_needs(call: Call) -> str | None:
    if call.q.device.type != "cpu":
        return f"q is on {call.q.device.type}; the C++ kernel runs on CPU"
    return None


_ROOT = "foveate.attention.backends"
BACKENDS: dict[str, Backend] = {
    "reference": Backend(f"{_ROOT}.reference"),
    "torch": Backend(f"{_ROOT}.torch_plans"),
    "flex": Backend(f"{_ROOT}.flex"),
}
for _name, _file, _needs in (("cpp", "cpp_plans", _cpp_needs), ("triton", "triton/plans", _triton_needs)):
    if (Path(__file__).parent / "backends" / f"{_file}.py").exists():
        BACKENDS[_name] = Backend(f"{_ROOT}.{_file.replace('/', '.')}", _needs)


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and the ones passed over with their reasons."""

    name: str
    passed_over: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"runs on {self.name!r}"]
        lines += [f"  not {name!r}: {reason}" for name, reason in self.passed_over]
        return "\n".join(lines)


def choose(call: Call, backend: str = "auto") -> Choice:
    """Pick a backend for a call; a named one that cannot run it raises BackendError with its reason."""
    if backend == "auto":
        backend = os.environ.get("FOVEATE_BACKEND", "auto")
    if backend not in NAMES:
        raise BackendError(f"backend={backend!r}, allowed: {NAMES}")
    if backend != "auto":
        if backend not in BACKENDS:
            raise BackendError(f"backend {backend!r} is not available in this installation; use backend='auto'")
        reason = BACKENDS[backend].why_not(call)
        if reason is not None:
            raise BackendError(f"backend={backend!r} cannot run this call: {reason}; use backend='auto'")
        return Choice(backend)
    passed_over: list[tuple[str, str]] = []
    for name in PREFERENCE.get(call.q.device.type, ("torch", "reference")):
        if name not in BACKENDS:
            continue
        reason = BACKENDS[name].why_not(call)
        if reason is None:
            choice = Choice(name, tuple(passed_over))
            _warn_when_slow(call, choice)
            return choice
        passed_over.append((name, reason))
    raise PlanError(f"no backend can run this call: {passed_over}")


_warned: set[str] = set()


def _warn_when_slow(call: Call, choice: Choice) -> None:
    sparse_prompt = isinstance(call.plan, Blocks | VerticalSlash)
    slow = (choice.name == "reference" and not isinstance(call.plan, Dense)) or (
        call.q.device.type == "cuda" and choice.name == "torch" and sparse_prompt
    )
    if not slow or choice.name in _warned:
        return
    _warned.add(choice.name)
    why = "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over) or "no faster one is installed"
    warnings.warn(
        f"attend ran a {type(call.plan).__name__} plan on the slower backend {choice.name!r} ({why}). "
        f"Ask for backend={choice.name!r} to accept this silently.",
        stacklevel=4,
    )


def run(call: Call, backend: str) -> tuple[Tensor, Any]:
    return BACKENDS[choose(call, backend).name].attend(call)
