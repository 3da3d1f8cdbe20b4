"""Launches of the linear family whose compiled form is checked, at their shipped configurations.

Run as a program in a process of its own (see `compiling`): prints one JSON object per kernel launched.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from tests.kernels.compiling import pretend_hopper, record_launches


def launch(name: str) -> None:
    """name: decay, heads x tokens, then "delta", "step" or "train"; for example "scalar 96x1024 delta train"."""
    from foveate.attention.backends.triton.delta_launch import delta_backward, delta_forward
    from foveate.attention.backends.triton.recurrent_step import recurrent_step
    from foveate.attention.backends.triton.scan_chunk_backward import scan_backward, scan_forward

    words = name.split()
    heads, tokens = (int(x) for x in words[1].split("x"))
    q = torch.empty(1, tokens, heads, 128, dtype=torch.bfloat16)
    g = {"none": None, "fixed": torch.empty(heads), "scalar": torch.empty(1, tokens, heads)}[words[0]]
    train = "train" in words
    gate = train and words[0] == "scalar"
    beta = torch.empty(1, tokens, heads)
    if "step" in words:
        recurrent_step(q, q, q, g, beta if "delta" in words else None, None, 1.0, False, 0.0, False)
    elif "delta" in words:
        o, final, kept = delta_forward(q, q, q, beta, g, None, 1.0, None, gate, train)
        if train:
            delta_backward(q, q, q, beta, g, None, 1.0, None, gate, final, kept, o, None)
    else:
        o, final, states = scan_forward(q, q, q, g, None, 1.0, None, gate)
        if train:
            scan_backward(q, q, q, g, None, 1.0, None, gate, final, states, o, None)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    found = record_launches()
    pretend_hopper()
    for each in sys.argv[1:]:
        del found[:]
        launch(each)
        for kernel in found:
            print(json.dumps({"case": each, **kernel}))
