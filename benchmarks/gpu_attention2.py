"""The second round of softmax attention kernels on one GPU: correct first, then timed.

    python benchmarks/gpu_attention2.py [--only slash,attend,topk,...]

Vertical-slash prompts, `attend` with one plan object, top-k, the block-sparse backward pass beside FlexAttention's,
compaction and coding of caches, and sums over attention weights. B 1, 32 query heads over 8 KV heads of 128 features,
bfloat16, unless a row says otherwise. Every candidate is judged (float64 definitions, a stable sort, exact codes)
before it is timed; a failure is a row without a time.

Each part is a process of its own with a time limit, so that a crash or a hang costs that part alone. All parts run once
together without timing, which compiles every kernel into Triton's cache, and then one after another.
Writes $OUT/gpu_attention2.json (benchmarks/results/ when OUT is unset).
"""

# ruff: noqa: B023  (closures here run before their loop goes on)
from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks import gpu_timing  # noqa: E402
from benchmarks.gpu_prefill import BLOCK, Case, random_case  # noqa: E402
from benchmarks.gpu_timing import GATES, ROWS, error, failed, host_time, unjudged  # noqa: E402

HQ, HKV, D, DTYPE = 32, 8, 128, torch.bfloat16
SCALE = D**-0.5
WARM = bool(os.environ.get("WARM_ONLY"))


def attempt(part: str, what: str, run: Callable, judge: Callable, calls: int = 8, floor=None, eager: bool = True):
    """`gpu_timing.attempt`; while kernels are only compiled, one call."""
    if not WARM:
        return gpu_timing.attempt(part, what, run, judge, calls, floor, eager)
    try:
        run(0)
    except Exception:
        traceback.print_exc(limit=2)
    return None


def correct(part: str, what: str, run: Callable, judge: Callable) -> None:
    if WARM:
        attempt(part, what, lambda i: run(), unjudged)
    else:
        gpu_timing.correct(part, what, run, judge)


def draw(n: int, m: int | None = None, dtype=DTYPE, heads=(HQ, HKV), d: int = D):
    q = torch.randn(1, heads[0], m or n, d, device="cuda").to(dtype)
    k, v = torch.randn(2, 1, heads[1], n, d, device="cuda").to(dtype)
    return q, k, v


def lowered(case: Case):
    from foveate.attention import Blocks

    return Blocks.from_mask(case.tiles, block_m=BLOCK, block_n=BLOCK).lower(case.q.shape[2], case.k.shape[2])


def close_to(wanted: dict[str, torch.Tensor], gate: float) -> Callable:
    """Judges a dict of tensors, or one tensor, by relative error."""

    def judge(got) -> dict:
        got = got if isinstance(got, dict) else dict(zip(wanted, got if isinstance(got, tuple) else (got,)))
        found = {f"error_{name}": error(got[name], want) for name, want in wanted.items()}
        bad = {name: value for name, value in found.items() if not value <= gate}
        assert not bad, f"{bad} > {gate}"
        return found

    return judge


# Vertical-slash.

FORWARD = [
    # block_m, block_n, num_warps, num_stages, tma, persistent, per_sm, registers, edge
    (128, 64, 8, 4, True), (128, 64, 8, 3, True), (128, 64, 8, 4), (64, 64, 4, 3, True), (64, 64, 4, 3),
    (128, 64, 8, 4, True, False, 1, None, 64), (128, 64, 8, 4, True, False, 1, None, 16),
]  # fmt: skip


