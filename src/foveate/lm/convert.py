"""Conversion of a pretrained language model: some of its attention layers become other mixers.

    1. The model becomes a HybridLM of softmax mixers with the same weights (`pretrained.as_hybrid`).
    2. The chosen layers get new mixers that start from their q, k, v and o projections.
    3. distill: the new mixers learn, layer by layer, what the old ones do (`distill.distill`).
    4. With `upcycle`, every SwiGLU block becomes experts, all copies at first (`upcycle.upcycle`).
    5. finetune: the whole model learns to predict the next token again, with LoRA (`finetune.finetune`); with `extend`
       it goes on at greater lengths.
    6. With `spikes`, the linear layers get 8-bit weights and read spike counts (`spikes.spike_coded`).

The procedure of Hedgehog (Zhang et al. 2024, arXiv 2402.04347) and LoLCATs (Zhang et al. 2024, arXiv 2410.10254), for
any mixer with such projections. The result is a HybridLM and not the original class with modules swapped: `generate`
with beams and padding, `save_pretrained`, `from_pretrained` and the Auto classes then work through the one shell that
already keeps states of every kind, where a model with swapped modules needs a cache and a loader of its own and a plain
`from_pretrained` of it would come up with random attention.

SpikingBrain (Pan et al. 2025, arXiv 2509.05276) is such a conversion without distillation, all of it trained (100B
tokens at a length of 8192, 20 to 30B at 32768 and as many at 131072, after Qwen2.5-7B):

    convert(model, tokenizer, to="spikingbrain,spikingbrain-window:window=4096", distill_steps=0, finetune="full",
            length=8192, finetune_steps=..., extend=(32768, 131072), extend_steps=..., spikes=3.0)

Deviations: the new mixers' own parameters go on training in the second stage; learning rates fall by a cosine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foveate.errors import DataError, OptionError, ResultsError
from foveate.hf.calibrations.base import Work
from foveate.hf.identity import identify
from foveate.hf.models import load_model
from foveate.hf.modules import check_model
from foveate.lm.convert_config import ConvertConfig
from foveate.lm.data import PackedText, pack, read_documents
from foveate.lm.distill import distill, objective_of
from foveate.lm.finetune import check_installed, finetune
from foveate.lm.model import HybridLM
from foveate.lm.pretrained import as_hybrid, mixer_at, replace_layers
from foveate.lm.spikes import spike_coded
from foveate.lm.stages import perplexity
from foveate.lm.upcycle import upcycle
from foveate.methods.profile import ModelIdentity, Profile, load
from foveate.mixers.base import Mixer
from foveate.options import check_names, options_of, parse_spec
from foveate.provenance import command_line, now, versions


@dataclass(frozen=True)
class Conversion:
    """What a conversion came to.

    model: the converted model, in evaluation mode, in the given model's dtype.    layers: those that were replaced.
    perplexity: on held-out text, of "base", "replaced" (nothing trained yet), "distilled", "upcycled", "finetuned",
        "extended-LENGTH" and "spiking"; a stage that is not asked for is left out.
    losses: per step of "distill", "finetune" and "extend-LENGTH".    folder: where it is kept, None for nowhere.
    """

    model: HybridLM
    layers: tuple[int, ...]
    perplexity: dict[str, float]
    losses: dict[str, list[float]]
    folder: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything but the model, for JSON."""
        folder = None if self.folder is None else str(self.folder)
        return {"layers": self.layers, "perplexity": self.perplexity, "losses": self.losses, "folder": folder}

    def __str__(self) -> str:
        of = f"{len(self.layers)} of {len(self.model.config.mixers)} layers"
        steps = ", ".join(f"{stage} {value:.2f}" for stage, value in self.perplexity.items())
        kept = "" if self.folder is None else f"; {self.folder / 'model'}"
        kinds = dict.fromkeys(self.model.config.mixers[layer] for layer in self.layers)
        return f"{of} are {' and '.join(kinds)}; perplexity: {steps}{kept}"


