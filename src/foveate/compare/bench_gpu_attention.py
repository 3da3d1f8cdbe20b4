"""Cases of `foveate bench gpu` for prompts: dense, block-sparse and vertical-slash, and block-sparse gradients.

B 1. Ours runs as users run it: through `attend` with its own choice of backend and shipped configurations. Judged in
float64 on sampled query blocks and key blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from foveate.attention import Blocks, VerticalSlash, attend, explain
from foveate.compare.bench_gpu_timing import (
    FORWARD,
    GRADIENTS,
    Case,
    Contender,
    Job,
    Judge,
    Run,
    always,
    finite,
    generator,
    optional,
    prepared,
    relative,
)

FLASH3 = "flash_attn_interface"


@dataclass(frozen=True, kw_only=True)
class AttentionSizes:
    """Shapes, and the targets that were set for them on one H200 in microseconds.

    densities: shares of the causal blocks of a prompt. columns: of the vertical-slash plan. learned: tokens of the
    prompt whose gradients are timed.
    """

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block: int = 128
    dtype: torch.dtype = torch.bfloat16
    prompt: int = 131072
    densities: tuple[tuple[float, float | None], ...] = ((0.10, 31_000.0), (0.034, 11_000.0))
    columns: int = 2048
    learned: int = 32768
    learned_density: float = 0.10


def attention_jobs(sizes: AttentionSizes, device: torch.device) -> list[Job]:
    jobs = [
        Job("prefill", f"density {density}", partial(prefill_case, sizes, device, place))
        for place, (density, _) in enumerate(sizes.densities)
    ]
    jobs.append(Job("train", "block-sparse backward", partial(backward_case, sizes, device)))
    return jobs


@dataclass(frozen=True, eq=False)
class Prompt:
    """q, k, v of a prompt; tiles: bool [1, Hq, R, R], the key blocks that each query block reads."""

    q: Tensor
    k: Tensor
    v: Tensor
    tiles: Tensor
    block: int

    @property
    def rows(self) -> int:
        return self.q.shape[2] // self.block

    @property
    def share(self) -> float:
        """Listed blocks over causal blocks."""
        return self.tiles.sum().item() / (self.tiles.shape[1] * self.rows * (self.rows + 1) / 2)

    @property
    def flop(self) -> float:
        """Of the forward pass over the listed blocks."""
        return 4.0 * self.q.shape[-1] * self.tiles.sum().item() * self.block**2

    def plan(self) -> Blocks:
        return Blocks.from_mask(self.tiles, block_m=self.block, block_n=self.block)

    def keys_of(self, head: int, row: int) -> Tensor:
        return _slots(self.tiles[0, head, row].nonzero()[:, 0], self.block)

    def samples(self) -> list[tuple[int, int]]:
        """A few heads and query blocks, the first and the last among them."""
        heads, rows = self.q.shape[1], self.rows
        places = ((0, 0), (heads // 10, 1), (heads // 3, rows - 2), (heads // 2, rows // 2), (heads - 1, rows - 1))
        return [(head, row % rows) for head, row in (*places, (heads - 2, 3 * rows // 10))]


def _slots(blocks: Tensor, block: int) -> Tensor:
    return (blocks[:, None] * block + torch.arange(block, device=blocks.device)).flatten()


def random_prompt(sizes: AttentionSizes, n: int, density: float, device: torch.device) -> Prompt:
    """Random blocks, each query block's own always among them; `density` of the causal ones in the mean."""
    own = generator(device)
    q = torch.randn(1, sizes.heads, n, sizes.head_dim, device=device, dtype=sizes.dtype, generator=own)
    k, v = torch.randn(2, 1, sizes.kv_heads, n, sizes.head_dim, device=device, dtype=sizes.dtype, generator=own)
    rows = n // sizes.block
    others = max(0.0, density * (rows + 1) - 2) / max(1, rows - 1)
    tiles = torch.rand(1, sizes.heads, rows, rows, device=device, generator=own) < others
    tiles = (tiles | torch.eye(rows, dtype=torch.bool, device=device)).tril()
    return Prompt(q, k, v, tiles, sizes.block)