def slash_part() -> None:
    from foveate.attention import VerticalSlash
    from foveate.attention.backends.triton import plans
    from foveate.attention.backends.triton.block_flash import block_flash_fwd
    from foveate.attention.backends.triton.configs import BlockConfig
    from foveate.attention.backends.triton.kv_compact import kv_compact
    from foveate.attention.backends.triton.stripes import _stripes, stripes

    n, columns, density = 131072, 2048, 0.10
    q, k, v = draw(n)
    rows = n // BLOCK
    slashes = int((density * rows * (rows + 1) / 2 - columns / BLOCK * rows / 2) / (rows / 2))
    vertical = torch.stack([torch.randperm(n, device="cuda")[:columns] for _ in range(HQ)])[None]
    slash = torch.stack([torch.randperm(rows, device="cuda")[:slashes].sort().values for _ in range(HQ)])[None]
    slash[..., 0] = 0
    plan = plans.lowered(VerticalSlash(vertical, slash, BLOCK), n, n)
    present = torch.zeros(HQ, rows, dtype=torch.long, device="cuda").scatter_(1, slash[0], 1)
    block = vertical[0] // BLOCK
    uncovered = (rows - block - present.cumsum(1).gather(1, rows - 1 - block)).sum().item()
    pairs = plan.nnz * BLOCK * BLOCK + uncovered * BLOCK
    share = pairs / (HQ * BLOCK**2 * rows * (rows + 1) / 2)
    every = torch.arange(BLOCK, device="cuda")

    def keys_of(h: int, r: int, with_columns: bool = True) -> torch.Tensor:
        blocks = (r - slash[0, h])[slash[0, h] <= r].unique()
        listed = (blocks[:, None] * BLOCK + every).flatten()
        return torch.cat((listed, vertical[0, h])).unique() if with_columns else listed

    tiles = torch.empty(1, HQ, 0, 0)
    name = f"128k vertical-slash, {columns} columns, {slashes} diagonals, density {share:.4f}"
    case = Case(name, q, k, v, tiles, keys_of)
    for c in FORWARD:
        config = BlockConfig(*c)
        run = lambda i: block_flash_fwd(q, k, v, plan, config=config)  # noqa: E731
        attempt("slash", f"{name} | {' '.join(map(str, c))}", run, case.judge)
    bare = plans.lowered(VerticalSlash(vertical[..., :0], slash, BLOCK), n, n)
    only = Case("128k its diagonals alone", q, k, v, tiles, lambda h, r: keys_of(h, r, False))
    attempt("slash", f"{only.name} | shipped", lambda i: block_flash_fwd(q, k, v, bare), only.judge)
    # Random blocks with the same number of pairs: the work without columns.
    same = random_case(q, k, v, share)
    blocks = lowered(same)
    attempt("slash", f"{same.name} | shipped", lambda i: block_flash_fwd(q, k, v, blocks), same.judge)
    column = stripes(plan, True).column.view(1, HQ, -1)
    attempt("slash", "128k gathering its stripes", lambda i: kv_compact(k, v, column), unjudged)
    attempt("slash", "128k preparing its columns", lambda i: _stripes(plan, True), unjudged)
    making = VerticalSlash(vertical, slash, BLOCK)
    attempt(
        "slash", "128k lowering its diagonals",
        lambda i: type(plan).from_diagonals(making.slash, n=n, block=BLOCK), unjudged,
    )  # fmt: skip


def attend_part() -> None:
    """The operator with one plan object beside the kernel alone."""
    from foveate.attention import Blocks, attend
    from foveate.attention.backends.triton.block_flash import block_flash_fwd

    for n in (131072, 32768):
        q, k, v = draw(n)
        case = random_case(q, k, v, 0.034)
        plan = Blocks.from_mask(case.tiles, block_m=BLOCK, block_n=BLOCK)
        ready = plan.lower(n, n)
        attempt("attend", f"{case.name} | kernel alone", lambda i: block_flash_fwd(q, k, v, ready), case.judge)
        run = lambda i: attend(q, k, v, plan, backend="triton", return_lse=True)  # noqa: E731
        attempt("attend", f"{case.name} | attend(), one plan object", run, case.judge)
    few = q[:, :, :1].contiguous()
    run = lambda i: attend(few, k, v, backend="triton", return_lse=True)  # noqa: E731
    attempt("attend", "dense decode of 32k | attend()", run, unjudged, 4, eager=False)
    if not WARM:
        print(f"attend   host time per eager decode call: {host_time(lambda: run(0)):.1f} us")


# Top-k.

TOPK = [
    # block, num_warps, most_chunks, least_block, per_sm
    (4096, 4, 32), (4096, 8, 32), (4096, 16, 32), (2048, 4, 64, 512, 4), (2048, 8, 64, 512, 4), (8192, 8, 16),
    (2048, 4, 32), (1024, 4, 32),
]  # fmt: skip


