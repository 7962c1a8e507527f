"""TensorRT, or TensorRT-RTX: all stages in one engine with one optimization profile each, so weights are stored once.

`tensorrt` is used where it is installed, else `tensorrt_rtx`, whose API is the same. The second also builds engines on
machines without a GPU, for the architectures in `TensorRTBackend.targets`. Running needs a GPU: building and parsing
are what the tests of this file do, the execution below was written against the documented API and has not been run.
"""

from __future__ import annotations

import copy
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

from jitexport.backends.base import Backend, RawEngine, Source
from jitexport.errors import BackendError, CompileError, HostMismatchError, MissingDependencyError
from jitexport.specs import DTYPES, EngineSpec

PLAN = "engine.plan"
#: Which library built the plan, its version, and the engine that each optimization profile is for.
INFO = "engine.json"
_OPSET = 20
_LIBRARIES = ("tensorrt", "tensorrt_rtx")


class TensorRTBackend(Backend):
    """Needs onnx and onnxscript where a bundle is built, a GPU where it is run."""

    name = "tensorrt"
    summary = "TensorRT or TensorRT-RTX, one engine for all stages"
    host_fields = ("system", "machine", "device", "gpu")
    holds_weights = True
    live_weights = False
    targets = ("sm_80", "sm_86", "sm_89", "sm_120")

    def __init__(self) -> None:
        self._opened: dict[Path, Any] = {}  # one plan serves several engines

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "TensorRT runs on cuda only; --target builds for a GPU elsewhere"
        if (library := installed()) is None:
            return _NOT_INSTALLED
        if not torch.cuda.is_available():
            return f"no CUDA device is visible to torch; with {library}, --target builds for a GPU elsewhere"
        return None

    def cannot_build(self, device: torch.device, target: str | None) -> str | None:
        if target is None:
            return self.missing(device)
        if (library := installed()) is None:
            return _NOT_INSTALLED
        if library != "tensorrt_rtx":
            return f"{library} builds for the GPU of this machine only; tensorrt_rtx builds for others"
        if target not in self.targets:
            return (
                f"tensorrt_rtx builds for {', '.join(self.targets)} and not for {target}; "
                "for other GPUs, build on a machine that has one, with `tensorrt` and --device cuda"
            )
        return None

    def groups(self, specs: Sequence[EngineSpec]) -> list[list[EngineSpec]]:
        stages = [s for s in specs if s.name.startswith("stage")]
        return [stages if s in stages else [s] for s in specs if s not in stages[1:]]

    def build(self, spec: EngineSpec, module: nn.Module, example: Sequence[Tensor], directory: Path) -> None:
        self.build_group([Source(spec, module, example)], directory)

    def libraries(self) -> dict[str, str]:
        trt = library()
        return {trt.__name__: trt.__version__}

    def build_group(self, sources: Sequence[Source], directory: Path, target: str | None = None) -> None:
        trt = library()
        specs = [s.spec for s in sources]
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=directory.parent) as scratch:
            graph = Path(scratch) / "graph.onnx"
            export_graph(sources, graph)
            plan = build_plan(trt, graph, specs, target)
        (directory / PLAN).write_bytes(plan)
        info = {"library": trt.__name__, "version": trt.__version__, "profiles": [s.name for s in specs]}
        (directory / INFO).write_text(json.dumps(info), encoding="utf-8")

    def load(
        self,
        spec: EngineSpec,
        directory: Path,
        weights: Mapping[str, Tensor],
        module: Callable[[], nn.Module],
        device: torch.device,
    ) -> RawEngine:
        trt = library()
        info = json.loads((directory / INFO).read_text(encoding="utf-8"))
        if (info["library"], info["version"]) != (trt.__name__, trt.__version__):
            raise HostMismatchError(
                "the bundle's engines were built with another TensorRT", found=f"{trt.__name__} {trt.__version__}",
                expected=f"{info['library']} {info['version']}", remedy="install that version, or build again",
            )
        if directory not in self._opened:
            runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
            # An engine must not outlive its runtime.
            self._opened[directory] = runtime, runtime.deserialize_cuda_engine((directory / PLAN).read_bytes())
        runtime, engine = self._opened[directory]
        context = engine.create_execution_context() if engine is not None else None
        if context is None:
            raise BackendError(
                f"cannot open engine {spec.name}", expected="a TensorRT engine for this GPU, and memory for it",
                remedy="free GPU memory, or build the bundle again",
            )
        context.set_optimization_profile_async(
            info["profiles"].index(spec.name), torch.cuda.current_stream(device).cuda_stream
        )
        for s in spec.inputs:
            context.set_input_shape(s.name, s.shape)
        lock = threading.Lock()  # a context serves one caller at a time

        def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            assert runtime is not None
            outputs = [torch.empty(s.shape, dtype=DTYPES[s.dtype], device=device) for s in spec.outputs]
            # Everything is ordered by torch's stream and nothing waits, so a CUDA graph can capture this.
            stream = torch.cuda.current_stream(device).cuda_stream
            with lock:
                for s, t in zip((*spec.inputs, *spec.outputs), (*inputs, *outputs), strict=True):
                    context.set_tensor_address(s.name, t.data_ptr())
                if not context.execute_async_v3(stream):
                    raise BackendError(f"TensorRT could not run engine {spec.name}")
            return outputs

        return run


