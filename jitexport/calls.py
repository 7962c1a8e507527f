"""The calls that run on a pipeline, and what is said to one of them alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from jitexport.forks import Lock


@dataclass(eq=False)
class Call:
    """One call.

    Attributes:
        guidance_scale: that it runs with.
        interrupted: whether its remaining steps are to be skipped.
        cut: prompts whose cutting has been logged.
    """

    guidance_scale: float | None = None
    interrupted: bool = False
    cut: set[str] = field(default_factory=set)


class Calls:
    """All calls that run, and for each thread the one that it is in."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: list[Call] = []
        self._own = threading.local()

    @property
    def current(self) -> Call | None:
        """The innermost call of this thread; None outside of calls."""
        return getattr(self._own, "call", None)

    @contextmanager
    def one(self, call: Call) -> Iterator[Call]:
        """The length of a call."""
        outer = self.current
        with self._lock:
            self._running.append(call)
        self._own.call = call
        try:
            yield call
        finally:
            self._own.call = outer
            with self._lock:
                self._running.remove(call)

    @property
    def interrupted(self) -> bool:
        """Whether this thread's call is interrupted; outside of calls, whether any is."""
        if self.current is not None:
            return self.current.interrupted
        with self._lock:
            return any(call.interrupted for call in self._running)

    def interrupt(self, value: bool) -> None:
        """Interrupt this thread's call; outside of calls, as from a stop button, all that run now."""
        with self._lock:
            for call in self._running if self.current is None else [self.current]:
                call.interrupted = value
