"""Contextual memory in a pretrained model: segments that see no earlier tokens, only what the memory kept of them.

    model, tokenizer = foveate.load_model()
    memory = memory_for(model, segment=512)                    # or trained=False, which needs no training
    fit(model, memory, text, steps=500)                        # text: foveate.lm.data.pack(documents, tokenizer, 4096)
    torch.save(memory.state_dict(), "memory.pt")
    with Reweaving(model, memory) as run:
        tokens = run.generate(ids, 100)                        # ids [B, N], a prompt of any length
        logits, stream = run(ids)                              # and run(more, stream)

How a text is cut into calls changes nothing: states are kept at the ends of segments only. With carry=True the model's
own cache goes on over segments and the memory comes on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import OptionError, ShapeError, StateError, UnsupportedCacheError
from foveate.hf import compat
from foveate.hf.modules import attention_modules, check_model, text_config
from foveate.lm.data import PackedText
from foveate.lm.synthetic import IGNORED
from foveate.mixers.memory.cmr import ContextualMemory, Memory


@dataclass
class Stream:
    """A batch of texts so far; every call consumes one and gives the next.

    memory: kept states.    cache: the model's own, of the segment (of the text with carry=True).
    last: [B, V], scores of the coming token, None before the first.
    """

    memory: Memory
    cache: Any
    last: Tensor | None = None


def capture_layers(layers: int, captured: int = 3) -> tuple[int, ...]:
    """Indices of `captured` evenly spaced decoder layers: of 30 and 3, layers 7, 15 and 22."""
    if not 1 <= captured <= layers:
        raise OptionError(f"captured={captured}, allowed: 1 to the model's {layers} layers")
    return tuple((index + 1) * layers // (captured + 1) for index in range(captured))


def memory_for(model: Any, *, captured: int = 3, seed: int = 0, **options: Any) -> ContextualMemory:
    """A new memory for a transformers causal LM, on its device, in float32; options of `ContextualMemory`."""
    check_model(model)
    capture_layers(len(attention_modules(model)), captured)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        made = ContextualMemory(dim=text_config(model).hidden_size, captured=captured, **options)
    return made.to(model.device)


class Reweaving:
    """A memory in a model: a context manager, or `attach()` and `detach()`; call it with tokens.

    model: a transformers causal LM, unpadded rows.    memory: trained for it, or trained=False.
    layers: indices of the decoder layers of C, default `capture_layers`.
    carry: the model's own cache goes on over segments.
    """

    def __init__(
        self, model: Any, memory: ContextualMemory, *, layers: tuple[int, ...] | None = None, carry: bool = False
    ) -> None:
        check_model(model)
        blocks = _decoder_layers(model)
        self.layers = capture_layers(len(blocks), memory.captured) if layers is None else tuple(layers)
        if len(self.layers) != memory.captured or any(not 0 <= each < len(blocks) for each in self.layers):
            raise OptionError(
                f"layers={self.layers}, allowed: {memory.captured} of 0 to {len(blocks) - 1}, as the memory captures"
            )
        if text_config(model).hidden_size != memory.dim:
            raise ShapeError(f"the memory has dim={memory.dim}, allowed: {text_config(model).hidden_size}, the model's")
        self.model, self.memory, self.carry = model, memory, carry
        self._blocks = [blocks[each] for each in self.layers]
        self._handles: list[Any] = []
        self._reading: Memory | None = None
        self._states: list[Tensor] = []

    def attach(self) -> Reweaving:
        """Hang the memory into the layers. The model's own calls stay as they are."""
        if not self._handles:
            for index, block in enumerate(self._blocks):
                self._handles.append(block.register_forward_hook(self._hook(index)))
        return self

    def detach(self) -> None:
        """Take it out; twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, index: int) -> Any:
        def reweave(block: nn.Module, args: Any, output: Any) -> Any:
            if self._reading is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            self._states.append(hidden)
            woven = self.memory(hidden, self._reading, index)
            return (woven, *output[1:]) if isinstance(output, tuple) else woven

        return reweave

    def start(self, batch: int) -> Stream:
        """Before the first token."""
        like = next(self.model.parameters())
        return Stream(self.memory.start(batch, like), compat.new_dynamic_cache(text_config(self.model)))

    def __call__(self, ids: Tensor, stream: Stream | None = None) -> tuple[Tensor, Stream]:
        """Read ids [B, T] after what `stream` has read: scores [B, T, V] of the tokens after each, and the stream.

        Raises StateError outside the context or for a stream of another batch; ShapeError for other ids.
        """
        if not self._handles:
            raise StateError("the memory is not in the model; use `with Reweaving(model, memory) as run:`")
        if ids.dim() != 2 or ids.shape[1] < 1:
            raise ShapeError(f"ids {list(ids.shape)}, allowed: [B, T] with T >= 1")
        stream = stream or self.start(ids.shape[0])
        if stream.memory.states.shape[0] != ids.shape[0]:
            raise StateError(
                f"a stream of {stream.memory.states.shape[0]} rows was given {ids.shape[0]} rows of tokens"
            )
        scores = []
        while ids.shape[1]:
            room = self.memory.segment - stream.memory.waiting.shape[2]
            made, stream = self._piece(ids[:, :room], stream)
            scores.append(made)
            ids = ids[:, room:]
        return torch.cat(scores, 1), stream

    def _piece(self, ids: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        """Tokens of one segment."""
        before = stream.cache.get_seq_length()
        self._reading, self._states = stream.memory, []
        try:
            scores = self.model(ids, **{compat.cache_keyword(self.model): stream.cache}, use_cache=True).logits
            states = torch.stack(self._states, 1)
        finally:
            self._reading, self._states = None, []
        if stream.cache.get_seq_length() != before + ids.shape[1]:
            raise UnsupportedCacheError("the model kept no cache; switch gradient checkpointing off")
        memory = self.memory.capture(stream.memory, states, _surprise(ids, scores, stream.last))
        ended = memory.waiting.shape[2] == 0 and not self.carry
        cache = compat.new_dynamic_cache(text_config(self.model)) if ended else stream.cache
        return scores, Stream(memory, cache, scores[:, -1].detach())

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int) -> Tensor:
        """The most likely continuation, token by token: ids [B, N] -> [B, N + max_new_tokens]."""
        scores, stream = self(ids)
        for step in range(max_new_tokens):
            ids = torch.cat((ids, scores[:, -1:].argmax(-1)), 1)
            if step + 1 < max_new_tokens:
                scores, stream = self(ids[:, -1:], stream)
        return ids

    def __enter__(self) -> Reweaving:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def _surprise(ids: Tensor, scores: Tensor, last: Tensor | None) -> Tensor:
    """-log p [B, T] of each token; 0 for the first of a text, which nothing predicts."""
    with torch.no_grad():
        earlier = scores[:, :-1].detach()
        first = torch.zeros(ids.shape[0], 1, device=ids.device)
        if last is not None:
            first = F.cross_entropy(last.float(), ids[:, 0], reduction="none")[:, None]
        rest = F.cross_entropy(earlier.float().transpose(1, 2), ids[:, 1:], reduction="none")
        return torch.cat((first, rest), 1)


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that hold an attention module each, by layer."""
    holders = {id(child): module for module in model.modules() for child in module.children()}
    return [holders[id(each)] for each in attention_modules(model)]  # type: ignore[arg-type]


