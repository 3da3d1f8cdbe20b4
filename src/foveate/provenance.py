"""With what, where and when a result was made: what every result file says of itself."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
import transformers


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        # An import of the package itself would be one of every room.
        "foveate": sys.modules["foveate"].__version__,
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
