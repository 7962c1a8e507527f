"""The fastest of several backends, for each engine by itself, measured where the bundle is built.

An engine's artifact is the chosen backend's, in a folder of its name beside `choice.json`, which has the times of all.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from jitexport.backends.aoti import AOTInductorBackend, reduced_precision
from jitexport.backends.base import Backend, RawEngine
from jitexport.backends.onnx import ONNXBackend
from jitexport.errors import BackendError, CompileError, JitExportError
from jitexport.specs import EngineSpec

logger = logging.getLogger(__name__)

CHOICE = "choice.json"
#: Runs of every candidate, in turns; the fastest run counts.
REPEATS = 20
#: What a later candidate must save to be chosen: less is the machine's noise.
GAIN = 0.03


class AutotunedAOTInductorBackend(AOTInductorBackend):
    """AOTInductor with the matrix-product templates that were fastest for the shapes at hand; for GPUs.

    On CPUs these templates keep weights in an order of their own, as constants that cannot be shared.
    """

    name = "aoti-autotuned"
    settings: Mapping[str, object] = {
        **AOTInductorBackend.settings, "max_autotune": True, "autotune_num_choices_displayed": 0,
        "max_autotune_report_choices_stats": False,
    }

    def cannot_build(self, device: torch.device, target: str | None) -> str | None:
        if device.type == "cpu":
            return "on CPUs its templates copy the weights into an order of their own"
        return super().cannot_build(device, target)


#: By the name of their folders, the first one preferred. Only such as read shared weights live.
CANDIDATES: dict[str, type[Backend]] = {
    "aoti": AOTInductorBackend,
    "aoti-autotuned": AutotunedAOTInductorBackend,
    "onnx": ONNXBackend,
}


class FastestBackend(Backend):
    """Builds each engine with every candidate that this machine has, and keeps the fastest."""

    name = "fastest"
    forkable = False  # ONNX Runtime has threads of its own
    summary = f"the fastest of {', '.join(CANDIDATES)} for each engine"
    host_fields = AOTInductorBackend.host_fields
    capturable = True
    quantizes = True
    kernels = True

    def missing(self, device: torch.device) -> str | None:
        return AOTInductorBackend().missing(device)

    def libraries(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for kind in CANDIDATES.values():
            with suppress(ImportError):  # what is not installed has built nothing
                found |= kind().libraries()
        return found

    def candidates(self, device: torch.device, dtype: str) -> dict[str, Backend]:
        """Those that can build for a device here. A CUDA graph has to be able to record them all."""
        made = {name: kind() for name, kind in CANDIDATES.items()}
        return {
            name: backend
            for name, backend in made.items()
            if backend.cannot_build(device, None) is None and dtype in backend.dtypes(device)
            and (device.type == "cpu" or backend.capturable)
        }

    def build(self, spec: EngineSpec, module: nn.Module, example: Sequence[Tensor], directory: Path) -> None:
        weights: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        weights |= dict(module.named_buffers(remove_duplicate=False))
        device = example[0].device
        dtype = "bf16" if reduced_precision(module) else "fp32"
        runs: dict[str, RawEngine] = {}
        errors: dict[str, Exception] = {}
        for name, backend in self.candidates(device, dtype).items():
            folder = directory / name
            folder.mkdir()
            try:
                backend.build(spec, module, example, folder)
                run = backend.load(spec, folder, weights, lambda: module, device)
                run(example)
            except JitExportError as error:
                logger.warning("engine %s cannot be had from %s: %s", spec.name, name, error)
                errors[name] = error
                shutil.rmtree(folder)
            else:
                runs[name] = run
        if not runs:
            raise CompileError(
                f"no backend can compile engine {spec.name}",
                found="; ".join(f"{name}: {error}" for name, error in errors.items()) or "no candidate",
            )
        seconds = measure(runs, example, device)
        chosen = choose(seconds)
        for name in runs:
            if name != chosen:
                shutil.rmtree(directory / name)
        text = json.dumps({"chosen": chosen, "seconds": seconds}, indent=1)
        (directory / CHOICE).write_text(text, encoding="utf-8")

    def load(
        self,
        spec: EngineSpec,
        directory: Path,
        weights: Mapping[str, Tensor],
        module: Callable[[], nn.Module],
        device: torch.device,
    ) -> RawEngine:
        try:
            chosen = json.loads((directory / CHOICE).read_text(encoding="utf-8"))["chosen"]
            backend = CANDIDATES[chosen]()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BackendError(
                f"cannot open engine {spec.name}", found=f"{CHOICE}: {error!r}",
                expected=f"one of: {', '.join(CANDIDATES)}", remedy="build the bundle again",
            ) from error
        if reason := backend.missing(device):
            raise BackendError(f"cannot open engine {spec.name}", found=reason, expected=f"backend {chosen}")
        return backend.load(spec, directory / chosen, weights, module, device)


@torch.inference_mode()
def measure(runs: Mapping[str, RawEngine], example: Sequence[Tensor], device: torch.device) -> dict[str, float]:
    """Seconds of the fastest run of each engine."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            run(example)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def choose(seconds: Mapping[str, float]) -> str:
    """The first candidate, or a later one that saves more than `GAIN` of its time."""
    chosen = next(iter(seconds))
    for name, time_ in seconds.items():
        if time_ < (1 - GAIN) * seconds[chosen]:
            chosen = name
    return chosen
