"""Training a HybridLM on transformers' Trainer: a synthetic task or text, resumed, logged and exported.

`train(TrainConfig.read("run.toml"))` writes to the run's output folder:
    checkpoint-N/      what resuming needs        log.jsonl       a line per logged step and test
    model/             the trained model, for `HybridLM.from_pretrained` (text: with its tokenizer)
    result.json        the last test's numbers, bytes of state, versions, command and date
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from foveate.errors import MissingPackageError, OptionError, ResultsError
from foveate.lm.checkpoints import checkpoint_to_resume
from foveate.lm.config import HybridConfig
from foveate.lm.data import PackedText, load_tokenizer, pack, read_documents
from foveate.lm.model import HybridLM
from foveate.lm.synthetic import IGNORED, Examples, make_examples, vocabulary
from foveate.lm.train_config import DataConfig, TrainConfig
from foveate.provenance import command_line, now, versions

Examined = Examples | PackedText


@dataclass(frozen=True)
class TrainData:
    """train: the training set.    tests: test sets by name.    vocab: how many tokens there are.    tokenizer: the
    text's, None for a task."""

    train: Examined
    tests: dict[str, Examined]
    vocab: int
    tokenizer: Any = None


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    folder: its output folder.    metrics: per test set, `loss` (nats), `accuracy`, and for text `perplexity`.
    steps: optimiser steps in all.    resumed_from: the checkpoint it continued, or None.    parameters: how many.
    state_bytes: bytes of one sequence's state after an example's length.
    """

    folder: Path
    metrics: dict[str, dict[str, float]]
    steps: int
    resumed_from: Path | None
    parameters: int
    state_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        resumed = None if self.resumed_from is None else str(self.resumed_from)
        return {**asdict(self), "folder": str(self.folder), "resumed_from": resumed}


def recall_accuracy(predictions: Any, labels: Any) -> float:
    """Share of labels that are not -100 and equal the prediction at their place, both [n, L]; nan without labels."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    asked = labels != IGNORED
    return float((predictions == labels)[asked].mean()) if asked.any() else math.nan


def make_data(config: DataConfig) -> TrainData:
    """The training and test sets that a config describes."""
    if config.task is None:
        tokenizer = load_tokenizer(config.tokenizer)
        documents = read_documents(config.text, config.separator)
        text = pack(documents, tokenizer, config.length, isolate=config.isolate)
        train, test = text.split(config.held_out)
        return TrainData(train, {"text": test}, len(tokenizer), tokenizer)
    options = {"length": config.length, **(config.task_options or {})}
    tests = {config.task: options}
    for each in config.slices:
        tests[f"{config.task}:" + ",".join(f"{name}={value}" for name, value in each.items())] = {**options, **each}
    vocab = max(vocabulary(config.task, **each) for each in tests.values())
    return TrainData(
        make_examples(config.task, config.train, seed=config.seed, **options),
        {
            name: make_examples(config.task, config.test, test=True, seed=config.seed, **each)
            for name, each in tests.items()
        },
        vocab,
    )


def train(config: TrainConfig, on_log: Callable[[dict[str, Any]], None] | None = None) -> TrainResult:
    """Train as a config says. `on_log` gets every line of the log as it is written.

    Raises before any work: the data's and options' errors, ResultsError for an output that holds another run, DataError
    for a damaged checkpoint, MissingPackageError without accelerate.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise MissingPackageError("accelerate", "training", "pip install 'foveate[train]'")
    run, output = config.run, Path(config.run.output).expanduser()
    data = make_data(config.data)
    settings = HybridConfig(**{**_tokens(data), **config.model})
    if settings.vocab_size < data.vocab:
        raise OptionError(f"vocab_size={settings.vocab_size}, allowed: >= {data.vocab}, the data's (leave it out)")
    if settings.spike_k is not None:
        raise OptionError(
            f"spike_k={settings.spike_k} in training, allowed: None; train the model, then foveate.lm.spike_coded"
        )
    checkpoint = checkpoint_to_resume(output, run.resume, settings)
    _make_folder(output)
    transformers.set_seed(run.seed)
    model = HybridLM(settings)
    if run.gradient_checkpointing:
        # Renamed in newer versions.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    trainer = _trainer(model, data, config, output, on_log)
    with _no_progress_bars():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        result = TrainResult(
            folder=output,
            metrics=_test(trainer, data),
            steps=trainer.state.global_step,
            resumed_from=checkpoint,
            parameters=sum(each.numel() for each in model.parameters()),
            state_bytes=model.state_bytes(1, config.data.length),
        )
        _export(trainer, data, config, result)
    return result


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokens(data: TrainData) -> dict[str, Any]:
    """What the data says about the model's vocabulary."""
    if data.tokenizer is None:
        return {"vocab_size": data.vocab}
    own = data.tokenizer
    return {
        "vocab_size": data.vocab,
        "eos_token_id": own.eos_token_id,
        "bos_token_id": own.bos_token_id,
        "pad_token_id": own.eos_token_id if own.pad_token_id is None else own.pad_token_id,
    }


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"{output}: cannot be made ({error.strerror}); name another output") from error