_NOT_INSTALLED = (
    "neither tensorrt nor tensorrt_rtx is installed: pip install 'jitexport[tensorrt]', "
    "or tensorrt for GPUs that TensorRT-RTX does not serve"
)


def installed() -> str | None:
    """The name of the library that is used, None where there is none."""
    return next((name for name in _LIBRARIES if importlib.util.find_spec(name) is not None), None)


def library() -> Any:
    """TensorRT's module.

    Raises:
        MissingDependencyError: neither library is there, or it does not import.
    """
    name = installed()
    try:
        return importlib.import_module(name or _LIBRARIES[0])
    except (ImportError, OSError) as error:  # OSError: a shared library of its own is missing
        raise MissingDependencyError(
            "TensorRT cannot be imported", found=error, remedy=_NOT_INSTALLED if name is None else None
        ) from error


def varying_axes(specs: Sequence[EngineSpec]) -> list[list[int]]:
    """For each input, the axes in which the engines differ."""
    shapes = zip(*([i.shape for i in s.inputs] for s in specs), strict=True)
    return [[axis for axis, sizes in enumerate(zip(*of, strict=True)) if len(set(sizes)) > 1] for of in shapes]


def export_graph(sources: Sequence[Source], path: Path) -> None:
    """Write the module that all sources share as ONNX with its weights; axes in which they differ are symbolic.

    Raises:
        CompileError: the module cannot be exported.
        MissingDependencyError: the `onnx` extra is not installed.
    """
    spec, module, example = sources[0].spec, sources[0].module, sources[0].example
    dynamic = tuple({axis: torch.export.Dim.DYNAMIC for axis in a} for a in varying_axes([s.spec for s in sources]))
    try:
        with torch.no_grad():
            exported = export_for_gpu(module, example, dynamic if any(dynamic) else None)
            program = torch.onnx.export(
                exported, (), dynamo=True, verbose=False, opset_version=_OPSET,
                input_names=[s.name for s in spec.inputs], output_names=[s.name for s in spec.outputs],
            )
        assert program is not None
        program.save(path, external_data=True)  # in one file, weights of over 2 GiB do not fit
    except ImportError as error:
        raise MissingDependencyError(
            "building for TensorRT needs onnx and onnxscript", found=error, remedy="pip install 'jitexport[onnx]'"
        ) from error
    except Exception as error:  # the exporter raises many types, none of them ours
        raise CompileError(f"cannot export engine {spec.name} to ONNX", found=error) from error


def export_for_gpu(module: nn.Module, example: Sequence[Tensor], dynamic: Any) -> torch.export.ExportedProgram:
    """`torch.export` of a module as it runs on a GPU, whether or not its tensors are on one.

    Modules choose some operations by the device, so they are traced on the meta device, which is not the CPU; the
    tensors themselves come in afterwards, and are not copied.
    """
    from torch.export.passes import move_to_device_pass  # torch.export: only where bundles are built

    real = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    blank = {
        id(t): nn.Parameter(t.to("meta"), requires_grad=False) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in real.values()
    }
    program = torch.export.export(
        copy.deepcopy(module, memo=blank), tuple(t.to("meta") for t in example), dynamic_shapes=dynamic
    )
    for held in (program.state_dict, program.constants):
        held.update({name: real[name] for name in held.keys() & real.keys()})
    program.example_inputs = tuple(example), {}
    return move_to_device_pass(program, str(example[0].device))


def build_plan(trt: Any, graph: Path, specs: Sequence[EngineSpec], target: str | None) -> bytes:
    """A serialized engine of an ONNX file, with one profile for exactly the shapes of each specification.

    Raises:
        CompileError: TensorRT cannot parse or build it.
    """
    log = _Log(trt)
    names = ", ".join(s.name for s in specs)
    builder = trt.Builder(log.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(graph)):
        raise CompileError(f"TensorRT cannot read the graph of {names}", found=log.text or "no reason given")
    config = builder.create_builder_config()
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.replace("_", "").upper()), 0)
    for spec in specs:
        profile = builder.create_optimization_profile()
        for s in spec.inputs:
            profile.set_shape(s.name, s.shape, s.shape, s.shape)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise CompileError(f"TensorRT cannot build {names}", found=log.text or "no reason given")
    return bytes(plan)


class _Log:
    """TensorRT's errors as text, instead of on the terminal."""

    def __init__(self, trt: Any) -> None:
        lines: list[str] = []
        self._lines = lines

        class Logger(trt.ILogger):  # type: ignore[misc]  # trt has no types
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                    lines.append(message)

        self.logger = Logger()

    @property
    def text(self) -> str:
        """All errors so far."""
        return "; ".join(self._lines)
