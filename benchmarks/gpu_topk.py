"""Top-k on one GPU: exact first, then timed by replays of a CUDA graph of 8 calls.

    python benchmarks/gpu_topk.py

`topk_select` in several configurations beside torch.topk and beside top-k by digits (`topk_by_digits.py`, 4 launches
for float32), on 2048 of 131072 scores in 8 rows, on other distributions of scores, with few and with short rows and
with other k. Every candidate must give exactly the positions of a stable sort before it is timed; a failure is a row
without a time. All parts run once side by side without timing, which compiles every kernel into Triton's cache, and
then one after another. Writes $OUT/gpu_topk.json (benchmarks/results/ when OUT is unset) after each part.
"""

# ruff: noqa: B023  (closures here run before their loop goes on)
from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks.gpu_attention2 import WARM, attempt, correct, wait  # noqa: E402
from benchmarks.gpu_timing import ROWS, failed, unjudged  # noqa: E402

R, N, K = 8, 131072, 2048
# block, num_warps, most_chunks, least_block, per_sm, width, late_warps
CONFIGS = [
    (4096, 8, 128), (4096, 8, 128, 512, 2, 1024), (4096, 8, 128, 512, 2, 512, 8), (4096, 8, 128, 512, 2, 512, 2),
    (4096, 8, 128, 512, 2, 1024, 8), (4096, 8, 128, 512, 2, 256, 2), (4096, 16, 128, 512, 1), (4096, 16, 16, 512, 1),
    (2048, 8, 64, 512, 4), (2048, 4, 64, 512, 4), (8192, 16, 16, 512, 1), (2048, 8, 32), (4096, 4, 32),
]  # fmt: skip
FEW = [(4096, 8, most) for most in (32, 64, 128, 256)] + [(8192, 16, 128, 512, 1), (2048, 4, 256, 512, 2)]
SHORT = [(4096, 8, 128, least) for least in (256, 512, 1024)] + [(4096, 8, 128, 512, 2, 128, 1)]


def exactly(scores: torch.Tensor, k: int, length: torch.Tensor | None = None) -> Callable:
    """Judges positions by a stable sort in float64: NaN lowest, equal scores by position, -1 where a row has fewer."""
    n = scores.shape[1]
    absent = torch.zeros_like(scores, dtype=torch.bool)
    if length is not None:
        absent = torch.arange(n, device=scores.device) >= length[:, None]
    # Adding 0 makes -0 a 0.
    value = scores.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
    # Three stable sorts, the last one first in importance: absent, NaN, value.
    order = value.argsort(dim=-1, descending=True, stable=True)
    for last in (scores.isnan(), absent):
        order = order.gather(1, last.gather(1, order).to(torch.int8).argsort(dim=-1, stable=True))
    chosen = order[:, :k]
    chosen = torch.where(absent.gather(1, chosen), n, chosen).sort(-1).values
    want = torch.where(chosen == n, -1, chosen).to(torch.int32)

    def judge(got: torch.Tensor) -> dict:
        wrong = int((got != want).sum())
        assert wrong == 0, f"{wrong} of {want.numel()} positions differ"
        return {"error": 0.0}

    return judge


def compare(what: str, sets: list[torch.Tensor], k: int, configs: list[tuple], digits: bool = True) -> None:
    """torch.topk, top-k by digits, what the package ships, and the given configurations of it."""
    from benchmarks.topk_by_digits import topk_by_digits

    from foveate.attention.backends.triton.configs import TopkConfig
    from foveate.attention.backends.triton.topk import topk_select

    judge = exactly(sets[0], k)

    def time_it(label: str, run: Callable, judge: Callable = judge) -> None:
        attempt("topk", f"{what} | {label}", lambda i: run(sets[i % len(sets)], k), judge, eager=False)

    time_it("torch.topk", torch.topk, unjudged)
    if digits:
        time_it("by digits", topk_by_digits)
    time_it("shipped", topk_select)
    for c in configs:
        time_it(str(c), partial(topk_select, config=TopkConfig(*c)))


def normal(rows: int, n: int, count: int = 4) -> list[torch.Tensor]:
    return [torch.randn(rows, n, device="cuda") for _ in range(count)]


def main_part() -> None:
    sets = normal(R, N)
    compare(f"{K} of {N} x {R} float32", sets, K, CONFIGS)
    compare(f"{K} of {N} x {R} bfloat16", [each.bfloat16() for each in sets], K, CONFIGS[:4])


