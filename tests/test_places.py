"""A place is asked in one way, whatever goes there, and is left as it was."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from foveate.compare.files import check_file
from foveate.errors import ProfileError, ResultsError
from foveate.methods.profile import check_target
from foveate.places import check_place

CHECKS = [(check_place, OSError), (check_file, ResultsError), (check_target, ProfileError)]


@pytest.mark.parametrize(("check", "error"), CHECKS)
def test_a_place_is_left_as_it_was(
    check: Callable[[Path], Path | None], error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "a", tmp_path / "new" / "deep" / "a", Path("a"), Path("new") / "a"):
        check(place)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "a", tmp_path / "file" / "deep" / "a", Path("/proc/a"), Path("/proc/new/a")):
        with pytest.raises(error):
            check(place)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("check", "error"), CHECKS)
def test_a_full_file_system_is_noticed(
    check: Callable[[Path], Path | None], error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its permissions say nothing of it."""

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(error, match="No space left on device"):
        check(tmp_path / "a")
