"""Flow-Attention's claim in small: competition and allocation bring linear attention closer to softmax.

A small model of bytes is trained on text with each mixer; the held-out loss is compared.

    python benchmarks/claims/flow.py [--device cuda] [--steps 400]
"""

from __future__ import annotations

import time

from claim import record
from features import arguments, byte_lm


def main() -> None:
    started = time.perf_counter()
    given = arguments(__doc__, steps=400, length=256, batch=32, dim=128, layers=4)
    rows = [byte_lm(mixer, given) for mixer in ("linear", "flow", "softmax:rotary=false", "softmax")]
    claim = "a model of flow attention has a lower loss than one of plain linear attention"
    record("flow", claim, given, started, rows=rows)


if __name__ == "__main__":
    main()
