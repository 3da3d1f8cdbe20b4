"""Sigmoid weights in the block-sparse kernels, and keys moved while they are gathered, on one GPU: correct first, then
timed.

    python benchmarks/gpu_sigmoid.py [--only shapes,times,moves]

shapes: forward and backward in bfloat16 at D 64 and 128, odd lengths, random block plans, columns, every shipped
configuration, against float64. times: the kernels beside their softmax selves on the same plan (judged on sampled
rows), and a dense causal prompt through `attend`. moves: `kv_compact` with a rotary embedding beside the plain gather
and torch's unrotate, gather and rotate. Writes $OUT/gpu_sigmoid.json (benchmarks/results/ when OUT is unset).
"""

# ruff: noqa: B023  (closures here run before their loop goes on)
from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks.gpu_attention2 import DTYPE, GRADIENT_GATE, HKV, HQ, close_to, draw, lowered  # noqa: E402
from benchmarks.gpu_prefill import BLOCK, SAMPLES, random_case  # noqa: E402
from benchmarks.gpu_timing import GATES, ROWS, attempt, correct, error, failed, unjudged  # noqa: E402


def exact(q, k, v, mask, do, bias: float, softcap: float | None = None) -> dict[str, torch.Tensor]:
    """o and its gradients in float64 by automatic differentiation. mask: bool [1, heads, M, N], causality apart."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    G, M, N = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    keys, values = (x.repeat_interleave(G, 1) for x in leaves[1:])
    scores = leaves[0] @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
    seen = seen & torch.ones(M, N, dtype=torch.bool, device="cuda").tril(N - M)
    o = torch.where(seen, 1 / (1 + torch.exp(-scores - bias)), 0.0) @ values
    gradients = torch.autograd.grad((o * do.double()).sum(), leaves)
    return {"o": o.detach(), **dict(zip(("dq", "dk", "dv"), gradients))}


def small(m: int, n: int, d: int, dtype, heads: int, block: int, columns: int):
    """Inputs, a random plan, and the bool mask that it means."""
    from foveate.attention import Blocks

    q, k, v = draw(n, m, dtype, (8, 2), d)
    tiles = torch.rand(1, heads, -(-m // block), -(-n // block), device="cuda") < 0.6
    plan = Blocks.from_mask(tiles, block_m=block, block_n=block).lower(m, n)
    mask = tiles.repeat_interleave(block, 2)[:, :, :m].repeat_interleave(block, 3)[..., :n]
    if columns:
        listed = torch.randint(-2, n, (1, heads, columns), device="cuda")
        plan = plan.with_columns(listed)
        mask = mask | (listed[..., None] == torch.arange(n, device="cuda")).any(2)[:, :, None]
    return q, k, v, plan, mask


def shapes_part() -> None:
    from foveate.attention.backends.triton import configs, ops
    from foveate.attention.backends.triton.block_flash import block_flash_fwd

    shapes = [(1, 1), (15, 15), (127, 127), (1000, 1000), (100, 777), (1024, 1024)]
    for d, (m, n), (heads, block) in product((64, 128), shapes, ((8, 128), (2, 64))):
        bias = -math.log(n)
        for columns in (0, 50):
            name = f"D{d} {m} of {n} plan heads {heads} block {block} columns {columns}"
            q, k, v, plan, mask = small(m, n, d, DTYPE, heads, block, columns)
            do = torch.randn_like(q)
            want = exact(q, k, v, mask, do, bias)
            if float(want["o"].norm()) == 0:
                continue
            for key, config in configs.BLOCKS.items():
                if key[2] == d and key[0] == block:
                    run = lambda: block_flash_fwd(q, k, v, plan, bias=bias, config=config)[0]  # noqa: E731
                    correct("shapes", f"{name} | {key}", run, close_to({"o": want["o"]}, GATES[DTYPE]))
            if columns:
                continue

            def gradients() -> dict:
                leaves = [x.clone().requires_grad_() for x in (q, k, v)]
                o, _ = ops.block_flash(*leaves, plan, bias=bias)
                return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, do)))

            wanted = {x: want[x] for x in ("dq", "dk", "dv")}
            correct("shapes", f"{name} | gradients", gradients, close_to(wanted, GRADIENT_GATE))
    for dtype, softcap in ((torch.float32, None), (torch.float16, 5.0)):
        q, k, v, plan, mask = small(500, 500, 64, dtype, 8, 64, 0)
        do = torch.randn_like(q)
        want = exact(q, k, v, mask, do, -6.0, softcap)

        def all_of_it() -> dict:
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            o, _ = ops.block_flash(*leaves, plan, bias=-6.0, softcap=softcap)
            return {"o": o.detach(), **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, do)))}

        gate = 2e-5 if dtype == torch.float32 else GRADIENT_GATE
        correct("shapes", f"{dtype} D64 softcap {softcap}", all_of_it, close_to(want, gate))
    print("shapes done", flush=True)


def sampled(q, k, v, keys_of: Callable, bias: float) -> Callable:
    """Judges o on a few query blocks in float64."""
    rows, wanted = q.shape[2] // BLOCK, []
    for h, where in SAMPLES:
        r = int(where * rows) if isinstance(where, float) else where % rows
        keys, at = keys_of(h, r), torch.arange(r * BLOCK, (r + 1) * BLOCK, device="cuda")
        kh, vh = (x[0, h * HKV // HQ, keys].double() for x in (k, v))
        scores = (q[0, h, at].double() @ kh.T) * q.shape[-1] ** -0.5
        wanted.append((h, at, torch.sigmoid(scores + bias).masked_fill(keys[None] > at[:, None], 0.0) @ vh))

    def judge(got) -> dict:
        o = got[0] if isinstance(got, tuple) else got
        assert bool(o.isfinite().all()), "not finite everywhere"
        found = error(torch.stack([o[0, h, at] for h, at, _ in wanted]), torch.stack([each for *_, each in wanted]))
        assert found <= GATES[DTYPE], f"error {found:.3g} > {GATES[DTYPE]}"
        return {"error": found}

    return judge


def finite(got) -> dict:
    assert all(bool(x.isfinite().all()) for x in got[:3]), "not finite everywhere"
    return {}


def times_part() -> None:
    from foveate.attention import attend
    from foveate.attention.backends.triton.block_flash import block_flash_fwd
    from foveate.attention.backends.triton.block_flash_bwd import block_flash_bwd

    for n, d, density in ((32768, 128, 0.10), (131072, 128, 0.10), (32768, 64, 0.10)):
        q, k, v = draw(n, d=d)
        bias, case = -math.log(n), random_case(q, k, v, density)
        name, plan = f"{case.name} D{d}", lowered(case)
        judge = sampled(q, k, v, case.keys_of, bias)
        run = lambda i: block_flash_fwd(q, k, v, plan, bias=bias)  # noqa: E731
        attempt("times", f"{name} | forward, sigmoid", run, judge, eager=True)
        attempt("times", f"{name} | forward, softmax", lambda i: block_flash_fwd(q, k, v, plan), unjudged, eager=True)
        if n > 32768:
            continue
        plan.by_keys  # noqa: B018  (transposed before it is timed)
        do, (o, lse) = torch.randn_like(q), block_flash_fwd(q, k, v, plan)
        run = lambda i: block_flash_bwd(do, None, q, k, v, None, None, plan, bias=bias)  # noqa: E731
        attempt("times", f"{name} | backward, sigmoid", run, finite, eager=True)
        run = lambda i: block_flash_bwd(do, None, q, k, v, o, lse, plan)  # noqa: E731
        attempt("times", f"{name} | backward, softmax", run, finite, eager=True)
    n = 16384
    for d in (64, 128):
        q, k, v = draw(n, d=d)
        every = lambda h, r: torch.arange((r + 1) * BLOCK, device="cuda")  # noqa: E731
        run = lambda i: attend(q, k, v, score="sigmoid", backend="triton")  # noqa: E731
        attempt(
            "times", f"16k dense causal D{d} | attend, sigmoid", run, sampled(q, k, v, every, -math.log(n)), eager=True
        )
        attempt("times", f"16k dense causal D{d} | attend, softmax", lambda i: attend(q, k, v), unjudged, eager=True)


def moves_part() -> None:
    from foveate.attention import Rope
    from foveate.attention.backends.torch_dense import gather_rows
    from foveate.attention.backends.triton.kv_compact import kv_compact

    def by_torch(k, v, index, pos, rope):
        at = torch.arange(k.shape[2], device="cuda").expand(1, k.shape[1], -1).gather(2, index)
        return rope.rotate(rope.unrotate(gather_rows(k, index), at), pos), gather_rows(v, index)

    n, d = 131072, 128
    # float32 angles of 128k positions are off by 2^-24 of themselves, here as in torch: by 4e-3 where the rate is 1.
    for dtype, gate in ((DTYPE, GATES[DTYPE]), (torch.float32, 1e-3)):
        _, k, v = draw(n, 1, dtype, d=d)
        for kept in (4096, 32768, 5001):
            index = torch.stack([torch.randperm(n, device="cuda")[:kept].sort().values for _ in range(HKV)])[None]
            pos = torch.arange(kept, device="cuda")[None]
            for rope in (Rope(128, 500000.0), Rope(128, 10000.0, "interleaved"), Rope(32, 10000.0)):
                plain = rope.unrotate(k.double(), torch.arange(n, device="cuda")[None])
                plain = plain.gather(2, index[..., None].expand(-1, -1, -1, d))
                want = {"keys": rope.rotate(plain, pos), "values": gather_rows(v, index).double()}
                name = f"{kept} of 128k {dtype} rope {rope.dim} {rope.style}"
                run = lambda i: kv_compact(k, v, index, pos=pos, rope=rope)  # noqa: E731
                judge = close_to(want, gate)
                floor = 4 * HKV * kept * d * k.element_size() / 4.27e6
                if kept == 5001:
                    correct("moves", name, lambda: run(0), judge)
                    continue
                attempt("moves", f"{name} | kv_compact, moved", run, judge, 8, floor)
                run = lambda i: by_torch(k, v, index, pos, rope)  # noqa: E731
                attempt("moves", f"{name} | torch: gather, unrotate, rotate", run, judge, 8, floor)
            attempt(
                "moves", f"{kept} of 128k {dtype} | kv_compact alone", lambda i: kv_compact(k, v, index), unjudged, 8
            )


PARTS = {"shapes": shapes_part, "times": times_part, "moves": moves_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, out of {','.join(PARTS)}")
    options = parser.parse_args()
    import triton

    facts = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    print(facts, flush=True)
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    torch.manual_seed(int(time.time()))
    for name in options.only.split(","):
        begin = time.perf_counter()
        try:
            PARTS[name]()
        except Exception as problem:
            failed(name, "the part stopped", f"{type(problem).__name__}: {str(problem)[:300]}")
            traceback.print_exc(limit=4)
        print(f"{name} took {time.perf_counter() - begin:.0f} s", flush=True)
        (folder / "gpu_sigmoid.json").write_text(json.dumps({**facts, "rows": ROWS}, indent=1))
    print(f"{len(ROWS)} rows, {sum(1 for each in ROWS if each.get('failed'))} failed")


if __name__ == "__main__":
    main()
