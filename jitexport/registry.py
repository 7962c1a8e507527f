"""Names of models, methods, caches and backends, and the modules that hold them.

A module is imported only when its name is used, so listing the names (for `--help`, say) imports nothing heavy.
Adding a model family, a method, a cache or a backend means adding one file and one line here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from jitexport.errors import UnknownNameError

if TYPE_CHECKING:
    from jitexport.backends.base import Backend
    from jitexport.methods.base import Method
    from jitexport.methods.temporal.base import Cache
    from jitexport.models.base import ModelAdapter


class Family(NamedTuple):
    """A model family: its adapter's class, and the names that `--model` takes for its published models."""

    adapter: str
    models: tuple[str, ...] = ()


#: By the diffusers pipeline class that a model folder names in model_index.json.
FAMILIES = {
    "FluxPipeline": Family("jitexport.models.flux:FluxAdapter", ("flux", "flux-schnell")),
    "Flux2KleinPipeline": Family(
        "jitexport.models.flux2_klein:KleinAdapter",
        ("flux2-klein-4b", "flux2-klein-9b", "flux2-klein-4b-distilled", "flux2-klein-9b-distilled"),
    ),
    "QwenImagePipeline": Family("jitexport.models.qwen_image:QwenImageAdapter", ("qwen-image", "qwen-image-2512")),
    "StableDiffusion3Pipeline": Family(
        "jitexport.models.sd3:SD3Adapter", ("sd3", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo")
    ),
    "HunyuanVideo15Pipeline": Family(
        "jitexport.models.hunyuan_video15:HunyuanVideo15Adapter", ("hunyuan-video-1.5", "hunyuan-video-1.5-720p")
    ),
}

#: What `--model` takes, beside folders and hub ids.
MODELS = ("demo", *(name for family in FAMILIES.values() for name in family.models))

#: Spatial acceleration methods.
METHODS = {
    "dense": "jitexport.methods.dense:Dense",
    "jit": "jitexport.methods.jit:JiT",
    "ralu": "jitexport.methods.ralu:RALU",
    "bottleneck": "jitexport.methods.bottleneck:Bottleneck",
    "ras": "jitexport.methods.ras:RAS",
}

#: Temporal acceleration methods.
CACHES = {
    "reuse": "jitexport.methods.temporal.taylor:Reuse",
    "taylor": "jitexport.methods.temporal.taylor:Taylor",
    "meancache": "jitexport.methods.temporal.meancache:MeanCache",
    "foca": "jitexport.methods.temporal.foca:FoCa",
    "taylorseer": "jitexport.methods.temporal.taylorseer:TaylorSeer",
    "teacache": "jitexport.methods.temporal.teacache:TeaCache",
    "delta-dit": "jitexport.methods.temporal.delta_dit:DeltaDiT",
    "toca": "jitexport.methods.temporal.toca:ToCa",
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
    return _resolve({name: entry.adapter for name, entry in FAMILIES.items()}, "model family", pipeline_class)


def family_of(model: str) -> str:
    """The pipeline class of a published model's name."""
    table = {name: pipeline_class for pipeline_class, entry in FAMILIES.items() for name in entry.models}
    if model not in table:
        raise UnknownNameError("unknown model", found=model, expected=f"one of: {', '.join(MODELS)}")
    return table[model]


def method(name: str) -> type[Method[Any]]:
    """The class of a spatial acceleration method."""
    return _resolve(METHODS, "method", name)


def cache(name: str) -> type[Cache[Any]]:
    """The class of a temporal acceleration method."""
    return _resolve(CACHES, "cache", name)


def backend(name: str) -> Backend:
    """An instance of a backend. It is not checked whether this machine can use it: see `Backend.missing`."""
    return _resolve(BACKENDS, "backend", name)()
