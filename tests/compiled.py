"""Compiled engines in the place of a pipeline's eager ones, without the rest of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from jitexport import registry
from jitexport.backends.base import Engine
from jitexport.building.comparing import tolerance, verify_engine
from jitexport.building.reference import probe_inputs
from jitexport.models.base import ModelAdapter
from jitexport.runtime.pipeline import Pipeline


@torch.no_grad()
def compiled_engines(
    name: str, pipe: Pipeline, adapter: ModelAdapter, folder: Path, chosen: Callable[[str], bool]
) -> dict[str, Engine]:
    """Engines of a backend for those of an eager fp32 pipeline that are `chosen`, each compared with the eager one."""
    backend, weights, engines = registry.backend(name), dict(adapter.tensors()), {}
    for spec, inputs in list(probe_inputs(pipe)):
        if not chosen(spec.name):
            continue
        directory = folder / spec.name
        directory.mkdir()
        backend.build(spec, adapter.module(spec.name), inputs, directory)
        raw = backend.load(spec, directory, weights, partial(adapter.module, spec.name), pipe.device)
        engines[spec.name] = Engine(spec, raw, pipe.device)
        verify_engine(spec, engines[spec.name], pipe.engines[spec.name], inputs, tolerance("fp32", pipe.device))
    return engines