def _best_tokens(logits: Any, labels: Any) -> Tensor:
    """Keep the chosen tokens only: a test set's logits would not fit."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _trainer(
    model: HybridLM,
    data: TrainData,
    config: TrainConfig,
    output: Path,
    on_log: Callable[[dict[str, Any]], None] | None,
) -> Any:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    run = config.run

    class LMTrainer(Trainer):
        """Decays matrices and nothing else."""

        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return [name for name, each in model.named_parameters() if each.dim() >= 2]

    class Log(TrainerCallback):
        """A line of JSON per log entry; stops at the accuracy that was asked for."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            line = {"step": state.global_step, **(logs or {})}
            with (output / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if on_log is not None:
                on_log(line)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            reached = [value for name, value in (metrics or {}).items() if name.endswith("_accuracy")]
            if run.stop_at is not None and reached and reached[0] >= run.stop_at:
                control.should_training_stop = True

    cosine = "cosine_with_min_lr" if run.final_rate else "cosine"
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=run.steps,
        per_device_train_batch_size=run.batch,
        per_device_eval_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulate,
        learning_rate=run.learning_rate,
        lr_scheduler_type=cosine,
        lr_scheduler_kwargs={"min_lr_rate": run.final_rate} if run.final_rate else {},
        warmup_steps=run.warmup,
        weight_decay=run.weight_decay,
        adam_beta2=run.beta2,
        max_grad_norm=run.clip,
        bf16=run.precision == "bfloat16",
        use_cpu=run.device == "cpu",
        dataloader_pin_memory=torch.cuda.is_available() and run.device != "cpu",
        eval_strategy="steps",
        eval_steps=run.evaluate_every,
        logging_steps=run.log_every,
        save_steps=run.save_every,
        save_total_limit=run.keep,
        seed=run.seed,
        label_names=["labels"],
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = LMTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=next(iter(data.tests.values())),
        compute_metrics=lambda found: {"accuracy": recall_accuracy(found.predictions, found.label_ids)},
        preprocess_logits_for_metrics=_best_tokens,
        callbacks=[Log()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _test(trainer: Any, data: TrainData) -> dict[str, dict[str, float]]:
    metrics = {}
    for name, examples in data.tests.items():
        found = trainer.evaluate(examples)
        metrics[name] = {"loss": found["eval_loss"], "accuracy": found["eval_accuracy"]}
        if data.tokenizer is not None:
            metrics[name]["perplexity"] = math.exp(min(found["eval_loss"], 700.0))
    return metrics


def _export(trainer: Any, data: TrainData, config: TrainConfig, result: TrainResult) -> None:
    trainer.save_model(str(result.folder / "model"))
    if data.tokenizer is not None:
        data.tokenizer.save_pretrained(result.folder / "model")
    record = {
        "metrics": result.metrics,
        "steps": result.steps,
        "parameters": result.parameters,
        "state_bytes": result.state_bytes,
        "model": config.model,
        "data": asdict(config.data),
        "run": asdict(config.run),
        "device": str(trainer.args.device),
        "versions": versions(),
        "command": command_line(),
        "date": now(),
    }
    made = result.folder / ".result.json"
    made.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(made, result.folder / "result.json")
