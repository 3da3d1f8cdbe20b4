"""Decode steps recorded once and replayed: a CUDA graph of the whole model for methods whose steps have a fixed shape.

Eager decoding on a GPU is bound by launches: some twenty kernels per layer, each issued by Python. Where every step
reads all that is stored and keeps it (`Method.steady`: full, and all that decide at the end of the prompt), only
contents and lengths change from step to step. The cache reserves room, its layers are seen as flat rows with a start
and a length per head on the device, and one forward over them is recorded; each later step copies the token in and
replays it. When the room is used up, or something else touched the cache, the next step records anew.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.attention.ragged import attend_ragged
from foveate.errors import UnsupportedModelError
from foveate.hf.compat import CACHE_NAMES
from foveate.hf.layer import FoveateLayer
from foveate.methods.base import Method
from foveate.methods.cache import LayerCache
from foveate.methods.step import Reading, RunState

ROOM = 256
# Arguments of a forward that a recorded step can stand for; any other is run as it is.
KNOWN = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep", *CACHE_NAMES}


class FlatLayer:
    """One layer's cache as flat rows with starts and lengths on the device, for a step that can be recorded.

    fields: [R, ...] by name; start, length: int64 [B * Hkv]; position: int64 [B], of the next token.
    """

    def __init__(self, store: LayerCache, device: torch.device, position: Tensor) -> None:
        self.fields, start, length = store.buffers()
        self.start = torch.tensor(start, device=device)
        self.length = torch.tensor(length, device=device)
        self.position = position
        self.heads = store.shape[1]

    def update(self, keys: Tensor, values: Tensor) -> None:
        """Write one token per sequence: keys [B, Hkv, 1, D], values [B, Hkv, 1, Dv]."""
        at = self.start + self.length
        rows = {"keys": keys[:, :, 0].flatten(0, 1), "values": values[:, :, 0].flatten(0, 1)}
        rows["positions"] = self.position.repeat_interleave(self.heads).to(torch.int32)
        for name, flat in self.fields.items():
            if name in rows:
                flat.index_copy_(0, at, rows[name].to(flat.dtype))
            else:
                flat.index_fill_(0, at, 0)
        self.length += 1

    def in_place(self, store: LayerCache) -> bool:
        """Whether the store's keys still lie where these do."""
        return self.fields["keys"].data_ptr() == store.keys_at()

    def attend(self, q: Tensor, scale: float, sink: Tensor | None) -> Tensor:
        """o [B, Hq, 1, Dv] of q [B, Hq, 1, D] over everything stored."""
        o = attend_ragged(
            q,
            self.fields["keys"],
            self.fields["values"],
            self.start,
            self.length,
            scale=scale,
            log_weight=self.fields.get("log_weight"),
            sink=sink,
        )
        assert isinstance(o, Tensor)
        return o


@dataclass
class Recording:
    """One recorded step of one cache."""

    cache: Any
    ids: Tensor
    position: Tensor
    flats: list[FlatLayer]
    stores: list[LayerCache]
    output: Any = None
    graph: Any = None
    seen: list[int] = field(default_factory=list)
    left: int = 0

    def holds(self, cache: Any, ids: Tensor) -> bool:
        """Whether the next step of this cache can be replayed: nothing else wrote to it, moved it or cut it."""
        return (
            self.cache is cache
            and self.left > 0
            and self.ids.shape == ids.shape
            and self.seen == [store.seen for store in self.stores]
            and all(flat.in_place(store) for flat, store in zip(self.flats, self.stores))
        )

    @contextmanager
    def flat(self) -> Iterator[None]:
        """While a step runs over the flat layers."""
        for layer, flat in zip(self.cache.layers, self.flats):
            layer.flat = flat
        try:
            yield
        finally:
            for layer in self.cache.layers:
                layer.flat = None


