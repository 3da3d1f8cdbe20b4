"""The command that made a result is told, and no place of the machine it ran on."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.compare.environment import command_line


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["/usr/bin/foveate", "compare", "--seeds", "3"], "foveate compare --seeds 3"),
        (["/x/site-packages/foveate/__main__.py", "list"], "foveate list"),
        (["benchmarks/needles.py"], "needles.py"),
        (["foveate", "compare", "--methods", "full a:b=1"], "foveate compare --methods 'full a:b=1'"),
        (["foveate", "--model", "/home/me/models/tiny", "--out=/tmp/x/r.json"], "foveate --model tiny --out=r.json"),
        (["foveate", "--tasks", "data-file:path=/home/me/q.jsonl,chat=true"], "foveate --tasks "
         "data-file:path=q.jsonl,chat=true"),
        (["foveate", "--out", "{here}/results/r.json"], "foveate --out results/r.json"),
        (["foveate", "--out", "results/r.json", "../up"], "foveate --out results/r.json ../up"),
        (["foveate", "~/models/tiny"], "foveate tiny"),
        (["foveate", "C:\\me\\tiny"], "foveate tiny"),
        (["foveate", "/"], "foveate /"),
        (["foveate", "HuggingFaceTB/SmolLM2-135M"], "foveate HuggingFaceTB/SmolLM2-135M"),
        (["foveate", "https://example.org/model"], "foveate https://example.org/model"),
        (["foveate", "--out", "/home/me/my files/r.json"], "foveate --out r.json"),
        (["foveate", "--tasks", "data-file:path=/a/b.jsonl data-file:path=/c/d.jsonl"], "foveate --tasks "
         "'data-file:path=b.jsonl data-file:path=d.jsonl'"),
        (["foveate", "'/home/me/r.json'"], """foveate ''"'"'r.json'"'"''"""),
        (["-c", "x"], None),
        (["-m"], None),
        ([""], None),
        ([], None),
        (["/env/ipykernel_launcher.py", "-f", "/run/kernel.json"], None),
    ],
)  # fmt: skip
def test_command_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: list[str], told: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [each.replace("{here}", str(tmp_path)) for each in given])
    assert command_line() == told
