"""Names of models, methods and backends, and the modules that hold them.

A module is imported only when its name is used, so listing the names (for `--help`, say) imports nothing heavy.
Adding a model family, a method or a backend means adding one file and one line here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jitexport.errors import UnknownNameError

if TYPE_CHECKING:
    from jitexport.backends.base import Backend
    from jitexport.methods.base import Method
    from jitexport.models.base import ModelAdapter
    from jitexport.models.naming import Naming

#: Model families, by the diffusers pipeline class that a model folder names in model_index.json.
FAMILIES = {
    "FluxPipeline": "jitexport.models.flux:FluxAdapter",
}

#: The names that a family's modules have in adapters and in other checkpoints; see `jitexport.models.naming`.
NAMINGS = {
    "FluxPipeline": "jitexport.models.flux_names:NAMING",
}

#: Model names that `--model` takes, beside folders and hub ids.
MODELS = {
    "demo": "jitexport.models.sources:demo",
    "flux": "jitexport.models.sources:flux_dev",
    "flux-schnell": "jitexport.models.sources:flux_schnell",
}

#: Spatial acceleration methods.
METHODS = {
    "dense": "jitexport.methods.dense:Dense",
    "jit": "jitexport.methods.jit:JiT",
    "ralu": "jitexport.methods.ralu:RALU",
    "bottleneck": "jitexport.methods.bottleneck:Bottleneck",
    "ras": "jitexport.methods.ras:RAS",
}

#: Ways of running a stage module.
BACKENDS = {
    "eager": "jitexport.backends.eager:EagerBackend",
    "inductor": "jitexport.backends.inductor:InductorBackend",
    "aoti": "jitexport.backends.aoti:AOTInductorBackend",
    "fastest": "jitexport.backends.fastest:FastestBackend",
    "onnx": "jitexport.backends.onnx:ONNXBackend",
    "onnx-tensorrt": "jitexport.backends.onnx:ONNXTensorRTBackend",
    "tensorrt": "jitexport.backends.tensorrt:TensorRTBackend",
    "torch-tensorrt": "jitexport.backends.torch_tensorrt:TorchTensorRTBackend",
}


def _resolve(table: dict[str, str], kind: str, name: str) -> Any:
    if name not in table:
        raise UnknownNameError(f"unknown {kind}", found=name, expected=f"one of: {', '.join(table)}")
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def family(pipeline_class: str) -> type[ModelAdapter]:
    """The adapter class of a diffusers pipeline class name."""
    return _resolve(FAMILIES, "model family", pipeline_class)


def naming(pipeline_class: str) -> Naming:
    """The names of a family's modules in adapters, by the family's diffusers pipeline class."""
    return _resolve(NAMINGS, "model family", pipeline_class)


def model_source(name: str) -> Any:
    """The function that describes a registered model: see `jitexport.models.sources`."""
    return _resolve(MODELS, "model", name)


def method(name: str) -> type[Method]:
    """The class of a spatial acceleration method."""
    return _resolve(METHODS, "method", name)


def backend(name: str) -> Backend:
    """An instance of a backend. It is not checked whether this machine can use it: see `Backend.missing`."""
    return _resolve(BACKENDS, "backend", name)()
