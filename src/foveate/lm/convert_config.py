"""What a conversion is: which layers become what, on which text, and how long each stage trains.

`to` is one mixer for all replaced layers, or a cycle: layer i takes entry i modulo their number, so that
"spikingbrain,spikingbrain-window" gives the even layers the first and the odd ones the second (SpikingBrain-7B), and
as many entries as layers name each layer's. A bare "softmax" leaves its layers as they are.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from foveate import registry
from foveate.errors import OptionError, UnknownNameError
from foveate.lm.data import MANUAL
from foveate.lm.mlp import SCALES
from foveate.options import check_fields, nearest, option, parse_spec


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Settings of `foveate.lm.convert.convert`."""

    to: str | tuple[str, ...] = option(
        "hedgehog", "a mixer's spec with q, k, v and o projections, e.g. 'hedgehog'; several with commas: a cycle"
    )
    layers: tuple[int, ...] | None = option(None, "layers that are replaced, from 0; default: by ratio")
    ratio: float | None = option(
        None,
        "share of the layers that are replaced, spread evenly; default: 0.5, or 1 for a cycle",
        above=0,
        at_most=1,
    )
    text: tuple[str, ...] = option((MANUAL,), "text files; 'manual' is Python's own manual")
    separator: str | None = option(None, "what stands between documents in a file")
    length: int = option(512, "tokens of a training example", at_least=2)
    held_out: float = option(0.1, "share of the text, its end, that tests", above=0, below=1)
    objective: str = option(
        "auto",
        "what distillation copies: 'weights' (Hedgehog's cross-entropy, trains its maps) or 'outputs' (trains all of a "
        "new layer); auto: weights where the mixer has maps",
        one_of=("auto", "weights", "outputs"),
    )
    distill_steps: int = option(200, "optimiser steps of distillation; 0: none", at_least=0)
    distill_rate: float = option(1e-2, "its peak learning rate", above=0)
    distill_minutes: float | None = option(None, "time after which it ends, whatever its steps", above=0)
    finetune: str = option("lora", "what trains in the second stage", one_of=("lora", "full"))
    finetune_steps: int = option(400, "optimiser steps on the next token; 0: none", at_least=0)
    finetune_rate: float = option(3e-4, "its peak learning rate", above=0)
    finetune_minutes: float | None = option(None, "time after which it ends, whatever its steps", above=0)
    extend: tuple[int, ...] = option((), "lengths of further such stages, for a longer context")
    extend_steps: int = option(100, "optimiser steps of each of them", at_least=1)
    upcycle: int = option(0, "experts that every SwiGLU block becomes before the second stage; 0: none", at_least=0)
    upcycle_top: int = option(1, "of which a token is sent to so many", at_least=1)
    upcycle_shared: int = option(1, "experts that every token reads besides", at_least=0)
    upcycle_scale: str = option("cube-root", "how their weights are scaled, see foveate.lm.mlp", one_of=SCALES)
    router_noise: float = option(0.0, "std of noise on the router's logits in training", at_least=0)
    dense_layers: tuple[int, ...] = option((), "layers that keep one SwiGLU block, from 0")
    spikes: float | None = option(
        None, "code the linear layers as spikes at the end, so many per mean channel (3: SpikingBrain)", above=0
    )
    spike_group: int = option(128, "inputs that share a scale of the 8-bit weights, at most", at_least=1)
    rank: int = option(8, "LoRA's rank, on q, k, v and o of every layer", at_least=1)
    alpha: int = option(16, "LoRA's scale times its rank", at_least=1)
    batch: int = option(4, "examples per forward pass", at_least=1)
    accumulate: int = option(2, "forward passes per optimiser step", at_least=1)
    warmup: float = option(0.05, "share of a stage over which its rate rises", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's", at_least=0)
    clip: float = option(1.0, "largest gradient norm", above=0)
    precision: str = option("float32", "of the computation; weights are float32", one_of=("float32", "bfloat16"))
    save_every: int = option(100, "steps between saves of unfinished work", at_least=1)
    seed: int = option(0, "of new weights and order", at_least=0)

    def __post_init__(self) -> None:
        check_fields(self)
        known = registry.names(kind="mixer")
        for each in self.specs:
            name, _ = parse_spec(each)
            if name not in known:
                raise UnknownNameError(f"convert: there is no mixer {name!r}{nearest(name, known)}")
        for field, kind in (("text", str), ("layers", int), ("extend", int), ("dense_layers", int)):
            given = getattr(self, field) or ()
            if not all(isinstance(each, kind) and not isinstance(each, bool) for each in given):
                raise OptionError(f"convert: {field}={list(given)!r}, allowed: values of type {kind.__name__}")
        if any(each < 2 for each in self.extend) or len(set(self.extend)) < len(self.extend):
            raise OptionError(f"convert: extend={list(self.extend)}, allowed: different lengths >= 2")
        if not self.upcycle and (self.dense_layers or self.router_noise):
            raise OptionError(
                f"convert: dense_layers={list(self.dense_layers)}, router_noise={self.router_noise} with upcycle=0, "
                "allowed: with upcycle >= 1, which makes experts"
            )
        if self.upcycle and self.upcycle_top > self.upcycle:
            raise OptionError(f"convert: upcycle_top={self.upcycle_top}, allowed: <= upcycle = {self.upcycle}")
        if self.upcycle and self.finetune == "lora" and (self.finetune_steps or self.extend):
            raise OptionError(
                f"convert: upcycle={self.upcycle} with finetune='lora', allowed: finetune='full', which trains experts"
            )

    @property
    def specs(self) -> tuple[str, ...]:
        """The mixers that `to` names: a cycle over the layers."""
        found = split_specs(self.to) if isinstance(self.to, str) else self.to
        if not found or not all(isinstance(each, str) for each in found):
            raise OptionError(f"convert: to={self.to!r}, allowed: mixers' specs, at least one")
        return tuple(found)

    @property
    def share(self) -> float:
        """`ratio`, or its default."""
        return self.ratio if self.ratio is not None else 0.5 if len(self.specs) == 1 else 1.0

    def chosen(self, layers: int) -> tuple[int, ...]:
        """The layers of a model of so many that are replaced, in order.

        By ratio r, layer i is when floor((i + 1) r) > floor(i r): 0.75 keeps the first of every four. Of either kind,
        those whose entry in `to` is "softmax" are not.
        """
        specs = self.specs
        if len(specs) > layers:
            raise OptionError(f"convert: to names {len(specs)} mixers, allowed: at most {layers}, one per layer")
        if any(not 0 <= each < layers for each in self.dense_layers):
            raise OptionError(f"convert: dense_layers={list(self.dense_layers)}, allowed: from 0 to {layers - 1}")
        found = self._asked(layers)
        changed = tuple(each for each in found if len(specs) == 1 or specs[each % len(specs)] != "softmax")
        if not changed:
            raise OptionError(f"convert: to={self.to!r} leaves layers {list(found)} as they are, allowed: a new mixer")
        return changed

    def _asked(self, layers: int) -> tuple[int, ...]:
        if self.layers is None:
            r = self.share
            found = tuple(i for i in range(layers) if int((i + 1) * r) > int(i * r))
            if not found:
                raise OptionError(f"convert: ratio={r} of {layers} layers replaces none, allowed: >= {1 / layers:.3g}")
            return found
        given = sorted(self.layers)
        if not given or given[0] < 0 or given[-1] >= layers or len(set(given)) < len(given):
            raise OptionError(
                f"convert: layers={list(self.layers)}, allowed: different layers from 0 to {layers - 1}, at least one"
            )
        return tuple(given)

    def as_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {**plain, "ratio": self.share}


def split_specs(text: str) -> tuple[str, ...]:
    """Specs with commas between them and within: `"gla:heads=4,expand_k=1.0,softmax"` is of two.

    A piece `name=value` belongs to the spec before it; any other begins one.
    """
    found: list[str] = []
    for piece in filter(None, (each.strip() for each in text.split(","))):
        option, equals, _ = piece.partition("=")
        if found and equals and ":" not in option:
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return tuple(found)
