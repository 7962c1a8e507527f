"""Engines: compiled into a bundle, verified, with golden examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from jitexport.backends.base import Backend, Engine
from jitexport.building.comparing import tolerance, verify_engine
from jitexport.building.reference import probe_inputs
from jitexport.bundle import BundleWriter
from jitexport.bundle.entries import EngineEntry, TensorEntry
from jitexport.bundle.golden import write_golden
from jitexport.compiling import Compilers, Task
from jitexport.kernels.native import read_record
from jitexport.models.base import ModelAdapter
from jitexport.runtime import Pipeline
from jitexport.specs import DTYPE_NAMES


class Progress(Protocol):
    """What a build reports to; see `jitexport.cli.progress`."""

    def begin(self, steps: Sequence[str]) -> None:
        """All steps, in order, before the first."""

    def step(self, name: str) -> None:
        """A step begins."""

    def note(self, text: str) -> None:
        """Something that the user should know, before the first step."""


class Silent:
    """Reports nothing."""

    def begin(self, steps: Sequence[str]) -> None:
        """Ignored."""

    def step(self, name: str) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""


def build_engines(
    writer: BundleWriter,
    backend: Backend,
    adapter: ModelAdapter,
    reference: Pipeline,
    weights: Mapping[str, Tensor],
    device: torch.device,
    compilers: Compilers,
    progress: Progress,
    *,
    verify: bool,
) -> tuple[EngineEntry, ...]:
    """Compile all engines of a pipeline into the bundle, verify each against the eager one, and store golden examples.

    Without `verify`, for engines that cannot run here, the examples come from the eager modules.

    Raises:
        CompileError: an engine cannot be compiled.
        VerificationError: an engine disagrees with the eager module.
    """
    entries = []
    allowed = tolerance(DTYPE_NAMES[reference.dtype], device, adapter.settings().get("quantization"))
    probes = {spec.name: inputs for spec, inputs in probe_inputs(reference)}
    begun = []
    for group in backend.groups([engine.spec for engine in reference.engines.values()]):
        name = f"engines/{group[0].name if len(group) == 1 else 'stages'}"
        directory = writer.directory(name)
        task = Task(group, [probes[spec.name] for spec in group], directory)
        begun.append((group, name, directory, compilers.submit(task)))
    for group, name, directory, finish in begun:
        progress.step(f"engine {group[0].name}")
        finish()
        kernels = read_record(directory)
        for spec in group:
            engine, inputs = reference.engines[spec.name], probes[spec.name]
            relative = largest = None
            if verify:
                raw = backend.load(spec, directory, weights, partial(adapter.module, spec.name), device)
                engine = Engine(spec, raw, device)
                relative, largest = verify_engine(
                    spec, engine, reference.engines[spec.name], inputs, allowed, kernels
                )
            entries.append(
                EngineEntry(
                    name=spec.name, directory=name,
                    inputs=tuple(map(TensorEntry.of, spec.inputs)),
                    outputs=tuple(map(TensorEntry.of, spec.outputs)),
                    golden=write_golden(writer, spec, inputs, engine(*inputs)),
                    relative_error=relative, max_error=largest, kernels=kernels,
                )
            )
    return tuple(entries)
