"""Cases of `foveate bench gpu` for whole models with random weights: time to the first token, and decoding.

B 1. Every method's selection is inside its time. Prompts: the stock model, which chooses torch's fastest kernel itself,
and block-sparse prompts of about a tenth of the blocks. Decoding: all keys and an eighth of them, both recorded in CUDA
graphs; eager rows beside them, which show how long Python needs to issue a step.
The figure in the place of an error is a relative difference of logits, and says of what: with random weights it is no
measure of quality (`foveate compare` is).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.compare.bench_gpu_attention import tokens
from foveate.compare.bench_gpu_timing import Case, Contender, Job, Judge, Opened, Run, relative
from foveate.hf.apply import apply
from foveate.hf.compat import cache_keyword, new_dynamic_cache

SHAPES = {
    "SmolLM2-135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "7B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Shapes of Llama models, and (shape, tokens, least speed-up over the strongest baseline) of each case.

    steps: decode steps per sample. A recorded step's room for new tokens bounds the steps of a whole run.
    """

    shapes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: SHAPES)
    prompts: tuple[tuple[str, int, float | None], ...] = (
        ("SmolLM2-135M", 32768, 2.0),
        ("7B", 32768, 1.3),
        ("7B", 131072, 2.3),
    )
    decodes: tuple[tuple[str, int, float | None], ...] = (("7B", 131072, 1.5),)
    dtype: torch.dtype = torch.bfloat16
    steps: int = 20


def model_jobs(sizes: ModelSizes, device: torch.device) -> list[Job]:
    made = Made(sizes, device)
    jobs = [
        Job("models", f"prompt {shape} {length}", partial(prompt_case, made, shape, length, target), compiles=False)
        for shape, length, target in sizes.prompts
    ]
    return jobs + [
        Job("models", f"decode {shape} {length}", partial(decode_case, made, shape, length, target), compiles=False)
        for shape, length, target in sizes.decodes
    ]


