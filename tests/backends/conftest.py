"""Bundles of the tiny FLUX pipeline, built once a session for each backend, dtype, batch and text length."""

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
from jitexport.building.reference import eager_pipeline, probe_inputs
from jitexport.bundle import EngineBundle
from jitexport.models.base import ModelAdapter
from jitexport.models.flux import FluxAdapter
from jitexport.plan import CustomSchedule
from jitexport.specs import DTYPES, EngineSpec
from tests import tiny

CPU = torch.device("cpu")
#: As in the fixture `aoti_bundle`, so that its bundle is built once.
SCHEDULE = CustomSchedule((2, 2), (0.35, 1.0))


@dataclass(frozen=True)
class Case:
    """A backend and the shapes that its engines are built for."""

    backend: str
    dtype: str = "fp32"
    batch: int = 1
    text: int = tiny.TEXT_TOKENS

    def __str__(self) -> str:
        return f"{self.backend}-{self.dtype}-batch{self.batch}-text{self.text}"


@dataclass
class Built:
    """A bundle, eager engines for the same shapes, and inputs for each.

    Attributes:
        bundle, root: the bundle and its folder of engines, not to be changed.
        weights: the tensors that `reference` computes with.
        blank: makes the model without weights.
    """

    case: Case
    backend: Backend
    bundle: Path
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


@pytest.fixture(scope="session")
def bundle_of(make_bundle: Callable[..., Path]) -> Callable[[Case], Path]:
    """The bundle of a case; skips where this machine cannot run the backend."""

    def get(case: Case) -> Path:
        backend = registry.backend(case.backend)
        if reason := backend.missing(CPU):
            pytest.skip(reason)
        if case.dtype not in backend.dtypes(CPU):
            pytest.skip(f"{case.backend} has no {case.dtype} on the CPU")
        options = {} if case.batch == 1 else {"batch": case.batch}
        if case.text != tiny.TEXT_TOKENS:
            options["settings"] = {"max_sequence_length": case.text}
        return make_bundle(
            backend=case.backend, dtype=case.dtype, custom=SCHEDULE, command=("jitexport", "build"), **options
        )

    return get


@pytest.fixture(scope="session")
def built(tiny_flux: Path, bundle_of: Callable[[Case], Path]) -> Callable[[Case], Built]:
    """The bundle of a case with what its engines are compared with; skips where this machine cannot run the backend."""
    made: dict[Case, Built] = {}

    def get(case: Case) -> Built:
        if case not in made:
            bundle = bundle_of(case)
            schedule = EngineBundle.open(bundle, "size").manifest.schedule.schedule()
            adapter = FluxAdapter.from_folder(tiny_flux, DTYPES[case.dtype], {"max_sequence_length": case.text})
            options = registry.method("dense").options("default")
            pipeline = eager_pipeline(
                adapter, schedule, "dense", options, batch=case.batch, dtype=case.dtype, device=CPU
            )
            with torch.no_grad():
                inputs = {spec.name: values for spec, values in probe_inputs(pipeline)}
            made[case] = Built(
                case, registry.backend(case.backend), bundle, bundle / "engines", inputs,
                {name: engine.spec for name, engine in pipeline.engines.items()}, pipeline.engines,
                dict(adapter.tensors()),
                partial(FluxAdapter.from_configs, adapter.configs, adapter.settings(), DTYPES[case.dtype]),
            )
        return made[case]

    return get