def exactly(scores: torch.Tensor, k: int, length: torch.Tensor | None = None) -> Callable:
    beyond = torch.zeros(scores.shape, dtype=torch.bool, device="cuda")
    if length is not None:
        beyond = torch.arange(scores.shape[1], device="cuda") >= length[:, None]
    doubles = scores.double().masked_fill(beyond, -torch.inf)
    order = torch.sort(doubles, dim=-1, descending=True, stable=True).indices[:, :k]
    want = order.masked_fill(beyond.gather(1, order), scores.shape[1] + 1).sort(-1).values
    want = want.masked_fill(want > scores.shape[1], -1)

    def judge(got) -> dict:
        assert torch.equal(got.long(), want), "positions differ from a stable sort"
        return {"error": 0.0}

    return judge


def topk_part() -> None:
    from foveate.attention.backends.triton import configs
    from foveate.attention.backends.triton.topk import topk_select

    R, N, k = 8, 131072, 2048
    sets = [torch.randn(R, N, device="cuda") for _ in range(4)]
    name, judge = "2048 of 131072 x 8 float32", exactly(sets[0], k)
    attempt("topk", f"{name} | torch.topk", lambda i: torch.topk(sets[i % 4], k), unjudged, eager=False)
    for c in TOPK:
        config = configs.TopkConfig(*c)
        run = lambda i: topk_select(sets[i % 4], k, config=config)  # noqa: E731
        attempt("topk", f"{name} | {c}", run, judge, eager=False)
    draws = {
        "four distinct values": [torch.randint(0, 4, (R, N), device="cuda").float() for _ in range(4)],
        "around 20": [3 * each + 20 for each in sets],
        "around 1000": [3 * each + 1000 for each in sets],
        "ascending": [each.sort(-1).values for each in sets],
        "bfloat16": [each.bfloat16() for each in sets],
    }
    for what, own in draws.items():
        run = lambda i, own=own: topk_select(own[i % 4], k)  # noqa: E731
        attempt("topk", f"2048 of 131072 x 8 {what} | shipped", run, exactly(own[0], k), eager=False)
    for n in (2048, 4096, 8192):
        pages = torch.randn(8, n, device="cuda")
        attempt("topk", f"256 of {n} x 8 | torch.topk", lambda i: torch.topk(pages, 256), unjudged, eager=False)
        for what, config in (("shipped", None), ("chunks", configs.TOPK)):
            run = lambda i, c=config: topk_select(pages, 256, config=c)  # noqa: E731
            attempt("topk", f"256 of {n} x 8 | {what}", run, exactly(pages, 256), eager=False)
    row = torch.randn(1, 1 << 20, device="cuda")
    attempt("topk", "2048 of 1048576 x 1 | shipped", lambda i: topk_select(row, k), exactly(row, k), eager=False)
    attempt("topk", "2048 of 1048576 x 1 | torch.topk", lambda i: torch.topk(row, k), unjudged, eager=False)


def topk_shapes_part() -> None:
    from foveate.attention.backends.triton.topk import topk_select

    shapes = ((3, 9001, 100), (1, 300000, 4096), (64, 20000, 1000), (300, 10000, 64), (5, 8193, 8193))
    for dtype, (R, N, k) in product((torch.float32, torch.bfloat16), shapes):
        length = torch.randint(0, N + 1, (R,), device="cuda")
        for what, scores in (("normal", torch.randn(R, N)), ("ties", torch.randint(0, 3, (R, N)))):
            scores = scores.to("cuda", dtype)
            correct("topk", f"{dtype} {R}x{N} k{k} {what}", lambda: topk_select(scores, k), exactly(scores, k))
            run = lambda: topk_select(scores, k, length=length)  # noqa: E731
            correct("topk", f"{dtype} {R}x{N} k{k} {what} lengths", run, exactly(scores, k, length))


# Gradients.

BY_QUERY = [
    # block_m, block_n, num_warps, num_stages
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 8, 3), (64, 128, 8, 2)
]  # fmt: skip
BY_KEY = [
    (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3), (32, 128, 4, 2)
]  # fmt: skip
GRADIENT_GATE = 1.5e-2


