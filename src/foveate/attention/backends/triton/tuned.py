"""Launch configurations found on this machine by `foveate tune`: they extend the shipped tables.

One JSON file per GPU model in the user's cache: {"schema_version", "device", "entries": [{"table", "key", "config",
"error", "us", "versions", "date"}]}. Read once per process; kernels look it up together with the shipped table.
An entry serves only the versions of torch and Triton that it was checked with: another compiler may compile it wrongly.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

from foveate.errors import BackendError

SCHEMA = 1
# Seconds that `keep` waits for another process that is writing the same file.
PATIENCE = 60
_log = logging.getLogger(__name__)
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


def compilers() -> dict[str, str]:
    """What an entry was checked with, and must be used with: {"torch": ..., "triton": ...}."""
    return {"torch": torch.__version__, "triton": importlib.metadata.version("triton")}


@functools.cache
def _of_this_machine() -> tuple[dict[str, Any], ...]:
    """The entries for the present GPU and compilers; one warning where there are others."""
    if not torch.cuda.is_available():
        return ()
    path, here = file_of(torch.cuda.get_device_name()), compilers()
    found = entries(path)
    checked = tuple(each for each in found if here.items() <= each.get("versions", {}).items())
    if len(checked) < len(found):
        _log.warning(
            "%d of %d launch configurations in %s were checked with other versions than torch %s and triton %s, and "
            "are not used; run `foveate tune` to check them again",
            len(found) - len(checked), len(found), path, here["torch"], here["triton"],
        )  # fmt: skip
    return checked


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
    """Add entries, checked with the present compilers, to a GPU's file, in place of older ones of the same key.

    Atomic, and one process at a time: BackendError where another one keeps the file for longer than PATIENCE seconds.
    """
    stamped = [{**each, "versions": {**each.get("versions", {}), **compilers()}} for each in fresh]
    new = {(each["table"], json.dumps(each["key"])) for each in fresh}
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"), timeout=PATIENCE)
    try:
        with lock:
            held = [each for each in entries(path) if (each["table"], json.dumps(each["key"])) not in new]
            _replace(path, {"schema_version": SCHEMA, "device": device, "entries": held + stamped})
    except Timeout as error:
        raise BackendError(f"{path} is being written by another process; wait for it, then run this again") from error
    _of_this_machine.cache_clear()


def _replace(path: Path, data: dict[str, Any]) -> None:
    handle, made = tempfile.mkstemp(dir=path.parent, suffix=".json")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(data, file, indent=1)
        os.replace(made, path)
    finally:
        Path(made).unlink(missing_ok=True)