class GraphedForward:
    """Stands for a model's forward: decode steps are replayed, everything else is passed on.

    record: capture a CUDA graph; False runs each step eagerly over the same flat layers (any device).
    """

    def __init__(
        self, forward: Callable[..., Any], method: Method, request: Callable[[], RunState], record: bool
    ) -> None:
        if not method.steady:
            raise UnsupportedModelError(
                f"cuda_graph=True records a decode step once, and {type(method).__name__} selects or evicts in every "
                "step; use a method that decides at the end of the prompt (snapkv, adakv, expected-attention, ...) "
                "or leave cuda_graph out"
            )
        self.forward = forward
        # generate() asks a model's forward for its parameters.
        self.__signature__ = inspect.signature(forward)
        self.request = request
        self.record = record
        self.recording: Recording | None = None
        self.pool: Any = None
        self.warned = False

    def __call__(self, *args: Any, **given: Any) -> Any:
        if args and "input_ids" not in given:
            given, args = {"input_ids": args[0], **given}, args[1:]
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        ids = given.get("input_ids")
        if args or cache is None or ids is None or ids.shape[1] != 1 or not self._seen(cache):
            return self.forward(*args, **given)
        reason = self._why_not(cache, ids, given)
        if reason is not None:
            self._warn(reason)
            return self.forward(**given)
        if self.recording is None or not self.recording.holds(cache, ids):
            self._start(cache, ids, given)
        return self._step(ids)

    @staticmethod
    def _seen(cache: Any) -> int:
        return int(cache.get_seq_length()) if cache.layers else 0

    def _why_not(self, cache: Any, ids: Tensor, given: dict[str, Any]) -> str | None:
        unknown = sorted(name for name, value in given.items() if value is not None and name not in KNOWN)
        if [name for name in unknown if given[name] is not False]:
            return f"the call has the arguments {unknown}"
        if torch.is_grad_enabled():
            return "gradients are on (use torch.no_grad or generate)"
        if self.record and not ids.is_cuda:
            return f"the model runs on {ids.device.type}; a CUDA graph needs a GPU"
        mask = given.get("attention_mask")
        if mask is not None and (mask.dim() != 2 or not bool(mask.all())):
            return "the batch is padded"
        others = [layer for layer in cache.layers if not isinstance(layer, FoveateLayer)]
        if others:
            return f"the model has layers with a {type(others[0]).__name__} of their own"
        if any(layer.store.holes for layer in cache.layers):
            return "the cache holds padding"
        return None

    def _warn(self, reason: str) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(f"cuda_graph=True: decode steps run eagerly, because {reason}", stacklevel=4)

    def _start(self, cache: Any, ids: Tensor, given: dict[str, Any]) -> None:
        """Reserve room and record a step; what the trial steps wrote lies beyond the lengths and is written again."""
        self.recording = None
        stores = [layer.store for layer in cache.layers]
        for store in stores:
            store.reserve(ROOM)
        position = stores[0].following(1, ids.device)[:, 0].clone()
        flats = [FlatLayer(store, ids.device, position) for store in stores]
        made = Recording(cache, ids.clone(), position, flats, stores, left=ROOM)
        made.seen = [store.seen for store in stores]
        keyword = next(name for name in CACHE_NAMES if given.get(name) is not None)
        passed = {keyword: cache, "use_cache": True, "return_dict": True}

        def step() -> Any:
            out = self.forward(input_ids=made.ids, position_ids=made.position[:, None], **passed)
            made.position += 1
            return out

        if self.record:
            with made.flat():
                made.graph, made.output = self._capture(step, made)
        else:
            made.graph = step
        self.recording = made

    def _capture(self, step: Callable[[], Any], made: Recording) -> tuple[Any, Any]:
        lengths, position = [flat.length.clone() for flat in made.flats], made.position.clone()

        def rewind() -> None:
            made.position.copy_(position)
            for flat, length in zip(made.flats, lengths):
                flat.length.copy_(length)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
                rewind()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = step()
        rewind()
        self.pool = graph.pool()
        return graph, output

    def _step(self, ids: Tensor) -> Any:
        made = self.recording
        assert made is not None
        made.ids.copy_(ids)
        if self.record:
            made.graph.replay()
            logits, kind = made.output.logits.clone(), type(made.output)
        else:
            with made.flat():
                out = made.graph()
            logits, kind = out.logits, type(out)
        made.left -= 1
        made.seen = [n + 1 for n in made.seen]
        self._account(made)
        keyword = next(name for name in CACHE_NAMES if name in kind.__dataclass_fields__)
        return kind(logits=logits, **{keyword: made.cache})

    def _account(self, made: Recording) -> None:
        """Tell the caches, and note what was read, as eager steps do."""
        request = self.request()
        for layer, store in enumerate(made.stores):
            store.advance(1)
            if request.record:
                stored = float(store.lengths().double().mean()) if store.ragged else float(store.stored)
                request.readings.append(Reading(layer, "decode", stored, float(store.seen)))


__all__ = ["FlatLayer", "GraphedForward", "Recording"]
