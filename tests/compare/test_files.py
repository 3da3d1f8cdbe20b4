"""Files are whole or absent, whatever fails while they are written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from foveate.compare.cells import CellStore
from foveate.compare.files import check_file, compact, document, make_folder, write_atomic
from foveate.errors import FoveateError, ResultsError


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_full_disk_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = write_atomic(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(ResultsError, match=r"a\.json could not be written \(No space left on device\).*run the same"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkstemp", full)
    with pytest.raises(ResultsError, match="No space left"):
        write_atomic(tmp_path / "a.json", "new")
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.json", "new")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ResultsError, match=r"the folder .*out cannot be made \(File exists\)"):
        make_folder(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_place_is_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_file(tmp_path / "new" / "a.json") == tmp_path / "new" / "a.json"
    assert os.listdir(tmp_path) == []
    with pytest.raises(ResultsError, match="is a folder, and a file is needed"):
        check_file(tmp_path)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ResultsError, match=r"a\.json cannot be written \(Not a directory\); name another place"):
        check_file(tmp_path / "mine" / "a.json")
    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(ResultsError, match=r"a\.json cannot be written \(No space left on device\)"):
        check_file(tmp_path / "a.json")


def test_results_errors_are_both_ours_and_os_errors() -> None:
    assert issubclass(ResultsError, FoveateError)
    assert issubclass(ResultsError, OSError)


def test_numbers_that_json_lacks_become_null() -> None:
    assert compact({"a": float("inf"), "b": (1, float("nan"))}) == '{"a":null,"b":[1,null]}'


def test_a_document_is_json_with_one_row_per_line() -> None:
    data = {"version": 1, "rows": [{"a": 1}, {"a": 2}], "none": []}
    text = document(data)
    assert json.loads(text) == data
    assert text.splitlines()[2:5] == [' "rows": [', '  {"a":1},', '  {"a":2}']


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: text.replace('"score":0.5', '"score":0.7'),
        lambda text: text.replace('"seed":3', '"seed":4'),
        lambda text: "[]",
        lambda text: text.replace('"cell_version":1', '"cell_version":0'),
    ],
    ids=["empty", "cut", "changed figure", "changed key", "no object", "other version"],
)
def test_a_damaged_cell_is_not_used(tmp_path: Path, damage: Any) -> None:
    store = CellStore(tmp_path)
    key = {"seed": 3, "lengths": (1, 2)}
    store.save(key, {"score": 0.5, "pair": (1, 2)})
    assert store.load(key) == {"score": 0.5, "pair": [1, 2]}
    path = store.path(key)
    damaged = damage(path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged)
    assert store.load(key) is None
    assert store.damaged == [path.name]


def test_a_cell_of_another_key_is_not_found(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    store.save({"seed": 3}, {"score": 0.5})
    assert store.load({"seed": 4}) is None
    assert store.damaged == []
