"""Clocks, ceilings and memory: what every figure is measured with and stands beside."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from jitexport import machine

T = TypeVar("T")


def now(device: torch.device) -> float:
    """Seconds on a steady clock, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Timing:
    """Seconds over repeats: median, and 10th and 90th percentile (the nearest measurement)."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """From single measurements, at least one."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


# --- ceilings --------------------------------------------------------------------------------------------------------

#: (rows, inner, columns) of the products that `matmul_rate` tries.
MATMUL_SHAPES = {
    "cpu": [(1024, 1024, 1024), (1024, 2048, 4096), (2048, 2048, 2048)],
    "cuda": [(4096, 4096, 4096), (4608, 3072, 12288), (8192, 8192, 8192)],
}


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.25) -> float:
    """FLOP/s of the fastest large matrix product on this machine, as a linear layer does it: 2 per multiply-add.

    Args:
        seconds: how long each of `MATMUL_SHAPES` is repeated.
    """
    rates = []
    for m, k, n in MATMUL_SHAPES[device.type]:
        x, w = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
        rates.append(2 * m * k * n / shortest(partial(F.linear, x, w), device, seconds))
    return max(rates)


def copy_rate(device: torch.device, size: int = 2**26, seconds: float = 0.25) -> float:
    """Bytes read and written a second by a copy of `size` bytes, which should not fit a cache."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / shortest(lambda: target.copy_(source), device, seconds)


@torch.inference_mode()
def shortest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest run among those that fit into a time, after one that is not counted.

    On a GPU ten runs are timed together: one alone would measure how long launching it takes.
    """
    together = 10 if device.type == "cuda" else 1
    run()
    best, until = float("inf"), now(device) + seconds
    while (start := now(device)) < until or best == float("inf"):
        for _ in range(together):
            run()
        best = min(best, (now(device) - start) / together)
    return best


def turns(ways: Iterable[T], rounds: int, warmups: int) -> Iterator[tuple[int, T, bool]]:
    """The number of a round, a way and whether it counts: one of each way in turn, `rounds` times after `warmups`.

    A machine that slows down slows all of them.
    """
    ways = list(ways)
    for number in range(warmups + rounds):
        for way in ways:
            yield number, way, number >= warmups


def in_turns(runs: Mapping[str, Callable[[], object]], rounds: int, warmups: int = 3) -> dict[str, list[float]]:
    """Seconds of every run on a CPU, round by round; see `turns`."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _, name, counted in turns(runs, rounds, warmups):
        start = time.perf_counter()
        runs[name]()
        if counted:
            seconds[name].append(time.perf_counter() - start)
    return seconds


# --- memory ----------------------------------------------------------------------------------------------------------


class PeakMemory:
    """Largest memory in use since this was made: of the process, and of the GPU where there is one.

    On Linux the process's high-water mark is reset; elsewhere it counts from the start of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def process(self) -> int:
        """Bytes of resident memory."""
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            import resource  # Unix only

            unit = 1 if platform.system() == "Darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def gpu(self) -> int | None:
        """Bytes allocated on the GPU; None without one."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def peak(self) -> dict[str, int | None]:
        """Both, by name: process and gpu."""
        return {"process": self.process(), "gpu": self.gpu()}


# --- the rest --------------------------------------------------------------------------------------------------------


def conditions() -> dict[str, Any]:
    """Date, commit, hardware and versions, to stand beside every figure."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "cpu": cpu_model(),
        "cpu_class": machine.cpu_class(),
        "threads": machine.default_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@cache
def commit() -> str | None:
    """Of the checkout that this package lies in, with "-dirty" where files differ from it; None outside of one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
