"""Torch-TensorRT: an exported program with TensorRT engines in it, and what TensorRT cannot run left to PyTorch.

Needs an NVIDIA GPU to build as to run: engines are for the GPU that they were built on. It was written against the
documented API of Torch-TensorRT 2.12 and later, where dtypes are the model's own, and has not been run: there was no
GPU. What the tests cover is which calls are made, with a stand-in for the library.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jitexport.backends.base import Backend, RawEngine
from jitexport.backends.eager import as_engine
from jitexport.errors import BackendError, CompileError, HostMismatchError, MissingDependencyError
from jitexport.specs import EngineSpec

PROGRAM = "engine.ep"
#: The version of Torch-TensorRT that built the program.
INFO = "engine.json"


class TorchTensorRTBackend(Backend):
    """Needs torch-tensorrt and an NVIDIA GPU, where a bundle is built and where it is run."""

    name = "torch-tensorrt"
    summary = "torch_tensorrt.dynamo, TensorRT engines in an exported program; needs an NVIDIA GPU"
    host_fields = ("system", "machine", "torch", "device", "cuda", "gpu")
    holds_weights = True
    live_weights = False

    def libraries(self) -> dict[str, str]:
        return {"torch_tensorrt": _library().__version__}

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"torch-tensorrt needs an NVIDIA GPU and does not run on {device.type}"
        if importlib.util.find_spec("torch_tensorrt") is None:
            return _NOT_INSTALLED
        if not torch.cuda.is_available():
            return "torch-tensorrt needs an NVIDIA GPU, and no CUDA device is visible to torch"
        return None

    def build(self, spec: EngineSpec, module: nn.Module, example: Sequence[Tensor], directory: Path) -> None:
        library = _library()
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=directory.parent) as scratch:
            try:
                with torch.no_grad():
                    program = torch.export.export(module, tuple(example))
                    compiled = library.dynamo.compile(
                        program,
                        arg_inputs=list(example),
                        device=example[0].device,
                        disable_tf32=True,  # fp32 is fp32
                        immutable_weights=True,
                        min_block_size=1,
                        timing_cache_path=str(Path(scratch) / "timing_cache.bin"),  # by default, one that all share
                    )
                    library.save(
                        compiled, str(directory / PROGRAM), output_format="exported_program", arg_inputs=list(example)
                    )
            except Exception as error:  # the library and torch raise many types here, none of them ours
                raise CompileError(f"torch-tensorrt cannot compile engine {spec.name}", found=error) from error
        (directory / INFO).write_text(json.dumps({"version": library.__version__}), encoding="utf-8")

    def load(
        self,
        spec: EngineSpec,
        directory: Path,
        weights: Mapping[str, Tensor],
        module: Callable[[], nn.Module],
        device: torch.device,
    ) -> RawEngine:
        library = _library()
        built_with = json.loads((directory / INFO).read_text(encoding="utf-8"))["version"]
        if built_with != library.__version__:
            raise HostMismatchError(
                "the bundle's engines were built with another torch-tensorrt", found=library.__version__,
                expected=built_with, remedy=f"pip install torch-tensorrt=={built_with}, or build again",
            )
        try:
            run = as_engine(library.load(str(directory / PROGRAM)).module())
        except Exception as error:  # see above
            raise BackendError(
                f"cannot open engine {spec.name}", found=error, expected="a torch-tensorrt program for this GPU",
                remedy="build the bundle again",
            ) from error
        lock = threading.Lock()  # an engine has one execution context, which serves one caller at a time

        def locked(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            with lock:
                return run(inputs)

        return locked


_NOT_INSTALLED = "torch-tensorrt is not installed: pip install torch-tensorrt, of the version of torch"


def _library() -> Any:
    """Torch-TensorRT's module; importing it registers the operator that runs engines.

    Raises:
        MissingDependencyError: it is not there, or does not import.
    """
    try:
        return importlib.import_module("torch_tensorrt")
    except (ImportError, OSError) as error:  # OSError: a shared library of CUDA or TensorRT is missing
        absent = importlib.util.find_spec("torch_tensorrt") is None
        raise MissingDependencyError(
            "torch-tensorrt cannot be imported", found=error, remedy=_NOT_INSTALLED if absent else None
        ) from error
