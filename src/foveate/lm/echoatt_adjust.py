"""The adjustment of EchoAtt: a student that shares attention learns to do what its teacher does.  (arXiv 2409.14595)

    1. share    the student gets the teacher's weights without its followers' W_q and W_k (`echoatt.share_attention`)
    2. distill  L = hard CE(student, argmax teacher) + soft T^2 KL(teacher_T | student_T)
                    + hidden sum over groups of the mean square of h_student - h_teacher after the group's last layer
    3. tune     cross-entropy of the next token on the same text

p_T = softmax(logits / T); means over tokens, and over features for h. Both stages train all of the student's weights in
float32 with AdamW (`stages.Stage`), the rate rising, then falling by a half cosine to a tenth. The paper's weights of
the losses, data and lengths of its stages are not known: 1, 1, 1 and T = 1 here. Interrupted work is not kept.
Cost of a distillation step: a forward pass of the teacher, a forward and a backward pass of the student, and the logits
of both.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import OptionError, ResultsError
from foveate.hf.calibrations.base import Work, frozen
from foveate.hf.identity import identify
from foveate.hf.modules import check_model
from foveate.lm.convert_config import ConvertConfig
from foveate.lm.data import MANUAL, PackedText, pack, read_documents
from foveate.lm.echoatt import share_attention
from foveate.lm.stages import Stage, computing, perplexity
from foveate.methods.select.echoatt import Groups, sharing_groups
from foveate.options import check_fields, check_names, option, options_of


@dataclass(frozen=True, kw_only=True)
class AdjustConfig:
    """Settings of `adjust`."""

    first: int = option(4, "first layers left alone", at_least=0)
    last: int = option(4, "last layers left alone", at_least=0)
    size: int = option(2, "layers per group", at_least=2)
    text: tuple[str, ...] = option((MANUAL,), "text files; 'manual' is Python's own manual")
    separator: str | None = option(None, "what stands between documents in a file")
    length: int = option(512, "tokens of a training example", at_least=2)
    held_out: float = option(0.1, "share of the text, its end, that tests", above=0, below=1)
    distill_steps: int = option(400, "optimiser steps of distillation; 0: none", at_least=0)
    tune_steps: int = option(100, "optimiser steps on the next token; 0: none", at_least=0)
    hard: float = option(1.0, "weight of the teacher's likeliest tokens", at_least=0)
    soft: float = option(1.0, "weight of the teacher's distribution", at_least=0)
    hidden: float = option(1.0, "weight of the hidden states at the groups' ends", at_least=0)
    temperature: float = option(1.0, "of both distributions", above=0)
    rate: float = option(1e-4, "peak learning rate of both stages", above=0)
    warmup: float = option(0.05, "share of a stage over which its rate rises", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's", at_least=0)
    clip: float = option(1.0, "largest gradient norm", above=0)
    batch: int = option(4, "examples per forward pass", at_least=1)
    accumulate: int = option(2, "forward passes per optimiser step", at_least=1)
    materialise: bool = option(False, "keep attention weights as matrices, as the paper does")
    precision: str = option("float32", "of the computation; weights are float32", one_of=("float32", "bfloat16"))
    seed: int = option(0, "of the order of examples", at_least=0)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.hard + self.soft + self.hidden:
            raise OptionError("adjust: hard=0, soft=0 and hidden=0, allowed: at least one above 0")

    @property
    def training(self) -> ConvertConfig:
        """What the stages read of it."""
        return ConvertConfig(
            batch=self.batch,
            accumulate=self.accumulate,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            clip=self.clip,
            precision=self.precision,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Adjusted:
    """What an adjustment came to.

    model: the student, in evaluation mode, in the teacher's dtype.    groups: of layers, leaders first.
    perplexity: on held-out text, of "teacher", "shared" (nothing trained yet), "distilled" and "tuned"; a stage of no
        steps is left out.    losses: per step of "distill" and "tune".
    """

    model: Any
    groups: Groups
    perplexity: dict[str, float]
    losses: dict[str, list[float]]


def adjust(
    model: Any,
    tokenizer: Any,
    groups: Sequence[Sequence[int]] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Adjusted:
    """Make a student that shares attention, and train it to do what the model does.

        student = adjust(model, tokenizer, size=2, out="smollm2-echo").model
        load_student("smollm2-echo")

    Args:
        model: a transformers causal LM, the teacher, on the device where the work is to be done; it is left as it is.
        tokenizer: its tokenizer.
        groups: which layers share; default: by `first`, `last` and `size`.
        out: a folder for the student and its tokenizer.    progress: draw progress bars on stderr.
        **settings: fields of `AdjustConfig`.
    Raises:
        before any training: UnknownNameError, OptionError; UnsupportedModelError for the model; DataError for the text;
        ResultsError for a folder that cannot be made.
    """
    check_names("adjust", settings, options_of(AdjustConfig))
    config = AdjustConfig(**settings)
    check_model(model)
    identity = identify(model)
    chosen = sharing_groups(identity.layers, config.first, config.last, config.size) if groups is None else groups
    documents = read_documents(config.text, config.separator)
    train, test = pack(documents, tokenizer, config.length).split(config.held_out)
    student = share_attention(model, chosen, materialise=config.materialise).float()
    folder = _made(out)
    # The teacher that is compared with computes in float32 as well.
    teacher = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    scores = {
        name: perplexity(each, test, config.training) for name, each in (("teacher", teacher), ("shared", student))
    }
    losses: dict[str, list[float]] = {}
    work = Work(identity, None, progress)
    found = tuple(tuple(group) for group in chosen)
    if config.distill_steps:
        losses["distill"] = distill(teacher, student, found, train, config, work)
        scores["distilled"] = perplexity(student, test, config.training)
    if config.tune_steps:
        losses["tune"] = tune(student, train, config, work)
        scores["tuned"] = perplexity(student, test, config.training)
    student = student.to(model.dtype).eval()
    if folder is not None:
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Adjusted(student, found, scores, losses)


def _made(out: str | os.PathLike[str] | None) -> Path | None:
    if out is None:
        return None
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"{folder}: cannot be made ({error.strerror}); name another folder") from error
    return folder


def distill(
    teacher: Any, student: Any, groups: Groups, data: PackedText, config: AdjustConfig, work: Work
) -> list[float]:
    """Train all of the student, in place, on the teacher's outputs. Returns the loss of every step."""

    def backward(tokens: Tensor, targets: Tensor, weight: float) -> float:
        asked = {"input_ids": tokens, "use_cache": False, "output_hidden_states": config.hidden > 0}
        with computing(config.precision, tokens.device):
            with torch.no_grad():
                theirs = teacher(**asked)
            ours = student(**asked)
        # hidden_states[l + 1] is what layer l gives.
        ends = [(o.hidden_states[group[-1] + 1] for group in groups) if config.hidden else () for o in (ours, theirs)]
        loss = distillation_loss(ours.logits, theirs.logits, list(zip(*ends)), config)
        (weight * loss).backward()
        return float(loss.detach())

    with frozen(teacher):
        return _train("distill", config.distill_steps, student, backward, data, config, work)


