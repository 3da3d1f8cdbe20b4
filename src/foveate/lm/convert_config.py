"""What a conversion is: which layers become what, on which text, and how long each stage trains."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from foveate import registry
from foveate.errors import OptionError, UnknownNameError
from foveate.lm.data import MANUAL
from foveate.options import check_fields, nearest, option, parse_spec


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Settings of `foveate.lm.convert.convert`."""

    to: str = option("hedgehog", "a mixer's spec with q, k, v and o projections, e.g. 'hedgehog' or 'gla'")
    layers: tuple[int, ...] | None = option(None, "layers that are replaced, from 0; default: by ratio")
    ratio: float = option(0.5, "share of the layers that are replaced, spread evenly", above=0, at_most=1)
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
        name, _ = parse_spec(self.to)
        known = registry.names(kind="mixer")
        if name not in known:
            raise UnknownNameError(f"convert: there is no mixer {name!r}{nearest(name, known)}")

    def chosen(self, layers: int) -> tuple[int, ...]:
        """The layers of a model of so many that are replaced, in order.

        By ratio r, layer i is when floor((i + 1) r) > floor(i r): 0.75 keeps the first of every four.
        """
        if self.layers is None:
            found = tuple(i for i in range(layers) if int((i + 1) * self.ratio) > int(i * self.ratio))
            if not found:
                raise OptionError(
                    f"convert: ratio={self.ratio} of {layers} layers replaces none, allowed: >= {1 / layers:.3g}"
                )
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
        return plain
