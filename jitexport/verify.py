"""Checking a bundle on the machine that is to run it: every digest, then every engine on its golden input."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from jitexport import machine
from jitexport.building.comparing import compare, tolerance
from jitexport.bundle import EngineBundle
from jitexport.bundle.entries import EngineEntry
from jitexport.bundle.golden import read_golden
from jitexport.errors import JitExportError
from jitexport.runtime import EngineOpener


@dataclass(frozen=True)
class Replay:
    """An engine's outputs here against the stored ones.

    Attributes:
        exact: whether all bits are the same. On the machine that built the bundle they are, unless the number of
            threads changes how sums are split.
        relative_error: ||here - stored|| / ||stored|| over all outputs; NaN where the engine could not run.
        max_error: the largest difference.
        tolerance: the largest relative error that passes.
        seconds: of opening the engine and running it once.
        problem: why it could not run.
    """

    name: str
    exact: bool
    relative_error: float
    max_error: float
    tolerance: float
    seconds: float
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the engine ran and is within the tolerance; false for NaN."""
        return self.problem is None and self.relative_error <= self.tolerance

    def report(self) -> dict[str, str | bool | float | None]:
        """All of it for JSON, which has no NaN: None instead."""
        values = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}
        return values | {"passed": self.passed}


@dataclass(frozen=True)
class Verification:
    """Results of a bundle whose files are all as declared: their number, their bytes, and one replay an engine."""

    files: int
    bytes: int
    engines: tuple[Replay, ...]

    @property
    def passed(self) -> bool:
        """Whether every engine passed."""
        return all(replay.passed for replay in self.engines)

    def to_json(self) -> str:
        """JSON text."""
        engines = [replay.report() for replay in self.engines]
        return json.dumps({"passed": self.passed, "files": self.files, "bytes": self.bytes, "engines": engines})


def verify(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    on_engine: Callable[[str], None] = lambda name: None,
) -> Verification:
    """Check a bundle's files and replay every engine.

    Args:
        path: the bundle's directory.
        device: where to run; the device that the bundle was built for by default.
        on_engine: told each engine's name before it is opened.

    Raises:
        BundleError: a file is not as declared, or the bundle was built for another machine; no engine was opened then.
        BackendUnavailableError: the backend cannot run here.
    """
    bundle = EngineBundle.open(path, "full")
    opener = EngineOpener(bundle, device)
    replays = []
    with machine.threads(machine.default_threads()):
        for entry in bundle.manifest.engines:
            on_engine(entry.name)
            replays.append(_replay(bundle, opener, entry))
    return Verification(len(bundle.manifest.files), bundle.manifest.size, tuple(replays))


def _replay(bundle: EngineBundle, opener: EngineOpener, entry: EngineEntry) -> Replay:
    allowed, started = tolerance(bundle.manifest.dtype, opener.device), time.perf_counter()
    try:
        inputs, stored = read_golden(bundle.path, entry)
        engine = opener.open(entry)
        outputs = [t.cpu() for t in engine(*(t.to(opener.device) for t in inputs))]
    except JitExportError as error:
        nan = float("nan")
        return Replay(entry.name, False, nan, nan, allowed, time.perf_counter() - started, error.message)
    seconds = time.perf_counter() - started
    shapes = [(t.shape, t.dtype) for t in outputs], [(t.shape, t.dtype) for t in stored]
    if shapes[0] != shapes[1]:
        problem = f"gives {shapes[0]}, stored are {shapes[1]}"
        return Replay(entry.name, False, float("nan"), float("nan"), allowed, seconds, problem)
    relative, largest = compare(outputs, stored)
    exact = all(torch.equal(a, b) for a, b in zip(outputs, stored, strict=True))
    return Replay(entry.name, exact, relative, largest, allowed, seconds)
