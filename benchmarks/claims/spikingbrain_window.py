"""SpikingBrain's claim about layers in small: linear layers and sliding windows in turn come near full attention on
text and recall, with a state and a time per token that do not grow; a full layer among them is compared too.

    python benchmarks/claims/spikingbrain_window.py [--device cuda] [--steps 400] [--length 512] [--dim 128]

The 7B model has linear layers and windows in turn. Windows reach an eighth of a training text. Recall is MQAR as in the
claim of the Dynamical Systems Framework, behind a short convolution, in windows of 16 tokens. Decoding is of one layer
of 1024 channels, with a window of `length`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from claim import record
from dsf import LENGTH, VOCAB, recalled
from language import arguments, decoding, on_text

from foveate.lm import HybridConfig, HybridLM

CLAIM = "linear layers and windows in turn come near full attention, with a state and a time per token that stay"
RECALL_WINDOW = LENGTH // 8


def stacks(window: int) -> dict[str, list[str]]:
    """Two layers each."""
    near = f"spikingbrain-window:window={window}"
    return {
        "full": ["softmax", "softmax"],
        "window": [near, near],
        "linear": ["spikingbrain", "spikingbrain"],
        "linear and window": ["spikingbrain", near],
        "linear, tied gate, and window": ["spikingbrain:gate=tied", near],
        "linear and full": ["spikingbrain", "softmax"],
    }


def growing(mixers: list[str], given: argparse.Namespace) -> dict[int, int]:
    """Bytes of a stack's state by tokens read."""
    model = HybridLM(HybridConfig(mixers=mixers, dim=given.dim, heads=4, vocab_size=256))
    return {length: model.state_bytes(1, length) for length in (given.length, 16 * given.length, 256 * given.length)}


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, steps=400)
    rows: dict[str, list[dict[str, Any]]] = {"text": [], "recall": [], "decoding": []}

    def save() -> None:
        record("spikingbrain_window", CLAIM, given, started, chance=2 / VOCAB, **rows)

    text = {name: pair * (given.layers // 2) for name, pair in stacks(given.length // 8).items()}
    # One layer in four is full, as one in seven of the 76B model.
    text["linear, window, and one full"] = [*text["linear and window"][:-1], "softmax"]
    for name, mixers in text.items():
        rows["text"].append({"stack": name, **on_text(mixers, given), "state_bytes_by_length": growing(mixers, given)})
        save()
    for name, pair in stacks(RECALL_WINDOW).items():
        rows["recall"].append({"stack": name, **recalled(["baseconv", *pair], given)})
        save()
    for spec in ("softmax", "spikingbrain", f"spikingbrain-window:window={given.length}"):
        rows["decoding"] += decoding([spec], [given.length, 8 * given.length, 64 * given.length], given)
        save()


if __name__ == "__main__":
    main()
