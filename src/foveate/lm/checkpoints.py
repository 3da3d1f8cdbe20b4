"""Which checkpoint a run continues from, and whether it is whole."""

from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

from foveate.errors import DataError, ResultsError
from foveate.lm.config import HybridConfig
from foveate.lm.model import HybridLM

_ARCHIVES = ("optimizer.pt", "scheduler.pt")
_MODEL = "model.safetensors"
# Checkpoints from before them lack the newer options.
_NEWER = ("experts", "top_experts", "shared_experts", "dense_layers", "spike_k", "spike_group")
_SHAPING = ("mixers", "dim", "heads", "vocab_size", "tie_embeddings", "mlp_ratio", "mlp_multiple", *_NEWER)


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
    """Raise DataError unless the folder is a whole checkpoint of the model that `config` describes.

    Every tensor of the model must be there, in its shape and with finite values: the Trainer goes on with fresh weights
    where one is missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such checkpoint; name a folder checkpoint-N of a run, or resume = 'auto'")
    _trainer_state(folder / "trainer_state.json")
    plain = HybridConfig(mixers=["softmax"]).to_dict()
    saved = {**{name: plain[name] for name in _NEWER}, **_json(folder / "config.json")}
    wanted = config.to_dict()
    for name in _SHAPING:
        if saved.get(name) != wanted[name]:
            raise DataError(
                f"{folder}: a checkpoint of a model with {name}={saved.get(name)!r}, but the run says "
                f"{wanted[name]!r}; resume with the same [model], or start in another output"
            )
    _weights(folder, config)
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


def _trainer_state(path: Path) -> None:
    state = _json(path)
    for name in ("global_step", "train_batch_size"):
        value = state.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            given = f"{name}={value!r}" if name in state else f"no {name}"
            raise _damaged(path, f"it has {given}, allowed: a whole number >= 0")


def _weights(folder: Path, config: HybridConfig) -> None:
    index = folder / f"{_MODEL}.index.json"
    shards = {_MODEL}
    if index.exists():
        weights = _json(index).get("weight_map")
        if not isinstance(weights, dict):
            raise _damaged(index, "it has no weight_map")
        shards = {str(name) for name in weights.values()}
    with torch.device("meta"):
        model = HybridLM(copy.deepcopy(config))
    wanted = {name: list(each.shape) for name, each in model.state_dict().items()}
    ties = model.get_expanded_tied_weights_keys()
    # Of tensors that are one, any name may have been written.
    missing = {ties.get(name, name) for name in wanted}
    for name in sorted(shards):
        found = _shard(folder / name, wanted)
        missing -= {ties.get(each, each) for each in found}
    if missing:
        first = min(missing)
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise _damaged(
            index if index.exists() else folder / _MODEL, f"it lacks the tensor {first} {wanted[first]}{more}"
        )


def _shard(path: Path, wanted: dict[str, list[int]]) -> list[str]:
    """The names of a file's tensors, each one of the model's, in its shape and finite."""
    try:
        # Opening checks the header against the file's size.
        with safe_open(path, "pt") as opened:
            names = list(opened.keys())
            for name in names:
                shape = list(opened.get_slice(name).get_shape())
                if shape != wanted.get(name):
                    allowed = f"allowed: {wanted[name]}" if name in wanted else "and the model has none of that name"
                    raise _damaged(path, f"the tensor {name} is {shape}, {allowed}")
                if not bool(opened.get_tensor(name).isfinite().all()):
                    raise _damaged(path, f"the tensor {name} has values that are not finite")
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    return names


def _archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    if broken is not None:
        raise _damaged(path, f"{broken} fails its checksum")
