"""Synthetic tasks that tell token mixers apart: Zoology's recall and circuit tasks.

    mqar               k1 v1 k2 v2 ... then every key again, at gaps that follow a power law: answer its value
    recall             the same pairs, a few of the keys asked at random places
    forgetting         as mqar, with some keys given a second value first: answer the last one
    parity, majority   bits, then an end mark: answer their parity, or which is more frequent
    cumulative-parity  bits: answer the parity so far, at every token

Paper: Arora et al. 2023 (arXiv 2312.04927). Keys are 1 .. V/2 - 1 and values V/2 .. V - 1, each distinct within an
example; 0 fills what is neither, or with filler="random" a uniform token, which may hit a key (as in the source).
Labels stand where the answer is predicted: at the query itself. Everything else is -100.

`mqar` draws from the source's own random stream (numpy's legacy generator: keys of all examples, then values, then
gaps), so equal seeds give its arrays; the random filler, which the source leaves unseeded, follows `filler_seed`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from foveate.errors import OptionError, UnknownNameError
from foveate.options import Option, nearest

IGNORED = -100
END_OF_BITS = 2
# Test examples are drawn from the upper half of the seeds, training examples from the lower.
TEST_SEEDS = 1 << 31


@dataclass(frozen=True)
class Examples(Dataset[dict[str, Tensor]]):
    """inputs, labels: [n, L] int64; labels[i, t] is what the model should say at token t, or -100."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # `labels` for the Trainer's counting and metrics, `shift_labels` because they are aligned already.
        return {"input_ids": self.inputs[index], "labels": self.labels[index], "shift_labels": self.labels[index]}


def _require(task: str, fits: bool, message: str) -> None:
    if not fits:
        raise OptionError(f"{task}: {message}")


def _check_vocab(task: str, vocab: int, length: int, drawn: int) -> None:
    _require(task, length >= 2 and length % 2 == 0, f"length={length}, allowed: even, >= 2")
    _require(task, vocab > length, f"vocab={vocab}, allowed: more than length = {length}")
    _require(
        task,
        1 <= drawn <= vocab // 2 - 1,
        f"{drawn} pairs of a vocabulary of {vocab}, allowed: 1 to vocab / 2 - 1 = {vocab // 2 - 1}",
    )


def _draw(random: np.random.RandomState, count: int, low: int, high: int, size: int) -> Tensor:
    """[count, size] distinct numbers per row out of low .. high - 1."""
    choices = np.arange(low, high)
    return torch.from_numpy(np.stack([random.choice(choices, replace=False, size=size) for _ in range(count)]))


def _gaps(random: np.random.RandomState, count: int, slots: int, size: int, power: float) -> Tensor:
    """[count, size] distinct slots per row, slot i with probability ~ power (i + 1)^(power - 1)."""
    weight = power * np.arange(1, slots + 1) ** (power - 1)
    weight = weight / weight.sum()
    rows = [random.choice(np.arange(slots), replace=False, p=weight, size=size) for _ in range(count)]
    return torch.from_numpy(np.stack(rows))


