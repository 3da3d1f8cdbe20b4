"""Finished cells on disk, so that an interrupted comparison goes on where it stopped.

A cell is one (method, task, length, seed). Its file's name is the hash of everything that decides its numbers: the
model's weights and dtype, the method with its profile, the prompt's own tokens, how it is run, the device, threads,
versions and foveate's code. A changed setting therefore never finds an old cell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.compare.files import compact, make_folder, plain, write_atomic
from foveate.errors import FoveateError
from foveate.methods import Method
from foveate.methods.profile import ModelIdentity

CELL_VERSION = 1


def digest(data: Any) -> str:
    """A hash of plain data, the same for equal data."""
    return hashlib.sha256(json.dumps(plain(data), sort_keys=True).encode()).hexdigest()


def example_digest(example: Any) -> str:
    """A hash of what is asked and expected: it covers task, options, tokenizer, text and data files."""
    turns = [[turn.question, turn.answers, turn.max_new_tokens] for turn in example.turns]
    return digest([example.context, turns, example.target, example.depth])


def profile_digest(method: Method, identity: ModelIdentity) -> str | None:
    """A hash of the calibration profiles that a method finds for a model; None when it needs or finds none."""
    try:
        members = method.for_model(identity).members
    except FoveateError:
        # `apply` meets the same refusal, and its row says so.
        return None
    found = [bound for each in members if (bound := getattr(each, "bound", None)) is not None]
    if not found:
        return None
    seen = hashlib.sha256()
    for profile in found:
        for name, tensor in sorted(profile.tensors.items()):
            seen.update(f"{profile.kind} {name} {list(tensor.shape)}".encode())
            seen.update(tensor.float().cpu().numpy().tobytes())
    return seen.hexdigest()[:16]


@dataclass
class CellStore:
    """Cells in one folder. `damaged` names the files that could not be used and were computed again."""

    folder: Path
    damaged: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        make_folder(self.folder)

    def path(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{digest(key)[:32]}.json"

    def load(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The cell of `key`, or None when there is none, or only a damaged one."""
        path = self.path(key)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            stored = None
        if self._whole(stored, key):
            return stored["cell"]
        self.damaged.append(path.name)
        return None

    def save(self, key: Mapping[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
        """Write a cell and return it as it will be read; raises ResultsError when it cannot be written."""
        cell = plain(cell)
        stored = {"cell_version": CELL_VERSION, "key": key, "sha256": digest(cell), "cell": cell}
        write_atomic(self.path(key), compact(stored))
        return cell

    @staticmethod
    def _whole(stored: Any, key: Mapping[str, Any]) -> bool:
        return (
            isinstance(stored, dict)
            and stored.get("cell_version") == CELL_VERSION
            and stored.get("key") == plain(dict(key))
            and stored.get("sha256") == digest(stored.get("cell"))
        )
