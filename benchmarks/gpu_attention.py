"""Softmax attention kernels on one GPU: correct first, then timed beside the public ones, in one run.

    python benchmarks/gpu_attention.py [--only decode,topk,prefill] [--quick]

Every candidate configuration is checked against float64 on the timed inputs before it is timed; a FAIL is printed
and has no time. Times are medians of CUDA-graph replays; a graph holds several calls, each on inputs of its own whose
sum exceeds the L2 cache where that matters (decode), so that nothing is read from cache that would not be there.
Writes $OUT/gpu_attention.json (benchmarks/results/ when OUT is unset).
"""

# ruff: noqa: B023  (closures here run before their loop goes on)
from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
import traceback
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks.gpu_prefill import prefill_part  # noqa: E402
from benchmarks.gpu_timing import (  # noqa: E402
    GATES,
    ROWS,
    Judge,
    attempt,
    best_of,
    copy_bandwidth,
    correct,
    failed,
    host_time,
    unjudged,
    within,
)

# Decode.


def attention64(q, k, v, index=None):
    """o and lse in float64, one KV head at a time. q [1, Hq, M, D]; index [1, Hkv, K]."""
    G = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for h in range(k.shape[1]):
        kh, vh = (x[0, h] if index is None else x[0, h][index[0, h].long()] for x in (k, v))
        qh = q[0, h * G : (h + 1) * G].double()
        scores = qh @ kh.double().T * q.shape[-1] ** -0.5
        if index is None and q.shape[2] > 1:
            m, n = q.shape[2], kh.shape[0]
            late = torch.arange(n, device=q.device)[None] > torch.arange(n - m, n, device=q.device)[:, None]
            scores = scores.masked_fill(late, -torch.inf)
        outs.append(scores.softmax(-1) @ vh.double())
        lses.append(scores.logsumexp(-1))
    return torch.stack(outs).flatten(0, 1)[None], torch.stack(lses).flatten(0, 1)[None]


def decode_correctness() -> None:
    """Shapes besides the timed ones, at the shipped configurations."""
    from foveate.attention.backends.triton.gather_decode import gather_decode

    shapes = ((1, 1, 8, 8), (1000, 1, 24, 8), (4097, 4, 32, 4), (20000, 16, 8, 1))
    for dtype, D, (N, M, Hq, Hkv) in product(GATES, (64, 128, 256), shapes):
        q = torch.randn(1, Hq, M, D, device="cuda").to(dtype)
        k, v = torch.randn(2, 1, Hkv, N, D, device="cuda").to(dtype)
        name = f"{dtype} D{D} N{N} M{M} {Hq}/{Hkv}"
        judge = within(attention64(q, k, v), dtype)
        correct("decode", f"dense {name}", lambda: gather_decode(q, k, v), judge)
        if M == 1:
            index = torch.randint(0, N, (1, Hkv, min(N, 777)), device="cuda")
            judge = within(attention64(q, k, v, index), dtype)
            correct("decode", f"tokens {name}", lambda: gather_decode(q, k, v, index=index), judge)
    print("decode   correctness over shapes: done (failures above, if any)")


DECODE_CANDIDATES = [
    # block_n, num_warps, num_stages, per_sm
    (64, 4, 3, 2), (64, 4, 3, 3), (64, 4, 2, 4), (64, 4, 4, 2), (64, 2, 3, 3), (64, 8, 3, 2),
    (32, 4, 4, 4), (32, 2, 4, 4), (32, 4, 3, 6), (128, 4, 2, 2), (128, 8, 2, 2), (128, 4, 3, 1), (128, 8, 3, 1),
]  # fmt: skip


@contextmanager
def no_dependent_launch():
    from foveate.attention.backends.triton import runtime

    kept, runtime.has_dependent_launch = runtime.has_dependent_launch, lambda index: False
    try:
        yield
    finally:
        runtime.has_dependent_launch = kept


