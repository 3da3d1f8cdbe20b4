"""One cell of a study: a tiny HybridLM of given mixers, trained at one learning rate, and what came of it.

Associative recall is learned from few pairs to many: with `stages` = 4, a training starts at an eighth of the pairs and
of the length and doubles both. A batch has the same number of tokens in every stage; the last stage takes as many
steps as the others together. Pools of examples are drawn once, and batches from them with replacement.

AdamW on matrices with weight decay, vectors without; linear warm-up over a tenth of the steps, cosine to 0; gradients
clipped; float32. A training ends early when the validation accuracy reaches `stop_at`, or when the loss is not finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import OptionError
from foveate.lm.config import HybridConfig
from foveate.lm.data import PackedText
from foveate.lm.model import IGNORED, HybridLM
from foveate.lm.synthetic import Examples, make_examples
from foveate.lm.train import make_data, recall_accuracy
from foveate.lm.train_config import DataConfig
from foveate.options import check_fields, option


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What every training of a study shares. Raises OptionError for values that do not fit each other."""

    task: str = option("mqar", "associative recall, or text", one_of=("mqar", "language"))
    length: int = option(256, "tokens of an example", at_least=2)
    pairs: int = option(64, "mqar: pairs of an example", at_least=1)
    vocab: int = option(512, "mqar: tokens there are; more than the length", at_least=4)
    stages: int = option(4, "mqar: how many, each of twice the pairs and length of the one before", at_least=1)
    pool: int = option(8192, "mqar: examples that a stage draws from", at_least=1)
    test: int = option(1000, "mqar: examples that test", at_least=1)
    text: tuple[str, ...] = option(("manual",), "language: text files; 'manual' is Python's own manual")
    dim: int = option(64, "channels", at_least=1)
    heads: int = option(1, "heads of every mixer", at_least=1)
    layers: int = option(2, "layers, the first convolution among them", at_least=1)
    first: str | None = option("baseconv", "mixer of the first layer, which lets any other bind neighbours; None: none")
    full: str = option("softmax", "the mixer that hybrids have among the others")
    mlp_ratio: float = option(0.0, "width of the SwiGLU block over dim, see HybridConfig; 0: none", at_least=0)
    steps: int = option(800, "optimiser steps", at_least=1)
    batch: int = option(128, "examples of full length per step", at_least=1)
    weight_decay: float = option(0.1, "of matrices", at_least=0)
    clip: float = option(1.0, "largest gradient norm", above=0)
    stop_at: float | None = option(0.99, "validation accuracy that ends a training; None: none", above=0, at_most=1)
    evaluate_every: int = option(50, "steps between validations, and between looks at the loss", at_least=1)
    seed: int = option(0, "of weights, examples and order", at_least=0)
    device: str = option("cpu", "where to train", one_of=("cpu", "cuda"))

    def __post_init__(self) -> None:
        check_fields(self)
        if self.task == "mqar":
            self._check_stages()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise OptionError("StudyConfig: device='cuda', and torch finds no CUDA device here; allowed: 'cpu'")

    def _check_stages(self) -> None:
        most = 2 ** (self.stages - 1)
        if self.pairs % most or self.length % (2 * most):
            raise OptionError(
                f"StudyConfig: stages={self.stages} with pairs={self.pairs}, length={self.length}, allowed: pairs that "
                f"halve {self.stages - 1} times, to a length that stays even; fewer stages need less"
            )
        for pairs, length in self.sizes():
            make_examples("mqar", 1, vocab=self.vocab, pairs=pairs, length=length)

    def sizes(self) -> list[tuple[int, int]]:
        """(pairs, length) of each stage."""
        return [(self.pairs >> n, self.length >> n) for n in reversed(range(self.stages))]


@dataclass(frozen=True)
class StudyData:
    """stages: inputs and targets [n, L] each, of a training's stages.    tests: the same by name, the whole task's
    first.    validation: what decides when to stop; never tests.    vocab: how many tokens there are."""

    stages: tuple[tuple[Tensor, Tensor], ...]
    validation: tuple[Tensor, Tensor]
    tests: dict[str, tuple[Tensor, Tensor]]
    vocab: int


def _tensors(examples: Examples | PackedText, device: str) -> tuple[Tensor, Tensor]:
    if isinstance(examples, Examples):
        return examples.inputs.to(device), examples.labels.to(device)
    return examples.tokens.to(device), examples.targets.to(device)


