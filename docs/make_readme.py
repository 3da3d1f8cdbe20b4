"""Write what is generated in the README and in docs/: `python docs/make_readme.py [PAGE ...]`.

Tables of methods, mixers and options come from the code, numbers from benchmarks/results, and the architectures that
tests hold from tests/models.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from foveate import registry
from foveate.compare.study_fit import StudyConfig
from foveate.hf.calibrate import calibration_names
from foveate.hf.calibrations.base import CALIBRATIONS
from foveate.lm.config import HybridConfig
from foveate.lm.convert_config import ConvertConfig
from foveate.lm.train_config import DataConfig, RunConfig
from foveate.options import Option, options_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
from tests.models import FAMILIES  # noqa: E402


def methods() -> str:
    rows = ["| name | kind | what it does | paper |", "|---|---|---|---|"]
    for kind in registry.METHOD_KINDS:
        for card in registry.cards(kind=kind):
            link = f"[{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else str(card.year)
            rows.append(f"| `{card.name}` | {card.kind} | {card.summary} | {link} |")
    mixers = ", ".join(f"`{name}`" for name in registry.names(kind="mixer"))
    return "\n".join(rows) + f"\n\nTrainable mixers for `HybridLM`: {mixers}."


def numbers() -> str:
    parts = []
    for file in sorted(RESULTS.glob("decode_cpu_*.json")):
        parts.append(_decode(json.loads(file.read_text()), "torch kernels only" if "torch" in file.stem else ""))
    for file in sorted(RESULTS.glob("needles_*.json")):
        parts.append(_needles(json.loads(file.read_text()), file.name))
    recall = RESULTS / "mqar.json"
    if recall.exists():
        parts.append(_recall(json.loads(recall.read_text()), recall.name))
    return "\n\n".join(parts) or "None recorded yet."


def gpu() -> str:
    """Our rows of `foveate bench gpu`, each beside the strongest baseline of its case."""
    data = json.loads((RESULTS / "bench_gpu_h200.json").read_text())
    rows = [row for row in data["rows"] if row["us"] is not None and row["failed"] is None]
    best = {row["case"]: row for row in rows if row["strongest"]}
    made = [
        f"One {data['device']}, bfloat16, {data['date'][:10]}, torch {data['versions']['torch']}, Triton "
        f"{data['versions']['triton']}:",
        "",
        "| | foveate | strongest baseline | times as fast | aim |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        other = best.get(row["case"])
        if row["baseline"] or other is None or "bound by launches" in row["name"]:
            continue
        name = row["name"].removeprefix("foveate").strip(", ")
        what = row["case"] + (f" ({name})" if name else "")
        aim = "" if row["met"] is None else "met" if row["met"] else "missed"
        theirs = f"{other['name']}: {_time(other['us'])}"
        made.append(f"| {what} | {_time(row['us'])} | {theirs} | {row['speedup']:.2f} | {aim} |")
    if not data["finished"]:
        made += ["", f"The run ended after {data['seconds']:.0f} s, before all of its cases were measured."]
    return "\n".join(made)


def _time(us: float) -> str:
    unit, name = next((each for each in ((1e6, "s"), (1e3, "ms")) if us >= each[0]), (1.0, "us"))
    return f"{us / unit:.3g} {name}"


def _recall(data: dict[str, Any], name: str) -> str:
    given = data["settings"]
    rows = [
        f"Multi-query recall, {given['pairs']} pairs in {given['length']} tokens: a short convolution and one mixer of "
        f"width {given['dim']}, at most {given['steps']} steps, rates {given['rates']}, "
        f"{data['environment']['device']} ({name}):",
        "",
        "| mixer | accuracy | bytes of state |",
        "|---|---|---|",
    ]
    best = sorted(data["best"], key=lambda row: -row["accuracy"])
    return "\n".join(
        [*rows, *(f"| {each['entry']} | {each['accuracy']:.3f} | {each['state_bytes']:,} |" for each in best)]
    )


def _needles(data: dict[str, Any], name: str) -> str:
    cells: dict[str, dict[tuple[str, int], float]] = {}
    for row in data["rows"]:
        cells.setdefault(_without_length(row["method"]), {})[row["task"], row["length"]] = row["score"]
    columns = sorted({at for found in cells.values() for at in found})
    known = "known" if data["rows"][-1]["query_aware"] else "not known when keys are dropped"
    rows = [
        f"Scores at half of a prompt's tokens, question {known}, {data['seeds']} seeds, "
        f"{data['environment']['device']} ({name}):",
        "",
        "| method | " + " | ".join(f"{task} {length}" for task, length in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for method, found in cells.items():
        rows.append(f"| {method} | " + " | ".join(f"{found[at]:.2f}" if at in found else "" for at in columns) + " |")
    return "\n".join(rows)


def _without_length(method: str) -> str:
    return re.sub(r"(budget|window)=\d{3,}", r"\1=half", method)


def _decode(data: dict[str, Any], note: str) -> str:
    where = data["environment"]
    rows = [
        f"SmolLM2-135M, {data['length']} tokens, {where['dtype']}, {where['device']}, {where['date'][:10]}, medians of "
        f"{where['rounds']} interleaved rounds{', ' + note if note else ''}:",
        "",
        "| method | first token, x stock | ms per token | decode speed-up over stock | cache bytes, x full |",
        "|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        share = row["bytes_ratio_to_full"]
        rows.append(
            f"| {row['method']} | {row['ttft_ratio']:.2f} | {row['decode_s_per_token'] * 1e3:.0f} | "
            f"{row['decode_speedup']:.2f} | {'' if share is None else f'{share:.3f}'} |"
        )
    return "\n".join(rows)


def families() -> str:
    return ", ".join(f"`{name}`" for name in FAMILIES)


def composition() -> str:
    """What methods declare about themselves, a row each."""
    head = ("method", "reads its own plan in", "drops keys", "heads differ", "decode step can be recorded", "alone")
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for kind in registry.METHOD_KINDS:
        for card in registry.cards(kind=kind):
            own = card.target
            acts = own.acts_in if isinstance(own.acts_in, property) else ", ".join(sorted(own.acts_in))
            told = (acts, own.evicts, own.ragged, own.steady, own.alone)
            rows.append("| " + " | ".join((f"`{card.name}`", *map(_told, told))) + " |")
    return "\n".join(rows)


def _told(value: Any) -> str:
    if isinstance(value, property):
        return "by its options"
    return value if isinstance(value, str) else "yes" if value else ""


def calibrations() -> str:
    rows = ["| calibration | settings (defaults) | used by |", "|---|---|---|"]
    users: dict[str, list[str]] = {}
    for name in registry.names():
        users.setdefault(registry.card(name).calibration or "", []).append(name)
    for name in calibration_names():
        settings = ", ".join(f"{each.name}={_default(each.default)}" for each in options_of(CALIBRATIONS[name]))
        rows.append(f"| `{name}` | {settings} | {', '.join(f'`{each}`' for each in users.get(name, []))} |")
    return "\n".join(rows)


def options(kind: type) -> Callable[[], str]:
    """A maker of the table of a configuration's options."""

    def made() -> str:
        rows = ["| option | default | allowed | what it is |", "|---|---|---|---|"]
        rows += [_option(each) for each in options_of(kind)]
        return "\n".join(rows)

    return made


