"""NPRF's claims in small: kernel attention on normalised queries and keys trains from scratch, the relative bias gives
back what normalising takes, and the FFT beats the quadratic form on long sequences.

A small model of bytes is trained on text with and without the bias, and with long queries and keys (tau), for which
random features are unsure; then both forms of the operator are timed.

    python benchmarks/claims/nprf.py [--device cuda] [--steps 300]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from claim import record
from features import arguments, byte_lm

from foveate.attention.convolutions import toeplitz_attention


def timing(length: int, given: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of one causal call, one sequence of 4 heads, 16 features and 32 channels."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.rand(1, length, 4, 16, generator=generator).to(given.device) for _ in range(2))
    v = torch.randn(1, length, 4, 32, generator=generator).to(given.device)
    bias = torch.randn(4, 2 * length - 1, generator=generator).to(given.device)
    row: dict[str, Any] = {"length": length}
    outputs = {}
    for method in ("fft", "direct"):
        seconds = []
        for _ in range(given.repeats + 1):
            if given.device != "cpu":
                torch.cuda.synchronize()
            began = time.perf_counter()
            outputs[method] = toeplitz_attention(q, k, v, bias, causal=True, method=method)
            if given.device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        row[f"{method}_seconds"] = sorted(seconds[1:])[given.repeats // 2]
    difference = outputs["fft"] - outputs["direct"]
    row["relative_difference"] = float(difference.norm() / outputs["direct"].norm())
    print(row, flush=True)
    return row


def main() -> None:
    started = time.perf_counter()
    given = arguments(__doc__, steps=300, length=256, batch=16, dim=64, layers=2, repeats=5, longest=16384)
    mixers = ("nprf:feature_dim=16", "nprf:feature_dim=16,reach=0", "nprf:feature_dim=16,tau=4.0", "linear", "softmax")
    rows = [byte_lm(mixer, given) for mixer in mixers]
    lengths = [length for length in (1024, 4096, 16384) if length <= given.longest]
    times = [timing(length, given) for length in lengths]
    claim = "normalised kernel attention trains, and better with a relative bias"
    record("nprf", claim, given, started, rows=rows, times=times)


if __name__ == "__main__":
    main()