def fit(
    model: Any,
    memory: ContextualMemory,
    text: PackedText,
    *,
    steps: int,
    batch: int = 8,
    rate: float = 1e-4,
    auxiliary: float = 0.1,
    seed: int = 0,
) -> list[float]:
    """Train the memory's weights on next-token loss, the model frozen; returns the loss in nats of every step.

    Gradients stay within a segment: kept states are constants. Each step is one AdamW step after whole texts.

    Args:
        text: packed, several segments long; targets of -100 are not asked for.
        steps, batch, rate: of AdamW, 20 steps of warm-up.
        auxiliary: weight of `ContextualMemory.reconstruction_loss`.    seed: of the order.
    Raises:
        OptionError for a memory without weights or texts of one segment.
    """
    if not memory.trained:
        raise OptionError("fit: a memory with trained=False has no weights, allowed: trained=True")
    if text.tokens.shape[1] <= memory.segment:
        raise OptionError(
            f"fit: texts of {text.tokens.shape[1]} tokens, allowed: more than a segment, {memory.segment}"
        )
    flags = [(each, each.requires_grad) for each in model.parameters()]
    optimiser = torch.optim.AdamW(memory.parameters(), lr=rate, weight_decay=0.0)
    random = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    losses = []
    try:
        with Reweaving(model, memory) as run:
            for step in range(steps):
                rows = torch.randint(len(text), (batch,), generator=random)
                for group in optimiser.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / 20)
                optimiser.zero_grad()
                tokens, targets = (each[rows].to(model.device) for each in (text.tokens, text.targets))
                losses.append(_backward(run, tokens, targets, auxiliary))
                nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
                optimiser.step()
    finally:
        for each, flag in flags:
            each.requires_grad_(flag)
    return losses


def _backward(run: Reweaving, tokens: Tensor, targets: Tensor, auxiliary: float) -> float:
    """Add the gradient of the mean loss of whole texts, segment by segment; the first has no memory to learn from."""
    size, stream, total = run.memory.segment, None, 0.0
    asked = int((targets != IGNORED).sum())
    for index, (part, target) in enumerate(zip(tokens.split(size, 1), targets.split(size, 1))):
        with torch.set_grad_enabled(index > 0):
            scores, after = run(part, stream)
        loss = F.cross_entropy(scores.float().flatten(0, 1), target.flatten(), reduction="sum", ignore_index=IGNORED)
        loss = loss / max(1, asked)
        total += float(loss.detach())
        if index > 0:
            assert stream is not None
            share = part.shape[1] / tokens.shape[1]
            (loss + auxiliary * share * run.memory.reconstruction_loss(stream.memory)).backward()
        stream = after
    return total