def decode_part(bandwidth: float, quick: bool) -> None:
    from foveate.attention.backends.triton import configs
    from foveate.attention.backends.triton.gather_decode import gather_decode

    decode_correctness()
    N, Hq, Hkv, D, dtype = 131072, 32, 8, 128, torch.bfloat16
    q = torch.randn(1, Hq, 1, D, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 1, Hkv, N, D, device="cuda", dtype=dtype)
    candidates = {str(c): c for c in (configs.DecodeConfig(*c) for c in DECODE_CANDIDATES[: 4 if quick else None])}

    judge, floor = within(attention64(q, k, v), dtype), 2 * k.numel() * 2 / bandwidth
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def dense(i):
            with sdpa_kernel(backend):
                return sdpa(q, k, v, enable_gqa=True), None

        attempt("decode", f"dense 128k | torch {backend.name}", dense, judge, 4, floor)
    runs = {label: lambda i, c=c: gather_decode(q, k, v, config=c) for label, c in candidates.items()}
    best_of("decode", "dense 128k", runs, judge, 4, floor)
    for K in (4096, 1024):
        decode_lists(q, k, v, K, candidates, bandwidth)

    pages = torch.stack([torch.randperm(N // 16, device="cuda")[:256].sort().values for _ in range(Hkv)])[None].int()
    tokens = (pages[..., None] * 16 + torch.arange(16, device="cuda")).flatten(2)
    attempt("decode", "256 pages of 16 | shipped", lambda i: gather_decode(q, k, v, index=pages, page_size=16),
            within(attention64(q, k, v, tokens), dtype))  # fmt: skip
    near = torch.cat((torch.arange(4), torch.arange(N - 4092, N))).cuda().expand(1, Hkv, -1)
    attempt("decode", "window 4091 + 4 sinks | shipped", lambda i: gather_decode(q, k, v, window=4091, sinks=4),
            within(attention64(q, k, v, near), dtype))  # fmt: skip
    decode_packed(q, k.view(-1, D), v.view(-1, D))


def decode_lists(q, k, v, K: int, candidates: dict, bandwidth: float) -> None:
    """K random keys per head; lists whose keys together are several times the cache."""
    from foveate.attention.backends.triton.gather_decode import gather_decode

    _, Hkv, N, D = k.shape
    Hq, name = q.shape[1], f"{K} of {N >> 10}k"
    n = 16 if K > 2000 else 48
    lists = [
        torch.stack([torch.randperm(N, device="cuda")[:K].sort().values for _ in range(Hkv)])[None] for _ in range(n)
    ]
    flat = [(each[0] + torch.arange(Hkv, device="cuda")[:, None] * N).flatten() for each in lists]
    lists = [each.to(torch.int32) for each in lists]
    judge, floor = within(attention64(q, k, v, lists[0]), q.dtype), 2 * Hkv * K * D * 2 / bandwidth
    folded = q.view(1, Hkv, Hq // Hkv, D)

    def select(i):
        kg, vg = (x.view(-1, D).index_select(0, flat[i]).view(1, Hkv, K, D) for x in (k, v))
        return sdpa(folded, kg, vg).view(1, Hq, 1, D), None

    attempt("decode", f"{name} | torch index_select + sdpa", select, judge, n, floor)
    runs = {label: lambda i, c=c: gather_decode(q, k, v, index=lists[i], config=c) for label, c in candidates.items()}
    best = best_of("decode", name, runs, judge, n, floor)
    attempt("decode", f"{name} | best, one list (cached)", lambda i: runs[best](0), judge, n, floor)
    for pieces in (8, 16, 32, 64, 128):
        run = lambda i, p=pieces: gather_decode(q, k, v, index=lists[i], config=candidates[best], num_splits=p)  # noqa: E731
        attempt("decode", f"{name} | best, {pieces} pieces", run, judge, n, floor)
    with no_dependent_launch():
        attempt("decode", f"{name} | best, no dependent launch", runs[best], judge, n, floor)
    print(f"decode   host time per eager call: {host_time(lambda: runs[best](0)):.1f} us")


def decode_packed(q, k, v) -> None:
    """Eight segments of very different lengths."""
    from foveate.attention.backends.triton.gather_decode import gather_decode

    lengths = [256, 512, 1024, 2048, 4096, 8192, 16384, 256]
    starts = [sum(lengths[:i]) for i in range(8)]
    start, length = torch.tensor(starts, device="cuda"), torch.tensor([lengths], device="cuda")
    parts = [
        attention64(q[:, 4 * h : 4 * h + 4], k[None, None, s : s + n], v[None, None, s : s + n])
        for h, (s, n) in enumerate(zip(starts, lengths))
    ]
    judge = within(tuple(torch.cat([part[i] for part in parts], 1) for i in (0, 1)), q.dtype)
    k, v = k[: sum(lengths)], v[: sum(lengths)]
    run = lambda i: gather_decode(q, k, v, start=start, length=length)  # noqa: E731
    attempt("decode", f"packed, {sum(lengths)} keys in 8 segments | shipped", run, judge)


# Top-k.


def exact(scores: torch.Tensor, k: int) -> Judge:
    want = torch.sort(scores.double(), dim=-1, descending=True, stable=True).indices[:, :k].sort(-1).values

    def judge(got) -> dict:
        assert torch.equal(got.long(), want), "positions differ from a stable sort"
        return {"error": 0.0}

    return judge


TOPK_CANDIDATES = [
    # block, num_warps, most_chunks
    (2048, 8, 32), (2048, 8, 16), (2048, 4, 32), (4096, 8, 32),
    (1024, 4, 32), (1024, 8, 32), (4096, 16, 16), (1024, 4, 64),
]  # fmt: skip


def topk_part(bandwidth: float, quick: bool) -> None:
    from foveate.attention.backends.triton import configs
    from foveate.attention.backends.triton.topk import topk_select

    shapes = ((3, 4097, 100), (1, 300000, 4096), (64, 20000, 1000), (16, 2048, 64), (5, 8192, 1024))
    for dtype, (R, N, k) in product((torch.float32, torch.bfloat16), shapes):
        for draw, scores in (("normal", torch.randn(R, N)), ("ties", torch.randint(0, 3, (R, N)))):
            scores = scores.to("cuda", dtype)
            correct("topk", f"{dtype} {R}x{N} k{k} {draw}", lambda: topk_select(scores, k), exact(scores, k))
    print("topk     correctness over shapes: done (failures above, if any)")

    R, N, k = 8, 131072, 2048
    # Fresh scores are in the cache when they are selected from: 4 sets of 4 MB.
    sets = [torch.randn(R, N, device="cuda") for _ in range(4)]
    judge, name = exact(sets[0], k), "2048 of 131072 x 8 float32"
    attempt("topk", f"{name} | torch.topk", lambda i: torch.topk(sets[i % 4], k), unjudged)
    candidates = {str(c): c for c in (configs.TopkConfig(*c) for c in TOPK_CANDIDATES[: 3 if quick else None])}
    runs = {label: lambda i, c=c: topk_select(sets[i % 4], k, config=c) for label, c in candidates.items()}
    best = best_of("topk", name, runs, judge)
    with no_dependent_launch():
        attempt("topk", "float32 | best, no dependent launch", runs[best], judge)
    for what, draws in (
        ("float32, four distinct values", [torch.randint(0, 4, (R, N), device="cuda").float() for _ in range(4)]),
        ("bfloat16", [each.bfloat16() for each in sets]),
    ):
        run = lambda i, draws=draws: topk_select(draws[i % 4], k, config=candidates[best])  # noqa: E731
        attempt("topk", f"2048 of 131072 x 8 {what} | best", run, exact(draws[0], k))
    for n in (2048, 8192):
        pages = torch.randn(8, n, device="cuda")
        attempt("topk", f"256 of {n} x 8 float32 | torch.topk", lambda i, x=pages: torch.topk(x, 256), unjudged)
        attempt(
            "topk", f"256 of {n} x 8 float32 | one block", lambda i, x=pages: topk_select(x, 256), exact(pages, 256)
        )
    print(f"topk     host time per eager call: {host_time(lambda: topk_select(sets[0], k)):.1f} us")


PARTS = {"decode": decode_part, "topk": topk_part, "prefill": prefill_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, out of {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="a few candidates per kernel only")
    options = parser.parse_args()
    torch.manual_seed(int(time.time()))
    import triton

    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    bandwidth = copy_bandwidth()
    facts["copy_TB_s"] = bandwidth / 1e6
    print(facts, flush=True)
    for name in options.only.split(","):
        begin = time.perf_counter()
        try:
            PARTS[name](bandwidth, options.quick)
        except Exception as problem:
            failed(name, "the part stopped", f"{type(problem).__name__}: {problem}")
            traceback.print_exc()
        print(f"{name} took {time.perf_counter() - begin:.0f} s", flush=True)
        torch.cuda.empty_cache()
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    (folder / "gpu_attention.json").write_text(json.dumps({**facts, "rows": ROWS}, indent=1))
    bad = [each for each in ROWS if each.get("failed")]
    print(f"{len(ROWS)} rows, {len(bad)} failed")


if __name__ == "__main__":
    main()
