"""What the commands share: options, the reading of lists, and where output goes."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from foveate.errors import DataError

Model = Annotated[str | None, typer.Option(help="folder or hub name; default: the bundled SmolLM2-135M-Instruct")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")]


def words(text: str | None) -> list[str]:
    """Specs separated by spaces or ';'."""
    return [each for each in (text or "").replace(";", " ").split() if each]


def numbers(text: str, option: str = "--lengths") -> list[int]:
    """Whole numbers separated by commas; raises DataError with the option's name for anything else."""
    try:
        return [int(each) for each in text.split(",") if each.strip()]
    except ValueError:
        raise DataError(f"{option} {text!r}: give whole numbers separated by commas, e.g. 1024,4096") from None


def stdout() -> Any:
    from rich.console import Console

    return Console()


def stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def print_json(data: Any) -> None:
    """Plain data only: anything else is a bug of the command."""
    json.dump(data, sys.stdout, indent=2)
    sys.stdout.write("\n")
