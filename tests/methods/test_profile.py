"""Profiles: saved whole, loaded only for the model they were made for."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from foveate.errors import ProfileError
from foveate.hf.calibrate import calibrate
from foveate.hf.calibrations.duo import DuoCalibration
from foveate.hf.identity import identify
from foveate.methods.profile import ModelIdentity, Profile, check_target, load, resolve
from tests.models import tiny
from tests.toy_tokenizer import ToyTokenizer

PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        made(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_replacement_leaves_the_old_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    folder = made(tmp_path)
    before = load(folder, "duo").tensors["gates"]
    replace, calls = os.replace, []

    def failing(source: Path, target: Path) -> None:
        calls.append(source)
        full() if len(calls) == fails_at else replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space"):
        Profile("duo", MODEL, {"gates": torch.zeros(2, 2)}).save(folder)
    assert torch.equal(load(folder, "duo").tensors["gates"], before)
    assert [each.name for each in tmp_path.iterdir()] == ["p"]


def test_a_crash_while_replacing_leaves_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path)
    before = load(folder, "duo").tensors["gates"]
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(source) != folder:
            os._exit(9)
        replace(source, target)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "replace", killed)
        Profile("duo", MODEL, {"gates": torch.zeros(2, 2)}).save(folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = sorted(tmp_path.iterdir(), key=lambda each: each.suffix)
    assert [each.suffix for each in left] == ["", ".old"]
    assert bool((load(left[0], "duo").tensors["gates"] == 0).all())
    assert torch.equal(load(left[1], "duo").tensors["gates"], before)


@pytest.mark.parametrize("names", [["thesis.tex"], ["profile.json", "thesis.tex"], ["profile.safetensors"], ["deep/x"]])
def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "p"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    with pytest.raises(ProfileError, match="holds what is no profile"):
        check_target(folder)
    with pytest.raises(ProfileError, match="left as it is"):
        made(tmp_path)
    assert all((folder / name).read_text() == "mine" for name in names)
    assert [each.name for each in tmp_path.iterdir()] == ["p"]


def test_where_a_profile_may_go(tmp_path: Path) -> None:
    assert check_target(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "p").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "p")
    Profile("duo", MODEL, {"gates": torch.zeros(2, 2)}).save(tmp_path / "link")
    Profile("duo", MODEL, {"gates": torch.ones(2, 2)}).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert bool((load(tmp_path / "p", "duo").tensors["gates"] == 1).all())


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ProfileError, match="is a file"):
        check_target(tmp_path / "file")
    with pytest.raises(ProfileError, match="cannot be written"):
        check_target(tmp_path / "file" / "p")
    with pytest.raises(ProfileError, match="cannot be written"):
        check_target("/proc/nowhere/p")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("taken", ["p", "p.partial"])
def test_calibration_refuses_a_place_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    def ran(*_: object) -> None:
        pytest.fail("the calibration ran")

    monkeypatch.setattr(DuoCalibration, "run", ran)
    (tmp_path / taken).mkdir()
    (tmp_path / taken / "thesis.tex").write_text("mine")
    with pytest.raises(ProfileError, match=r"holds what is no profile \(thesis.tex\)"):
        calibrate("duo", tiny("llama"), ToyTokenizer(), out=tmp_path / "p", progress=False)
    assert (tmp_path / taken / "thesis.tex").read_text() == "mine"


def test_a_model_is_the_same_in_every_precision() -> None:
    """Also with weights that are halfway between two bfloat16 numbers, or too small or large for float16."""
    model = tiny("llama").double()
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[0, :4] = torch.tensor([1 + 2**-8, 1 + 2**-8 + 2**-20, -1e-30, -1e9])
    found = {str(dtype): identify(model.to(dtype)).fingerprint for dtype in PRECISIONS}
    assert len(set(found.values())) == 1, found


def test_another_model_has_another_fingerprint() -> None:
    model = tiny("llama")
    before = identify(model).fingerprint
    assert identify(tiny("llama", seed=1)).fingerprint != before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-4 * torch.randn_like(parameter))
    assert identify(model).fingerprint != before
