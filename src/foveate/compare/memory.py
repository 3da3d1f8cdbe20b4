"""Peak memory of one request: what it takes at most above what was allocated before it.

    CUDA                 torch.cuda.max_memory_allocated, reset before the request
    Linux                the kernel's own high-water mark of resident memory (VmHWM), reset through clear_refs: exact
    Linux, not allowed   resident memory read by a thread every 5 ms: may miss short peaks
    elsewhere            growth of ru_maxrss over the process's life: 0 when an earlier request took more

Before a CPU request the allocator's free pages are given back (malloc_trim), or growth would be hidden in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SAMPLING_SECONDS = 0.005


def kind_of_peak(device: torch.device) -> str:
    """How peak bytes are measured on this device and machine; stands in the results' environment."""
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated above what was allocated before the request"
    if device.type != "cpu":
        return f"not measured on {device.type}"
    if _can_reset():
        return "growth of resident memory: the kernel's high-water mark (VmHWM), reset before the request"
    if _STATUS.exists():
        return "growth of resident memory, sampled every 5 ms"
    return "growth of ru_maxrss over the life of the process (a lower bound)"


def _can_reset() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _field("VmHWM") is not None


def _field(name: str) -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def _most_ever() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back() -> None:
    """Return freed memory to the system where the C library can."""
    gc.collect()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """While inside, `give_back` looks only at objects made since: 0.3 s less for each request.

    A full collection walks the half million objects of the imported packages each time.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class PeakMemory:
    """A context manager; afterwards `bytes` is the request's peak growth, None where it cannot be measured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._resets = False
        self._before = 0
        self._highest = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            give_back()
            self._resets = _can_reset()
            if _STATUS.exists():
                self._before = _field("VmRSS") or 0
            elif os.name == "posix":
                self._before = _most_ever()
            if _STATUS.exists() and not self._resets:
                self._thread = threading.Thread(target=self._sample, daemon=True)
                self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLING_SECONDS):
            self._highest = max(self._highest, _field("VmRSS") or 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self.device.type == "cpu":
            self.bytes = self._grown()

    def _grown(self) -> int | None:
        if self._resets:
            return max(0, (_field("VmHWM") or 0) - self._before)
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            return max(0, max(self._highest, _field("VmRSS") or 0) - self._before)
        return max(0, _most_ever() - self._before) if os.name == "posix" else None
