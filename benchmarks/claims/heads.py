"""What the claims about calibrated heads share: profiles, and the same profile with other heads chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.errors import ProfileError
from foveate.hf.calibrate import calibrate
from foveate.hf.identity import identify
from foveate.methods.profile import Profile, resolve


def profile_of(name: str, model: Any, tokenizer: Any) -> Profile:
    """The model's profile, calibrated now if there is none."""
    try:
        return resolve(None, name, identify(model))
    except ProfileError:
        return calibrate(name, model, tokenizer)


def shuffled(profile: Profile, names: tuple[str, ...], seed: int) -> Profile:
    """The same values at other heads; the tables `names` are permuted alike."""
    size = profile.tensors[names[0]].numel()
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return changed(
        profile, {name: profile.tensors[name].flatten()[order].view_as(profile.tensors[name]) for name in names}
    )


def changed(profile: Profile, tables: dict[str, Tensor]) -> Profile:
    return dataclasses.replace(profile, tensors={**profile.tensors, **tables})


def saved(folder: str, label: str, profile: Profile) -> str:
    """A place from which a spec can name the profile."""
    return str(profile.save(Path(folder) / label))


def labelled(rows: list[dict[str, Any]], labels: dict[str, str]) -> list[dict[str, Any]]:
    """Rows with what their method's spec stands for; specs that hold a temporary folder lose it."""
    return [{**row, "method": labels[row["method"]]} for row in rows]
