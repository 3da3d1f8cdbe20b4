"""Where and with what the numbers were made."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import foveate
from foveate.compare.memory import kind_of_peak
from foveate.hf.identity import identify
from foveate.hf.models import cache_root
from foveate.hf.modules import check_model

# The rooms whose code decides what a cell's numbers are; a change in them makes old cells invalid.
_DECISIVE = ("attention", "methods", "hf", "tasks", "compare/measure.py", "compare/subject.py", "compare/memory.py")
_SOURCES = {".py", ".cpp", ".cu", ".h"}


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "foveate": foveate.__version__,
    }


def device_name(device: torch.device) -> str:
    """The processor's or the GPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() if device.type == "cpu" else str(device)


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("model name", "Hardware")):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def load_average() -> list[float] | None:
    """The machine's load over 1, 5 and 15 minutes: what else ran beside the measurement."""
    return [round(each, 2) for each in os.getloadavg()] if hasattr(os, "getloadavg") else None


# A folder or file named from the root, a home or a drive; not the end of a relative path, nor a URL. Folders may have
# spaces in their names.
_ABSOLUTE = re.compile(r"(?:(?<=[=:,;\s'\"])|^)(?:/(?!/)|~|[A-Za-z]:\\)(?:[^=:,;'\"]*/)?[^=:,;\s'\"]*")


def command_line() -> str | None:
    """The command that runs now, program first; None where there is none to repeat (a notebook, `python -c`).

    No absolute path is told: a place under the working folder is named from there, any other by its last part.
    """
    program, *given = sys.argv or [""]
    name = Path(program).name
    if name == "__main__.py":
        # `python -m package`
        name = Path(program).parent.name
    if not name or name.startswith("-") or name == "ipykernel_launcher.py":
        return None
    return " ".join([name, *(shlex.quote(_ABSOLUTE.sub(_relative, each)) for each in given)])


def _relative(found: re.Match[str]) -> str:
    path = Path(found[0].replace("\\", "/")).expanduser()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name or "/")


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, command, threads, date, load and platform; see docs/results-schema.md."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "versions": versions(),
        "command": command_line(),
        "threads": torch.get_num_threads(),
        "date": now(),
        "loadavg": load_average(),
        "platform": platform.platform(),
        "peak_bytes_kind": kind_of_peak(device),
    }


def model_facts(model: Any) -> dict[str, Any]:
    """Name, size and attention shape of a model; raises UnsupportedModelError when no method could serve it."""
    check_model(model)
    identity = identify(model)
    return {
        "name": _name(model),
        "type": identity.model_type,
        "parameters": sum(each.numel() for each in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": identity.layers,
        "heads": identity.heads,
        "kv_heads": identity.kv_heads,
        "head_dim": identity.head_dim,
        "fingerprint": identity.fingerprint,
    }


def _name(model: Any) -> str:
    """The model's own name: the last part of its path or hub name."""
    path = Path(str(getattr(model, "name_or_path", "") or ""))
    if path.parent == cache_root() / "models":
        # The bundled model's folder ends in a hash of its file.
        return path.name.rsplit("-", 1)[0]
    return path.name or type(model).__name__


@cache
def source_digest(parts: tuple[str, ...] = _DECISIVE) -> str:
    """A hash of foveate's own code as far as it decides results, so that changed code never reuses old cells."""
    root = Path(foveate.__file__).parent
    digest = hashlib.sha256()
    for part in parts:
        place = root / part
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if file.suffix in _SOURCES:
                digest.update(file.relative_to(root).as_posix().encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
