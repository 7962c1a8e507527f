"""ONNX Runtime: one graph per engine, no weights in it; a bundle that is portable between machines.

Weights are external initializers of the graphs, handed over by reference when an engine is opened. Two things would
copy them again, and are kept from it:

- folding the transpose of a linear layer's weight into the graph. Linear layers are exported as Gemm, which reads the
  weight as torch keeps it, and the graph is optimised with the weights as unknowns;
- ONNX Runtime's prepacking, one reordered copy for each session, and its layout of its own for convolutions' filters.
  Both are off; the products of FLUX, with hundreds of rows, took the same time without the first.

So the tensors given to `load` are what the engines read, and changing them in place changes the engines. While an
engine is being opened its weights are in memory twice; onnxruntime offers no way around that.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jitexport.backends.base import Backend, RawEngine
from jitexport.errors import BackendError, CompileError, needed
from jitexport.specs import DTYPES, EngineSpec

GRAPH = "graph.onnx"
#: Names of the weights that a graph reads, full names as in the bundle.
NAMES = "weights.json"
_OPSET = 20
#: ONNX's element types, by the names of `jitexport.specs`.
_ELEMENT = {"fp32": 1, "int64": 7, "bf16": 16}


class ONNXBackend(Backend):
    """Needs onnx and onnxscript where a bundle is built, and only onnxruntime where it is loaded."""

    name = "onnx"
    forkable = False  # ONNX Runtime has threads of its own
    summary = "ONNX Runtime, its CPU or CUDA execution provider, shared weights"
    native = False
    providers: Mapping[str, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

    def libraries(self) -> dict[str, str]:
        return {name: importlib.import_module(name).__version__ for name in ("onnx", "onnxscript", "onnxruntime")}

    def missing(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("onnxruntime") is None:
            return "onnxruntime is not installed: pip install 'jitexport[onnx]'"
        provider = self.providers.get(device.type)
        if provider is None:
            return f"{self.name} runs on {', '.join(self.providers)} only"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "no CUDA device is visible to torch"
        import onnxruntime

        if provider not in (available := onnxruntime.get_available_providers()):
            return (
                f"onnxruntime {onnxruntime.__version__} has no {provider}, only {', '.join(available)}: "
                "pip uninstall onnxruntime, then pip install onnxruntime-gpu"
            )
        return None

    def cannot_build(self, device: torch.device, target: str | None) -> str | None:
        if reason := super().cannot_build(device, target):
            return reason
        if absent := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
            return f"{' and '.join(absent)} not installed: pip install 'jitexport[onnx]'"
        return None

    def dtypes(self, device: torch.device) -> Sequence[str]:
        # ONNX Runtime's CPU provider has no bf16 kernels for matrix products and norms.
        return ("fp32",) if device.type == "cpu" else ("fp32", "bf16")

    def build(self, spec: EngineSpec, module: nn.Module, example: Sequence[Tensor], directory: Path) -> None:
        model, names = export_graph(spec, module, example)
        (directory / GRAPH).write_bytes(model)
        (directory / NAMES).write_text(json.dumps(names, indent=0), encoding="utf-8")

    def load(
        self,
        spec: EngineSpec,
        directory: Path,
        weights: Mapping[str, Tensor],
        module: Callable[[], nn.Module],
        device: torch.device,
    ) -> RawEngine:
        import onnxruntime

        try:
            names = json.loads((directory / NAMES).read_text(encoding="utf-8"))
            held = [weights[name].detach().contiguous() for name in names]
            values = [onnxruntime.OrtValue.from_dlpack(t) for t in held]
            options = session_options(onnxruntime)
            # The first call stands in for the files that the graph would read, by a copy that lasts until the session
            # is made; the second makes the session use the tensors themselves.
            options.add_external_initializers(names, values)
            for name, value in zip(names, values, strict=True):
                options.add_initializer(name, value)
            # From memory, not by path: then the graph can refer to no file.
            session = onnxruntime.InferenceSession(
                (directory / GRAPH).read_bytes(), options, providers=[self._provider(device)],
                disabled_optimizers=["ConstantFolding", "NchwcTransformer"],  # they keep what they make of weights
            )
        except Exception as error:  # onnxruntime's errors have no common base
            raise BackendError(
                f"cannot open engine {spec.name}", found=error, expected="an ONNX graph of this bundle",
                remedy="build the bundle again",
            ) from error
        if (used := session.get_providers()[0]) != self.providers[device.type]:
            raise BackendError(
                f"engine {spec.name} would run on another device", found=used, expected=self.providers[device.type],
                remedy="install the CUDA and cuDNN versions that onnxruntime-gpu asks for",
            )
        index = device.index or 0

        def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            assert held is not None and values is not None  # the session holds bare pointers to them
            outputs = [torch.empty(s.shape, dtype=DTYPES[s.dtype], device=device) for s in spec.outputs]
            binding = session.io_binding()
            for bind, specs, tensors in (
                (binding.bind_input, spec.inputs, inputs), (binding.bind_output, spec.outputs, outputs)
            ):
                for s, t in zip(specs, tensors, strict=True):
                    bind(s.name, device.type, index, _ELEMENT[s.dtype], s.shape, t.data_ptr())
            if device.type == "cuda":  # the session has a stream of its own, and waits for it before it returns
                torch.cuda.current_stream(device).synchronize()
            session.run_with_iobinding(binding)
            return outputs

        return run

    def _provider(self, device: torch.device) -> str | tuple[str, dict[str, Any]]:
        name = self.providers[device.type]
        return name if device.type == "cpu" else (name, {"device_id": device.index or 0})


class ONNXTensorRTBackend(ONNXBackend):
    """The same graphs on ONNX Runtime's TensorRT provider, which compiles them, weights copied, at every load."""

    name = "onnx-tensorrt"
    summary = "ONNX Runtime, its TensorRT execution provider"
    live_weights = False
    providers: Mapping[str, str] = {"cuda": "TensorrtExecutionProvider"}