def draws(sets: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    masked = [torch.rand_like(each) < 0.97 for each in sets]
    return {
        "around 20": [3 * each + 20 for each in sets],
        "around 1000": [3 * each + 1000 for each in sets],
        "threshold at 0": [each - 2.15 for each in sets],
        "ascending": [each.sort(-1).values for each in sets],
        "softmax": [(3 * each).softmax(-1) for each in sets],
        "Cauchy": [each / torch.randn_like(each) for each in sets],
        "four distinct values": [torch.randint(0, 4, each.shape, device="cuda").float() for each in sets],
        "all equal": [torch.zeros_like(each) for each in sets],
        "97 % masked": [each.masked_fill(m, -torch.inf) for each, m in zip(sets, masked)],
        "99 % masked": [each.masked_fill(torch.rand_like(each) < 0.99, -1e9) for each in sets],
        "the sample misleads": [misleading(each) for each in sets],
    }


def misleading(scores: torch.Tensor) -> torch.Tensor:
    """Scores whose sample, and nothing else, is large: the bound is too high for any k over 512."""
    x = torch.arange(1, 513, device="cuda") * 0x9E3779B1 % 2**32
    x = (x ^ (x >> 15)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return scores.index_fill(1, (x ^ (x >> 16)) * scores.shape[1] >> 32, 100.0)


def distributions_part() -> None:
    for what, own in draws(normal(R, N)).items():
        compare(f"{K} of {N} x {R} {what}", own, K, [])


def few_part() -> None:
    for rows, n in ((1, 1 << 20), (1, N), (2, N), (4, N)):
        compare(f"{K} of {n} x {rows}", normal(rows, n, 2), K, FEW if rows == 1 else [])


def short_part() -> None:
    for n in (512, 1024, 2048, 4096, 8192):
        compare(f"256 of {n} x {R}", normal(R, n), 256, SHORT)
    compare("256 of 1024 x 64", normal(64, 1024), 256, SHORT[1:2])
    compare("64 of 1024 x 512", normal(512, 1024), 64, SHORT[1:2])


def budgets_part() -> None:
    sets = normal(R, N)
    for k in (64, 8192, 32768, 65536):
        compare(f"{k} of {N} x {R}", sets, k, [(4096, 8, 128, 512, 2, 4096, 8)])
    compare(f"{K} of {N} x 32", normal(32, N, 2), K, [])


def shapes_part(dtype: torch.dtype) -> None:
    """Exactness alone: odd shapes, lengths, ties, NaN, both zeros, neighbouring values."""
    from foveate.attention.backends.triton.topk import topk_select

    shapes = ((3, 9001, 100), (1, 300000, 4096), (64, 20000, 1000), (300, 10000, 64), (5, 8193, 8193), (2, 700000, 9))
    for rows, n, k in shapes:
        length = torch.randint(0, n + 1, (rows,), device="cuda")
        x = torch.randn(rows, n, device="cuda")
        kinds = {
            "normal": x,
            "ties": torch.randint(-1, 2, (rows, n), device="cuda").float() * torch.randn_like(x).sign(),
            "NaN and infinities": x.masked_fill(x > 1.0, torch.nan).masked_fill(x < -1.0, torch.inf),
            "neighbours": (1000 + torch.arange(n, device="cuda") * 2**-14).flip(0).expand(rows, n),
        }
        for what, scores in kinds.items():
            scores = scores.to(dtype).contiguous()
            name = f"{dtype} {rows}x{n} k{k} {what}"
            correct("topk", name, lambda: topk_select(scores, k), exactly(scores, k))
            run = lambda: topk_select(scores, k, length=length)  # noqa: E731
            correct("topk", f"{name} lengths", run, exactly(scores, k, length))


def stress_part(seconds: float = 2.0) -> None:
    """Back-to-back calls over scores that a copy or a kernel just before has written, so that a missing wait shows."""
    from foveate.attention.backends.triton.topk import topk_select

    base = normal(R, N, 1)[0]
    fresh = [base.roll(shift, 1) for shift in range(8)]
    judges = [exactly(each, K) for each in fresh]
    scores = torch.empty_like(base)
    writers = {"a copy": scores.copy_, "a kernel": lambda each: torch.add(each, 0.0, out=scores)}

    def calls(write: Callable) -> list[torch.Tensor]:
        found = []
        for each in fresh:
            write(each)
            found.append(topk_select(scores, K))
        return found

    for what, write in writers.items():
        calls(write)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = calls(write)

        def replayed() -> list[torch.Tensor]:
            scores.zero_()
            graph.replay()
            return captured

        end, rounds = time.perf_counter() + seconds / 2, 0
        while not rounds or (time.perf_counter() < end and not WARM):
            for kind, run in (("eager", partial(calls, write)), ("graph", replayed)):
                for got, judge in zip(run(), judges):
                    correct("topk", f"scores fresh from {what}, {kind}", lambda: got, judge)
            rounds += 1
        print(f"topk     {16 * rounds} calls on scores fresh from {what} judged", flush=True)


PARTS = {
    "main": main_part, "distributions": distributions_part, "few": few_part, "short": short_part,
    "budgets": budgets_part, "stress": stress_part,
    **{f"shapes {each}": partial(shapes_part, each) for each in (torch.float32, torch.bfloat16, torch.float16)},
}  # fmt: skip


def run_part(name: str) -> None:
    try:
        PARTS[name]()
    except Exception as problem:
        failed("topk", f"the part {name} stopped", f"{type(problem).__name__}: {str(problem)[:300]}")
        traceback.print_exc(limit=4)


def warm(names: list[str]) -> None:
    environment = {**os.environ, "WARM_ONLY": "1"}
    command = [sys.executable, __file__, "--part"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    begin = time.perf_counter()
    for process in [subprocess.Popen([*command, name], env=environment, **quiet) for name in names]:
        wait(process, 90 - (time.perf_counter() - begin))
    print(f"kernels compiled in {time.perf_counter() - begin:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, out of {','.join(PARTS)}")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options.part)
        return
    import triton

    names = options.only.split(",")
    warm(names)
    torch.manual_seed(int(time.time()))
    facts = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    print(facts, flush=True)
    path = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results") / "gpu_topk.json"
    for name in names:
        begin = time.perf_counter()
        run_part(name)
        print(f"{name} took {time.perf_counter() - begin:.0f} s", flush=True)
        path.write_text(json.dumps({**facts, "rows": ROWS}, indent=1))
    print(f"{len(ROWS)} rows, {sum(1 for each in ROWS if each.get('failed'))} failed")


if __name__ == "__main__":
    main()
