"""Linear scans and delta rule on one GPU: every configuration correct first, then timed.

    python benchmarks/gpu_scans.py [--only linear,gated_delta_long] [--out FILE]

Outputs, states and gradients are judged by the chunked backend in float64 (which the tests hold to the recurrence to
1e-12) on the timed inputs where float64 fits in memory, and, for gradients too, on 4 heads of 8,209 tokens in the same
configuration. The shipped tables are checked at other widths. Wrong candidates have a FAIL and no time. Times are
medians over replays of a CUDA graph.
All candidates are compiled by parallel processes first. The jobs then run in one process, or, where one of them
breaks the device, the rest in a fresh one. Writes gpu_scans.json to $OUT (benchmarks/results/ when OUT is unset).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks.gpu_timing import ROWS, attempt, error, failed  # noqa: E402

Candidate = tuple[Any, ...]
# Chunk, value block, warps, stages.
SCANS = [(64, 64, 4, 2), (64, 64, 4, 3)]
# The same, registers and precision of the preparation, columns, warps and stages of the sums, thread blocks per
# multiprocessor.
DELTAS = [
    (64, 128, 8, 2, 168, "bf16", 64, 4, 2, 1),
    (64, 128, 8, 3, 168, "bf16", 64, 4, 3, 1),
    (64, 128, 8, 3, None, "bf16", 64, 4, 3, 1),
]
LONG_DELTAS = [*DELTAS, (64, 128, 8, 3, 168, "bf16", 32, 4, 3, 1), (64, 128, 8, 4, 168, "bf16", 64, 4, 4, 1)]
# Chunk, value block, warps, stages, warps of the scores.
VECTORS = [(32, 64, 4, 1, 4), (32, 64, 4, 2, 4)]


@dataclass(frozen=True)
class Job:
    """One shape; width: K, V. Without candidates only the shipped table is checked.

    decay: none, fixed, scalar or vector. floor: tensors of [N, H, D] that must pass through memory.
    """

    heads: int
    length: int
    decay: str
    delta: bool = False
    backward: bool = False
    floor: int = 4
    candidates: list[Candidate] = field(default_factory=list)
    width: tuple[int, int] = (128, 128)


JOBS = {
    "linear": Job(96, 8192, "none", candidates=SCANS),
    "retention": Job(96, 8192, "fixed", candidates=SCANS),
    "scalar_gate": Job(96, 8192, "scalar", candidates=SCANS),
    "linear_long": Job(8, 65536, "none", candidates=SCANS),
    "retention_long": Job(8, 65536, "fixed", candidates=SCANS[:1]),
    "delta": Job(96, 8192, "none", True, candidates=DELTAS),
    "gated_delta": Job(96, 8192, "scalar", True, candidates=DELTAS),
    "delta_long": Job(8, 65536, "none", True, candidates=LONG_DELTAS),
    "gated_delta_long": Job(8, 65536, "scalar", True, candidates=LONG_DELTAS),
    "linear_train": Job(16, 65536, "none", backward=True, floor=11, candidates=SCANS),
    "lightning_train": Job(16, 65536, "fixed", backward=True, floor=11, candidates=SCANS[:1]),
    "scalar_gate_train": Job(16, 65536, "scalar", backward=True, floor=11, candidates=SCANS[:1]),
    "vector_gate_train": Job(16, 65536, "vector", backward=True, floor=15, candidates=VECTORS),
    "gated_delta_train": Job(16, 65536, "scalar", True, True, floor=12, candidates=DELTAS),
}
# Correctness of the shipped tables alone, at other widths (K, V).
for K, V in ((128, 16), (128, 32), (64, 64), (256, 256)):
    JOBS[f"check_gate_{K}_{V}"] = Job(4, 8209, "scalar", backward=True, width=(K, V))
    JOBS[f"check_delta_{K}_{V}"] = Job(4, 8209, "scalar", True, True, width=(K, V))
    JOBS[f"check_vector_{K}_{V}"] = Job(4, 8209, "vector", backward=True, width=(K, V))


def draw(job: Job, heads: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs [1, N, H, D] in bfloat16; keys of norm 1 for the delta rule, decays that forget over 10 to 1000 tokens."""
    from foveate.attention.linear import head_decay

    K, V = job.width
    shape = (1, length, heads, K)
    q, k, v = (torch.randn(1, length, heads, n, device="cuda", dtype=torch.bfloat16) for n in (K, K, V))
    inputs = {"q": q, "k": k, "v": v}
    if job.delta:
        inputs["k"] = torch.nn.functional.normalize(k.float(), dim=-1).bfloat16()
        inputs["beta"] = torch.rand(1, length, heads, device="cuda")
    if job.decay == "fixed":
        inputs["g"] = head_decay(heads, "alibi").cuda()
    elif job.decay == "scalar":
        inputs["g"] = torch.nn.functional.logsigmoid(4 + 1.5 * torch.randn(1, length, heads, device="cuda"))
    elif job.decay == "vector":
        inputs["g"] = torch.nn.functional.logsigmoid(4 + 1.5 * torch.randn(shape, device="cuda"))
    return inputs


