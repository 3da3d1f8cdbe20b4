"""Launch configurations found on this machine by `foveate tune`: they extend the shipped tables.

One JSON file per GPU model in the user's cache: {"schema_version", "device", "entries": [{"table", "key", "config",
"error", "us", "versions", "date"}]}. Read once per process; kernels look it up together with the shipped table.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch

from foveate.errors import BackendError

SCHEMA = 1
Config = TypeVar("Config")


def file_of(device: str) -> Path:
    """Where the entries for a GPU of this name lie."""
    root = Path(os.environ.get("FOVEATE_CACHE", Path.home() / ".cache" / "foveate"))
    name = "".join(each if each.isalnum() else "-" for each in device.lower())
    return root / "tuned" / f"{name}.json"


def entries(path: Path) -> list[dict[str, Any]]:
    """What a file holds, [] when there is none; BackendError for one that cannot be read."""
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text())
        if data["schema_version"] != SCHEMA:
            raise ValueError(f"schema_version {data['schema_version']}, allowed: {SCHEMA}")
        found: list[dict[str, Any]] = data["entries"]
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(f"{path} cannot be read ({error}); delete it, or run `foveate tune` again") from error


@functools.cache
def _of_this_machine() -> tuple[dict[str, Any], ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(entries(file_of(torch.cuda.get_device_name())))


def extended(name: str, table: dict[Any, Config]) -> dict[Any, Config]:
    """The shipped table with this machine's own entries; entries of other fields than the table's are left out."""
    found = dict(table)
    if not table:
        return found
    kind: Any = type(next(iter(table.values())))
    fields = {each.name for each in dataclasses.fields(kind)}
    for entry in _of_this_machine():
        if entry["table"] == name and set(entry["config"]) <= fields:
            key = tuple(entry["key"]) if isinstance(entry["key"], list) else entry["key"]
            found[key] = kind(**entry["config"])
    return found


def keep(path: Path, device: str, fresh: list[dict[str, Any]]) -> None:
    """Add entries to a GPU's file, newer ones in place of older ones of the same key; atomically."""
    new = {(each["table"], json.dumps(each["key"])) for each in fresh}
    held = [each for each in entries(path) if (each["table"], json.dumps(each["key"])) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, made = tempfile.mkstemp(dir=path.parent, suffix=".json")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"schema_version": SCHEMA, "device": device, "entries": held + fresh}, file, indent=1)
        os.replace(made, path)
    finally:
        Path(made).unlink(missing_ok=True)
    _of_this_machine.cache_clear()
