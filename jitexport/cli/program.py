"""The verbs together, and what becomes of errors and signals."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from jitexport import causes, interrupts
from jitexport._version import __version__
from jitexport.cli.building import build
from jitexport.cli.bundles import inspect, pack, pull, push, unpack, verify
from jitexport.cli.images import generate
from jitexport.cli.measuring import evaluate, profile
from jitexport.cli.options import flat
from jitexport.cli.planning import calibrate, doctor, plan
from jitexport.cli.serving import serve
from jitexport.console import echo, err, prepare_streams
from jitexport.errors import JitExportError, OutputError
from jitexport.files import DISK_ERRORS

app = typer.Typer(
    name="jitexport",
    help="Training-free acceleration of diffusion transformers, compiled into prebuilt engines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for verb in (
    build, plan, calibrate, generate, inspect, profile, evaluate, verify, pack, unpack, push, pull, serve, doctor,
):  # fmt: skip
    app.command()(flat(verb))


def _version(value: bool) -> None:
    if value:
        echo(f"jitexport {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and turns this package's errors and signals into a message and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    if argv is None:  # a process of its own
        prepare_streams()
        interrupts.adopt_orphans()
    with interrupts.watched():
        try:
            code = _run(argv)
        except interrupts.Interrupted as stop:  # between the command and its end
            code = _interrupted(stop.number)
    sys.exit(code)


def _run(argv: Sequence[str] | None) -> int | str | None:
    """A command's exit code, after its message."""
    try:
        with causes.explained("running the command"):
            interrupts.check()  # what came before, and was dropped
            app(args=list(argv) if argv is not None else None, standalone_mode=True)
    except SystemExit as end:
        code = end.code
    except JitExportError as error:
        if interrupts.caught() is None:  # else it is what a compiler said when the signal reached it
            err.print(f"error: {error}", style="red", soft_wrap=True)
        code = error.exit_code
    except (interrupts.Interrupted, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    except Exception as error:
        if interrupts.caught() is None:
            if not isinstance(error, OSError) or error.errno not in DISK_ERRORS:
                raise
            what = "  remedy:   free space, or write elsewhere"
            err.print(f"error: cannot write\n  found:    {error}\n{what}", style="red", soft_wrap=True)
        code = OutputError.exit_code
    number = interrupts.caught()
    return code if number is None else _interrupted(number)


def _interrupted(number: int) -> int:
    """The exit code of a signal, after its word."""
    interrupts.ignore()
    interrupts.end_children()
    err.print("interrupted")
    return 128 + number
