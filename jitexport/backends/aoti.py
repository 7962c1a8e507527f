"""AOTInductor: one native library per engine, compiled ahead of time; loading takes milliseconds and no compiler.

Weights are left out of the library and handed to it by reference, so that all stages share one copy of them.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import threading
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from unittest import mock

import torch
from torch import Tensor, nn

from jitexport.backends.base import Backend, RawEngine
from jitexport.errors import BackendError, CompileError
from jitexport.kernels.native import compile_with_kernels, write_record
from jitexport.specs import EngineSpec


class AOTInductorBackend(Backend):
    """Needs a C++ compiler where a bundle is built, and none where it is loaded."""

    name = "aoti"
    summary = "AOTInductor, compiled ahead of time, shared weights"
    host_fields = ("system", "machine", "cpu", "torch", "device", "gpu")
    capturable = True
    quantizes = True
    kernels = True
    separable = True
    #: Of Inductor.
    settings: Mapping[str, object] = {
        "aot_inductor.package_constants_in_so": False,
        # Short vectors (biases, norms) would become numbers in the code, out of a LoRA's reach.
        "always_keep_tensor_constants": True,
        # Loops run on as many threads as OpenMP has then, and not on as many as the build had.
        "cpp.dynamic_threads": True,
    }

    def missing(self, device: torch.device) -> str | None:
        if device.type == "cuda" and not torch.cuda.is_available():
            return "no CUDA device is visible to torch"
        if not hasattr(torch._C, "_aoti"):
            return f"torch {torch.__version__} was built without AOTInductor; install a release build of torch"
        return None

    def cannot_build(self, device: torch.device, target: str | None) -> str | None:
        if reason := super().cannot_build(device, target):
            return reason
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            return "AOTInductor needs Triton for CUDA: install a CUDA build of torch"
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            return "AOTInductor needs a C++ compiler to build: install g++ (Debian, Ubuntu: apt-get install g++)"
        return None

    def build(self, spec: EngineSpec, module: nn.Module, example: Sequence[Tensor], directory: Path) -> None:
        from torch._inductor import aoti_compile_and_package  # heavy, and not needed to load

        if shutil.which("g++") is None and shutil.which("clang++") is None:
            raise CompileError(
                "AOTInductor needs a C++ compiler to build", found="neither g++ nor clang++ on PATH",
                remedy="install g++ (Debian, Ubuntu: apt-get install g++), or build with --backend eager",
            )
        # Beside the engine and not in TMPDIR: what a killed build leaves is then removed with the rest of it.
        scratch_directory = tempfile.TemporaryDirectory(prefix=".scratch-", dir=directory.parent)
        with scratch_directory as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # from inside torch.export, about its own calls
            package = Path(scratch) / f"{spec.name}.pt2"

            def compiler() -> None:
                program = torch.export.export(module, tuple(example))
                aoti_compile_and_package(program, package_path=str(package), inductor_configs=dict(self.settings))

            try:
                exponentials = fast_exponentials() if reduced_precision(module) else nullcontext()
                with torch.no_grad(), exponentials:
                    _, kernels = compile_with_kernels(compiler, spec.name)
            except Exception as error:  # torch raises many types here, none of them ours
                raise CompileError(f"AOTInductor cannot compile engine {spec.name}", found=error) from error
            unpack_package(package, directory)
            write_record(directory, kernels)

    def load(
        self,
        spec: EngineSpec,
        directory: Path,
        weights: Mapping[str, Tensor],
        module: Callable[[], nn.Module],
        device: torch.device,
    ) -> RawEngine:
        # Between threads the library keeps order by itself, with events that a CUDA graph cannot record: on CUDA it
        # is told to leave that out, and threads take turns here.
        turns = threading.Lock() if device.type == "cuda" else nullcontext()
        try:
            library = _take(directory, device)
            library.lend(weights)
        except (RuntimeError, KeyError, OSError) as error:
            raise BackendError(
                f"cannot open engine {spec.name}", found=error, expected="an AOTInductor engine of this bundle",
                remedy="build the bundle again",
            ) from error

        def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            with turns:
                return library.loader.boxed_run(list(inputs))

        weakref.finalize(run, _give_back, library)
        return run


def reduced_precision(module: nn.Module) -> bool:
    """Whether a module computes in bf16."""
    return any(p.dtype == torch.bfloat16 for p in module.parameters())


@contextmanager
def fast_exponentials() -> Iterator[None]:
    """C++ code for CPUs takes exponentials to 20 units in the last place of fp32, and not to 1.

    PyTorch's own attention kernel does the same. It is a thousand times more exact than bf16, and a stage is 5% faster.
    Inductor has no setting for it; with a torch that generates code in another way, nothing changes.
    """
    from torch._inductor.codegen import cpp

    vectors = getattr(cpp, "CppVecOverrides", None)
    if not hasattr(vectors, "exp"):
        yield
        return
    with mock.patch.object(vectors, "exp", staticmethod(lambda x: f"{x}.exp_u20()")):
        yield


class _Library:
    """An opened engine and tensor objects of its own, through which it reads weights that belong to others.

    torch 2.13 never drops the constants that a library was handed: each opening would keep a copy of the weights, or at
    best a few bytes for each of them, for as long as the process lives. So a library is handed constants once, and is
    used again when the same engine is opened again.
    """

    def __init__(self, directory: Path, device: torch.device, identity: tuple[object, ...]) -> None:
        index = device.index if device.index is not None else -1
        # path, model name, single-threaded, number of runners, device index
        self.loader = torch._C._aoti.AOTIModelPackageLoader(str(directory), "model", device.type == "cuda", 1, index)
        self.identity = identity
        self.constants: dict[str, Tensor] = {}

    def lend(self, weights: Mapping[str, Tensor]) -> None:
        """Let the library read weights, by name, in their own memory."""
        given = {name: weights[name].detach() for name in self.constants or self.loader.get_constant_fqns()}
        first = not self.constants
        with torch.inference_mode(False):
            if first:
                self.constants = {name: torch.empty(0) for name in given}
            for name, weight in given.items():
                self.constants[name].data = weight
        # Inactive buffer: no; every constant must be given: the first time; the tensors stay ours: yes; copy to device:
        # no. Later nothing is given, which makes the library look up where its constants are now.
        self.loader.load_constants(self.constants if first else {}, False, first, True, False)

    def release(self) -> None:
        """Let go of the weights' memory. The library must not run until it is lent weights again."""
        with torch.inference_mode(False):
            for tensor in self.constants.values():
                tensor.data = torch.empty(0)


