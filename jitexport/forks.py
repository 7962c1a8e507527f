"""A process that forks after it has loaded a pipeline: gunicorn --preload, Celery, a DataLoader's workers.

OpenMP keeps its threads with the thread that began to use them. In a forked process that thread is there, its helpers
are not, and the next parallel loop waits for them for ever. A thread that is begun after the fork has helpers of its
own. So in a forked process the thread that forked hands its calls to one that lives from then on; others need nothing.

A thread that ends gives back the buffers it had of MKL, under a lock of MKL's, and does so after Python counts it as
joined. A fork in this moment copies the lock as it is, held by a thread that the new process does not have, and the
next matrix product there waits for ever (10 to 13 of 60 forks right after a `join` did, PyTorch 2.13.0 on AVX2). So a
fork waits until the threads that Python does not know are asleep or gone.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_first = os.getpid()  # the process that imported this, and PyTorch
_LONGEST_WAIT = 0.25  # seconds; threads took up to 0.03 to end while three other processes used both cores


@functools.cache
def _caller(process: int) -> ThreadPoolExecutor:
    """The thread of a process that makes its calls."""
    return ThreadPoolExecutor(1, f"jitexport-{process}")


class Lock:
    """A lock that is free in a forked process: whoever held it in the other process is not there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def acquire(self, blocking: bool = True) -> bool:
        """As `threading.Lock` has it."""
        return self._lock.acquire(blocking)

    def release(self) -> None:
        """As `threading.Lock` has it."""
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _renew_locks() -> None:
    for lock in _locks:
        lock._lock = threading.Lock()


def _ending() -> bool:
    """Whether threads that Python does not know run: some may be about to end, others are helpers of OpenMP's."""
    known = {str(thread.native_id) for thread in threading.enumerate()}
    try:
        return any(_runs(task) for task in os.listdir("/proc/self/task") if task not in known)
    except OSError:  # no /proc here any more, or no file may be opened: then nobody can tell
        return False


def _runs(task: str) -> bool:
    try:
        with open(f"/proc/self/task/{task}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "S"
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has ended


def _let_threads_end() -> None:
    """Wait for threads that are about to end, a millisecond as a rule, and not for ever: helpers may work for long."""
    until = time.monotonic() + _LONGEST_WAIT
    while _ending() and time.monotonic() < until:
        time.sleep(0.0002)


if os.path.isdir("/proc/self/task"):  # Linux; elsewhere PyTorch comes without MKL
    os.register_at_fork(before=_let_threads_end)
os.register_at_fork(after_in_child=_renew_locks)


def forked() -> bool:
    """Whether this process was forked from the one that imported this package."""
    return os.getpid() != _first


def survives_fork(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function that uses PyTorch callable in forked processes."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not forked() or threading.current_thread() is not threading.main_thread():
            return function(*args, **kwargs)
        return _caller(os.getpid()).submit(function, *args, **kwargs).result()

    return call
