"""Which checkpoint a run continues from, and whether it is whole."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

from foveate.errors import DataError, ResultsError
from foveate.lm.config import HybridConfig

_ARCHIVES = ("optimizer.pt", "scheduler.pt")
_MODEL = "model.safetensors"


def checkpoint_to_resume(output: Path, resume: str, config: HybridConfig) -> Path | None:
    """The checkpoint that a run in `output` starts from; None for a fresh start.

    Raises ResultsError when `resume` is "never" and the folder holds a run; DataError for a checkpoint that is missing,
    damaged, or of another model than `config`.
    """
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if resume == "never":
        if last is not None:
            raise ResultsError(
                f"{output} holds a run already ({Path(last).name}); set resume = 'auto' to continue it, or name "
                "another output"
            )
        return None
    folder = last if resume == "auto" else resume
    if folder is None:
        return None
    check_checkpoint(Path(folder).expanduser(), config)
    return Path(folder).expanduser()


def check_checkpoint(folder: Path, config: HybridConfig) -> None:
    """Raise DataError unless the folder is a whole checkpoint of the model that `config` describes."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such checkpoint; name a folder checkpoint-N of a run, or resume = 'auto'")
    _json(folder / "trainer_state.json")
    saved = _json(folder / "config.json")
    wanted = config.to_dict()
    for name in ("mixers", "dim", "heads", "vocab_size", "tie_embeddings", "mlp_ratio", "mlp_multiple"):
        if saved.get(name) != wanted[name]:
            raise DataError(
                f"{folder}: a checkpoint of a model with {name}={saved.get(name)!r}, but the run says "
                f"{wanted[name]!r}; resume with the same [model], or start in another output"
            )
    _weights(folder)
    for name in (*_ARCHIVES, *(each.name for each in sorted(folder.glob("rng_state*.pth")))):
        _archive(folder / name)


def _damaged(path: Path, why: object) -> DataError:
    return DataError(
        f"{path}: the checkpoint is damaged ({why}); delete {path.parent} and resume from an earlier one, or start "
        "again"
    )


def _json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(found, dict):
        raise _damaged(path, "not a JSON object")
    return found


def _weights(folder: Path) -> None:
    index = folder / f"{_MODEL}.index.json"
    shards = {_MODEL}
    if index.exists():
        weights = _json(index).get("weight_map")
        if not isinstance(weights, dict):
            raise _damaged(index, "it has no weight_map")
        shards = {str(name) for name in weights.values()}
    for name in sorted(shards):
        try:
            # Opening checks the header against the file's size.
            with safe_open(folder / name, "pt") as opened:
                opened.keys()
        except (OSError, SafetensorError) as error:
            raise _damaged(folder / name, error) from error


def _archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    if broken is not None:
        raise _damaged(path, f"{broken} fails its checksum")
