"""calibrate: find out about one model what a method needs to know, and save it as a profile."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil
from typing import Any

import torch

from foveate.errors import OptionError, UnknownNameError
from foveate.hf import calibrations
from foveate.hf.calibrations.base import CALIBRATIONS, Work
from foveate.hf.identity import identify
from foveate.hf.modules import check_model
from foveate.methods.profile import Profile, check_target, default_folder
from foveate.options import check_names, nearest, options_of


def calibration_names() -> list[str]:
    """What can be calibrated, sorted."""
    for module in pkgutil.iter_modules(calibrations.__path__, prefix=f"{calibrations.__name__}."):
        importlib.import_module(module.name)
    return sorted(CALIBRATIONS)


def calibrate(
    name: str,
    model: Any,
    tokenizer: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Profile:
    """Calibrate `name` ("duo", "razor", "retrieval-heads", "compresskv") for a model and save the profile.

        foveate.calibrate("duo", model, tokenizer, steps=200)
        foveate.apply(model, "duo")

    Args:
        model: a transformers causal LM; it is as it was afterwards.
        tokenizer: its tokenizer.
        out: folder of the profile (written whole or not at all); default: the user's cache, where methods look.
        progress: draw a progress bar on stderr.
        **settings: the calibration's own, see its class under foveate.hf.calibrations.
    Returns:
        the saved profile. Long calibrations save unfinished work beside it (FOLDER.partial) and go on from there when
        called again with the same settings.
    Raises:
        UnknownNameError, OptionError, ProfileError (for `out`) before any work; UnsupportedModelError for the model.
    """
    if name not in calibration_names():
        raise UnknownNameError(f"there is no calibration {name!r}{nearest(name, CALIBRATIONS)}")
    kind = CALIBRATIONS[name]
    check_names(f"calibration {name!r}", settings, options_of(kind))
    chosen = kind(**settings)
    check_model(model)
    if not callable(tokenizer):
        raise OptionError(f"calibrate({name!r}): tokenizer={tokenizer!r}, allowed: the model's tokenizer")
    identity = identify(model)
    target = check_target(out if out is not None else default_folder(name, identity))
    work = Work(identity, check_target(target.with_name(target.name + ".partial")), progress)
    found = chosen.run(model, tokenizer, work)
    described = {**dataclasses.asdict(chosen), **found.facts, "dtype": str(model.dtype), "torch": torch.__version__}
    profile = Profile(name, identity, found.tensors, described)
    profile.save(target)
    work.forget_partial()
    return profile
