"""Block-sparse prefill on one GPU: `python benchmarks/gpu_attention.py --only prefill`.

B 1, 32 query heads over 8 KV heads of 128 features, bfloat16, random causal plans of 128 x 128 blocks with the diagonal
always in. Baselines on the same tensors: torch's dense causal attention, and FlexAttention on the same plan, once as
`backend="flex"` runs it (every listed block masked) and once with its full blocks told apart. Every result is judged
in float64 on sampled query blocks. tflops counts listed blocks whole.
"""

# ruff: noqa: B023  (closures here run before their loop goes on)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from benchmarks.gpu_timing import GATES, Judge, attempt, error, failed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

HQ, HKV, D, BLOCK, DTYPE = 32, 8, 128, 128, torch.bfloat16
SAMPLES = ((0, 0), (3, 1), (11, -2), (17, 0.5), (31, -1), (30, 0.3))

POINTERS = [
    # block_m, block_n, num_warps, num_stages, tma, persistent, per_sm, registers
    (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 8, 2), (128, 128, 8, 2), (128, 32, 4, 3),
    (128, 32, 8, 3, False, False, 1, 128), (128, 32, 8, 4, False, False, 1, 128), (64, 64, 4, 3), (64, 64, 4, 2),
    (128, 64, 8, 3, False, True), (128, 128, 8, 2, False, True), (128, 32, 8, 3, False, True, 2, 128),
]  # fmt: skip
# Last: a wrong descriptor can end the process's use of the device.
DESCRIPTORS = [
    (128, 64, 8, 3, True), (128, 64, 8, 4, True), (128, 128, 8, 2, True), (128, 32, 4, 4, True),
    (128, 32, 8, 4, True, False, 1, 128), (64, 64, 4, 3, True), (128, 64, 8, 3, True, True),
]  # fmt: skip


