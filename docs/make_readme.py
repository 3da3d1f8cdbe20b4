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
        data = json.loads(file.read_text())
        parts.append(_decode(data))
    return "\n\n".join(parts) or "None recorded yet."


def _decode(data: dict[str, Any]) -> str:
    where = data["environment"]
    rows = [
        f"SmolLM2-135M, {data['length']} tokens, {where['dtype']}, {where['device']}, {where['date'][:10]}, medians of "
        f"{where['rounds']} interleaved rounds:",
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