def _fill(inputs: Tensor, vocab: int, filler: str, seed: int) -> Tensor:
    if filler == "zero":
        return inputs
    random = torch.randint(vocab, inputs.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(inputs == 0, random, inputs)


def lay_out_recall(
    keys: Tensor, values: Tensor, gaps: Tensor, *, length: int, passes: int = 1, answers: Tensor | None = None
) -> Examples:
    """The MQAR layout of given draws.

    keys, values: [n, C] pairs of the context, in order, written `passes` times.    gaps: [n, P], the slot (of two
    tokens after the context) where each of the first P keys is asked; its label is `answers` [n, P] (default: values).
    """
    n, P = gaps.shape
    context = torch.stack((keys, values), -1).flatten(1).repeat(1, passes)
    inputs = torch.zeros(n, length, dtype=torch.int64)
    labels = torch.full((n, length), IGNORED)
    inputs[:, : context.shape[1]] = context
    asked = context.shape[1] + 2 * gaps
    inputs.scatter_(1, asked, keys[:, :P])
    labels.scatter_(1, asked, values[:, :P] if answers is None else answers)
    return Examples(inputs, labels)


def mqar(
    count: int,
    *,
    vocab: int = 8192,
    length: int = 64,
    pairs: int = 4,
    passes: int = 1,
    power: float = 0.01,
    filler: str = "random",
    seed: int = 0,
    filler_seed: int | None = None,
) -> Examples:
    """Multi-query associative recall: `count` examples of `pairs` pairs, every key asked once.

    Raises OptionError unless vocab > length, length is even and 2 pairs (passes + 1) <= length.
    """
    _check_vocab("mqar", vocab, length, pairs)
    _check_common("mqar", count, filler, power)
    context = 2 * pairs * passes
    _require("mqar", passes >= 1, f"passes={passes}, allowed: >= 1")
    _require(
        "mqar",
        context + 2 * pairs <= length,
        f"pairs={pairs}, passes={passes} need {context + 2 * pairs} tokens, allowed: at most length = {length}",
    )
    random = np.random.RandomState(seed)
    keys = _draw(random, count, 1, vocab // 2, pairs)
    values = _draw(random, count, vocab // 2, vocab, pairs)
    gaps = _gaps(random, count, (length - context) // 2, pairs, power)
    made = lay_out_recall(keys, values, gaps, length=length, passes=passes)
    return Examples(_fill(made.inputs, vocab, filler, seed if filler_seed is None else filler_seed), made.labels)


def _check_common(task: str, count: int, filler: str, power: float = 1.0) -> None:
    _require(task, count >= 1, f"count={count}, allowed: >= 1")
    _require(task, filler in ("random", "zero"), f"filler={filler!r}, allowed: 'random', 'zero'")
    _require(task, power > 0, f"power={power}, allowed: > 0")


def recall(
    count: int,
    *,
    vocab: int = 8192,
    length: int = 64,
    pairs: int = 4,
    queries: int = 1,
    filler: str = "random",
    seed: int = 0,
) -> Examples:
    """Associative recall with few queries: `queries` of the keys asked once, at random places after the pairs."""
    _check_vocab("recall", vocab, length, pairs)
    _check_common("recall", count, filler)
    _require("recall", 1 <= queries <= pairs, f"queries={queries}, allowed: 1 to pairs = {pairs}")
    _require(
        "recall",
        2 * pairs + queries <= length,
        f"pairs={pairs}, queries={queries} need {2 * pairs + queries} tokens, allowed: at most length = {length}",
    )
    random = np.random.RandomState(seed)
    keys = _draw(random, count, 1, vocab // 2, pairs)
    values = _draw(random, count, vocab // 2, vocab, pairs)
    chosen = _draw(random, count, 0, pairs, queries)
    places = _draw(random, count, 2 * pairs, length, queries)
    inputs = torch.zeros(count, length, dtype=torch.int64)
    inputs[:, : 2 * pairs] = torch.stack((keys, values), -1).flatten(1)
    inputs.scatter_(1, places, keys.gather(1, chosen))
    labels = torch.full((count, length), IGNORED).scatter_(1, places, values.gather(1, chosen))
    return Examples(_fill(inputs, vocab, filler, seed), labels)


def forgetting(
    count: int,
    *,
    vocab: int = 8192,
    length: int = 64,
    pairs: int = 4,
    updates: int = 2,
    power: float = 0.01,
    filler: str = "random",
    seed: int = 0,
) -> Examples:
    """MQAR where `updates` of the keys get a second value after all pairs; the last value is the answer."""
    _check_vocab("forgetting", vocab, length, pairs + updates)
    _check_common("forgetting", count, filler, power)
    _require("forgetting", 0 <= updates <= pairs, f"updates={updates}, allowed: 0 to pairs = {pairs}")
    needed = 2 * (pairs + updates) + 2 * pairs
    _require(
        "forgetting",
        needed <= length,
        f"pairs={pairs}, updates={updates} need {needed} tokens, allowed: at most length = {length}",
    )
    random = np.random.RandomState(seed)
    keys = _draw(random, count, 1, vocab // 2, pairs)
    # Second values differ from all first ones, so no update repeats what was there.
    values = _draw(random, count, vocab // 2, vocab, pairs + updates)
    updated = _draw(random, count, 0, pairs, updates) if updates else torch.zeros(count, 0, dtype=torch.int64)
    context_keys = torch.cat((keys, keys.gather(1, updated)), 1)
    final = values[:, :pairs].scatter(1, updated, values[:, pairs:])
    gaps = _gaps(random, count, (length - 2 * (pairs + updates)) // 2, pairs, power)
    made = lay_out_recall(context_keys, values, gaps, length=length, answers=final)
    return Examples(_fill(made.inputs, vocab, filler, seed), made.labels)


def _bits(task: str, count: int, length: int, size: int, seed: int) -> Tensor:
    _check_common(task, count, "zero")
    _require(task, length >= 2, f"length={length}, allowed: >= 2")
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 2, size=(count, size)))


def _one_answer(bits: Tensor, answer: Tensor) -> Examples:
    inputs = torch.cat((bits, torch.full_like(bits[:, :1], END_OF_BITS)), 1)
    labels = torch.full_like(inputs, IGNORED)
    labels[:, -1] = answer
    return Examples(inputs, labels)


def parity(count: int, *, length: int = 64, seed: int = 0) -> Examples:
    """length - 1 bits and an end mark (2), where the sum of the bits modulo 2 is the answer."""
    bits = _bits("parity", count, length, length - 1, seed)
    return _one_answer(bits, bits.sum(1) % 2)


def majority(count: int, *, length: int = 64, seed: int = 0) -> Examples:
    """length - 1 bits and an end mark (2), where 1 is the answer if more than half of the bits are 1, else 0."""
    bits = _bits("majority", count, length, length - 1, seed)
    return _one_answer(bits, (2 * bits.sum(1) > length - 1).long())


def cumulative_parity(count: int, *, length: int = 64, seed: int = 0) -> Examples:
    """Bits, and at each the sum modulo 2 of all so far."""
    bits = _bits("cumulative-parity", count, length, length, seed)
    return Examples(bits, bits.cumsum(1) % 2)


TASKS: dict[str, Callable[..., Examples]] = {
    "mqar": mqar,
    "recall": recall,
    "forgetting": forgetting,
    "parity": parity,
    "majority": majority,
    "cumulative-parity": cumulative_parity,
}


def make_examples(task: str, count: int, *, test: bool = False, seed: int = 0, **options: Any) -> Examples:
    """Examples of a task by name; `test` takes the seed from the half that training never uses.

    Raises UnknownNameError for an unknown task or option, OptionError for values that do not fit.
    """
    if task not in TASKS:
        raise UnknownNameError(f"there is no synthetic task {task!r}{nearest(task, TASKS)}")
    _require(task, 0 <= seed < TEST_SEEDS, f"seed={seed}, allowed: 0 to {TEST_SEEDS - 1}")
    check_task_options(task, options)
    return TASKS[task](count, seed=seed + TEST_SEEDS if test else seed, **options)


def check_task_options(task: str, options: Mapping[str, Any]) -> None:
    """Raise UnknownNameError for an option that a task lacks, OptionError for one of another type than its default."""
    defaults = _defaults(task)
    known = set(defaults) - {"seed", "filler_seed"}
    for name, value in options.items():
        if name not in known:
            raise UnknownNameError(f"the synthetic task {task!r} has no option {name!r}{nearest(name, known)}")
        kind = type(defaults[name])
        if kind is not type(None):
            Option(name, kind.__name__, None, "", accepts=(kind,)).check(task, value)


def _defaults(task: str) -> dict[str, Any]:
    parameters = inspect.signature(TASKS[task]).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


def vocabulary(task: str, **options: Any) -> int:
    """How many tokens a task uses with these options."""
    defaults = _defaults(task)
    return int(options.get("vocab", defaults["vocab"])) if "vocab" in defaults else END_OF_BITS + 1
