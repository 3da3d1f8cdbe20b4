"""Profiles: what a calibration found out about one model, as safetensors plus JSON, never pickle.

A profile is a folder NAME/ with `profile.json` (schema version, method, model identity, settings) and
`profile.safetensors` (its tensors), and nothing else. Both are written to a folder beside it that is then renamed into
place; an older profile is renamed aside first and deleted last. What is no profile is never replaced.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from foveate.errors import ProfileError
from foveate.places import check_place

SCHEMA_VERSION = 1
FILES = frozenset({"profile.json", "profile.safetensors"})


@dataclass(frozen=True)
class ModelIdentity:
    """What a profile is bound to. `fingerprint` hashes the signs of a sample of the weights, in any precision."""

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    fingerprint: str


@dataclass(frozen=True)
class Profile:
    """A calibration result.

    kind: the calibration that made it ("duo"). tensors: by name, [layers, heads] tables and the like.
    settings: what it was made with, plain data.
    """

    kind: str
    model: ModelIdentity
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write atomically; an older profile in the same place is replaced whole.

        After a crash the new or the old one is there, whole, in its place or beside it. ProfileError as `check_target`.
        """
        from safetensors.torch import save_file

        target = check_target(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            save_file(
                {name: tensor.contiguous() for name, tensor in self.tensors.items()}, made / "profile.safetensors"
            )
            described = {
                "schema_version": SCHEMA_VERSION,
                "kind": self.kind,
                "model": asdict(self.model),
                "settings": self.settings,
                "tensors": {name: list(tensor.shape) for name, tensor in self.tensors.items()},
            }
            (made / "profile.json").write_text(json.dumps(described, indent=2) + "\n")
            _move_in(made, target)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        return target

    def check(self, kind: str, model: ModelIdentity) -> None:
        """Raise ProfileError unless this is a profile of that kind for that model."""
        if self.kind != kind:
            raise ProfileError(f"this is a {self.kind!r} profile, and {kind!r} is needed; {remake(kind)}")
        for name in ("model_type", "layers", "heads", "kv_heads", "head_dim", "fingerprint"):
            ours, theirs = getattr(self.model, name), getattr(model, name)
            if ours != theirs:
                raise ProfileError(
                    f"the {kind!r} profile was made for another model: {name} is {ours!r} there and {theirs!r} here; "
                    f"{remake(kind)}"
                )


def check_target(folder: str | os.PathLike[str]) -> Path:
    """Where a profile would be written, links followed; call it before work whose result goes there.

    Raises ProfileError for a place that holds anything but a profile, and for one that cannot be written.
    """
    target = Path(os.path.realpath(folder))
    try:
        if target.exists() and not target.is_dir():
            raise ProfileError(f"{target} is a file, and a profile is a folder; name another place")
        held = {each.name for each in target.iterdir()} if target.exists() else set()
        if held and not ("profile.json" in held and held <= FILES):
            other = sorted(held - FILES) or sorted(held)
            shown = ", ".join(other[:3]) + (", ..." if len(other) > 3 else "")
            raise ProfileError(
                f"{target} holds what is no profile ({shown}) and is left as it is; name a new or empty folder, or one "
                "that holds an older profile"
            )
        check_place(target)
    except OSError as error:
        raise ProfileError(f"{target} cannot be written ({error.strerror}); name another place") from error
    return target


def _move_in(made: Path, target: Path) -> None:
    """Rename a new folder into place; the one that was there goes when it is in."""
    if not target.exists():
        os.replace(made, target)
        return
    old = made.with_name(f"{made.name}.old")
    os.replace(target, old)
    try:
        os.replace(made, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


def remake(kind: str) -> str:
    return f"make one with: foveate calibrate {kind} --model MODEL"


def load(folder: str | os.PathLike[str], kind: str) -> Profile:
    """Read a profile; one that is missing or damaged raises ProfileError with the command that makes it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    target = Path(folder)
    if not (target / "profile.json").exists():
        raise ProfileError(f"there is no {kind!r} profile at {target}; {remake(kind)}")
    try:
        described = json.loads((target / "profile.json").read_text())
        version = described["schema_version"]
        if version != SCHEMA_VERSION:
            raise ProfileError(
                f"{target} has schema version {version}, this foveate reads {SCHEMA_VERSION}; {remake(kind)}"
            )
        tensors = load_file(target / "profile.safetensors")
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if shapes != described["tensors"]:
            raise ProfileError(f"{target} is damaged: its tensors {shapes} are not the ones described; {remake(kind)}")
        return Profile(described["kind"], ModelIdentity(**described["model"]), tensors, described.get("settings", {}))
    except (json.JSONDecodeError, KeyError, TypeError, SafetensorError, UnicodeDecodeError, FileNotFoundError) as error:
        raise ProfileError(f"{target} is damaged ({type(error).__name__}: {error}); {remake(kind)}") from error


def default_folder(kind: str, model: ModelIdentity) -> Path:
    """Where profiles are kept when no place is named: the user's cache, by kind and model."""
    root = Path(os.environ.get("FOVEATE_CACHE", Path.home() / ".cache" / "foveate"))
    return root / "profiles" / f"{kind}-{model.model_type}-{model.layers}x{model.kv_heads}-{model.fingerprint}"


def shipped(kind: str, model: ModelIdentity) -> Path | None:
    """A profile that comes with foveate (for the bundled model), None when there is none for this one."""
    for described in sorted(Path(__file__).parents[1].glob(f"profiles/{kind}-*/profile.json")):
        if json.loads(described.read_text())["model"] == asdict(model):
            return described.parent
    return None


def resolve(profile: str | Profile | None, kind: str, model: ModelIdentity) -> Profile:
    """A profile given as an object or a folder, else the user's own, else the shipped one; checked for the model."""
    if isinstance(profile, Profile):
        found = profile
    else:
        own = default_folder(kind, model)
        place = profile or (own if own.exists() else shipped(kind, model)) or own
        found = load(place, kind)
    found.check(kind, model)
    return found