#: Libraries that nobody uses, the oldest first, and how many of them are kept.
_idle: list[_Library] = []
_MOST_IDLE = 64
_idle_lock = threading.Lock()


def _take(directory: Path, device: torch.device) -> _Library:
    """An idle library of the same files, or a new one."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    states = [(str(p), p.stat()) for p in files]
    identity = (str(device), *((p, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for p, s in states))
    with _idle_lock:
        for i, library in enumerate(_idle):
            if library.identity == identity:
                return _idle.pop(i)
    return _Library(directory, device, identity)


def _give_back(library: _Library) -> None:
    library.release()
    with _idle_lock:
        _idle.append(library)
        del _idle[:-_MOST_IDLE]


def unpack_package(package: Path, directory: Path) -> None:
    """Write the files of a .pt2 package that loading needs into a directory; sources stay behind.

    Raises:
        CompileError: an entry that would land outside the directory.
    """
    with zipfile.ZipFile(package) as archive:
        for entry in archive.infolist():
            if entry.is_dir() or entry.filename.endswith(".cpp"):
                continue
            inner = PurePosixPath(entry.filename).parts[1:]  # the first part is the package's own name
            if not inner or ".." in inner or PurePosixPath(entry.filename).is_absolute():
                raise CompileError("the compiler's package has an unsafe entry", found=entry.filename)
            target = directory.joinpath(*inner)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(entry))
