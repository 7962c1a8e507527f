"""AOTInductor: one native library per engine, compiled ahead of time; loading takes milliseconds and no compiler.

Weights are left out of the library and handed to it by reference, so that all stages share one copy of them.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import warnings
import weakref
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn

from jitexport.backends.base import Backend, RawEngine
from jitexport.errors import BackendError, CompileError
from jitexport.specs import EngineSpec


class AOTInductorBackend(Backend):
    """Needs a C++ compiler where a bundle is built, and none where it is loaded."""

    name = "aoti"
    summary = "AOTInductor, compiled ahead of time, shared weights"
    host_fields = ("system", "machine", "cpu", "torch", "device", "gpu")
    capturable = True

    def missing(self, device: torch.device) -> str | None:
        if device.type == "cuda" and not torch.cuda.is_available():
            return "no CUDA device is visible to torch"
        if not hasattr(torch._C, "_aoti"):
            return f"torch {torch.__version__} was built without AOTInductor; install a release build of torch"
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
            try:
                with torch.no_grad():
                    program = torch.export.export(module, tuple(example))
                    aoti_compile_and_package(
                        program,
                        package_path=str(package),
                        inductor_configs={"aot_inductor.package_constants_in_so": False},
                    )
            except Exception as error:  # torch raises many types here, none of them ours
                raise CompileError(f"AOTInductor cannot compile engine {spec.name}", found=error) from error
            unpack_package(package, directory)

    def load(
        self,
        spec: EngineSpec,
        directory: Path,
        weights: Mapping[str, Tensor],
        module: Callable[[], nn.Module],
        device: torch.device,
    ) -> RawEngine:
        index = device.index if device.index is not None else -1
        # Between threads the library keeps order by itself, with events that a CUDA graph cannot record: on CUDA it
        # is told to leave that out, and threads take turns here.
        single = device.type == "cuda"
        turns = threading.Lock() if single else nullcontext()
        try:
            # path, model name, single-threaded, number of runners, device index
            loader = torch._C._aoti.AOTIModelPackageLoader(str(directory), "model", single, 1, index)
            names = loader.get_constant_fqns()
            constants = {name: _borrow(weights[name]) for name in names}
            # inactive buffer: no; every constant must be given: yes; the tensors stay ours: yes; copy to device: no
            loader.load_constants(constants, False, True, True, False)
        except (RuntimeError, KeyError) as error:
            raise BackendError(
                f"cannot open engine {spec.name}", found=error, expected="an AOTInductor engine of this bundle",
                remedy="build the bundle again",
            ) from error

        def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            # The closure keeps `constants` alive: the library holds bare pointers to them.
            assert constants is not None
            with turns:
                return loader.boxed_run(list(inputs))

        weakref.finalize(run, _let_go, list(constants.values()))
        return run


#: Tensor objects, without memory, whose engine is gone. torch 2.13 never drops its references to user-managed
#: constants: handed the weights themselves, every load would keep a copy of them for as long as the process lives. So
#: engines get tensor objects of their own on the weights' memory, which lose it with the engine and are used again.
_spent: list[Tensor] = []


def _borrow(weight: Tensor) -> Tensor:
    """Another tensor object on the memory of a weight."""
    with torch.inference_mode(False):
        try:
            borrowed = _spent.pop()
        except IndexError:
            borrowed = torch.empty(0)
        borrowed.data = weight.detach()
    return borrowed


def _let_go(borrowed: Sequence[Tensor]) -> None:
    """Give up the memory of an engine that is gone."""
    with torch.inference_mode(False):
        for tensor in borrowed:
            tensor.data = torch.empty(0)
    _spent.extend(borrowed)


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
