"""Cases of `foveate bench gpu` for the linear family: forward passes, and forward with backward passes.

B 1, through `linear_scan` with its own choice of backend, beside the chunked operators of flash-linear-attention where
its package `fla` imports. Judged on a few heads over all tokens by the chunked torch backend in float64, gradients by
its autograd.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from foveate.attention.linear import explain_scan, head_decay, linear_scan
from foveate.compare.bench_gpu_timing import (
    GRADIENTS,
    Case,
    Contender,
    Job,
    Judge,
    Run,
    always,
    finite,
    generator,
    prepared,
    relative,
)

# Largest relative error of outputs in half precision over 8k tokens and more; docs/kernels.md, "Numeric gates".
LONG = 1e-2
# Tensors by the names of linear_scan's arguments, or gradients by d and their name.
Inputs = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ScanSize:
    """One shape. kind: linear, retention, gated (a scalar decay per token), delta or gated delta.

    learned: with gradients of all inputs. target_us: on one H200.
    """

    kind: str
    heads: int
    length: int
    target_us: float | None = None
    learned: bool = False
    width: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def delta(self) -> bool:
        return self.kind.endswith("delta")

    @property
    def gated(self) -> bool:
        return self.kind.startswith("gated")


SCANS = (
    ScanSize(kind="linear", heads=96, length=8192, target_us=450.0),
    ScanSize(kind="retention", heads=96, length=8192, target_us=450.0),
    ScanSize(kind="delta", heads=96, length=8192),
    ScanSize(kind="gated delta", heads=96, length=8192, target_us=1200.0),
    ScanSize(kind="linear", heads=8, length=65536, target_us=350.0),
    ScanSize(kind="delta", heads=8, length=65536),
    ScanSize(kind="gated delta", heads=8, length=65536, target_us=800.0),
    ScanSize(kind="linear", heads=16, length=65536, target_us=2900.0, learned=True),
    ScanSize(kind="gated", heads=16, length=65536, learned=True),
    ScanSize(kind="gated delta", heads=16, length=65536, learned=True),
)


def scan_jobs(sizes: Sequence[ScanSize], device: torch.device) -> list[Job]:
    return [
        Job(
            "train" if size.learned else "scans",
            f"{size.kind} H{size.heads} N{size.length}",
            partial(learned_case if size.learned else forward_case, size, device),
        )
        for size in sizes
    ]


def draw(size: ScanSize, device: torch.device) -> Inputs:
    """[1, N, H, D]; keys of norm 1 for the delta rule, decays per token that forget over 10 to 1000 tokens."""
    own = generator(device)
    shape = (1, size.length, size.heads)
    q, k, v = (torch.randn(*shape, size.width, device=device, dtype=size.dtype, generator=own) for _ in range(3))
    inputs = {"q": q, "k": k, "v": v}
    if size.delta:
        inputs["k"] = torch.nn.functional.normalize(k.float(), dim=-1).to(size.dtype)
        inputs["beta"] = torch.rand(shape, device=device, generator=own)
    if size.kind == "retention":
        inputs["g"] = head_decay(size.heads, "retnet").to(device)
    elif size.gated:
        inputs["g"] = torch.nn.functional.logsigmoid(4 + 1.5 * torch.randn(shape, device=device, generator=own))
    return inputs


def some_heads(size: ScanSize, count: int) -> list[int]:
    """Evenly spread, the first and the last among them."""
    last, count = size.heads - 1, min(count, size.heads)
    return sorted({round(i * last / max(1, count - 1)) for i in range(count)})


def of_heads(inputs: Inputs, heads: list[int]) -> Inputs:
    return {name: (x[heads] if x.dim() == 1 else x[:, :, heads]).double() for name, x in inputs.items()}


def forward_case(size: ScanSize, device: torch.device) -> Case:
    inputs, heads = draw(size, device), some_heads(size, 4)

    @cache
    def exact() -> Tensor:
        return linear_scan(**of_heads(inputs, heads), backend="torch")[0]

    def judge(o: Tensor) -> dict[str, float]:
        return {"error": relative(o[:, :, heads], exact()) if finite(o) else math.inf}

    shared: dict[str, Any] = {"judged": f"float64, {len(heads)} heads", "gate": {"error": LONG}, "calls": 10}
    theirs, absent = fla_operator(size.kind)
    contenders = []
    if theirs is not None:
        run: Run = lambda i: theirs(inputs)  # noqa: E731
        contenders.append(Contender(name=FLA, open=always(run, judge), baseline=True, **shared))
    contenders.append(
        Contender(
            name="foveate", open=always(lambda i: linear_scan(**inputs)[0], judge), target_us=size.target_us,
            facts={"backend": explain_scan(**inputs).name}, **shared,
        )
    )  # fmt: skip
    return Case(f"{size.kind} scan, {size.heads} heads, {size.length} tokens", contenders, absent)


def learned_case(size: ScanSize, device: torch.device) -> Case:
    """A forward and a backward pass by autograd, gradients of all inputs."""
    inputs, heads = draw(size, device), some_heads(size, 2)
    do = torch.randn(inputs["v"].shape, device=device, dtype=size.dtype, generator=generator(device, 1))

    @cache
    def exact() -> Inputs:
        part = {name: x.requires_grad_() for name, x in of_heads(inputs, heads).items()}
        o = linear_scan(**part, backend="torch")[0]
        grads = torch.autograd.grad(o, list(part.values()), do[:, :, heads].double())
        return {"o": o.detach(), **{f"d{name}": grad for name, grad in zip(part, grads)}}

    def judge(got: Inputs) -> dict[str, float]:
        errors = {name: relative(got[name][:, :, heads], want) for name, want in exact().items()}
        return {"error": max(errors.values()) if finite(*got.values()) else math.inf, **errors}

    def contender(name: str, scan: Callable[[Inputs], Tensor], **more: Any) -> Contender:
        def make() -> tuple[Run, Judge]:
            leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}

            def run(i: int) -> Inputs:
                o = scan(leaves)
                grads = torch.autograd.grad(o, list(leaves.values()), do)
                return {"o": o.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads)}}

            return run, judge

        judged = f"float64 and its autograd, {len(heads)} heads; the largest of the output's and the gradients'"
        return Contender(name=name, open=prepared(make), judged=judged, gate={**GRADIENTS, "o": LONG}, calls=3, **more)

    theirs, absent = fla_operator(size.kind)
    contenders = [] if theirs is None else [contender(FLA, theirs, baseline=True)]
    # What auto takes may depend on whether gradients are wanted.
    wanting = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    facts = {"backend": explain_scan(**wanting).name}
    contenders.append(contender("foveate", lambda x: linear_scan(**x)[0], target_us=size.target_us, facts=facts))
    title = f"{size.kind} scan, forward and backward, {size.heads} heads, {size.length} tokens"
    return Case(title, contenders, absent)


FLA = "flash-linear-attention"
OPERATORS = {
    "linear": ("linear_attn", "chunk_linear_attn", ("q", "k", "v"), {"normalize": False}),
    "retention": ("retention", "chunk_retention", ("q", "k", "v"), {}),
    "gated": ("simple_gla", "chunk_simple_gla", ("q", "k", "v", "g"), {}),
    "delta": ("delta_rule", "chunk_delta_rule", ("q", "k", "v", "beta"), {}),
    "gated delta": ("gated_delta_rule", "chunk_gated_delta_rule", ("q", "k", "v", "g", "beta"), {}),
}


def fla_operator(kind: str) -> tuple[Callable[[Inputs], Tensor] | None, list[str]]:
    """The chunked operator of a kind, or None and a line that says why."""
    module, name, takes, options = OPERATORS[kind]
    found, why = _fla_module(module)
    if found is None:
        return None, [f"{FLA} is not installed ({why})"]
    operator = getattr(found, name)

    def run(inputs: Inputs) -> Tensor:
        o: Tensor = operator(**{each: inputs[each] for each in takes}, **options)[0]
        return o

    return run, []


@cache
def _fla_module(name: str) -> tuple[Any, str]:
    """fla.ops.<name>, without the layers and models that `import fla` brings along where they are installed: these
    register themselves with transformers and want versions of their own."""
    unwanted = [each for each in ("fla.layers", "fla.models") if each not in sys.modules]
    for each in unwanted:
        # Python then says that there is no such module.
        sys.modules[each] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(f"fla.ops.{name}"), ""
    except Exception as problem:  # it asks the driver for its GPU while it is imported, which fails in many ways
        return None, f"{type(problem).__name__}: {str(problem)[:200]}"
    finally:
        for each in unwanted:
            sys.modules.pop(each, None)


def fla_version() -> str | None:
    """Of the imported package."""
    return getattr(sys.modules.get("fla"), "__version__", None)