@dataclass
class Case:
    """One prompt and one plan for it."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    tiles: Tensor
    keys_of: Callable[[int, int], Tensor]
    first: Tensor | None = None

    def judge(self, got) -> dict:
        """Sampled rows in float64; all rows against the first result of another kernel or configuration."""
        found = sampled(self.q, self.k, self.v, self.keys_of)(got)
        if self.first is None:
            self.first = got[0]
        pairs = zip(got[0][0].float(), self.first[0].float())
        found["differs"] = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
        assert found["differs"] <= 2 * GATES[DTYPE], f"differs from the first result by {found['differs']:.3g}"
        return found

    def rate(self, microseconds: float, pairs: int | None = None) -> float:
        pairs = int(self.tiles.sum()) * BLOCK * BLOCK * HQ // self.tiles.shape[1] if pairs is None else pairs
        return 4 * D * pairs / microseconds / 1e6


def sampled(q, k, v, keys_of: Callable[[int, int], Tensor]) -> Judge:
    """Judges (o, lse or None) on a few query blocks in float64. keys_of(head, row): the key slots that a row lists."""
    rows = q.shape[2] // BLOCK
    wanted = []
    for h, where in SAMPLES:
        r = int(where * rows) if isinstance(where, float) else where % rows
        keys, at = keys_of(h, r), torch.arange(r * BLOCK, (r + 1) * BLOCK, device=q.device)
        kh, vh = (x[0, h * HKV // HQ, keys].double() for x in (k, v))
        scores = (q[0, h, at].double() @ kh.T) * D**-0.5
        scores = scores.masked_fill(keys[None] > at[:, None], -torch.inf)
        wanted.append((h, at, scores.softmax(-1) @ vh, scores.logsumexp(-1)))

    def judge(got) -> dict:
        o, lse = got
        assert bool(o.isfinite().all()), "not finite everywhere"
        found = {
            "error": error(torch.stack([o[0, h, at] for h, at, _, _ in wanted]), torch.stack([w[2] for w in wanted]))
        }
        assert found["error"] <= GATES[q.dtype], f"error {found['error']:.3g} > {GATES[q.dtype]}"
        if lse is not None:
            found["lse_error"] = max((lse[0, h, at].double() - want).abs().max().item() for h, at, _, want in wanted)
            assert found["lse_error"] <= 2e-3, f"lse off by {found['lse_error']:.3g}"
        return found

    return judge


def block_keys(tiles: Tensor) -> Callable[[int, int], Tensor]:
    def keys_of(h: int, r: int) -> Tensor:
        blocks = tiles[0, h * tiles.shape[1] // HQ, r].nonzero()[:, 0]
        return (blocks[:, None] * BLOCK + torch.arange(BLOCK, device=tiles.device)).flatten()

    return keys_of


def random_case(q, k, v, density: float, heads: int = HQ) -> Case:
    rows = q.shape[2] // BLOCK
    tiles = torch.rand(1, heads, rows, rows, device="cuda") < density
    tiles = (tiles | torch.eye(rows, dtype=torch.bool, device="cuda")).tril()
    share = tiles.sum().item() / (heads * rows * (rows + 1) / 2)
    what = "" if heads == HQ else ", one plan per KV head"
    return Case(f"{q.shape[2] >> 10}k density {share:.3f}{what}", q, k, v, tiles, block_keys(tiles))


def lowered(case: Case):
    from foveate.attention import Blocks

    plan = Blocks.from_mask(case.tiles, block_m=BLOCK, block_n=BLOCK)
    return plan.lower(case.q.shape[2], case.k.shape[2])


def timed(case: Case, label: str, run: Callable[[int], object], pairs: int | None = None) -> float | None:
    """One row, with the rate on the listed work."""
    spent = attempt("prefill", f"{case.name} | {label}", run, case.judge, eager=True)
    if spent is not None:
        print(f"prefill  {'':64s} {case.rate(spent, pairs):10.0f} TFLOP/s on the listed work", flush=True)
    return spent


def dense_baselines(q, k, v) -> None:
    judge = sampled(q, k, v, lambda h, r: torch.arange((r + 1) * BLOCK, device=q.device))
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def dense(i):
            with sdpa_kernel(backend):
                return sdpa(q, k, v, is_causal=True, enable_gqa=True), None

        attempt("prefill", f"{q.shape[2] >> 10}k dense causal | torch {backend.name}", dense, judge, eager=True)


def flex_baselines(case: Case, apart: bool) -> None:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    from foveate.attention import Blocks, Positions
    from foveate.attention.backends import flex
    from foveate.attention.call import Call

    plan = Blocks.from_mask(case.tiles, block_m=BLOCK, block_n=BLOCK)
    call = Call(case.q, case.k, case.v, plan, Positions(), D**-0.5, None, True, None, None, None, True)
    torch._dynamo.config.recompile_limit = 64
    compiled = torch.compile(flex_attention, dynamic=False)
    given = {"scale": D**-0.5, "enable_gqa": True, "return_lse": True}
    run = lambda mask: lambda i: compiled(case.q, case.k, case.v, block_mask=mask, **given)  # noqa: E731
    masked = flex.block_mask(call)
    timed(case, "FlexAttention, every block masked", run(masked))
    if not apart:
        return
    rows = case.tiles.shape[2]
    diagonal = torch.eye(rows, dtype=torch.bool, device="cuda").expand_as(case.tiles)
    lists = []
    for tiles in (case.tiles & diagonal, case.tiles & ~diagonal):
        order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        lists += [tiles.sum(-1).to(torch.int32), order.to(torch.int32)]
    full = BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=masked.mask_mod, seq_lengths=(call.m, call.n)
    )
    timed(case, "FlexAttention, full blocks apart", run(full))


def candidates(case: Case, configs: dict) -> dict:
    from foveate.attention.backends.triton.block_flash import block_flash_fwd

    plan = lowered(case)
    return {
        label: lambda i, c=c: block_flash_fwd(case.q, case.k, case.v, plan, config=c) for label, c in configs.items()
    }


def race(case: Case, configs: dict) -> dict:
    """Times of candidates; the fastest three of them, fastest first."""
    spent = {label: timed(case, label, run) for label, run in candidates(case, configs).items()}
    right = sorted((time, label) for label, time in spent.items() if time is not None)
    if not right:
        failed("prefill", case.name, "no candidate is right")
        return {}
    print(f"prefill  BEST {case.name}: {right[0][1]} = {right[0][0] / 1e3:.2f} ms", flush=True)
    return {label: configs[label] for _, label in right[:3]}


def work_orders(case: Case, config) -> None:
    """What the order of the rows is worth."""
    from foveate.attention import Blocks
    from foveate.attention.backends.triton.block_flash import block_flash_fwd

    plan = Blocks.from_mask(case.tiles, block_m=BLOCK, block_n=BLOCK).lower(case.q.shape[2], case.k.shape[2])
    plain = torch.arange(plan.order.numel(), dtype=torch.int32, device="cuda")
    longest = plan.row_ptr.diff().argsort(descending=True, stable=True).to(torch.int32)
    for what, order in (("longest first over all heads", longest), ("as stored", plain)):
        each = replace(plan, order=order)
        timed(case, f"best, rows {what}", lambda i: block_flash_fwd(case.q, case.k, case.v, each, config=config))


def through_attend(case: Case) -> None:
    from foveate.attention import Blocks, attend

    plan = Blocks.from_mask(case.tiles, block_m=BLOCK, block_n=BLOCK)
    timed(
        case,
        "attend(), the plan lowered once",
        lambda i: (attend(case.q, case.k, case.v, plan, backend="triton"), None),
    )


def vertical_slash(q, k, v, density: float, config) -> None:
    """Columns and diagonals with about as many pairs as `density` of the blocks."""
    from foveate.attention import VerticalSlash
    from foveate.attention.backends.triton.block_flash import block_flash_fwd
    from foveate.attention.backends.triton.plans import lowered as lowered_once

    n, rows, columns = q.shape[2], q.shape[2] // BLOCK, 2048
    tiles_wanted = density * rows * (rows + 1) / 2 - columns / BLOCK * rows / 2
    slashes = int(tiles_wanted / (rows / 2))
    vertical = torch.stack([torch.randperm(n, device="cuda")[:columns].sort().values for _ in range(HQ)])[None]
    slash = torch.stack([torch.randperm(rows, device="cuda")[:slashes].sort().values for _ in range(HQ)])[None]
    slash[..., 0] = 0
    plan = lowered_once(VerticalSlash(vertical, slash, BLOCK), n, n)
    present = torch.zeros(HQ, rows, dtype=torch.long, device="cuda").scatter_(1, slash[0], 1)
    block = vertical[0] // BLOCK
    uncovered = (rows - block - present.cumsum(1).gather(1, rows - 1 - block)).sum().item()
    pairs = plan.nnz * BLOCK * BLOCK + uncovered * BLOCK

    def keys_of(h: int, r: int) -> Tensor:
        blocks = (r - slash[0, h])[slash[0, h] <= r].unique()
        listed = (blocks[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")).flatten()
        return torch.cat((listed, vertical[0, h])).unique()

    share = pairs / (HQ * BLOCK**2 * rows * (rows + 1) / 2)
    name = f"{n >> 10}k vertical-slash, {columns} columns, {slashes} diagonals, density {share:.3f}"
    case = Case(name, q, k, v, torch.empty(1, HQ, 0, 0), keys_of)
    timed(case, "best", lambda i: block_flash_fwd(q, k, v, plan, config=config), pairs)
    bare = replace(plan, columns=None)
    only = Case(
        f"{n >> 10}k its diagonals alone", q, k, v, case.tiles,
        lambda h, r: torch.cat([torch.arange((r - o) * BLOCK, (r - o + 1) * BLOCK, device="cuda")
                                for o in slash[0, h].unique().tolist() if o <= r]),
    )  # fmt: skip
    timed(only, "best", lambda i: block_flash_fwd(q, k, v, bare, config=config), plan.nnz * BLOCK * BLOCK)


def prefill_part(bandwidth: float, quick: bool) -> None:
    from foveate.attention.backends.triton.configs import BlockConfig

    def named(rows: list[tuple]) -> dict:
        return {" ".join(map(str, c)): BlockConfig(*c) for c in rows[: 3 if quick else None]}

    print("prefill  candidates: block_m block_n num_warps num_stages tma persistent per_sm registers")
    cases, best = [], None
    for n in (131072, 32768):
        q = torch.randn(1, HQ, n, D, device="cuda", dtype=DTYPE)
        k, v = torch.randn(2, 1, HKV, n, D, device="cuda", dtype=DTYPE)
        dense_baselines(q, k, v)
        for density in (0.10, 0.034):
            case = random_case(q, k, v, density)
            cases.append(case)
            flex_baselines(case, apart=n == 131072)
            found = race(case, named(POINTERS) if best is None else best)
            best = best or found
            if not best:
                return
        if n == 131072:
            first = next(iter(best.values()))
            work_orders(cases[0], first)
            race(random_case(q, k, v, 0.10, heads=HKV), best)
            vertical_slash(q, k, v, 0.10, first)
        through_attend(cases[-1])
    fastest = race(cases[0], named(DESCRIPTORS))
    for case in cases[1:]:
        if fastest:
            race(case, fastest)
