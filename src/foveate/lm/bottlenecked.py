"""A pretrained model whose cache is rewritten at the end of every step of reasoning, by a trained processor.

    model, tokenizer = foveate.load_model()
    processor = processor_for(model, width=256)
    data = encode(tokenizer, [(question, solution), ...])      # steps of a solution end with a newline
    with Bottlenecked(model, processor, newline_tokens(tokenizer)) as run:
        fit(run, data, steps=1000)
        torch.save(processor.state_dict(), "processor.pt")
        tokens = run.generate(ids, 200)                        # ids [B, N]

A step ends with a token whose text has a newline in it; the token itself is read, and the next one predicted, with the
cache as it was. What every layer recalls are the older entries with the largest mean attention of the step's queries.
Entries keep their number, order and positions; tensors of the cache are replaced, never written into.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.positions import Positions
from foveate.attention.softmax import attend
from foveate.attention.statistics import column_mass
from foveate.errors import DataError, OptionError, ShapeError, StateError, UnsupportedCacheError, UnsupportedModelError
from foveate.hf import compat
from foveate.hf.finetune import Installed
from foveate.hf.masks import columns
from foveate.hf.modules import attention_modules, check_model, decoder_of, text_config
from foveate.hf.rope import ModelRope, check_rope, find_rope
from foveate.lm.synthetic import IGNORED
from foveate.mixers.memory.bottlenecked import CacheProcessor


@dataclass
class Stream:
    """A batch of texts so far; every call consumes one and gives the next.

    cache: the model's own.    real: [B, N] bool, slots that hold tokens.    step: [B, N] bool, slots of the unfinished
    step.    mass: per layer [B, N] float32, attention of the unfinished step's queries, mean over heads.
    """

    cache: Any
    real: Tensor
    step: Tensor
    mass: list[Tensor]

    def detached(self) -> Stream:
        """The same, cut off from what made it."""
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return self


class _Watched:
    """Dense attention in one layer, which notes how much weight every key receives."""

    def __init__(self) -> None:
        self.mass: Tensor | None = None

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        if options["softcap"] is not None or options["sink"] is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__}: a softcap or a sink, allowed: plain softmax attention"
            )
        M, N = q.shape[2], k.shape[2]
        places = columns(mask, M, N)
        if self.mass is not None:
            scale = q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
            with torch.no_grad():
                found = column_mass(q, k, scale=scale, positions=places).mean(1)
            self.mass = F.pad(self.mass, (0, N - self.mass.shape[1])) + found
        if mask is not None:
            # Padded queries read too: an empty softmax has no gradient.
            places = Positions(torch.arange(N - M, N, device=q.device)[None], places.k, holes=True)
        o: Tensor = attend(q, k, v, positions=places, **options)
        return o


class Bottlenecked:
    """A processor on a model: a context manager.

    model: a transformers causal LM with attention to everything in all layers.    processor: made by `processor_for`.
    newlines: [V] bool, the tokens that end a step, see `newline_tokens`.
    """

    def __init__(self, model: Any, processor: CacheProcessor, newlines: Tensor) -> None:
        check_model(model)
        modules = attention_modules(model)
        if len(processor.layers) != len(modules):
            raise OptionError(f"the processor has {len(processor.layers)} layers, allowed: {len(modules)}, the model's")
        if newlines.dtype != torch.bool or newlines.dim() != 1:
            raise ShapeError(f"newlines {list(newlines.shape)} {newlines.dtype}, allowed: bool [V]")
        self.model, self.processor, self.newlines = model, processor, newlines.to(model.device)
        self._ropes: list[ModelRope | None] = [None] * len(modules)
        if not processor.rotated:
            config, decoder = text_config(model), decoder_of(model)
            self._ropes = [check_rope(find_rope(decoder, each), config, "CacheProcessor") for each in modules]
        self._watched = [_Watched() for _ in modules]
        self._installed = Installed(model, self._watched.__getitem__)
        self._inside = False

    def start(self, batch: int) -> Stream:
        """Before the first token."""
        none = torch.zeros(batch, 0, dtype=torch.bool, device=self.model.device)
        cache = compat.new_dynamic_cache(text_config(self.model))
        return Stream(cache, none, none, [none.float()] * len(self._watched))

    def read(self, ids: Tensor, stream: Stream, real: Tensor | None = None) -> tuple[Tensor, Stream]:
        """Read ids [B, T], part of a step, without rewriting: scores [B, T, V] of the tokens after each.

        real: [B, T] bool, false for padding (anywhere). Raises StateError, ShapeError.
        """
        if not self._inside:
            raise StateError("the processor is not on the model; use `with Bottlenecked(...) as run:`")
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()
        if ids.dim() != 2 or real.shape != ids.shape or ids.shape[0] != stream.real.shape[0]:
            raise ShapeError(
                f"ids {list(ids.shape)}, real {list(real.shape)}, allowed: both [{stream.real.shape[0]}, T]"
            )
        held = torch.cat((stream.real, real), 1)
        at = (held.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        # The first step has nothing older that it could recall.
        if bool((stream.real & ~stream.step).any()):
            for watched, mass in zip(self._watched, stream.mass):
                watched.mass = mass
        given = {compat.cache_keyword(self.model): stream.cache, "use_cache": True}
        unread = torch.zeros_like(held, dtype=torch.float32)
        try:
            scores = self.model(ids, attention_mask=held.long(), position_ids=at, **given).logits
            noted = [unread if watched.mass is None else watched.mass for watched in self._watched]
        finally:
            for watched in self._watched:
                watched.mass = None
        if stream.cache.get_seq_length() != held.shape[1]:
            raise UnsupportedCacheError("the model kept no cache; switch gradient checkpointing off")
        return scores, Stream(stream.cache, held, torch.cat((stream.step, real), 1), noted)

    def consolidate(self, stream: Stream, rows: Tensor) -> Stream:
        """Rewrite the cache of rows [B] bool, whose step is over; the others stay as they are."""
        new = stream.step & rows[:, None]
        if bool(new.any()):
            at = (stream.real.long().cumsum(1) - 1).clamp_min(0)
            old = stream.real & ~stream.step & (at >= self.processor.sinks) & new.any(1, keepdim=True)
            for index, layer in enumerate(stream.cache.layers):
                recalled = old & _largest(stream.mass[index].masked_fill(~old, -1.0), self.processor.recall)
                self._rewrite(index, layer, at, new, new | recalled)
        mass = [each.masked_fill(rows[:, None], 0.0) for each in stream.mass]
        return Stream(stream.cache, stream.real, stream.step & ~rows[:, None], mass)

    def _rewrite(self, index: int, layer: Any, at: Tensor, new: Tensor, chosen: Tensor) -> None:
        """at, new, chosen: [B, N]."""
        # Chosen slots first, in order; rows with fewer are filled up with slots that are written back unchanged.
        slots = _gathered(chosen)
        real, at = chosen.gather(1, slots), at.gather(1, slots)
        places = slots[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
        k, v = layer.keys.gather(2, places), layer.values.gather(2, places)
        rope = self._ropes[index]
        plain = k if rope is None else rope.unrotate(k, at)
        dk, dv = self.processor(index, plain, v, at, new.gather(1, slots), real)
        # Rotation is linear: turning the change alone leaves keys exactly as they are where it is zero.
        dk = dk if rope is None else rope.rotate(dk, at)
        keep = real[:, None, :, None]
        layer.keys = layer.keys.scatter(2, places, torch.where(keep, (k + dk).to(k.dtype), k))
        layer.values = layer.values.scatter(2, places, torch.where(keep, (v + dv).to(v.dtype), v))

    def pieces(self, ids: Tensor, prompt: Tensor, real: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The steps of texts ids [B, T]: per step the columns [B, m] of its tokens, and which are real, padded right.

        The prompts, the first prompt [B] columns, are the first piece. Raises ShapeError for a text without one.
        """
        if ids.dim() != 2 or prompt.shape != ids.shape[:1] or bool((prompt < 1).any()):
            raise ShapeError(
                f"ids {list(ids.shape)}, prompts of {prompt.tolist()} columns, allowed: [B, T] and at least 1 for each"
            )
        column = torch.arange(ids.shape[1], device=ids.device)[None]
        ends = self.newlines[ids] & (column >= prompt[:, None]) & real
        number = torch.where(column < prompt[:, None], 0, 1 + ends.long().cumsum(1) - ends.long())
        number = number.masked_fill(~real, -1)
        for index in range(int(number.max()) + 1):
            own = number == index
            places = _gathered(own)
            yield places, own.gather(1, places)

    def __call__(self, ids: Tensor, prompt: Tensor, real: Tensor | None = None) -> tuple[Tensor, Stream]:
        """Read whole texts, rewriting after their prompt (unless prompt=False) and after every step.

        Args:
            ids: [B, T].    prompt: [B] int64, columns of the prompt, newlines in which end no step.
            real: [B, T] bool, false for padding.
        Returns:
            scores [B, T, V] of the tokens after each, 0 at padding, and the stream.
        """
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()
        stream, whole = self.start(ids.shape[0]), None
        for index, (places, own) in enumerate(self.pieces(ids, prompt, real)):
            scores, stream = self.read(ids.gather(1, places), stream, own)
            if whole is None:
                whole = scores.new_zeros(*ids.shape, scores.shape[-1])
            spread = places[..., None].expand_as(scores)
            whole = whole.scatter_add(1, spread, scores.masked_fill(~own[..., None], 0.0))
            stream = self.consolidate(stream, self.step_over(ids.gather(1, places), own, index))
        assert whole is not None
        return whole, stream

    def step_over(self, ids: Tensor, own: Tensor, index: int) -> Tensor:
        """Rows whose step ends with the index-th piece."""
        if index == 0:
            return own.any(1) if self.processor.prompt else torch.zeros_like(own[:, 0])
        return (self.newlines[ids] & own).any(1)

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int, real: Tensor | None = None) -> Tensor:
        """The most likely continuation of prompts ids [B, N] -> [B, N + at most max_new_tokens].

        real: [B, N] bool, false for padding. A row ends with the model's end-of-text token, repeated.
        """
        known = self.model.generation_config.eos_token_id
        ends = torch.tensor([] if known is None else known, device=ids.device, dtype=torch.int64).flatten()
        scores, stream = self.read(ids, self.start(ids.shape[0]), real)
        last = torch.full_like(ids[:, 0], ids.shape[1] - 1)
        if real is not None:
            last = (real.long() * torch.arange(ids.shape[1], device=ids.device)).amax(1)
        following = scores[torch.arange(len(ids), device=ids.device), last].argmax(-1)
        stream = self.consolidate(stream, torch.full_like(last, self.processor.prompt, dtype=torch.bool))
        alive = torch.ones_like(last, dtype=torch.bool)
        for count in range(1, max_new_tokens + 1):
            ids = torch.cat((ids, following[:, None]), 1)
            alive = alive & ~torch.isin(following, ends)
            if count == max_new_tokens or not bool(alive.any()):
                break
            scores, stream = self.read(ids[:, -1:], stream, alive[:, None])
            stream = self.consolidate(stream, self.newlines[ids[:, -1]] & alive)
            following = torch.where(alive, scores[:, -1].argmax(-1), following)
        return ids

    def __enter__(self) -> Bottlenecked:
        self._installed.attach()
        self._inside = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside = False
        self._installed.detach()


