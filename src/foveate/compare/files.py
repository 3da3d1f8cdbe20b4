"""Files that are whole or absent: written beside their place, synced, then moved into it."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from foveate.errors import ResultsError
from foveate.places import check_place


def make_folder(folder: Path) -> Path:
    """Make a folder, or raise ResultsError when something stands in its way or it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"the folder {folder} cannot be made ({_reason(error)}); name another with out=") from error
    if not os.access(folder, os.W_OK):
        raise ResultsError(f"the folder {folder} cannot be written to; name another with out=")
    return folder


def check_file(path: Path) -> Path:
    """Raise ResultsError unless a file can be written at `path`; call it before the work whose result goes there."""
    if path.is_dir():
        raise ResultsError(f"{path} is a folder, and a file is needed; name another place")
    try:
        check_place(path)
    except OSError as error:
        raise ResultsError(f"{path} cannot be written ({_reason(error)}); name another place") from error
    return path


def write_atomic(path: Path, text: str) -> Path:
    """Replace `path` by `text` (UTF-8) in one step; on any failure the old file stays and nothing is left behind.

    Raises ResultsError (disk full, no permission, ...) that says how to go on.
    """
    make_folder(path.parent)
    made: str | None = None
    try:
        handle, made = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(made, 0o666 & ~_umask())
        os.replace(made, path)
    except OSError as error:
        raise ResultsError(f"{path} could not be written ({_reason(error)}); {_advice(error)}") from error
    finally:
        if made is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(made)
    return path


def _umask() -> int:
    # There is no way to ask for it without setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and run the same command again: what was finished is kept and reused"
    return "nothing was half-written; set this right and run the same command again"


def plain(value: Any) -> Any:
    """JSON-ready data: tuples become lists, and numbers that are not finite, which JSON lacks, become null."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def compact(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def document(data: dict[str, Any]) -> str:
    """JSON with one line per entry, and one per element of lists of objects: readable, and small with long arrays."""
    lines = []
    for key, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = ",\n".join(f"  {compact(each)}" for each in value)
            lines.append(f" {json.dumps(key)}: [\n{inner}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {compact(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