def convert(
    model: Any,
    tokenizer: Any,
    to: str | Sequence[str] = "hedgehog",
    *,
    layers: Sequence[int] | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Conversion:
    """Replace attention layers of a pretrained model by another mixer, and train it to work as before.

        converted = convert(model, tokenizer, to="hedgehog", ratio=0.5, out="smollm2-hedgehog").model
        converted.generate(**inputs)
        HybridLM.from_pretrained("smollm2-hedgehog/model")

    Args:
        model: a transformers causal LM of Llama's layout, on the device where the work is to be done; it is left as
            it is.    tokenizer: its tokenizer.
        to: a mixer's spec, or several (a list, or text with commas): layer i takes number i modulo their count, and
            as many as layers name each layer's; a bare "softmax" among them leaves its layers as they are.
        layers: which layers, from 0; default: `ratio` of them, spread evenly.
        out: a folder for the model, its tokenizer, result.json, and unfinished work. Called again with the same
            arguments, a conversion goes on where it was interrupted; a finished one is loaded. Default: nothing is
            written.
        progress: draw a progress bar on stderr.
        **settings: fields of `ConvertConfig`.
    Returns:
        the converted model and how its perplexity on held-out text went.
    Raises:
        before any training: UnknownNameError, OptionError; UnsupportedModelError for a model of another layout;
        DataError for the text; MissingPackageError without peft; ResultsError for a folder that cannot be made or
        holds another conversion.
    Cost: a stage's step is one forward and backward pass; distillation of "weights" is quadratic in `length`, in blocks
        of rows. Two sets of weights at most (float32) beside the model's own.
    """
    check_names("convert", settings, options_of(ConvertConfig))
    config = ConvertConfig(
        to=to if isinstance(to, str) else tuple(to), layers=None if layers is None else tuple(layers), **settings
    )
    check_installed(config)
    check_model(model)
    folder = None if out is None else Path(out).expanduser()
    run = _Run(config, identify(model), folder, progress)
    finished = run.finished(model)
    if finished is not None:
        return finished
    teacher = as_hybrid(model)
    chosen = config.chosen(len(teacher.layers))
    student = replace_layers(teacher, chosen, config.specs, config.seed)
    mixers = {index: mixer_at(student, index) for index in chosen}
    objective_of(mixers, config.objective)
    documents = read_documents(config.text, config.separator)
    train, test = pack(documents, tokenizer, config.length).split(config.held_out)
    longer = {length: train.in_blocks(length) for length in config.extend}
    run.make_folder()
    losses, scores = run.distil(teacher, student, mixers, train, test)
    # Its tensors are the student's, which change now.
    del teacher
    student = run.train(student, chosen, longer, train, test, losses, scores).to(model.dtype)
    if config.spikes is not None:
        student = spike_coded(student, k=config.spikes, group=config.spike_group)
        scores["spiking"] = perplexity(student, test, config)
    made = Conversion(student, chosen, scores, losses, folder)
    run.save(made, tokenizer)
    return made


@dataclass(frozen=True)
class _Run:
    """Where one conversion is kept.

    FOLDER/distill.partial, finetune.partial: unfinished stages.    distilled: the new mixers after the first.
    FOLDER/model: the result.    result.json: written last.
    """

    config: ConvertConfig
    identity: ModelIdentity
    folder: Path | None
    shown: bool

    def work(self, stage: str) -> Work:
        return Work(self.identity, None if self.folder is None else self.folder / f"{stage}.partial", self.shown)

    def finished(self, model: Any) -> Conversion | None:
        """The conversion that the folder holds; raises ResultsError where it is another one."""
        if self.folder is None or not (self.folder / "result.json").exists():
            return None
        record = self._record()
        made = HybridLM.from_pretrained(self.folder / "model").to(model.device).eval()
        return Conversion(made, tuple(record["layers"]), record["perplexity"], record["losses"], self.folder)

    def _record(self) -> dict[str, Any]:
        assert self.folder is not None
        path = self.folder / "result.json"
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            # Of settings newer than the record, the defaults made it.
            held = {**ConvertConfig().as_dict(), **record["config"]}, record["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no result of a conversion ({error}); delete {self.folder}") from error
        wanted = self.config.as_dict(), asdict(self.identity)
        if held != wanted:
            differing = [name for a, b in zip(held, wanted) for name in b if a.get(name) != b[name]]
            raise ResultsError(
                f"{self.folder} holds another conversion, with other {', '.join(differing)}; name another folder"
            )
        return record

    def make_folder(self) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(f"{self.folder}: cannot be made ({error.strerror}); name another folder") from error

    def distil(
        self, teacher: HybridLM, student: HybridLM, mixers: dict[int, Mixer], train: PackedText, test: PackedText
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Train the new mixers, or load what an earlier call trained. Returns losses and perplexities by stage."""
        earlier = self._load_distilled(mixers)
        if earlier is not None:
            return earlier
        scores = {"base": perplexity(teacher, test, self.config), "replaced": perplexity(student, test, self.config)}
        losses: dict[str, list[float]] = {}
        if self.config.distill_steps:
            losses["distill"] = distill(teacher, mixers, train, self.config, self.work("distill"))
            scores["distilled"] = perplexity(student, test, self.config)
        if self.folder is not None:
            tensors = {
                f"{index}.{name}": each for index, own in mixers.items() for name, each in own.state_dict().items()
            }
            described = {"config": self.config.as_dict(), "losses": losses, "perplexity": scores}
            Profile("convert-distilled", self.identity, tensors, described).save(self.folder / "distilled")
        return losses, scores

    def train(
        self,
        student: HybridLM,
        layers: tuple[int, ...],
        longer: dict[int, PackedText],
        text: PackedText,
        test: PackedText,
        losses: dict[str, list[float]],
        scores: dict[str, float],
    ) -> HybridLM:
        """Upcycle and train the whole model; adds to losses and scores."""
        config = self.config
        if config.upcycle:
            student = upcycle(
                student,
                experts=config.upcycle,
                top=config.upcycle_top,
                shared=config.upcycle_shared,
                scale=config.upcycle_scale,
                noise=config.router_noise,
                dense_layers=config.dense_layers,
                seed=config.seed,
            )
            scores["upcycled"] = perplexity(student, test, config)
        if config.finetune_steps:
            student, losses["finetune"] = finetune(student, layers, text, config, self.work("finetune"))
            scores["finetuned"] = perplexity(student, test, config)
        for length, blocks in longer.items():
            stage = f"extend-{length}"
            student, losses[stage] = finetune(
                student, layers, blocks, config, self.work(stage), stage=stage, steps=config.extend_steps
            )
            scores[f"extended-{length}"] = perplexity(student, test, config)
        return student

    def _load_distilled(self, mixers: dict[int, Mixer]) -> tuple[dict[str, list[float]], dict[str, float]] | None:
        if self.folder is None or not (self.folder / "distilled").exists():
            return None
        found = load(self.folder / "distilled", "convert-distilled")
        found.check("convert-distilled", self.identity)
        if found.settings["config"] != self.config.as_dict():
            return None
        for index, mixer in mixers.items():
            prefix = f"{index}."
            mixer.load_state_dict(
                {name.removeprefix(prefix): each for name, each in found.tensors.items() if name.startswith(prefix)}
            )
        return found.settings["losses"], found.settings["perplexity"]

    def save(self, made: Conversion, tokenizer: Any) -> None:
        """Write the result, and forget unfinished work."""
        if self.folder is None:
            return
        made.model.save_pretrained(self.folder / "model")
        tokenizer.save_pretrained(self.folder / "model")
        record = {
            "config": self.config.as_dict(),
            "identity": asdict(self.identity),
            "layers": list(made.layers),
            "perplexity": made.perplexity,
            "losses": made.losses,
            "versions": versions(),
            "command": command_line(),
            "date": now(),
        }
        part = self.folder / ".result.json"
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.folder / "result.json")
        for stage in ("distill", "finetune", *(f"extend-{length}" for length in self.config.extend)):
            self.work(stage).forget_partial()


def run_convert(
    *,
    model: str | None = None,
    to: str = "hedgehog",
    layers: str | None = None,
    text: Sequence[str] = (),
    extend: str | None = None,
    dense_layers: str | None = None,
    out: str | os.PathLike[str],
    settings: Sequence[str] = (),
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = True,
) -> Conversion:
    """The body of `foveate convert`: load a model by name, convert it, keep it in `out`.

    model: folder or hub name; default the bundled one.    to: a spec, or several with commas.    layers: "1,3,5";
    default: by ratio.    text: files; default Python's manual.    extend: "32768,131072", further lengths.
    dense_layers: "0,1", layers without experts.    settings: "name=value" of `ConvertConfig`, several.    dtype,
    device: as of `load_model`.
    Raises: as `convert`, and OptionError for layers or settings that cannot be read.
    """
    _, given = parse_spec(f"convert:{','.join(settings)}")
    for name in ("to", "layers", "text", "extend", "dense_layers"):
        if name in given:
            flag = name.replace("_", "-")
            raise OptionError(f"convert: {name} among the settings, allowed: its own argument, --{flag}")
    if text:
        given["text"] = tuple(text)
    for name, numbers in (("extend", extend), ("dense_layers", dense_layers)):
        if numbers is not None:
            given[name] = _numbers(name, numbers)
    chosen = None if layers is None else _numbers("layers", layers)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    return convert(loaded, tokenizer, to, layers=chosen, out=out, progress=progress, **given)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError:
        raise OptionError(f"convert: {name}={text!r}, allowed: whole numbers separated by commas, as 1,3,5") from None
