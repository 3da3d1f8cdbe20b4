"""Profiles: saved whole, loaded only for the model they were made for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from foveate.errors import ProfileError
from foveate.methods.profile import ModelIdentity, Profile, load, resolve

MODEL = ModelIdentity("llama", 2, 4, 2, 16, "abc")


def made(folder: Path) -> Path:
    return Profile("duo", MODEL, {"gates": torch.rand(2, 2)}, {"steps": 3}).save(folder / "p")


def test_round_trip_and_replacement(tmp_path: Path) -> None:
    folder = made(tmp_path)
    again = load(folder, "duo")
    assert again.settings == {"steps": 3}
    assert again.model == MODEL
    Profile("duo", MODEL, {"gates": torch.zeros(2, 2)}).save(folder)
    assert bool((load(folder, "duo").tensors["gates"] == 0).all())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["p"]


def test_missing_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="foveate calibrate duo"):
        load(tmp_path / "none", "duo")


@pytest.mark.parametrize("damage", ["not json", '{"schema_version": 1}', '{"schema_version": 99, "kind": "duo"}'])
def test_damaged_description(tmp_path: Path, damage: str) -> None:
    folder = made(tmp_path)
    (folder / "profile.json").write_text(damage)
    with pytest.raises(ProfileError, match="damaged|schema version 99"):
        load(folder, "duo")


def test_damaged_tensors(tmp_path: Path) -> None:
    folder = made(tmp_path)
    (folder / "profile.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ProfileError, match="damaged"):
        load(folder, "duo")
    (folder / "profile.safetensors").unlink()
    with pytest.raises(ProfileError, match="damaged"):
        load(folder, "duo")


@pytest.mark.parametrize("field", ["model_type", "layers", "kv_heads", "fingerprint"])
def test_foreign_models_are_refused(tmp_path: Path, field: str) -> None:
    folder = made(tmp_path)
    value = "other" if field in ("model_type", "fingerprint") else 7
    other = dataclasses.replace(MODEL, **{field: value})
    with pytest.raises(ProfileError, match=f"another model: {field}"):
        resolve(str(folder), "duo", other)
    with pytest.raises(ProfileError, match="'razor' is needed"):
        resolve(str(folder), "razor", MODEL)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        made(tmp_path)
    assert list(tmp_path.iterdir()) == []