def on_samples(prompt: Prompt, keys_of: Callable[[int, int], Tensor]) -> Judge:
    """Judges (o, lse or None) in float64 on sampled query blocks. keys_of(head, row): key slots that a block reads."""
    q, k, v, block = prompt.q, prompt.k, prompt.v, prompt.block
    group = q.shape[1] // k.shape[1]

    @cache
    def wanted() -> list[tuple[int, Tensor, Tensor, Tensor]]:
        made = []
        for h, row in prompt.samples():
            keys, at = keys_of(h, row), torch.arange(row * block, (row + 1) * block, device=q.device)
            kh, vh = (x[0, h // group, keys].double() for x in (k, v))
            scores = (q[0, h, at].double() @ kh.T) * q.shape[-1] ** -0.5
            scores = scores.masked_fill(keys[None] > at[:, None], -torch.inf)
            made.append((h, at, scores.softmax(-1) @ vh, scores.logsumexp(-1)))
        return made

    def judge(got: Any) -> dict[str, float]:
        o, lse = got
        found = torch.stack([o[0, h, at] for h, at, _, _ in wanted()])
        errors = {"error": relative(found, torch.stack([want for _, _, want, _ in wanted()]))}
        if not finite(o):
            errors["error"] = math.inf
        if lse is not None:
            errors["lse_error"] = max((lse[0, h, at].double() - want).abs().max().item() for h, at, _, want in wanted())
        return errors

    return judge


SAMPLED = "float64, sampled query blocks"


def dense_backends(device: torch.device) -> list[tuple[str, SDPBackend]]:
    """Torch's fused attention, cuDNN's first."""
    flash = ("SDPA, FlashAttention", SDPBackend.FLASH_ATTENTION)
    return [("SDPA, cuDNN", SDPBackend.CUDNN_ATTENTION), flash] if device.type == "cuda" else [flash]


def tokens(n: int) -> str:
    return f"{n >> 10}k tokens" if n >= 1024 and n % 1024 == 0 else f"{n} tokens"


def flash3(device: torch.device) -> tuple[Any, list[str]]:
    """The module of FlashAttention-3, or None and a line that says so."""
    if device.type != "cuda":
        return None, ["FlashAttention-3 needs CUDA"]
    module, why = optional(FLASH3)
    return module, [] if module is not None else [f"FlashAttention-3 is not installed ({why})"]


def dense_prompts(prompt: Prompt) -> tuple[list[Contender], list[str]]:
    """Dense causal attention of the prompt, measured once in a run."""
    q, k, v = prompt.q, prompt.k, prompt.v
    n = q.shape[2]
    judge = on_samples(prompt, lambda h, row: torch.arange((row + 1) * prompt.block, device=q.device))
    flop = 2.0 * q.shape[-1] * q.shape[1] * n * (n + 1)

    def by_torch(backend: SDPBackend, i: int) -> Any:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, is_causal=True, enable_gqa=True), None

    runs: dict[str, Run] = {name: partial(by_torch, backend) for name, backend in dense_backends(q.device)}
    module, absent = flash3(q.device)
    if module is not None:
        turned = tuple(x.transpose(1, 2) for x in (q, k, v))
        runs["FlashAttention-3"] = lambda i: (
            first_of(module.flash_attn_func(*turned, causal=True)).transpose(1, 2),
            None,
        )
    made = [
        Contender(
            name=f"dense: {name}", open=always(run, judge), judged=SAMPLED, baseline=True, gate=FORWARD,
            once=f"dense prompt {n}: {name}", flop=flop,
        )
        for name, run in runs.items()
    ]  # fmt: skip
    return made, absent


def first_of(got: Any) -> Any:
    return got[0] if isinstance(got, tuple) else got


@cache
def compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


# One function for all masks: torch compiles anew for another.
def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def flex_options(prompt: Prompt) -> dict[str, Any]:
    """The prompt's plan as FlexAttention reads it best: whole blocks, which need no mask, told apart."""
    from torch.nn.attention.flex_attention import BlockMask

    tiles = prompt.tiles
    diagonal = torch.eye(prompt.rows, dtype=torch.bool, device=tiles.device).expand_as(tiles)

    def listed(part: Tensor) -> tuple[Tensor, Tensor]:
        order = part.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return part.sum(-1).to(torch.int32), order.to(torch.int32)

    (count, index), (full_count, full_index) = listed(tiles & diagonal), listed(tiles & ~diagonal)
    n = prompt.q.shape[2]
    mask = BlockMask.from_kv_blocks(
        count,
        index,
        full_count,
        full_index,
        BLOCK_SIZE=(prompt.block, prompt.block),
        mask_mod=_causal,
        seq_lengths=(n, n),
    )
    return {"block_mask": mask, "scale": prompt.q.shape[-1] ** -0.5, "enable_gqa": True, "return_lse": True}


def flex_prompt(prompt: Prompt, judge: Judge) -> Contender:
    def make() -> tuple[Run, Judge]:
        options = flex_options(prompt)
        return lambda i: compiled_flex()(prompt.q, prompt.k, prompt.v, **options), judge

    return Contender(
        name="FlexAttention, same blocks", open=prepared(make), judged=SAMPLED, baseline=True, gate=FORWARD,
        calls=3, flop=prompt.flop,
    )  # fmt: skip


def through_attend(prompt: Prompt, plan: Blocks | VerticalSlash) -> tuple[Run, dict[str, Any]]:
    """The operator with one plan object, and which backend it takes."""
    q, k, v = prompt.q, prompt.k, prompt.v
    backend = explain(q, k, v, plan, return_lse=True).name
    return lambda i: attend(q, k, v, plan, return_lse=True), {"backend": backend}


def prefill_case(sizes: AttentionSizes, device: torch.device, place: int) -> Case:
    """Dense baselines, FlexAttention and ours on the same random blocks; with the first density, vertical-slash too."""
    density, target = sizes.densities[place]
    prompt = random_prompt(sizes, sizes.prompt, density, device)
    contenders, absent = dense_prompts(prompt)
    judge = on_samples(prompt, prompt.keys_of)
    run, facts = through_attend(prompt, prompt.plan())
    ours = Contender(
        name="foveate, random blocks", open=always(run, judge), judged=SAMPLED, gate=FORWARD, calls=3,
        target_us=target, flop=prompt.flop, facts=facts,
    )  # fmt: skip
    contenders += [flex_prompt(prompt, judge), ours]
    if place == 0:
        contenders.append(vertical_slash(prompt, sizes.columns, ours.name))
    return Case(f"prompt of {tokens(sizes.prompt)}, density {prompt.share:.3f}", contenders, absent)


def vertical_slash(prompt: Prompt, columns: int, blocks: str) -> Contender:
    """Columns and diagonals of about as many pairs as the prompt's random blocks, which `blocks` names."""
    q, block, rows = prompt.q, prompt.block, prompt.rows
    heads, n = q.shape[1], q.shape[2]
    own = generator(q.device, 1)
    diagonals = int((prompt.share * rows * (rows + 1) / 2 - columns / block * rows / 2) / (rows / 2))

    def pick(most: int, count: int) -> Tensor:
        drawn = [torch.randperm(most, device=q.device, generator=own)[:count] for _ in range(heads)]
        return torch.stack(drawn)[None]

    vertical, slash = pick(n, columns), pick(rows, max(1, diagonals)).sort(-1).values
    # A query block reads its own.
    slash[..., 0] = 0
    plan = VerticalSlash(vertical, slash, block)
    present = torch.zeros(heads, rows, dtype=torch.long, device=q.device).scatter_(1, slash[0], 1)
    listed = ((rows - torch.arange(rows, device=q.device)) * present).sum().item()
    at = vertical[0] // block
    uncovered = (rows - at - present.cumsum(1).gather(1, rows - 1 - at)).sum().item()
    pairs = listed * block**2 + uncovered * block

    def keys_of(h: int, row: int) -> Tensor:
        near = (row - slash[0, h])[slash[0, h] <= row].unique()
        return torch.cat((_slots(near, block), vertical[0, h])).unique()

    run, facts = through_attend(prompt, plan)
    work = 4.0 * q.shape[-1] * pairs
    return Contender(
        name="foveate, vertical-slash", open=always(run, on_samples(prompt, keys_of)), judged=SAMPLED, gate=FORWARD,
        calls=3, flop=work, within=(blocks, 1.15 * work / prompt.flop),
        facts={**facts, "density": pairs / (heads * block**2 * rows * (rows + 1) / 2), "diagonals": slash.shape[-1]},
    )  # fmt: skip


def backward_case(sizes: AttentionSizes, device: torch.device) -> Case:
    """Gradients alone: the forward pass is done once, each contender by its own."""
    prompt = random_prompt(sizes, sizes.learned, sizes.learned_density, device)
    do = torch.randn(prompt.q.shape, device=device, dtype=sizes.dtype, generator=generator(device, 1))
    plan = prompt.plan()

    def contender(name: str, forward: Callable[..., Any], baseline: bool) -> Contender:
        def make() -> tuple[Run, Judge]:
            leaves = [x.detach().requires_grad_() for x in (prompt.q, prompt.k, prompt.v)]
            o, lse = forward(*leaves)
            judge = gradient_judge(prompt, do, o.detach(), lse.detach())
            return lambda i: torch.autograd.grad(o, leaves, do, retain_graph=True), judge

        # Five products of the blocks' scores instead of two.
        return Contender(
            name=name, open=prepared(make), judged="float64, sampled blocks, from its own forward pass",
            baseline=baseline, gate=GRADIENTS, calls=3, flop=2.5 * prompt.flop,
        )  # fmt: skip

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return compiled_flex()(q, k, v, **flex_options(prompt))

    title = f"block-sparse backward pass, {tokens(sizes.learned)}, density {prompt.share:.3f}"
    ours = partial(attend, plan=plan, return_lse=True)
    return Case(title, [contender("FlexAttention", flex, True), contender("foveate", ours, False)])


def gradient_judge(prompt: Prompt, do: Tensor, o: Tensor, lse: Tensor) -> Judge:
    """Judges (dq, dk, dv) on a few blocks in float64, from the forward pass's o and lse."""
    q, k, v, block, tiles = prompt.q, prompt.k, prompt.v, prompt.block, prompt.tiles[0]
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    places = [(0, 0), (q.shape[1] // 3, prompt.rows // 2), (q.shape[1] - 1, prompt.rows - 1)]

    def pieces(h: int, q_at: Tensor, k_at: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and gradients of scores, queries by keys."""
        s = q[0, h, q_at].double() @ k[0, h // group, k_at].double().T * scale
        p = (s - lse[0, h, q_at].double()[:, None]).exp().masked_fill(k_at[None] > q_at[:, None], 0.0)
        grad = do[0, h, q_at].double()
        delta = (grad * o[0, h, q_at].double()).sum(-1, keepdim=True)
        return p, p * (grad @ v[0, h // group, k_at].double().T - delta)

    def wanted(h: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
        at = _slots(torch.tensor([b], device=q.device), block)
        keys = prompt.keys_of(h, b)
        dq = pieces(h, at, keys)[1] @ k[0, h // group, keys].double() * scale
        dk, dv = torch.zeros_like(dq), torch.zeros(block, v.shape[-1], dtype=torch.float64, device=q.device)
        for head in range(h // group * group, h // group * group + group):
            queries = _slots(tiles[head, :, b].nonzero()[:, 0], block)
            p, ds = pieces(head, queries, at)
            dk += ds.T @ q[0, head, queries].double() * scale
            dv += p.T @ do[0, head, queries].double()
        return dq, dk, dv

    def judge(got: Any) -> dict[str, float]:
        want = [wanted(h, b) for h, b in places]
        errors = {}
        for i, name in enumerate(("dq", "dk", "dv")):
            found = [got[i][0, h if i == 0 else h // group, b * block : (b + 1) * block] for h, b in places]
            exact = torch.stack([each[i] for each in want])
            errors[name] = relative(torch.stack(found), exact) if finite(got[i]) else math.inf
        return {"error": max(errors.values()), **errors}

    return judge
