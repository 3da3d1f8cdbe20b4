"""Tuned launch configurations: what is kept, and what is refused without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from foveate.attention.backends.triton import tuned
from foveate.compare import tune
from foveate.errors import BackendError, OptionError


@dataclass(frozen=True)
class Config:
    block: int
    warps: int = 4


def entry(table: str, key: object, **config: int) -> dict[str, object]:
    return {"table": table, "key": key, "config": config, "error": 1e-3, "us": 2.0}


def test_kept_entries_extend_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    path = tuned.file_of("Some GPU 80GB")
    tuned.keep(path, "Some GPU 80GB", [entry("decode", [True, 12], block=64), entry("scan", 64, block=16)])
    tuned.keep(path, "Some GPU 80GB", [entry("decode", [True, 12], block=128, warps=8)])
    assert [each["config"]["block"] for each in tuned.entries(path)] == [16, 128]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU 80GB")
    tuned._of_this_machine.cache_clear()
    try:
        shipped = {(False, 12): Config(32), (True, 12): Config(32)}
        assert tuned.extended("decode", shipped) == {(False, 12): Config(32), (True, 12): Config(128, 8)}
        assert tuned.extended("scan", {128: Config(1)}) == {128: Config(1), 64: Config(16)}
    finally:
        tuned._of_this_machine.cache_clear()


@pytest.mark.parametrize("text", ["{", '{"schema_version": 9, "entries": []}', '{"entries": []}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(BackendError, match="delete it"):
        tuned.entries(path)


def test_without_a_gpu_or_a_known_table() -> None:
    with pytest.raises(OptionError, match="allowed: decode, blocks, scan"):
        tune.tune(["dense"])
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="needs a CUDA GPU"):
            tune.tune()