class Case:
    """A job's inputs and one candidate's launches."""

    def __init__(self, job: Job, inputs: dict[str, torch.Tensor], candidate: Candidate | None) -> None:
        from foveate.attention.backends.triton.scan_configs import DeltaConfig, ScanConfig, VectorConfig

        self.job, self.inputs = job, inputs
        self.scale = job.width[0] ** -0.5
        self.config: Any = None
        if candidate is None:
            return
        if job.delta:
            chunk, block_v, warps, stages, registers, solve, sum_v, sum_warps, sum_stages, per_sm = candidate
            self.config = DeltaConfig(
                chunk, block_v, warps, stages,
                prepare_registers=registers, solve=solve, sum_v=sum_v, sum_warps=sum_warps, sum_stages=sum_stages,
                per_sm=per_sm,
            )  # fmt: skip
        elif job.decay == "vector":
            self.config = VectorConfig(*candidate)
        else:
            self.config = ScanConfig(*candidate)

    def forward(self) -> tuple:
        from foveate.attention.backends.triton.delta_launch import delta_forward
        from foveate.attention.backends.triton.scan_chunk_backward import scan_forward
        from foveate.attention.backends.triton.scan_vector import vector_forward

        x, job = self.inputs, self.job
        gate = job.backward and job.decay in ("scalar", "vector")
        if job.delta:
            return delta_forward(
                x["q"], x["k"], x["v"], x["beta"], x.get("g"), None, self.scale, None, gate, job.backward, self.config
            )
        if job.decay == "vector":
            return vector_forward(x["q"], x["k"], x["v"], x["g"], None, self.scale, None, gate, self.config)
        return scan_forward(x["q"], x["k"], x["v"], x.get("g"), None, self.scale, None, gate, self.config)

    def backward(self, saved: tuple, do: torch.Tensor) -> dict[str, torch.Tensor | None]:
        from foveate.attention.backends.triton.delta_launch import delta_backward
        from foveate.attention.backends.triton.scan_chunk_backward import scan_backward
        from foveate.attention.backends.triton.scan_vector_backward import vector_backward

        x, job = self.inputs, self.job
        gate = job.decay in ("scalar", "vector")
        _, final, kept = saved
        if job.delta:
            dq, dk, dv, dbeta, dg, _ = delta_backward(
                x["q"], x["k"], x["v"], x["beta"], x.get("g"), None, self.scale, None, gate, final, kept, do, None,
                self.config,
            )  # fmt: skip
            return {"q": dq, "k": dk, "v": dv, "beta": dbeta, "g": dg}
        if job.decay == "vector":
            dq, dk, dv, dg, _ = vector_backward(
                x["q"], x["k"], x["v"], x["g"], None, self.scale, None, gate, final, kept, do, None, self.config
            )
            return {"q": dq, "k": dk, "v": dv, "g": dg}
        dq, dk, dv, dg, _ = scan_backward(
            x["q"], x["k"], x["v"], x.get("g"), None, self.scale, None, gate, final, kept, do, None, self.config
        )
        return {"q": dq, "k": dk, "v": dv, "g": dg}


