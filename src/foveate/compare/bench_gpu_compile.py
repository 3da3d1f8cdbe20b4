"""Compiles what `foveate bench gpu` is going to time, in several processes at once.

Triton and Inductor keep compiled kernels in files, which the measuring process finds. flash-linear-attention tries
dozens of configurations per kernel: compiling them one after another would take longer than the benchmark. Which one is
fastest is decided by the measuring process alone, on a GPU that nothing else uses.

    python -m foveate.compare.bench_gpu_compile PART/NAME ...
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

# Longer would cost more than it spares; what is not compiled by then is compiled when it is measured.
SECONDS = 150.0


def compile_jobs(
    keys: Sequence[str], *, seconds: float = SECONDS, start: Callable[[str], subprocess.Popen[bytes]] | None = None
) -> None:
    """One process per job, as many at a time as there are cores; ends those that run when the time is up."""
    start = start or _start
    waiting = list(keys)
    running: list[subprocess.Popen[bytes]] = []
    until = time.monotonic() + seconds
    try:
        while (waiting or running) and time.monotonic() < until:
            running = [each for each in running if each.poll() is None]
            while waiting and len(running) < max(1, os.cpu_count() or 1):
                running.append(start(waiting.pop(0)))
            time.sleep(0.1)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()


def _start(key: str) -> subprocess.Popen[bytes]:
    # Timings of configurations beside other processes must not be remembered.
    environment = {**os.environ, "FLA_CACHE_RESULTS": "0", "TRITON_CACHE_AUTOTUNING": "0"}
    command = [sys.executable, "-m", "foveate.compare.bench_gpu_compile", key]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def call_once(key: str, device: str = "cuda") -> list[str]:
    """Run every contender of a job once; returns those that failed, which the measuring process will report."""
    import torch

    from foveate.compare import bench_gpu

    failed = []
    for job in bench_gpu.jobs(bench_gpu.Sizes(), torch.device(device)):
        if job.key != key:
            continue
        for contender in job.build().contenders:
            try:
                with contender.open() as (run, _):
                    run(0)
            except Exception as problem:
                failed.append(f"{contender.name}: {type(problem).__name__}: {problem}"[:300])
    return failed


if __name__ == "__main__":
    for each in sys.argv[1:]:
        for line in call_once(each):
            sys.stderr.write(f"{each}: {line}\n")
