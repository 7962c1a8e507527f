"""A process that forks after it has loaded a pipeline: gunicorn --preload, Celery, a DataLoader's workers.

OpenMP keeps its threads with the thread that began to use them. In a forked process that thread is there, its helpers
are not, and the next parallel loop waits for them for ever. A thread that is begun after the fork has helpers of its
own. So in a forked process the thread that forked hands its calls to one that lives from then on; others need nothing.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_first = os.getpid()  # the process that imported this, and PyTorch


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
