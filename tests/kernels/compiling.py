"""Compiles what a launcher would launch on a Hopper GPU, without one, and tells registers, spills and shared memory.

Run as a program in a process of its own (`python -m tests.kernels.compiling NAME`), because Triton's interpreter
cannot be switched off once it is on. It prints one JSON object per kernel launched.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def compiled(case: str, program: str = "compiling") -> list[dict[str, Any]]:
    """What a case of `tests.kernels.PROGRAM` launches, compiled in a process of its own: one dict per kernel."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, "-m", f"tests.kernels.{program}", case]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def record_launches() -> list[dict[str, Any]]:
    """From now on launches compile for sm_90 and run nothing; the list fills with their resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Hopper:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    driver.set_active(Hopper())
    found: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append({"kernel": self.__name__, "grid": list(grid), **resources(kernel, Path(triton.__file__).parent)})
        return kernel

    JITFunction.run = compile_only
    return found


def resources(kernel, package: Path) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = package / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        path = f"{tool.parent}:{os.environ['PATH']}"
        sass = subprocess.run(
            [str(tool), "--dump-sass", file.name], capture_output=True, text=True, env={**os.environ, "PATH": path}
        ).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        "shared": kernel.metadata.shared,
        "cp_async": ptx.count("cp.async.cg.shared") + ptx.count("cp.async.ca.shared"),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "num_warps": kernel.metadata.num_warps,
        "num_stages": kernel.metadata.num_stages,
    }


def pretend_hopper() -> None:
    """The launchers ask for the device's size and for dependent launches; answer as an H200 would."""
    from foveate.attention.backends.triton import runtime

    runtime.multiprocessors = lambda index: 132
    runtime.has_dependent_launch = lambda index: True


def compile_cases(names: list[str]) -> list[dict[str, Any]]:
    os.environ["TRITON_INTERPRET"] = "0"
    found = record_launches()
    pretend_hopper()
    from tests.kernels.cases import CASES

    results = []
    for name in names or list(CASES):
        del found[:]
        CASES[name]()
        results += [{"case": name, **each} for each in found]
    return results


if __name__ == "__main__":
    for result in compile_cases(sys.argv[1:]):
        print(json.dumps(result))