def reference(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and final state in float64, a few heads at a time, since float64 intermediates are large."""
    from foveate.attention.linear import linear_scan

    heads = inputs["q"].shape[2]
    parts = []
    for h in range(0, heads, 4):
        part = {
            name: (x[h : h + 4] if x.dim() == 1 else x[:, :, h : h + 4]).double().contiguous()
            for name, x in inputs.items()
        }
        o, state = linear_scan(**part, backend="torch", output_final_state=True)
        parts.append((o.float(), state))
    return torch.cat([o for o, _ in parts], 2), torch.cat([s for _, s in parts], 1)


def judge_of(want: tuple[torch.Tensor, torch.Tensor], gate: float = 5e-3) -> Callable[[object], dict]:
    def judge(got) -> dict:
        o, state = got[0], got[1]
        found = {"error": error(o, want[0].double()), "state_error": error(state, want[1])}
        assert found["error"] <= gate, f"error {found['error']:.3g} > {gate}"
        assert found["state_error"] <= 1e-2, f"state error {found['state_error']:.3g} > 1e-2"
        return found

    return judge


def gradient_errors(job: Job, candidate: Candidate | None) -> dict[str, float]:
    """Errors of all gradients on 4 heads of 8,209 tokens, by autograd of the chunked backend in float64."""
    from foveate.attention.linear import linear_scan

    inputs = draw(job, 4, 8209)
    double = {name: x.double().requires_grad_() for name, x in inputs.items()}
    o, _ = linear_scan(**double, backend="torch")
    do = torch.randn_like(o).to(inputs["q"].dtype)
    want = dict(zip(double, torch.autograd.grad(o, list(double.values()), do.double())))
    case = Case(job, inputs, candidate)
    saved = case.forward()
    got = case.backward(saved, do)
    found = {"error": error(saved[0], o.detach())}
    for name, gradient in got.items():
        if gradient is not None:
            found[f"d{name}"] = error(gradient, want[name])
    return found


def ragged_errors(job: Job, candidate: Candidate, inputs: dict[str, torch.Tensor], want: Any) -> dict[str, float]:
    """Errors where the last chunk is not whole."""
    o, final, *_ = Case(job, inputs, candidate).forward()
    return {"ragged_error": error(o, want[0].double()), "ragged_state_error": error(final, want[1])}


GRADIENT_GATES = {"error": 5e-3, "dq": 1.5e-2, "dk": 1.5e-2, "dv": 1.5e-2, "dbeta": 1.5e-2, "dg": 2e-2}


def judged_gradients(job: Job, candidate: Candidate | None) -> dict[str, float]:
    found = gradient_errors(job, candidate)
    over = {key: value for key, value in found.items() if not value <= GRADIENT_GATES[key]}
    assert not over, f"errors {over} of {found}"
    return found


def run_job(name: str) -> None:
    job = JOBS[name]
    if not job.candidates:
        try:
            ROWS.append({"part": "scans", "what": name, "us": None, **judged_gradients(job, None)})
        except Exception as problem:
            failed("scans", name, f"{type(problem).__name__}: {str(problem)[:300]}")
        check_device()
        return
    inputs = draw(job, job.heads, job.length)
    floor = job.floor * inputs["q"].numel() * 2 / 4.27e6
    if not job.backward:
        whole, part = judge_of(reference(inputs)), draw(job, 4, 8209)
        part_want = reference(part)
        for candidate in job.candidates:
            case = Case(job, inputs, candidate)

            def judge(got, candidate: Candidate = candidate) -> dict:
                found = whole(got) | ragged_errors(job, candidate, part, part_want)
                assert found["ragged_error"] <= 5e-3, f"{found} with a part of a chunk"
                assert found["ragged_state_error"] <= 1e-2, f"{found} with a part of a chunk"
                return found

            attempt("scans", f"{name} | {candidate}", lambda i, case=case: case.forward(), judge, 2, floor)
            check_device()
        return
    do = torch.randn_like(inputs["v"])
    for candidate in job.candidates:
        case = Case(job, inputs, candidate)

        def both(i: int, case: Case = case) -> object:
            saved = case.forward()
            return saved, case.backward(saved, do)

        def judge(got, candidate: Candidate = candidate) -> dict:
            for each in (got[0][0], *got[1].values()):
                assert each is None or bool(each.isfinite().all()), "not finite at the timed shape"
            return judged_gradients(job, candidate)

        attempt("scans", f"{name} | {candidate} | forward + backward", both, judge, 1, floor)
        check_device()


class DeviceBrokenError(RuntimeError):
    pass


def check_device() -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as problem:
        raise DeviceBrokenError(str(problem)[:200]) from problem


def compile_job(name: str) -> None:
    """Run every candidate once; failures are reported where they are judged."""
    job = JOBS[name]
    shapes = [draw(job, job.heads, job.length), draw(job, 4, 8209)]
    for candidate, inputs in itertools.product(job.candidates or [None], shapes):
        try:
            case = Case(job, inputs, candidate)
            saved = case.forward()
            if job.backward:
                case.backward(saved, torch.randn_like(inputs["v"]))
            torch.cuda.synchronize()
        except Exception as problem:
            print(f"compile {name} {candidate}: {type(problem).__name__}: {str(problem)[:200]}", flush=True)


def run_here(names: list[str], path: Path) -> None:
    """Run jobs in this process, writing what is known after each."""
    for name in names:
        begin = time.perf_counter()
        broken = False
        try:
            run_job(name)
        except DeviceBrokenError as problem:
            failed("scans", name, f"the device broke: {problem}")
            broken = True
        except Exception as problem:
            failed("scans", name, f"the job stopped: {type(problem).__name__}: {str(problem)[:300]}")
        path.write_text(json.dumps({"rows": ROWS, "done": names[: names.index(name) + 1]}))
        print(f"{name} took {time.perf_counter() - begin:.0f} s", flush=True)
        if broken:
            os._exit(1)
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(JOBS), help=f"jobs, out of {','.join(JOBS)}")
    parser.add_argument("--role", choices=("all", "compile", "run"), default="all", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = [name for name in names if name not in JOBS]
    if unknown:
        parser.error(f"unknown jobs {unknown}")
    torch.manual_seed(int(time.time()))
    if options.role == "compile":
        for name in names:
            compile_job(name)
        return
    if options.role == "run":
        run_here(names, options.out)
        return
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    begin = time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve())]
    compiling = [subprocess.Popen([*command, "--role", "compile", "--only", name]) for name in names]
    for process in compiling:
        process.wait()
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    rows: list[dict] = []
    left, part = names, folder / "gpu_scans_part.json"
    while left:
        part.unlink(missing_ok=True)
        subprocess.run([*command, "--role", "run", "--only", ",".join(left), "--out", str(part)], check=False)
        found = json.loads(part.read_text()) if part.exists() else {"rows": [], "done": left[:1]}
        if not found["rows"]:
            found["rows"] = [{"part": "scans", "what": left[0], "us": None, "failed": "the process ended early"}]
        rows += found["rows"]
        left = [name for name in left if name not in found["done"]]
    part.unlink(missing_ok=True)
    import triton

    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - begin),
    }
    out = options.out or folder / "gpu_scans.json"
    out.write_text(json.dumps({**facts, "rows": rows}, indent=1))
    print(facts)
    print(f"{len(rows)} rows, {len([each for each in rows if each.get('failed')])} failed -> {out}")


if __name__ == "__main__":
    main()