def exact_gradients(q, k, v, tiles, do, sink=None, softcap=None):
    """Gradients in float64 of a small causal prompt by automatic differentiation, the sink's last."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    if sink is not None:
        leaves.append(sink.double().requires_grad_())
    G, n = q.shape[1] // k.shape[1], q.shape[2]
    keys, values = (x.repeat_interleave(G, 1) for x in leaves[1:3])
    scores = leaves[0] @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    mask = tiles.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    mask = mask.repeat_interleave(q.shape[1] // tiles.shape[1], 1)
    scores = scores.masked_fill(~(mask & torch.ones(n, n, dtype=torch.bool, device="cuda").tril()), -torch.inf)
    if sink is not None:
        scores = torch.cat((scores, leaves[3][None, :, None, None].expand(1, -1, n, 1)), -1)
        values = torch.nn.functional.pad(values, (0, 0, 0, 1))
    loss = (scores.softmax(-1) @ values * do.double()).sum()
    return dict(zip(("dq", "dk", "dv", "dsink"), torch.autograd.grad(loss, leaves)))


def small_prompt(n: int, d: int, dtype, heads: int):
    q, k, v = draw(n, dtype=dtype, heads=(8, 2), d=d)
    case = random_case(q, k, v, 0.5, heads=heads)
    return q, k, v, case


def gradient_shapes_part() -> None:
    """Other widths, types and options, at the shipped configurations, through the operator and autograd."""
    from foveate.attention.backends.triton import ops

    for dtype, d, heads, softcap in (
        (DTYPE, 64, 8, None), (DTYPE, 256, 8, None), (DTYPE, 128, 2, 5.0), (torch.float16, 128, 1, None),
        (torch.float32, 64, 8, None),
    ):  # fmt: skip
        q, k, v, case = small_prompt(512, d, dtype, heads)
        plan, do, sink = lowered(case), torch.randn_like(q), torch.randn(8, device="cuda")

        def run() -> dict:
            leaves = [x.clone().requires_grad_() for x in (q, k, v, sink)]
            o, _ = ops.block_flash(*leaves[:3], plan, sink=leaves[3], softcap=softcap)
            return dict(zip(("dq", "dk", "dv", "dsink"), torch.autograd.grad(o, leaves, do)))

        want = {} if WARM else exact_gradients(q, k, v, case.tiles, do, sink, softcap)
        gate = 2e-5 if dtype == torch.float32 else GRADIENT_GATE
        correct("backward", f"{dtype} D{d} plan heads {heads} softcap {softcap} sink", run, close_to(want, gate))


def backward_part() -> None:
    from foveate.attention.backends.triton.block_flash import block_flash_fwd
    from foveate.attention.backends.triton.block_flash_bwd import block_flash_bwd
    from foveate.attention.backends.triton.configs import BackwardConfig

    def gradients(given, config=None) -> dict:
        do, q, k, v, o, lse, plan = given
        return dict(zip(("dq", "dk", "dv"), block_flash_bwd(do, None, q, k, v, o, lse, plan, config=config)))

    q, k, v, case = small_prompt(1024, D, DTYPE, 8)
    plan, do = lowered(case), torch.randn_like(q)
    small = (do, q, k, v, *block_flash_fwd(q, k, v, plan), plan)
    judge_small = close_to({} if WARM else exact_gradients(q, k, v, case.tiles, do), GRADIENT_GATE)

    q, k, v = draw(32768)
    case = random_case(q, k, v, 0.10)
    plan, do = lowered(case), torch.randn_like(q)
    plan.by_keys  # noqa: B018  (transposed before it is timed)
    large = (do, q, k, v, *block_flash_fwd(q, k, v, plan), plan)
    judge_large = sampled_gradients(case, large)
    best, spent = {}, {}
    fixed = (BackwardConfig(*BY_QUERY[0]), BackwardConfig(*BY_KEY[0]))
    for side, candidates in (("queries", BY_QUERY), ("keys", BY_KEY)):
        for c in candidates:
            own = BackwardConfig(*c)
            config = (own, fixed[1]) if side == "queries" else (fixed[0], own)

            def judge(got, config=config) -> dict:
                judge_small(gradients(small, config))
                return judge_large(got)

            label = f"{case.name} | by {side} {' '.join(map(str, c))}"
            run = lambda i, config=config: gradients(large, config)  # noqa: E731
            if WARM:
                attempt("backward", label, lambda i: gradients(small, config), unjudged)
            spent[side, c] = attempt("backward", label, run, judge)
        right = {c: t for (s, c), t in spent.items() if s == side and t is not None}
        best[side] = min(right, key=right.__getitem__) if right else candidates[0]
    config = (BackwardConfig(*best["queries"]), BackwardConfig(*best["keys"]))
    for what, given in ((f"both best {best}", config), ("shipped", None)):
        attempt("backward", f"{case.name} | {what}", lambda i: gradients(large, given), judge_large)
    attempt("backward", f"{case.name} | forward, shipped", lambda i: block_flash_fwd(q, k, v, plan), case.judge)
    shared = random_case(q, k, v, 0.10, heads=HKV)
    plan = lowered(shared)
    own = (do, q, k, v, *block_flash_fwd(q, k, v, plan), plan)
    attempt("backward", f"{shared.name} | shipped", lambda i: gradients(own), sampled_gradients(shared, own))


def sampled_gradients(case: Case, given) -> Callable:
    """Judges gradients on a few blocks in float64, from the forward pass's lse and o (judged apart)."""
    do, q, k, v, o, lse, _ = given
    if WARM:
        return unjudged
    G, rows, every = HQ // HKV, case.tiles.shape[2], torch.arange(BLOCK, device="cuda")
    listed = case.tiles[0].repeat_interleave(HQ // case.tiles.shape[1], 0)

    def pieces(h: int, q_at, k_at):
        """p and dS in float64 of queries by keys."""
        s = q[0, h, q_at].double() @ k[0, h // G, k_at].double().T * SCALE
        p = (s - lse[0, h, q_at].double()[:, None]).exp().masked_fill(k_at[None] > q_at[:, None], 0.0)
        grad = do[0, h, q_at].double()
        delta = (grad * o[0, h, q_at].double()).sum(-1, keepdim=True)
        return p, p * (grad @ v[0, h // G, k_at].double().T - delta)

    places = [(0, 0), (9, rows // 2), (31, rows - 1)]
    want_q, want_k, want_v = [], [], []
    for h, block in places:
        at = block * BLOCK + every
        keys = (listed[h, block].nonzero() * BLOCK + every).flatten()
        want_q.append(pieces(h, at, keys)[1] @ k[0, h // G, keys].double() * SCALE)
        dk, dv = 0.0, 0.0
        for head in range(h // G * G, h // G * G + G):
            queries = (listed[head, :, block].nonzero() * BLOCK + every).flatten()
            p, ds = pieces(head, queries, at)
            dk = dk + ds.T @ q[0, head, queries].double() * SCALE
            dv = dv + p.T @ do[0, head, queries].double()
        want_k.append(dk)
        want_v.append(dv)
    judge = close_to({"dq": torch.stack(want_q), "dk": torch.stack(want_k), "dv": torch.stack(want_v)}, GRADIENT_GATE)

    def judge_places(got) -> dict:
        assert all(bool(x.isfinite().all()) for x in got.values()), "not finite everywhere"
        cut = lambda x, h, block: x[0, h, block * BLOCK : (block + 1) * BLOCK]  # noqa: E731
        return judge(
            {
                name: torch.stack([cut(got[name], h if name == "dq" else h // G, b) for h, b in places])
                for name in ("dq", "dk", "dv")
            }
        )

    return judge_places


def flex_part() -> None:
    """FlexAttention's forward and backward passes on a plan drawn alike, its full blocks told apart."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = draw(32768)
    case = random_case(q, k, v, 0.10)
    rows = case.tiles.shape[2]
    diagonal = torch.eye(rows, dtype=torch.bool, device="cuda").expand_as(case.tiles)
    lists = []
    for tiles in (case.tiles & diagonal, case.tiles & ~diagonal):
        order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        lists += [tiles.sum(-1).to(torch.int32), order.to(torch.int32)]
    mask = BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=lambda b, h, i, j: i >= j, seq_lengths=(q.shape[2], k.shape[2])
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    given = {"block_mask": mask, "scale": SCALE, "enable_gqa": True, "return_lse": True}
    o, lse = compiled(*leaves, **given)
    do = torch.randn_like(o)
    judge = sampled_gradients(case, (do, *[x.detach() for x in (*leaves, o, lse)], None))

    def run(i):
        return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, do, retain_graph=True)))

    attempt("backward", f"{case.name} | FlexAttention backward", run, judge)
    with torch.no_grad():
        attempt("backward", f"{case.name} | FlexAttention forward", lambda i: compiled(*leaves, **given), case.judge)


# Caches.


def cache_part() -> None:
    from foveate.attention.backends.triton.kv_compact import kv_compact

    bandwidth = 1.0 if WARM else gpu_timing.copy_bandwidth()
    n = 131072
    _, k, v = draw(n, 1)
    for kept in (4096, 32768):
        index = torch.stack([torch.randperm(n, device="cuda")[:kept].sort().values for _ in range(HKV)])[None]
        where = index[..., None].expand(-1, -1, -1, D)
        want = tuple(x.gather(2, where) for x in (k, v))

        def judge(got) -> dict:
            assert all(torch.equal(a, b) for a, b in zip(got, want)), "differs from gather"
            return {"error": 0.0}

        floor = 2 * 2 * HKV * kept * D * 2 / bandwidth
        name, eager = f"keep {kept} of 128k, keys and values of 8 heads", kept > 4096
        attempt("caches", f"{name} | kv_compact", lambda i: kv_compact(k, v, index), judge, 8, floor, eager)
        run = lambda i: tuple(x.gather(2, where) for x in (k, v))  # noqa: E731
        attempt("caches", f"{name} | torch.gather", run, judge, 8, floor, eager)


def coding_part() -> None:
    from foveate.attention.backends.triton.kv_quant import kv_decode, kv_encode
    from foveate.attention.quantize import dequantize, quantize

    bandwidth = 1.0 if WARM else gpu_timing.copy_bandwidth()
    x = torch.randn(1, HKV, 32768, D, device="cuda", dtype=DTYPE)
    x[:, :, :, 3] *= 20
    for bits, group, dim in ((2, 32, 2), (2, 32, 3), (4, 32, 2), (4, 64, 3), (8, 64, 2), (8, 64, 3)):
        theirs = quantize(x, bits, group, dim, backend="torch")
        made = (theirs.code, theirs.scale, theirs.least)

        def same(got) -> dict:
            assert all(torch.equal(a, b) for a, b in zip(got, made)), "differs from the eager coding"
            return {"error": 0.0}

        along, numbers = "tokens" if dim == 2 else "channels", x.numel()
        name = f"{bits} bits, groups of {group} {along}, 32k x 8 heads"
        floor = (2 * numbers + bits * numbers / 8 + 4 * numbers / group) / bandwidth
        run = lambda i: kv_encode(x, bits=bits, group=group, dim=dim)  # noqa: E731
        attempt("caches", f"encode {name} | kv_encode", run, same, 8, floor, False)
        run = lambda i: quantize(x, bits, group, dim, backend="torch")  # noqa: E731
        attempt("caches", f"encode {name} | eager", run, unjudged, 8, floor)
        back = dequantize(theirs, bits, group, dim, backend="torch")
        run = lambda i: kv_decode(*made, bits=bits, group=group, dim=dim)  # noqa: E731
        attempt("caches", f"decode {name} | kv_decode", run, close_to({"x": back.double()}, 4e-3), 8, floor, False)
        run = lambda i: dequantize(theirs, bits, group, dim, backend="torch")  # noqa: E731
        attempt("caches", f"decode {name} | eager", run, unjudged, 8, floor)


# Sums over weights.


def reference_weights(q, k, heads: list[int], fold: Callable) -> list[list[torch.Tensor]]:
    """fold(float64 weights of 2048 queries) for each such piece of each head."""
    m, n = q.shape[2], k.shape[2]
    made = []
    for h in heads:
        parts = []
        for first in range(0, m, 2048):
            at = torch.arange(first, min(first + 2048, m), device="cuda") + (n - m)
            s = (q[0, h, first : first + 2048].double() @ k[0, h * HKV // HQ].double().T) * SCALE
            s = s.masked_fill(torch.arange(n, device="cuda")[None] > at[:, None], -torch.inf)
            parts.append(fold(s.softmax(-1)))
        made.append(parts)
    return made


def sums_part() -> None:
    from foveate.attention import statistics
    from foveate.attention.backends.triton import score_reduce

    heads = [0, 13]
    for m, n in ((64, 131072), (1, 131072), (8192, 8192), (32768, 32768)):
        q, k, _ = draw(n, m)
        wanted = {}
        if not WARM:
            parts = reference_weights(q, k, heads, lambda weights: weights.sum(0))
            wanted["mass"] = torch.stack([torch.stack(each).sum(0) for each in parts])
        judge = close_to(wanted, GATES[DTYPE])
        name = f"column mass, {m} queries of {n >> 10}k"
        run = lambda i: score_reduce.column_mass(q, k, scale=SCALE)  # noqa: E731
        attempt("sums", f"{name} | score_reduce", run, lambda got: judge(got[0, heads]), 8, None, m > 64)
        run = lambda i: score_reduce.log_sum_exp(q, k, scale=SCALE)  # noqa: E731
        attempt("sums", f"log-sum-exp of {m} queries of {n >> 10}k", run, unjudged, 8, None, m > 64)
        if m <= 8192:
            run = lambda i: statistics.column_mass(q, k, scale=SCALE)  # noqa: E731
            attempt("sums", f"{name} | torch pieces", run, lambda got: judge(got[0, heads]))
        if m < 8192:
            continue
        size = 64
        wanted = {}
        if not WARM:
            fold = lambda w: w.unflatten(1, (-1, size)).sum(-1).unflatten(0, (-1, size)).mean(1)  # noqa: E731
            wanted["mass"] = torch.stack([torch.cat(parts) for parts in reference_weights(q, k, heads, fold)])
        judge_blocks = close_to(wanted, GATES[DTYPE])
        for bn in (64, 128):
            run = lambda i, bn=bn: score_reduce.block_mass(q, k, block_m=size, block_n=bn, scale=SCALE)  # noqa: E731
            own = (lambda got: judge_blocks(got[0, heads])) if bn == size else unjudged
            attempt("sums", f"block mass {size} x {bn}, {m} queries of {n >> 10}k | score_reduce", run, own)


PARTS = {
    "slash": slash_part, "attend": attend_part, "topk": topk_part, "topk_shapes": topk_shapes_part,
    "backward": backward_part, "gradient_shapes": gradient_shapes_part, "flex": flex_part, "caches": cache_part,
    "coding": coding_part, "sums": sums_part,
}  # fmt: skip


def run_part(name: str, path: str) -> None:
    """In a process of its own: rows to `path`, written however the part ends."""
    torch.manual_seed(int(time.time()))
    try:
        PARTS[name]()
    except Exception as problem:
        failed(name, "the part stopped", f"{type(problem).__name__}: {str(problem)[:300]}")
        traceback.print_exc(limit=4)
    finally:
        Path(path).write_text(json.dumps(ROWS))


def start(name: str, path: Path, warm: bool) -> subprocess.Popen:
    environment = {**os.environ, "WARM_ONLY": "1" if warm else ""}
    quiet = subprocess.DEVNULL if warm else None
    return subprocess.Popen(
        [sys.executable, __file__, "--part", name, "--rows", str(path)], env=environment, stdout=quiet, stderr=quiet
    )


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Its exit code; None, and the process ended, when it took too long."""
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, out of {','.join(PARTS)}")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options.part, options.rows)
        return
    import triton

    names = options.only.split(",")
    facts = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    print(facts, flush=True)
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        begin = time.perf_counter()
        warming = [start(name, Path(scratch) / f"warm_{name}.json", warm=True) for name in names]
        for process in warming:
            wait(process, 90 - (time.perf_counter() - begin))
        print(f"kernels compiled in {time.perf_counter() - begin:.0f} s", flush=True)
        for name in names:
            begin, path = time.perf_counter(), Path(scratch) / f"{name}.json"
            code = wait(start(name, path, warm=False), 60)
            rows += json.loads(path.read_text()) if path.exists() else []
            if code != 0:
                what = "took more than 60 s" if code is None else f"ended with code {code}"
                rows.append({"part": name, "what": f"the part {what}", "failed": what})
                print(f"{name}: {what}", flush=True)
            print(f"{name} took {time.perf_counter() - begin:.0f} s", flush=True)
            (folder / "gpu_attention2.json").write_text(json.dumps({**facts, "rows": rows}, indent=1))
    print(f"{len(rows)} rows, {sum(1 for each in rows if each.get('failed'))} failed")


if __name__ == "__main__":
    main()
