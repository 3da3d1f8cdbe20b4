"""What is in the registry: list, show."""

from __future__ import annotations

from typing import Annotated

import typer

from foveate.cli.common import AsJson, print_json, stderr, stdout


def list_(
    pattern: Annotated[str, typer.Argument(help="shell wildcards, e.g. '*kv*'")] = "*",
    kind: Annotated[str | None, typer.Option(help="only this kind, e.g. keep, select, mixer, task")] = None,
    as_json: AsJson = False,
) -> None:
    """List the mechanisms in the registry; exit code 1 when there are none of that kind or pattern."""
    from foveate import registry

    found = [registry.card(name) for name in registry.names(pattern, kind=kind)]
    if as_json:
        print_json([card.as_dict() for card in found])
    elif found:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for column in ("name", "kind", "year", "what it does"):
            table.add_column(column, no_wrap=column != "what it does")
        for card in found:
            table.add_row(card.name, card.kind, str(card.year), card.summary)
        stdout().print(table)
    if not found:
        stderr().print(f"foveate: {_nothing(pattern, kind)}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1)


def _nothing(pattern: str, kind: str | None) -> str:
    from foveate import registry
    from foveate.options import nearest

    present = registry.names(kind=kind)
    if not present:
        kinds = ", ".join(each for each in registry.KINDS if registry.names(kind=each))
        return f"there is no mechanism of kind {kind!r} yet; kinds that have some: {kinds}"
    of_kind = "" if kind is None else f" of kind {kind!r}"
    return f"no mechanism{of_kind} matches {pattern!r}{nearest(pattern.strip('*?'), present)}"


def show(
    name: Annotated[str, typer.Argument(help="a name that `foveate list` shows")], as_json: AsJson = False
) -> None:
    """Show one mechanism: paper, options with their bounds, the measured claim."""
    from foveate import registry
    from foveate.options import Bounds

    card = registry.card(name)
    if as_json:
        print_json(card.as_dict())
        return
    out = stdout()
    link = f" (arXiv {card.arxiv})" if card.arxiv else ""
    out.print(f"[bold]{card.name}[/bold]  {card.kind}: {card.paper}{link}, {card.year}", highlight=False)
    out.print(card.summary, highlight=False, markup=False)
    for option in card.options:
        facts = [option.type, "required" if option.required else f"default {option.default!r}"]
        if option.bounds != Bounds():
            facts.append(f"allowed {option.bounds}")
        told = f". {option.help}" if option.help else ""
        out.print(f"  {option.name}: {', '.join(facts)}{told}", highlight=False, markup=False)
    if card.calibration:
        out.print(f"calibration: foveate calibrate {card.calibration}", highlight=False)
    if card.claim:
        out.print(f"claim here: {card.claim}", highlight=False, markup=False)
