"""The command line. Data goes to stdout, everything else to stderr; a user's mistake is one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from foveate.cli import catalogue, pretrained, timing, training
from foveate.errors import FoveateError

# The help lists the commands in these groups and this order.
GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "What there is": {"list": catalogue.list_, "show": catalogue.show},
    "Pretrained models": {
        "generate": pretrained.generate,
        "compare": pretrained.compare,
        "calibrate": pretrained.calibrate,
        "probe": pretrained.probe,
    },
    "Training": {"train": training.train, "convert": training.convert, "study": training.study},
    "Speed": {"bench": timing.bench, "tune": timing.tune},
}

app = typer.Typer(
    name="foveate",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Efficient attention for the models people already use.",
)
for group, commands in GROUPS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=group)(command)


def _tell_version(wanted: bool) -> None:
    if wanted:
        from foveate import __version__

        sys.stdout.write(f"foveate {__version__}\n")
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Show the version and exit.")
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point: errors of the user's are one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except FoveateError as error:
        sys.stderr.write(f"foveate: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("foveate: interrupted; what was finished is kept\n")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        # Usage errors of the option parser know how to say themselves; anything else is a bug and shows its trace.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            # The one without a message has printed the help.
            if message := error.format_message():
                sys.stderr.write(f"foveate: {message}\n")
            sys.exit(error.exit_code)
        raise
    if code:
        sys.exit(code)
