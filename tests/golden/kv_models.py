"""What every `model_generate` case of the kv group shares: a tiny Llama under a method, prompt then greedy steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from foveate.hf import Run, apply
from foveate.hf.compat import cache_keyword
from foveate.methods import Method, create
from foveate.methods.base import Composed
from foveate.methods.cache import Change
from foveate.methods.prompt import PromptKeep
from foveate.methods.step import Step

STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Listener(Method):
    """Notes another method's scores of the prompt, and changes nothing."""

    to: Method
    heard: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, step: Step) -> Change | None:
        if step.phase == "prefill":
            self.heard[step.layer] = self.to.score(step)[0]  # type: ignore[attr-defined]
        return None


def tiny_llama(config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The model of a case: config["model_config"] and the state dict among `tensors`."""
    options = dict(config["model_config"])
    made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[options.pop("model_type")](**options))
    made.load_state_dict({name: tensors[name] for name in made.state_dict()})
    return made.eval()


def model_generate(config: dict[str, Any], tensors: dict[str, Tensor], method: str | Method) -> dict[str, Tensor]:
    """Run the prompt input_ids [1, N] and five greedy steps under `method`.

    Returns prefill_last_logits [vocab], decode_tokens [5], decode_logits [5, vocab], per layer keep_mask.<layer>
    uint8 [Hkv, N] (prompt keys held after the prompt), layer_kept [layers] (how many in the first head) and, where
    the method has `score(step)`, scores.<layer> [Hkv, N].
    """
    model = tiny_llama(config, tensors)
    method = create(method)
    listener = Listener(to=method) if _scores(method) else None
    applied = method if listener is None else Composed(parts=(listener, method))
    ids = tensors["input_ids"].long()
    with torch.no_grad(), apply(model, applied) as run:
        held = {cache_keyword(model): run.new_cache()}
        last = model(ids, **held).logits[0, -1]
        made = {"prefill_last_logits": last, **_kept(run, ids.shape[1])}
        tokens, logits = [], []
        for _ in range(STEPS):
            tokens.append(last.argmax())
            last = model(tokens[-1].view(1, 1), **held).logits[0, -1]
            logits.append(last)
    made |= {"decode_tokens": torch.stack(tokens).int(), "decode_logits": torch.stack(logits)}
    for layer, scores in ({} if listener is None else listener.heard).items():
        made[f"scores.{layer}"] = scores
    return made


def _scores(method: Method) -> bool:
    own = getattr(type(method), "score", None)
    return not method.alone and own is not None and own is not PromptKeep.score


def _kept(run: Run, prompt: int) -> dict[str, Tensor]:
    lengths = run.stats.lengths
    made = {"layer_kept": torch.tensor([int(row[0]) for row in lengths], dtype=torch.int32)}
    for layer, row in enumerate(lengths):
        mask = torch.zeros(len(row), prompt, dtype=torch.uint8)
        for head in range(len(row)):
            mask[head, run.stats.positions(layer, head)] = 1
        made[f"keep_mask.{layer}"] = mask
    return made