def _gathered(chosen: Tensor) -> Tensor:
    """Where chosen [B, N] is true, in order, then other places: [B, m], m the most that a row has."""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(chosen.sum(1).max())]


def _largest(mass: Tensor, count: int) -> Tensor:
    """Bool like mass [B, N]: the `count` largest of each row."""
    best = mass.topk(min(count, mass.shape[1]), 1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter(1, best, True)


def processor_for(model: Any, *, seed: int = 0, **options: Any) -> CacheProcessor:
    """A new processor for a transformers causal LM, on its device, in float32; options of `CacheProcessor`."""
    check_model(model)
    config = text_config(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    sizes = {"layers": len(attention_modules(model)), "kv_heads": kv_heads, "head_dim": head_dim}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        made = CacheProcessor(**sizes, **options)
    return made.to(model.device)


def newline_tokens(tokenizer: Any) -> Tensor:
    """[V] bool: tokens whose text has a newline in it."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return torch.tensor(["\n" in each for each in texts])


@dataclass
class Solutions:
    """tokens: [n, L] int64, prompts and solutions, padded on the right.    prompt, length: [n] int64, in tokens."""

    tokens: Tensor
    prompt: Tensor
    length: Tensor


def encode(tokenizer: Any, pairs: Iterable[tuple[str, str]]) -> Solutions:
    """Questions with their solutions, each ended by the end-of-text token. Raises DataError for none, or empty ones."""
    rows: list[list[int]] = []
    prompts: list[int] = []
    for question, solution in pairs:
        asked, solved = (tokenizer(each, add_special_tokens=False).input_ids for each in (question, solution))
        if not asked or not solved:
            raise DataError(f"a question {question!r} with the solution {solution!r}, allowed: both with text")
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        rows.append([*asked, *solved, *end])
        prompts.append(len(asked))
    if not rows:
        raise DataError("no questions were given, allowed: at least one pair of question and solution")
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(each) for each in rows], batch_first=True)
    return Solutions(tokens, torch.tensor(prompts), torch.tensor([len(each) for each in rows]))


def fit(
    run: Bottlenecked,
    data: Solutions,
    *,
    steps: int,
    batch: int = 8,
    rate: float = 1e-4,
    horizon: int = 4,
    seed: int = 0,
) -> list[float]:
    """Train the processor on the next-token loss of what is read after a rewrite, the model frozen.

    Args:
        data: solutions.    steps, batch, rate: of AdamW, 20 steps of warm-up.
        horizon: gradients go back through so many rewrites.    seed: of the order.
    Returns:
        the loss of every step, nats per token.
    Raises:
        OptionError for a horizon below 1; StateError outside the context.
    """
    if horizon < 1:
        raise OptionError(f"fit: horizon={horizon}, allowed: >= 1")
    flags = [(each, each.requires_grad) for each in run.model.parameters()]
    optimiser = torch.optim.AdamW(run.processor.parameters(), lr=rate, weight_decay=0.0)
    random = torch.Generator().manual_seed(seed)
    run.model.requires_grad_(False)
    losses = []
    try:
        for step in range(steps):
            rows = torch.randint(len(data.tokens), (batch,), generator=random)
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 20)
            optimiser.zero_grad()
            losses.append(_backward(run, data, rows, horizon))
            nn.utils.clip_grad_norm_(run.processor.parameters(), 1.0)
            optimiser.step()
    finally:
        for each, flag in flags:
            each.requires_grad_(flag)
    return losses


def _backward(run: Bottlenecked, data: Solutions, rows: Tensor, horizon: int) -> float:
    """Add the gradient of the mean loss of some solutions, step by step."""
    device = run.model.device
    length = int(data.length[rows].max())
    tokens, prompt = data.tokens[rows, :length].to(device), data.prompt[rows].to(device)
    real = torch.arange(length, device=device)[None] < data.length[rows].to(device)[:, None]
    targets = F.pad(tokens[:, 1:].masked_fill(~real[:, 1:], IGNORED), (0, 1), value=IGNORED)
    pieces = list(run.pieces(tokens, prompt, real))
    first = 1 if run.processor.prompt else 2
    wanted = [targets.gather(1, places).masked_fill(~own, IGNORED) for places, own in pieces]
    asked = max(1, sum(int((each != IGNORED).sum()) for each in wanted[first:]))
    stream, total, rewrites = run.start(len(rows)), 0.0, 0
    waiting = torch.zeros((), device=device)
    for index, (places, own) in enumerate(pieces):
        ids = tokens.gather(1, places)
        scores, stream = run.read(ids, stream, own)
        if index >= first:
            flat = scores.float().flatten(0, 1)
            waiting = waiting + F.cross_entropy(flat, wanted[index].flatten(), reduction="sum", ignore_index=IGNORED)
        over = run.step_over(ids, own, index)
        if index + 1 < len(pieces) and bool(over.any()):
            if rewrites and rewrites % horizon == 0:
                total += _settle(waiting / asked)
                stream, waiting = stream.detached(), torch.zeros((), device=device)
            stream = run.consolidate(stream, over)
            rewrites += 1
    return total + _settle(waiting / asked)


def _settle(loss: Tensor) -> float:
    if loss.requires_grad:
        loss.backward()
    return float(loss.detach())