class Made:
    """The model asked for last; one at a time is in memory."""

    def __init__(self, sizes: ModelSizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self._shape: str | None = None
        self._model: Any = None

    def model(self, shape: str) -> Any:
        if shape != self._shape:
            self._model = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._model, self._shape = random_llama(self.sizes.shapes[shape], self.sizes.dtype, self.device), shape
        return self._model

    def ids(self, model: Any, length: int) -> Tensor:
        own = torch.Generator(self.device).manual_seed(0)
        return torch.randint(0, model.config.vocab_size, (1, length), device=self.device, generator=own)


def random_llama(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, max_position_embeddings=1 << 18)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    # Inverse frequencies must not be rounded to half precision.
    half = (config.head_dim or config.hidden_size // config.num_attention_heads) // 2
    exact = 10000.0 ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.original_inv_freq = exact
    return model


def sparse_prompt(length: int) -> str:
    """FlexPrefill with fixed budgets: c columns and c diagonals of blocks are about 2.5 c / n of the causal ones."""
    budget = max(128, length // 25 // 128 * 128)
    return f"flexprefill:tau=0,min_budget={budget},max_budget={budget}"


def prompt_case(made: Made, shape: str, length: int, target: float | None) -> Case:
    model = made.model(shape)
    ids, kept = made.ids(model, length), Logits()

    def last_logits(i: int) -> Tensor:
        logits: Tensor = model(ids, use_cache=True, logits_to_keep=1).logits
        return logits

    @contextlib.contextmanager
    def stock() -> Iterator[tuple[Run, Judge]]:
        with torch.inference_mode():
            yield last_logits, kept.keep

    @contextlib.contextmanager
    def sparse() -> Iterator[tuple[Run, Judge]]:
        with torch.inference_mode(), apply(model, sparse_prompt(length)) as run:
            yield (
                last_logits,
                lambda logits: {**kept.against(logits), "density": float(run.stats.prefill_density or 0.0)},
            )

    # The dense 7B prompt of 128k tokens takes 12 s on an H200.
    shared: dict[str, Any] = {"how": "eager", "samples": 2 if length > 65536 else None}
    contenders = [
        Contender(name="stock", open=stock, judged="(what the others are compared with)", baseline=True, **shared),
        Contender(
            name="foveate, block-sparse", open=sparse, judged="the stock model's last logits, random weights",
            target_speedup=target, facts={"method": sparse_prompt(length)}, **shared,
        ),
    ]  # fmt: skip
    return Case(f"{shape} shape, first token after {tokens(length)}", contenders)


class Logits:
    """Logits that later ones are compared with."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def keep(self, logits: Tensor) -> dict[str, float]:
        self._kept = logits.double()
        return {}

    def against(self, logits: Tensor) -> dict[str, float]:
        # Nothing is kept where the contender to compare with has failed.
        return {} if self._kept is None else {"error": relative(logits, self._kept)}


def decode_case(made: Made, shape: str, length: int, target: float | None) -> Case:
    """All keys beside an eighth of them. Eager contenders come first: recorded ones are compared with their logits."""
    model = made.model(shape)
    ids, token = made.ids(model, length), torch.full((1, 1), 7, device=made.device)
    prompt, budget = sparse_prompt(length), length // 8
    steps = made.sizes.steps

    def decoding(method: str, graph: bool, judge: Callable[[Tensor], dict[str, float]]) -> Callable[[], Opened]:
        @contextlib.contextmanager
        def opened() -> Iterator[tuple[Run, Judge]]:
            with torch.inference_mode(), apply(model, method, cuda_graph=graph) as run:
                held = {cache_keyword(model): run.new_cache()}
                model(ids, logits_to_keep=1, **held)
                # The first steps compile and record.
                for _ in range(3):
                    model(token, **held)
                yield (
                    lambda i: model(token, **held).logits,
                    lambda logits: {**judge(logits), "cache_bytes": float(run.stats.cache_bytes)},
                )

        return opened

    contenders = [stock_decode(model, length, token)]
    recorded = []
    for name, method in (("every key", prompt), ("an eighth of the keys", f"{prompt}+snapkv:budget={budget}")):
        kept, dense = Logits(), method == prompt
        shared: dict[str, Any] = {"how": "eager", "samples": 3, "facts": {"method": method}}
        contenders.append(
            Contender(
                name=f"foveate, {name}, eager (bound by launches)", open=decoding(method, False, kept.keep),
                judged="(what its CUDA graph is compared with)", calls=max(1, steps // 4), **shared,
            )
        )  # fmt: skip
        recorded.append(
            Contender(
                name=f"{'dense: ' if dense else ''}foveate, {name}, CUDA graph",
                open=decoding(method, made.device.type == "cuda", kept.against),
                judged="the eager steps' logits", calls=steps, baseline=dense,
                target_speedup=None if dense else target, **shared,
            )
        )  # fmt: skip
    return Case(f"{shape} shape, a token after {tokens(length)}", [*contenders, *recorded])


def stock_decode(model: Any, length: int, token: Tensor) -> Contender:
    """The untouched model with its own cache, on random keys."""

    @contextlib.contextmanager
    def opened() -> Iterator[tuple[Run, Judge]]:
        config = model.config
        cache: Any = new_dynamic_cache(config)
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        own = torch.Generator(token.device).manual_seed(0)
        for layer in range(config.num_hidden_layers):
            k, v = (torch.randn(shape, device=token.device, dtype=model.dtype, generator=own) for _ in range(2))
            cache.update(k, v, layer)
        held = {cache_keyword(model): cache}
        with torch.inference_mode():
            yield lambda i: model(token, **held).logits, lambda logits: {}

    return Contender(
        name="stock, eager (bound by launches)", open=opened, judged="(random keys)", baseline=True, how="eager",
        calls=5, samples=3,
    )  # fmt: skip
