"""Cases of `foveate bench gpu` for steps of decoding: one query over all keys or listed ones, and top-k of scores.

B 1, in CUDA graphs. Ours runs through `attend` with shipped configurations; top-k, which has no operator of its own on
GPUs, through `torch.ops.foveate.topk`. Decoding is judged in float64, top-k by a stable sort.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from foveate.attention import Tokens, attend, explain
from foveate.attention.scoring import slots_of, top_mask
from foveate.compare.bench_gpu_attention import dense_backends, first_of, flash3, tokens
from foveate.compare.bench_gpu_timing import (
    FORWARD,
    Case,
    Contender,
    Job,
    Judge,
    Run,
    always,
    generator,
    prepared,
    relative,
)


@dataclass(frozen=True, kw_only=True)
class DecodeSizes:
    """Shapes, and the targets that were set for them on one H200 in microseconds.

    lists: keys per list, how many lists are rotated (together they exceed the L2 cache), target. scores: rows, numbers
    in each, how many are wanted.
    """

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    cached: int = 131072
    dense: float | None = 145.0
    lists: tuple[tuple[int, int, float | None], ...] = ((4096, 16, 15.0), (1024, 48, 10.0))
    scores: tuple[int, int, int] = (8, 131072, 2048)
    top: float | None = 25.0


def decode_jobs(sizes: DecodeSizes, device: torch.device) -> list[Job]:
    jobs = [Job("decode", "dense", partial(dense_decode_case, sizes, device))]
    jobs += [
        Job("decode", f"{keys} keys", partial(list_decode_case, sizes, device, place))
        for place, (keys, _, _) in enumerate(sizes.lists)
    ]
    return [*jobs, Job("topk", "rows of scores", partial(topk_case, sizes, device))]


def exact_decode(q: Tensor, k: Tensor, v: Tensor, index: Tensor | None = None) -> Tensor:
    """o in float64 of one query per head, one KV head at a time; index: [Hkv, K]."""
    group = q.shape[1] // k.shape[1]
    outputs = []
    for h in range(k.shape[1]):
        kh, vh = (x[0, h] if index is None else x[0, h, index[h].long()] for x in (k, v))
        scores = q[0, h * group : (h + 1) * group].double() @ kh.double().T * q.shape[-1] ** -0.5
        outputs.append(scores.softmax(-1) @ vh.double())
    return torch.stack(outputs).flatten(0, 1)[None]


def close_to(exact: Callable[[], Tensor]) -> Judge:
    """By the relative error to a float64 tensor, made when it is first asked for."""
    exact = cache(exact)
    return lambda got: {"error": relative(got, exact())}


def cached_keys(sizes: DecodeSizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    own = generator(device)
    q = torch.randn(1, sizes.heads, 1, sizes.head_dim, device=device, dtype=sizes.dtype, generator=own)
    shape = (2, 1, sizes.kv_heads, sizes.cached, sizes.head_dim)
    k, v = torch.randn(*shape, device=device, dtype=sizes.dtype, generator=own)
    return q, k, v


def dense_decode_case(sizes: DecodeSizes, device: torch.device) -> Case:
    """One query over all keys, in a CUDA graph. Keys and values of the full sizes exceed the L2 cache nine times."""
    q, k, v = cached_keys(sizes, device)
    judge = close_to(lambda: exact_decode(q, k, v))
    moved = 2.0 * k.numel() * k.element_size()

    def by_torch(backend: SDPBackend, i: int) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, enable_gqa=True)

    runs: dict[str, Run] = {name: partial(by_torch, backend) for name, backend in dense_backends(device)}
    module, absent = flash3(device)
    if module is not None:
        turned = tuple(x.transpose(1, 2) for x in (q, k, v))
        runs["FlashAttention-3"] = lambda i: first_of(module.flash_attn_with_kvcache(*turned)).transpose(1, 2)
    shared: dict[str, Any] = {"judged": "float64", "gate": FORWARD, "how": "graph", "calls": 4, "moved": moved}
    contenders = [
        Contender(name=f"{name}, CUDA graph", open=always(run, judge), baseline=True, **shared)
        for name, run in runs.items()
    ]
    facts = {"backend": explain(q, k, v).name}
    ours = always(lambda i: attend(q, k, v), judge)
    contenders.append(Contender(name="foveate, CUDA graph", open=ours, target_us=sizes.dense, facts=facts, **shared))
    return Case(f"decoding, all of {tokens(sizes.cached)}", contenders, absent)


def list_decode_case(sizes: DecodeSizes, device: torch.device, place: int) -> Case:
    """One query over listed keys, in a CUDA graph over several lists."""
    keys, count, target = sizes.lists[place]
    q, k, v = cached_keys(sizes, device)
    own, (heads, n, width) = generator(device, 1), k.shape[1:]

    def draw() -> Tensor:
        picks = [torch.randperm(n, device=device, generator=own)[:keys].sort().values for _ in range(heads)]
        return torch.stack(picks)

    lists = [draw() for _ in range(count)]
    rows = [(each + torch.arange(heads, device=device)[:, None] * n).flatten() for each in lists]
    plans = [Tokens(each[None].to(torch.int32)) for each in lists]
    folded = q.view(1, heads, -1, width)

    def select(i: int) -> Tensor:
        kg, vg = (x.view(-1, width).index_select(0, rows[i]).view(1, heads, keys, width) for x in (k, v))
        return sdpa(folded, kg, vg).view(q.shape)

    judge = close_to(lambda: exact_decode(q, k, v, lists[0]))
    moved = 2.0 * heads * keys * width * k.element_size()
    shared: dict[str, Any] = {"judged": "float64", "gate": FORWARD, "how": "graph", "calls": count, "moved": moved}
    contenders = [
        Contender(name="index_select + SDPA, CUDA graph", open=always(select, judge), baseline=True, **shared),
        Contender(
            name="foveate, CUDA graph", open=always(lambda i: attend(q, k, v, plans[i]), judge), target_us=target,
            facts={"backend": explain(q, k, v, plans[0]).name}, **shared,
        ),
    ]  # fmt: skip
    return Case(f"decoding, {keys} of {tokens(sizes.cached)}", contenders)


def topk_case(sizes: DecodeSizes, device: torch.device) -> Case:
    """Rotating over four sets of scores, as fresh ones would lie in the cache."""
    rows, n, count = sizes.scores
    own = generator(device)
    sets = [torch.randn(rows, n, device=device, generator=own) for _ in range(4)]

    @cache
    def exact() -> tuple[Tensor, Tensor]:
        values, order = sets[0].sort(dim=-1, descending=True, stable=True)
        return values[:, :count], order[:, :count].sort(-1).values

    def judge(got: Tensor) -> dict[str, float]:
        values, order = exact()
        found = sets[0].gather(1, got.long()).sort(-1, descending=True).values
        wrong = (found != values).double().mean().item()
        return {"error": wrong, "other_ties": (got.long().sort(-1).values != order).double().mean().item()}

    def make() -> tuple[Run, Judge]:
        if device.type != "cuda":
            return lambda i: slots_of(top_mask(sets[i % 4][None], count))[0], judge
        from foveate.attention.backends.triton import ops

        return lambda i: ops.topk(sets[i % 4], count), judge

    shared: dict[str, Any] = {"judged": "a stable sort, share of wrong entries", "how": "graph", "calls": 8}
    return Case(
        f"top {count} of {n} float32 scores, {rows} rows",
        [
            Contender(
                name="torch.topk, CUDA graph", open=always(lambda i: torch.topk(sets[i % 4], count).indices, judge),
                baseline=True, gate={"error": 0.0}, **shared,
            ),
            Contender(
                name="foveate, CUDA graph", open=prepared(make), gate={"error": 0.0, "other_ties": 0.0},
                target_us=sizes.top, **shared,
            ),
        ],
    )  # fmt: skip