def session_options(onnxruntime: Any) -> Any:
    """As many threads as torch has, which sleep while there is nothing to do, and no copies of weights."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def export_graph(spec: EngineSpec, module: nn.Module, example: Sequence[Tensor]) -> tuple[bytes, list[str]]:
    """A module as a serialized ONNX graph without weights, and the names of the weights that it reads.

    Raises:
        CompileError: the module cannot be exported.
        MissingDependencyError: the `onnx` extra is not installed.
    """
    with needed("building ONNX graphs needs onnx and onnxscript", "onnx"):
        import onnx_ir
        from onnxscript import opset20 as op
        from onnxscript import optimizer

    def sizes(of: Sequence[int]) -> Any:
        return op.Constant(value_ints=of)

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        """aten.linear over any leading dimensions, as a Gemm that takes the weight as it is, [out, in]."""
        *lead, width = map(int, x.shape)
        flat = op.Reshape(x, sizes([-1, width])) if len(lead) != 1 else x
        y = op.Gemm(flat, weight, bias, transB=1)
        return op.Reshape(y, sizes([*lead, int(weight.shape[0])])) if len(lead) != 1 else y

    try:
        with torch.no_grad():
            program = torch.onnx.export(
                module, tuple(example), dynamo=True, optimize=False, verbose=False, opset_version=_OPSET,
                input_names=[s.name for s in spec.inputs], output_names=[s.name for s in spec.outputs],
                custom_translation_table={torch.ops.aten.linear.default: linear},
            )
        assert program is not None
        model = program.model
        floating = {
            name
            for name, tensor in [
                *module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)
            ]
            if tensor.is_floating_point()
        }
        # As inputs, the weights are out of reach of what folds constants and merges equal ones.
        graph = model.graph
        weights = {n: v for n, v in graph.initializers.items() if n in floating}
        tensors = {}
        for name, value in weights.items():
            tensors[name], value.const_value = value.const_value, None
            del graph.initializers[name]
            graph.inputs.append(value)
        optimizer.optimize_ir(model)
        del graph.inputs[len(spec.inputs) :]
        names = sorted(name for name, value in weights.items() if value.uses())
        for name in names:
            t: Any = tensors[name]
            weights[name].const_value = onnx_ir.ExternalTensor(
                "weights", 0, t.nbytes, t.dtype, shape=t.shape, name=name
            )
            graph.initializers.add(weights[name])
        model.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()  # stack traces, which name this machine's folders
        for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
            value.metadata_props.clear()
        return onnx_ir.serde.serialize_model(model).SerializeToString(), names
    except Exception as error:  # the exporter raises many types, none of them ours
        raise CompileError(f"cannot export engine {spec.name} to ONNX", found=error) from error
