"""Ctrl-C, `kill` and a closed terminal: a command ends, cleans up, and leaves neither files nor processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
_PR_SET_CHILD_SUBREAPER = 36


class Interrupted(BaseException):
    """A signal asked the process to end. No `Exception`, so that nobody takes it for a failure of theirs."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"signal {number}")


class _State:
    """The first signal that came, whether it waits for the end of `finishing`, and how deep in there the process is."""

    caught: int | None = None
    waiting = False
    held = 0


def caught() -> int | None:
    """The signal that asked this process to end, if one did."""
    return _State.caught


def check() -> None:
    """Raise what was lost: Python drops exceptions in destructors and callbacks.

    Raises:
        Interrupted: a signal came.
    """
    if _State.caught is not None and not _State.held:
        raise Interrupted(_State.caught)


@contextmanager
def watched() -> Iterator[None]:
    """Signals raise `Interrupted` inside. Those that the process was started to ignore, as by nohup, stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _State.caught, _State.waiting = None, False
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ignore() -> None:
    """From here to the end of `watched`, further signals change nothing: the process is ending already."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def default() -> None:
    """From here on a signal ends the process at once."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, frame: Any) -> None:
    _State.caught = _State.caught or number
    if _State.held:
        _State.waiting = True
    else:
        raise Interrupted(_State.caught)


@contextmanager
def finishing() -> Iterator[None]:
    """What is inside runs to its end; a signal that comes meanwhile counts after it. For short work only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1
        if not _State.held and _State.waiting:
            _State.waiting = False
            check()


def adopt_orphans() -> None:
    """Become the parent of processes whose own parent ends, as a compiler's parts do, so that they can be ended too."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children() -> None:
    """End all processes that this one has started, and theirs."""
    until = time.monotonic() + 10
    while (children := _children()) and time.monotonic() < until:
        for child in children:
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
            with suppress(OSError):
                os.waitpid(child, 0)  # its own children are this process's now


def _children() -> list[int]:
    """Process ids of this process's children; none where the system has no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            if int(path.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found
