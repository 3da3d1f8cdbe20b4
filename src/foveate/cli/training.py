"""Training: train, convert, study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.common import AsJson, Dtype, numbers, print_json, stdout, words


def train(config: Annotated[Path, typer.Argument(help="a TOML file, see docs/training.md")]) -> None:
    """Train a language model of foveate's mixers; what came out is printed as JSON."""
    from foveate.lm.train import TrainConfig
    from foveate.lm.train import train as run_training

    print_json(run_training(TrainConfig.read(config)).as_dict())


def convert(
    model: Annotated[str | None, typer.Argument(help="folder or hub name; default: the bundled model")] = None,
    to: Annotated[
        str, typer.Option(help="the mixer that takes the attention layers' place; several take turns: gla,softmax")
    ] = "hedgehog",
    layers: Annotated[str | None, typer.Option(help="which layers, e.g. 1,3,5; default: by ratio")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="text files to train on; default: Python's manual")] = None,
    extend: Annotated[str | None, typer.Option(help="lengths of further training, e.g. 32768,131072")] = None,
    dense_layers: Annotated[
        str | None, typer.Option(help="with upcycle: layers that keep one SwiGLU block, e.g. 0,1")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of the recipe, several")] = None,
    out: Annotated[Path, typer.Option(help="folder of the converted model")] = Path("foveate-converted"),
    dtype: Dtype = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: as the model comes")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn attention layers of a pretrained model into other mixers: distillation, then fine-tuning."""
    from foveate.lm.convert import run_convert

    made = run_convert(
        model=model,
        to=to,
        layers=layers,
        text=[str(each) for each in text or ()],
        extend=extend,
        dense_layers=dense_layers,
        settings=settings or (),
        out=out,
        dtype=dtype,
        device=device,
        progress=not as_json,
    )
    if as_json:
        print_json(made.as_dict())
    else:
        stdout().print(str(made), highlight=False)


def study(
    mixers: Annotated[str | None, typer.Option(help="specs separated by spaces or ';'; default: eight of them")] = None,
    task: Annotated[str, typer.Option(help="mqar or language")] = "mqar",
    ratios: Annotated[str, typer.Option(help="hybrids: layers per one of full attention, e.g. 3,1")] = "",
    text: Annotated[list[str] | None, typer.Option(help="for language: text files")] = None,
    out: Annotated[Path, typer.Option(help="folder for cells, study.json and study.html")] = Path("foveate-study"),
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    minutes: Annotated[float | None, typer.Option(help="when to stop; what is missing is listed")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of the study, several")] = None,
) -> None:
    """Train small models of mixers and of hybrids: recall or perplexity against bytes of state."""
    from foveate.compare.study import study_command

    done = study_command(
        words(mixers),
        task=task,
        ratios=numbers(ratios, "--ratios"),
        text=text or (),
        out=out,
        workers=workers,
        minutes=minutes,
        device=device,
        settings=settings or (),
    )
    stdout().print(done.table())
