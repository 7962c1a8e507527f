"""The contract of a backend, and the input checks that every engine has in front of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from jitexport import quant
from jitexport.errors import BackendError, InputError
from jitexport.specs import DTYPE_NAMES, DTYPES, EngineSpec, TensorSpec

#: Runs on tensors that match the engine's input specs; returns outputs in the order of the output specs.
RawEngine = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Source:
    """What an engine is made of: its specification, the module, and an example of its inputs."""

    spec: EngineSpec
    module: nn.Module
    example: Sequence[Tensor]


class Backend(ABC):
    """Builds and loads engines. Weights stay outside: one copy serves all engines of a bundle."""

    name: str
    #: One line for `jitexport doctor`.
    summary: str
    #: Fields of the host fingerprint that an engine depends on; a bundle is refused where one of them differs.
    host_fields: Sequence[str] = ()
    #: Whether artifacts hold the weights, so that a bundle needs no files for them.
    holds_weights: bool = False
    #: Whether engines hold code. Such bundles are taken from a hub only from someone who is trusted.
    native: bool = True
    #: Whether a loaded engine sees the weights' tensors change in place.
    live_weights: bool = True
    #: Whether engines on CUDA run on PyTorch's current stream without waiting for it, so that a graph can record them.
    capturable: bool = False
    #: Whether engines on a CPU that were opened before a fork run after it: they have no threads of their own.
    forkable: bool = True
    #: Whether engines can run 8-bit linear layers: see `jitexport.quant`.
    quantizes: bool = False
    #: Whether engines for CPUs may have our own kernels: see `jitexport.kernels`.
    kernels: bool = False
    #: Whether groups of engines may be built in separate processes, and gain by it.
    separable: bool = False

    @abstractmethod
    def missing(self, device: torch.device) -> str | None:
        """Why this machine cannot use the backend on the device and what would help; None when it can."""

    def libraries(self) -> dict[str, str]:
        """Versions of the libraries beside torch that build and run the engines, by module name."""
        return {}

    def dtypes(self, device: torch.device) -> Sequence[str]:
        """Engine dtypes that the backend runs on the device."""
        return ("bf16", "fp32")

    def quantizations(self, device: torch.device) -> Sequence[str]:
        """Kinds of 8-bit linear layers that the backend can run on the device."""
        return quant.available(device) if self.quantizes else ()

    def cannot_build(self, device: torch.device, target: str | None) -> str | None:
        """Why this machine cannot build for the device, or for another machine's GPU `target` ("sm_89"); else None."""
        if target is not None:
            return f"{self.name} builds for this machine only"
        return self.missing(device)

    def groups(self, specs: Sequence[EngineSpec]) -> list[list[EngineSpec]]:
        """Which engines are built together, into one directory: by default each by itself."""
        return [[s] for s in specs]

    def build_group(self, sources: Sequence[Source], directory: Path, target: str | None = None) -> None:
        """`build` for a group of engines, which share one module and differ in shapes, and for a target.

        Raises:
            CompileError: exporting or compiling failed.
        """
        for source in sources:
            self.build(source.spec, source.module, source.example, directory)

    @abstractmethod
    def build(self, spec: EngineSpec, module: nn.Module, example: Sequence[Tensor], directory: Path) -> None:
        """Compile a module for exactly the shapes of `spec` and write the artifact into an empty directory.

        Raises:
            CompileError: exporting or compiling failed.
        """

    @abstractmethod
    def load(
        self,
        spec: EngineSpec,
        directory: Path,
        weights: Mapping[str, Tensor],
        module: Callable[[], nn.Module],
        device: torch.device,
    ) -> RawEngine:
        """Open an engine on the given weights without copying them.

        Args:
            weights: every parameter and buffer of the model on `device`, by full name.
            module: makes the engine's module without weights, for backends that run modules.

        Raises:
            BackendError: the artifact cannot be opened.
        """


class Engine:
    """An engine with its specification: refuses tensors that it was not built for, which native code would not.

    Raises:
        InputError: on a call with a wrong number, dtype, shape or device of inputs.
    """

    def __init__(self, spec: EngineSpec, run: RawEngine, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self._run = run
        self._expected = [(s.shape, DTYPES[s.dtype]) for s in spec.inputs]

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        if len(inputs) != len(self._expected):
            raise InputError(
                f"engine {self.spec.name} takes {len(self._expected)} inputs",
                found=len(inputs),
                expected=", ".join(map(str, self.spec.inputs)),
            )
        for tensor, (shape, dtype), spec in zip(inputs, self._expected, self.spec.inputs, strict=True):
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != self.device.type:
                raise InputError(
                    f"engine {self.spec.name} was built for another input",
                    found=f"{describe(spec.name, tensor)} on {tensor.device}",
                    expected=f"{spec} on {self.device}",
                    remedy="pass tensors of the engine's shape, or build a bundle for the shape you need",
                )
        # Compiled code reads memory by the strides that it was built for.
        return self._run([t.contiguous() for t in inputs])


def describe(name: str, tensor: Tensor) -> TensorSpec:
    """A tensor in the words of a specification."""
    return TensorSpec(name, tuple(tensor.shape), DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)))


def assign_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Point a module's parameters and buffers at tensors by full name, without copying.

    Raises:
        BackendError: a parameter's tensor is missing or has another shape.
    """
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        given = weights.get(name)
        if given is None or given.shape != parameter.shape:
            raise BackendError(
                "the weights do not fit the model", found="nothing" if given is None else describe(name, given),
                expected=describe(name, parameter), remedy="build the bundle again",
            )
        if weights[name] is not parameter:
            owner._parameters[leaf] = nn.Parameter(weights[name], requires_grad=False)
    for name, _ in list(module.named_buffers(remove_duplicate=False)):
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent)._buffers[leaf] = weights[name]
    return module
