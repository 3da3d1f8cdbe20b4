"""Compile the CPU kernels on first use: a plain shared library, no torch headers, a few seconds, then cached."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = tuple(sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h")))
# Not -ffast-math: its start-up code switches denormals off for the whole process.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-shared", "-fPIC", "-fopenmp")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def why_unavailable() -> str | None:
    """Why the kernel cannot be had here, None when it can (or is already built)."""
    if os.environ.get("FOVEATE_CPP", "1") == "0":
        return "it is switched off by FOVEATE_CPP=0"
    return _library()[1]


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return "".join(line for line in lines if line.startswith(("model name", "flags")))[:4000]


def _target() -> Path:
    made_of = [each.read_bytes() for each in SOURCES] + [" ".join(FLAGS).encode(), _cpu().encode()]
    key = hashlib.sha256(b"".join(made_of)).hexdigest()[:16]
    root = Path(os.environ.get("FOVEATE_CACHE", Path.home() / ".cache" / "foveate"))
    return root / "kernels" / f"cpu-{key}.so"


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    target = _target()
    try:
        if not target.exists():
            if compiler() is None:
                return None, "no C++ compiler (g++ or clang++) was found to build it"
            _compile(target)
        return ctypes.CDLL(str(target)), None
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return None, f"building it failed: {str(detail).strip().splitlines()[-1:]}"


def _compile(target: Path) -> None:
    program = compiler()
    assert program is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, made = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        subprocess.run(
            [program, *FLAGS, *(str(each) for each in SOURCES if each.suffix == ".cpp"), "-o", made],
            check=True,
            capture_output=True,
            text=True,
        )
        os.replace(made, target)
    finally:
        Path(made).unlink(missing_ok=True)


def library() -> ctypes.CDLL:
    loaded, reason = _library()
    if loaded is None:
        raise OSError(reason)
    return loaded
