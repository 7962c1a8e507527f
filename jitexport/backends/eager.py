"""The stage modules as they are, run by PyTorch: nothing to compile, and the reference for every other backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jitexport.backends.base import Backend, RawEngine, assign_weights
from jitexport.specs import EngineSpec


def as_engine(module: Callable[..., Any]) -> RawEngine:
    """A module as an engine: no gradients, outputs always a sequence."""

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.inference_mode():
            out = module(*inputs)
        return out if isinstance(out, tuple) else (out,)

    return run


class EagerBackend(Backend):
    """Needs the model's code (the `build` extra) where the bundle is loaded."""

    name = "eager"
    summary = "PyTorch without compiling; the reference"
    native = False
    capturable = True
    quantizes = True

    def missing(self, device: torch.device) -> str | None:
        if device.type == "cuda" and not torch.cuda.is_available():
            return "no CUDA device is visible to torch"
        return None

    def build(self, spec: EngineSpec, module: nn.Module, example: Sequence[Tensor], directory: Path) -> None:
        """Nothing to write: the module is made again from the bundle's configurations."""

    def load(
        self,
        spec: EngineSpec,
        directory: Path,
        weights: Mapping[str, Tensor],
        module: Callable[[], nn.Module],
        device: torch.device,
    ) -> RawEngine:
        return as_engine(assign_weights(module(), weights))