def _option(each: Option) -> str:
    bounds = each.bounds
    if bounds.one_of is not None:
        allowed = ", ".join(_default(value) for value in bounds.one_of)
    else:
        allowed = str(bounds) if str(bounds).startswith((">", "<")) else _type(each.type)
    default = "required" if each.required else f"`{_default(each.default)}`"
    return f"| `{each.name}` | {default} | {allowed} | {each.help} |"


def _type(name: str) -> str:
    """As TOML has it."""
    name = name.replace("collections.abc.Mapping[str, Any]", "table").replace("dict[str, Any]", "table")
    return re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", name).replace(" | None", " or none")


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return json.dumps(list(value))
    return json.dumps(value) if isinstance(value, str | bool) else str(value)


def model_options() -> str:
    rows = ["| option | default |", "|---|---|"]
    theirs = {each.name for each in dataclasses.fields(PreTrainedConfig)}
    for each in dataclasses.fields(HybridConfig):
        if each.name not in theirs:
            default = each.default_factory() if callable(each.default_factory) else each.default
            rows.append(f"| `{each.name}` | `{_default(default)}` |")
    return "\n".join(rows)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"methods": methods, "gpu": gpu, "numbers": numbers},
    "docs/methods.md": {"families": families, "composition": composition, "calibrations": calibrations},
    "docs/training.md": {
        "model": model_options,
        "data": options(DataConfig),
        "run": options(RunConfig),
        "convert": options(ConvertConfig),
        "study": options(StudyConfig),
    },
}


def main(pages: list[str]) -> None:
    for page in pages or PAGES:
        path = ROOT / page
        text = path.read_text()
        for name, make in PAGES[page].items():
            pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.S)
            made = make()
            text = pattern.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
        path.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
