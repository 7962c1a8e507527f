"""Standard output and standard error of the command line. What is printed is data, and nothing in data is markup.

Rich takes square brackets for markup: a folder `out[bf16]` would be shown as `out`, and `[/x]` would be an error. It is
switched off here, once for everything; a test sees to it that no other module, and no script, uses rich by itself.
"""

from __future__ import annotations

import codecs
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.table import Table
from rich.text import Text

from jitexport.errors import OutputError

__all__ = [
    "BarColumn", "MofNCompleteColumn", "PlainConsole", "Progress", "SpinnerColumn", "Table", "TimeElapsedColumn",
    "TimeRemainingColumn", "echo", "err", "out", "prepare_streams", "quiet_libraries", "text_column", "track",
]  # fmt: skip

Item = TypeVar("Item")


class PlainConsole(Console):
    """A console that prints text as it is: no markup, no emoji codes, no colours for numbers and paths."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; on standard output, what cannot be written is an error.

        Raises:
            OutputError: standard output is full or closed.
        """
        if self.stderr:
            with suppress(OSError, ValueError):  # a message that cannot be shown changes nothing about what was done
                super().print(*objects, **options)
        else:
            with _writing():
                super().print(*objects, **options)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """A spinner with a text beside it."""
        return _PlainStatus(_plain(status), console=self, **options)


class _PlainStatus(Status):
    def update(self, status: RenderableType | None = None, **options: Any) -> None:
        super().update(None if status is None else _plain(status), **options)


def _plain(text: RenderableType) -> RenderableType:
    return Text(text) if isinstance(text, str) else text


def text_column(form: str) -> ProgressColumn:
    """A column of a progress bar, as "{task.description}"."""
    return TextColumn(form, markup=False)


out = PlainConsole()
err = PlainConsole(stderr=True)


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """The items one by one, with a bar on standard error."""
    columns = text_column("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err) as bar:
        yield from bar.track(items, description=description)


def echo(text: object) -> None:
    """Write a line of data to standard output.

    Raises:
        OutputError: it is full or closed.
    """
    with _writing():
        print(text, flush=True)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # the reader has what it wanted, as `head` has
        _drop_output()
        raise SystemExit(1) from None
    except (OSError, ValueError) as error:
        _drop_output()
        raise OutputError(
            "cannot write to standard output", found=error, expected="an open file or pipe with room",
            remedy="free space, or send the output elsewhere",
        ) from error


def _drop_output() -> None:
    """Send what is left in standard output's buffer nowhere: Python would try to write it again when it ends."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def prepare_streams() -> None:
    """Let standard streams take any path and any text, and be there.

    Bytes of a path that are no text come out as the same bytes; characters that the terminal's encoding lacks come out
    as escapes. A stream that was closed when the process began is the null device, or a file that is opened later would
    get its number, and what libraries print.
    """
    with suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) < 3:
            os.set_inheritable(number, True)
        os.close(number)
    codecs.register_error("jitexport", _encodable)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="jitexport")  # type: ignore[union-attr]  # AttributeError: see above


def quiet_libraries() -> None:
    """Keep the libraries that read models from writing banners and bars between our lines."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|copyreg")
    for name in ("diffusers", "transformers", "torch._inductor", "torch.utils.flop_counter"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging
    except ImportError:
        return  # reported by whatever needs them
    for module in (diffusers_logging, transformers_logging):
        module.set_verbosity_error()
        module.disable_progress_bar()


def _encodable(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)
