"""Where and with what the numbers were made."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate.compare.memory import kind_of_peak
from foveate.hf.identity import identify
from foveate.hf.models import cache_root
from foveate.hf.modules import check_model
from foveate.provenance import command_line, device_name, load_average, now, versions

# The rooms whose code decides what a cell's numbers are; a change in them makes old cells invalid.
_DECISIVE = ("attention", "methods", "hf", "tasks", "compare/measure.py", "compare/subject.py", "compare/memory.py")
_SOURCES = {".py", ".cpp", ".cu", ".h"}


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
