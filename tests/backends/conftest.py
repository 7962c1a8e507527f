"""Engines of the tiny FLUX pipeline, built once a session for each backend, dtype, batch and text length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jitexport import registry
from jitexport.backends.base import Backend, Engine
from jitexport.build import eager_pipeline, probe_inputs
from jitexport.models.base import ModelAdapter
from jitexport.models.flux import FluxAdapter
from jitexport.schedule import StageSchedule, make_stages, uniform_sigmas
from jitexport.specs import DTYPES, EngineSpec

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A backend and the shapes that its engines are built for."""

    backend: str
    dtype: str = "fp32"
    batch: int = 1
    text: int = 10

    def __str__(self) -> str:
        return f"{self.backend}-{self.dtype}-batch{self.batch}-text{self.text}"


@dataclass
class Built:
    """Artifacts of all engines of a case, eager engines beside them, and inputs for each.

    Attributes:
        weights: the tensors that `reference` computes with.
        blank: makes the model without weights.
    """

    case: Case
    backend: Backend
    root: Path
    inputs: dict[str, list[Tensor]]
    specs: dict[str, EngineSpec]
    reference: dict[str, Engine]
    weights: dict[str, Tensor]
    blank: Callable[[], ModelAdapter]

    def load(self, name: str, weights: dict[str, Tensor] | None = None) -> Engine:
        """Open an engine as `jitexport.load` does: on weights from elsewhere, on a module without any."""
        spec, directory = self.specs[name], self.root / name
        raw = self.backend.load(spec, directory, weights or self.weights, lambda: self.blank().module(name), CPU)
        return Engine(spec, raw, CPU)


def build_engines(folder: Path, root: Path, case: Case) -> Built:
    adapter = FluxAdapter.from_folder(folder, DTYPES[case.dtype], {"max_sequence_length": case.text})
    schedule = StageSchedule(tuple(make_stages(96, (2, 1), (0.35, 1.0))), uniform_sigmas(3))
    pipeline = eager_pipeline(adapter, schedule, "dense", {}, batch=case.batch, dtype=case.dtype, device=CPU)
    backend = registry.backend(case.backend)
    inputs = {}
    with torch.no_grad():
        for spec, values in probe_inputs(pipeline):
            inputs[spec.name] = values
            (root / spec.name).mkdir()
            backend.build(spec, adapter.module(spec.name), values, root / spec.name)
    blank = partial(FluxAdapter.from_configs, adapter.configs, adapter.settings(), DTYPES[case.dtype])
    specs = {name: engine.spec for name, engine in pipeline.engines.items()}
    return Built(case, backend, root, inputs, specs, pipeline.engines, dict(adapter.tensors()), blank)


@pytest.fixture(scope="session")
def built(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Built]:
    """The artifacts of a case; skips where this machine cannot run the backend."""
    made: dict[Case, Built] = {}

    def get(case: Case) -> Built:
        backend = registry.backend(case.backend)
        if reason := backend.missing(CPU):
            pytest.skip(reason)
        if case.dtype not in backend.dtypes(CPU):
            pytest.skip(f"{case.backend} has no {case.dtype} on the CPU")
        if case not in made:
            made[case] = build_engines(tiny_flux, tmp_path_factory.mktemp(str(case)), case)
        return made[case]

    return get