@lru_cache(maxsize=1)
def study_data(config: StudyConfig) -> StudyData:
    """The data of a study, made once per process."""
    if config.task == "language":
        made = make_data(DataConfig(text=config.text, length=config.length, seed=config.seed))
        train, test = _tensors(made.train, config.device), _tensors(made.tests["text"], config.device)
        held = max(1, min(64, len(train[0]) // 20))
        seen, validation = zip(*(each.split([len(each) - held, held]) for each in train))
        return StudyData((seen,), validation, {"text": test}, made.vocab)
    stages, tests, options = [], {}, dict[str, Any]()
    for pairs, length in config.sizes():
        # As the paper's figure 2: what is neither key nor value is 0.
        options = {"vocab": config.vocab, "pairs": pairs, "filler": "zero"}
        data = DataConfig(
            task="mqar", task_options=options, length=length, train=config.pool, test=config.test, seed=config.seed
        )
        made = make_data(data)
        stages.append(_tensors(made.train, config.device))
        tests[f"{pairs} pairs, {length} tokens"] = _tensors(made.tests["mqar"], config.device)
    count = min(config.test, 256)
    # Another seed of the test half: tests are neither trained on nor stopped at.
    others = make_examples("mqar", count, test=True, seed=config.seed + 1, length=config.length, **options)
    return StudyData(tuple(stages), _tensors(others, config.device), dict(reversed(tests.items())), config.vocab)


def model_config(mixers: tuple[str, ...], config: StudyConfig, vocab: int) -> HybridConfig:
    """The configuration of one stack; raises what HybridConfig raises."""
    return HybridConfig(
        mixers=list(mixers), dim=config.dim, heads=config.heads, vocab_size=vocab, mlp_ratio=config.mlp_ratio
    )


def fit(
    mixers: tuple[str, ...], rate: float, config: StudyConfig, proceed: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train one stack at one learning rate and test it.

    proceed: called at every validation; what it raises ends the training.

    Returns:
        status: "finished" or "diverged" (a loss that was not finite; accuracy and loss are None then).
        accuracy, loss (nats): on the whole task's test.    perplexity: of text, else None.
        accuracies: by name of test.    steps: taken.    diverged_at, reached_at: the step where it was seen, or None.
        history: [step, training loss, validation accuracy].    seconds: of training and validating.
        parameters: how many.    state_bytes: of one sequence after `length` tokens, all layers.
        constant_state: whether that stops growing with the length.
    """
    data = study_data(config)
    torch.manual_seed(config.seed)
    model: Any = HybridLM(model_config(mixers, config, data.vocab)).train()
    model.to(config.device)
    started = time.perf_counter()
    course = _train(model, data, rate, config, proceed)
    seconds = time.perf_counter() - started
    model.eval()
    tested = {} if course["diverged_at"] else {name: _test(model, *each, config) for name, each in data.tests.items()}
    if not all(math.isfinite(loss) for loss, _ in tested.values()):
        course["diverged_at"], tested = course["steps"], {}
    loss, accuracy = next(iter(tested.values()), (None, None))
    return {
        "status": "diverged" if course["diverged_at"] else "finished",
        "accuracy": accuracy,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)) if config.task == "language" and loss is not None else None,
        "accuracies": {name: each[1] for name, each in tested.items()},
        **course,
        "seconds": seconds,
        "parameters": sum(each.numel() for each in model.parameters()),
        "state_bytes": model.state_bytes(1, config.length),
        "constant_state": all(block.mixer.constant_state for block in model.layers),
    }


def _train(
    model: HybridLM, data: StudyData, rate: float, config: StudyConfig, proceed: Callable[[], None]
) -> dict[str, Any]:
    """Steps done, where it diverged or reached its aim (None if not), and [step, loss, validation accuracy] by the way.

    A divergence is seen up to `evaluate_every` steps late: the loss is not read at every step, which would wait for the
    GPU.
    """
    from transformers import get_cosine_schedule_with_warmup

    optimiser = torch.optim.AdamW(
        [
            {"params": [each for each in model.parameters() if each.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [each for each in model.parameters() if each.dim() < 2], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, 0.95),
        fused=config.device == "cuda",
    )
    schedule = get_cosine_schedule_with_warmup(optimiser, max(1, config.steps // 10), config.steps)
    batches = _batches(data, config)
    course: dict[str, Any] = {"steps": 0, "diverged_at": None, "reached_at": None, "history": []}
    for step in range(1, config.steps + 1):
        inputs, targets = next(batches)
        loss = model(input_ids=inputs, shift_labels=targets).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
        schedule.step()
        course["steps"] = step
        if step % config.evaluate_every and step < config.steps:
            continue
        proceed()
        value = float(loss.detach())
        if not math.isfinite(value):
            course["diverged_at"] = step
            break
        model.eval()
        accuracy = _test(model, *data.validation, config)[1]
        model.train()
        course["history"].append([step, value, accuracy])
        if config.stop_at is not None and accuracy >= config.stop_at:
            course["reached_at"] = step
            break
    return course


def _batches(data: StudyData, config: StudyConfig) -> Any:
    """Inputs and targets of every step, stage by stage."""
    generator = torch.Generator().manual_seed(config.seed)
    for (inputs, targets), steps in zip(data.stages, _steps(config, len(data.stages))):
        size = config.batch * config.length // inputs.shape[1]
        # Drawn at once: a copy per step would wait for the GPU.
        chosen = torch.randint(len(inputs), (steps, size), generator=generator).to(inputs.device)
        for rows in chosen:
            yield inputs[rows], targets[rows]


def _steps(config: StudyConfig, stages: int) -> list[int]:
    """How many steps each stage takes: half for the last."""
    if stages == 1:
        return [config.steps]
    each = config.steps // 2 // (stages - 1)
    return [each] * (stages - 1) + [config.steps - each * (stages - 1)]


@torch.no_grad()
def _test(model: HybridLM, inputs: Tensor, targets: Tensor, config: StudyConfig) -> tuple[float, float]:
    """Mean loss (nats) over what is asked, and the share that is right."""
    loss, best = torch.zeros((), dtype=torch.float64), []
    size = max(1, config.batch * config.length // inputs.shape[1])
    for x, y in zip(inputs.split(size), targets.split(size)):
        logits = model(input_ids=x, use_cache=False).logits.float()
        loss += nn.functional.cross_entropy(
            logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="sum"
        ).cpu()
        best.append(logits.argmax(-1).cpu())
    asked = int((targets != IGNORED).sum())
    return float(loss) / asked, recall_accuracy(torch.cat(best), targets.cpu())
