"""Write the README's generated parts from the registry and from benchmarks/results: `python docs/make_readme.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from foveate import registry

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


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


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, made in (("methods", methods()), ("numbers", numbers())):
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.S)
        text = pattern.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    readme.write_text(text)


if __name__ == "__main__":
    main()
