"""A model as it is measured, with the untouched model behind the same face as one under a method.

`on(model, method)` gives a run with `new_cache()` and `figures(cache)`: for "dense" the stock model with transformers'
own dynamic cache, for all other specs `foveate.hf.apply`.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate.hf import apply, compat
from foveate.hf.modules import text_config

DENSE = "dense"
BINS = 64


@dataclass
class Stopwatch:
    """seconds: wall time of a finished `Subject.timed()`."""

    seconds: float = 0.0


@dataclass(frozen=True)
class Subject:
    """A causal LM and what the measuring loop must know of it.

    eos: tokens that end an answer. cache_keyword: the name of the cache argument of the model's forward.
    keeps_logits: whether the forward can be told to compute the last logits only.
    """

    model: Any
    eos: frozenset[int]
    cache_keyword: str
    keeps_logits: bool

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None) -> Subject:
        parameters = inspect.signature(inspect.unwrap(type(model).forward)).parameters
        generation = getattr(model, "generation_config", None)
        ends = [getattr(generation, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
        return cls(model, _ids(ends), compat.cache_keyword(model), "logits_to_keep" in parameters)

    def logits(self, ids: Sequence[int], cache: Any, last: int = 1) -> Tensor:
        """Read tokens into the cache: logits [last, V] of the last `last` of them."""
        given = {self.cache_keyword: cache, "use_cache": True}
        if self.keeps_logits:
            given["logits_to_keep"] = last
        tokens = torch.tensor([ids], dtype=torch.long, device=self.model.device)
        return self.model(input_ids=tokens, **given).logits[0, -last:]

    def wait(self) -> None:
        """Until the device has done what was asked of it."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    @contextlib.contextmanager
    def timed(self) -> Iterator[Stopwatch]:
        """Times what is done inside, until the device is done with it."""
        watch = Stopwatch()
        self.wait()
        began = time.perf_counter()
        yield watch
        self.wait()
        watch.seconds = time.perf_counter() - began


def _ids(given: Sequence[Any]) -> frozenset[int]:
    flat = [each for entry in given for each in (entry if isinstance(entry, list | tuple) else [entry])]
    return frozenset(int(each) for each in flat if each is not None)


@dataclass(frozen=True)
class Figures:
    """What one cache holds and what was read, after a request.

    lengths: tokens held per layer and KV head. kept: per layer and KV head the share of the text's tokens that is
    held, in equal bins over the text; None when everything is. host_bytes: the part of cache_bytes in host memory
    beside the model's device, None where nothing is. recall: of searches in an index against exact ones, None where
    none was measured.
    """

    cache_bytes: int
    density: float | None
    prefill_density: float | None
    decode_density: float | None
    lengths: list[list[float]]
    tokens_seen: int
    kept: list[list[list[float]]] | None = None
    host_bytes: int | None = None
    recall: float | None = None


class MeasuredRun(Protocol):
    def new_cache(self) -> Any: ...

    def figures(self, cache: Any) -> Figures: ...


@contextlib.contextmanager
def on(model: Any, method: str) -> Iterator[MeasuredRun]:
    """A method on the model, or the untouched model for "dense"."""
    if method == DENSE:
        yield StockRun(model)
        return
    with apply(model, method) as run:
        yield MethodRun(run)


@dataclass(frozen=True)
class StockRun:
    """The untouched model with transformers' own dynamic cache."""

    model: Any

    def new_cache(self) -> Any:
        return compat.new_dynamic_cache(text_config(self.model))

    def figures(self, cache: Any) -> Figures:
        held = [
            (layer.keys, layer.values)
            for layer in cache.layers
            if getattr(layer, "keys", None) is not None and layer.keys.dim() == 4
        ]
        return Figures(
            cache_bytes=sum(keys.nbytes + values.nbytes for keys, values in held),
            density=1.0,
            prefill_density=1.0,
            decode_density=1.0,
            lengths=[[float(keys.shape[2])] * keys.shape[1] for keys, _ in held],
            tokens_seen=int(cache.get_seq_length()),
        )


@dataclass(frozen=True)
class MethodRun:
    """The model under `foveate.hf.apply`."""

    run: Any

    def new_cache(self) -> Any:
        return self.run.new_cache()

    def figures(self, cache: Any) -> Figures:
        stats = self.run.stats
        lengths, seen = stats.lengths, stats.seen
        return Figures(
            cache_bytes=int(stats.cache_bytes),
            density=stats.density,
            prefill_density=stats.prefill_density,
            decode_density=stats.decode_density,
            lengths=lengths,
            tokens_seen=seen,
            kept=None if all(each >= seen for row in lengths for each in row) else kept_shares(stats, lengths, seen),
            host_bytes=int(stats.host_bytes) or None,
            recall=stats.recall,
        )


def kept_shares(stats: Any, lengths: list[list[float]], seen: int) -> list[list[list[float]]]:
    """Per layer and KV head: the share of each bin's tokens that is held, over the `seen` tokens of the text."""
    bins = min(BINS, max(1, seen))
    edges = (torch.arange(bins + 1) * seen).div(bins, rounding_mode="floor")
    sizes = edges.diff()
    shares = []
    for layer, row in enumerate(lengths):
        shares.append([_share(stats.positions(layer, head), edges, sizes) for head in range(len(row))])
    return shares


def _share(positions: Tensor, edges: Tensor, sizes: Tensor) -> list[float]:
    at = torch.bucketize(positions.cpu(), edges[1:-1], right=True)
    counts = torch.bincount(at, minlength=len(sizes))[: len(sizes)]
    return [round(each, 3) for each in (counts / sizes).clamp_max(1.0).tolist()]
