"""Ctrl-C, `kill` and a closed terminal: a command ends, cleans up, and leaves neither files nor processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

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
    raised: Callable[[], Interrupted | None] = staticmethod(lambda: None)  # as long as it lives, cleaning is going on
    waiting = False
    held = 0
    watching = 0


def caught() -> int | None:
    """The signal that asked this process to end, if one did."""
    return _State.caught


def check() -> None:
    """Raise what was lost: Python drops exceptions in destructors and callbacks.

    Raises:
        Interrupted: a signal came.
    """
    if _State.caught is not None and not _State.held:
        _interrupt(_State.caught)


def _interrupt(number: int) -> NoReturn:
    stop = Interrupted(number)
    _State.raised = weakref.ref(stop)
    try:
        raise stop
    finally:
        del stop  # the frame would keep it alive, and it the frame


@contextmanager
def watched() -> Iterator[None]:
    """Signals raise `Interrupted` inside. Those that the process was started to ignore, as by nohup, stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook = {number: signal.getsignal(number) for number in SIGNALS}, sys.unraisablehook
    if not _State.watching:  # else a signal may have come that `check` has still to find
        _State.caught, _State.waiting, _State.raised = None, False, lambda: None
    _State.watching += 1
    try:
        sys.unraisablehook = lambda dropped: None if issubclass(dropped.exc_type, Interrupted) else hook(dropped)
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, _stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        sys.unraisablehook = hook
        _State.watching -= 1


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
    elif _State.raised() is None:  # once is enough, unless a library took it for a failure and went on
        _interrupt(_State.caught)


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
