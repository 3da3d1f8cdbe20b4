"""Copy the golden cases that have an adapter from ../shared/golden: `python -m tests.golden.copy_cases`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.golden.adapters import ADAPTERS

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "golden"


def main() -> None:
    for manifest in sorted(SHARED.glob("*/manifest.json")):
        cases = [
            case for case in json.loads(manifest.read_text()) if f"{case['system']}/{case['function']}" in ADAPTERS
        ]
        if not cases:
            continue
        target = HERE / manifest.parent.name
        target.mkdir(exist_ok=True)
        for case in cases:
            for name in (f"{case['case']}.safetensors", case.get("params_file")):
                if name:
                    shutil.copyfile(manifest.parent / name, target / name)
        (target / "manifest.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
