"""Cores that other processes want as well: how long waiting OpenMP threads hold on to theirs.

Threads of GNU's OpenMP spin for some milliseconds before they sleep. On cores that nobody else wants that is right: an
image is 5% faster than with threads that sleep at once. Where another process runs on the same cores, a thread that
spins keeps the one it waits for from working, and an image takes ten times as long and more.

The library spins a thousand times shorter as soon as the process has more OpenMP threads than it may use cores
(`GOMP_SPINCOUNT` in its manual). So while cores are crowded, some threads are added that sleep. Environment variables
would be simpler, but are read when torch is imported, and hold for good.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from jitexport.forks import Lock
from jitexport.machine import affinity

#: Share of the time that threads spent ready to run and without a core, from which cores count as crowded.
CROWDED = 0.05
#: Seconds without that until they count as free again, and between two looks.
CALM = 2.0
INTERVAL = 0.02


def waiting_seconds() -> float | None:
    """Time that this process's threads have spent ready to run but without a core, all together; None if unknown."""
    total = 0
    try:
        for task in os.scandir("/proc/self/task"):
            try:
                total += int(Path(task.path, "schedstat").read_bytes().split()[1])
            except (OSError, IndexError):  # it ended just now
                continue
    except OSError:
        return None
    return total / 1e9


def others_run(threads: int) -> bool:
    """Whether so many threads of ours would not have a core each now, by the number of threads that run anywhere."""
    try:
        running = int(Path("/proc/loadavg").read_bytes().split()[3].split(b"/")[0])
    except (OSError, IndexError, ValueError):
        return False
    return running - 1 + threads > (os.cpu_count() or 1)  # one of them reads this


class Sleepers:
    """OpenMP threads that sleep, in a pool of their own, until they are dismissed."""

    def __init__(self, count: int) -> None:
        self._done = threading.Event()
        ready = threading.Event()

        def host() -> None:
            # A pool belongs to the thread that first starts a parallel region, and ends with it.
            _start_region()(count + 1)
            ready.set()
            self._done.wait()

        self._host = threading.Thread(target=host, name="jitexport-sleepers", daemon=True)
        self._host.start()
        ready.wait()

    def dismiss(self) -> None:
        """End the threads."""
        self._done.set()
        self._host.join()


@cache
def _start_region() -> Callable[[int], None]:
    """What starts a parallel region of n threads that do nothing, by GNU's OpenMP library where torch uses that."""
    try:
        library = ctypes.CDLL(torch._C.__file__)  # symbols are looked for in what it was linked with, too
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        return lambda n: None
    nothing = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
    parallel.argtypes = [type(nothing), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return lambda n: parallel(nothing, None, n, 0)


class Watch:
    """Looks whether cores are crowded, and lets waiting threads sleep early while they are.

    One for the process, as there is one OpenMP library; calls may come from any thread.

    Args:
        clock, waited, others: what it looks at, in this order: seconds; `waiting_seconds`; `others_run`.
        sleepers: makes the threads that sleep.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        waited: Callable[[], float | None] = waiting_seconds,
        others: Callable[[int], bool] = others_run,
        sleepers: Callable[[int], Any] = Sleepers,
    ) -> None:
        self._clock, self._waited, self._others, self._make = clock, waited, others, sleepers
        self._lock = Lock()
        self._looked: tuple[float, float] | None = None  # when, and the time waited until then
        self._crowded = float("-inf")  # when they last were
        self._sleepers: Any = None

    def enter_process(self) -> None:
        """After a fork: the threads that slept are not there."""
        self._looked = self._sleepers = None
        self._crowded = float("-inf")

    @property
    def crowded(self) -> bool:
        """Whether waiting threads sleep early now."""
        return self._sleepers is not None

    def begin(self) -> None:
        """Look before work begins, when there is nothing to be measured yet."""
        with self._lock:
            waited = self._waited()
            if waited is None:
                return
            self._looked = (self._clock(), waited)
            if not self.crowded and self._others(torch.get_num_threads()):
                self._crowded = self._clock()
            self._settle()

    def look(self) -> None:
        """Look at how the threads fared since the last time."""
        if not self._lock.acquire(blocking=False):
            return  # another thread looks
        try:
            now = self._clock()
            if self._looked is None or now - self._looked[0] < INTERVAL:
                return
            waited = self._waited()
            if waited is None:
                return
            if waited - self._looked[1] > CROWDED * (now - self._looked[0]):
                self._crowded = now
            self._looked = (now, waited)
            self._settle()
        finally:
            self._lock.release()

    def _settle(self) -> None:
        crowded = self._clock() - self._crowded < CALM
        if crowded and self._sleepers is None:
            self._sleepers = self._make(sleepers_needed())
        elif not crowded and self._sleepers is not None:
            self._sleepers.dismiss()
            self._sleepers = None


def sleepers_needed() -> int:
    """How many threads have to be added so that there are more than OpenMP counts cores: it knows no quotas."""
    return max(1, affinity() + 1 - torch.get_num_threads())


#: The process's own.
watch = Watch()
os.register_at_fork(after_in_child=watch.enter_process)