def tune(student: Any, data: PackedText, config: AdjustConfig, work: Work) -> list[float]:
    """Train all of the student, in place, on the next token. Returns the loss of every step."""

    def backward(tokens: Tensor, targets: Tensor, weight: float) -> float:
        with computing(config.precision, tokens.device):
            logits = student(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
        (weight * loss).backward()
        return float(loss.detach())

    return _train("tune", config.tune_steps, student, backward, data, config, work)


def _train(
    name: str, steps: int, student: nn.Module, backward: Any, data: PackedText, config: AdjustConfig, work: Work
) -> list[float]:
    stage = Stage(name, steps, config.rate, None, config.training)
    student.train()
    losses = stage.run(dict(student.named_parameters()), backward, data, work)
    student.eval()
    return losses


def distillation_loss(
    student: Tensor, teacher: Tensor, ends: Sequence[tuple[Tensor, Tensor]], config: AdjustConfig
) -> Tensor:
    """The loss of stage 1, a scalar, of logits [B, N, V] and pairs of hidden states [B, N, C] at the groups' ends."""
    ours, theirs = student.float().flatten(0, 1), teacher.float().flatten(0, 1)
    loss = ours.new_zeros(())
    if config.hard:
        loss = loss + config.hard * F.cross_entropy(ours, theirs.argmax(-1))
    if config.soft:
        mine, yours = (F.log_softmax(each / config.temperature, -1) for each in (ours, theirs))
        divergence = F.kl_div(mine, yours, log_target=True, reduction="batchmean")
        loss = loss + config.soft * config.temperature**2 * divergence
    for end, wanted in ends:
        loss = loss + config.hidden * F.mse_loss(end.float(), wanted.float())
    return loss
