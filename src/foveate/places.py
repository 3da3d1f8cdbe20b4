"""Whether something can be written at a place: asked before the work whose result goes there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_place(place: Path) -> None:
    """Raise OSError unless a file or folder can be made at `place`, whose own folder may be missing.

    Nothing is left behind, and no missing folder is made.
    """
    present = next(each for each in place.absolute().parents if each.exists())
    # Permissions alone do not tell: a file system may be full or read-only. A full one may still take an empty file.
    os.rmdir(tempfile.mkdtemp(prefix=f".{place.name}-", dir=present))
