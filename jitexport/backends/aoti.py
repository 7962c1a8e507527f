"""AOTInductor: native libraries, one per engine or per kind of block in it, compiled ahead of time; loading takes
milliseconds and no compiler.

Weights are left out of the library and handed to it by reference, so that all stages share one copy of them.
"""

from __future__ import annotations

import importlib.util
import tempfile
import threading
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from jitexport.backends.aoti_runtime import shared_runtime
from jitexport.backends.base import Backend, RawEngine
from jitexport.backends.commands import INSTALL_COMPILER, cpp_compiler, quoted_paths, without_compiler
from jitexport.errors import BackendError, CompileError, JitExportError
from jitexport.forks import Lock
from jitexport.kernels.native import compile_with_kernels, write_record
from jitexport.programs import Program, Run, check, open_program
from jitexport.regions import Outline, outline
from jitexport.specs import EngineSpec

#: In an engine that was compiled by regions: the program that runs them, and a folder for each.
PROGRAM = "program.json"
REGIONS = "regions"
#: Opens engines as folders, and is asked whether to copy weights. Older ones are good for trying things out.
NEWER_TORCH = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)


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
        # The code that calls kernels runs in no time, and takes the compiler longest; kernels get -O3 all the same.
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "aot_inductor.enable_line_tables": False,
    }

    def __init__(self, regional: bool | None = None) -> None:
        """With `regional`, modules with regions are compiled by regions always, or never; by default where it pays."""
        self.regional = regional

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
        if cpp_compiler() is None:
            return f"AOTInductor needs a C++ compiler to build ({without_compiler()}): {INSTALL_COMPILER}"
        return None

    def build(self, spec: EngineSpec, module: nn.Module, example: Sequence[Tensor], directory: Path) -> None:
        if cpp_compiler() is None:
            raise CompileError(
                "AOTInductor needs a C++ compiler to build", found=without_compiler(),
                remedy=f"{INSTALL_COMPILER}, or build with --backend eager",
            )
        made = None if self.regional is False else self.outline(spec, module, example)
        exponentials = fast_exponentials if reduced_precision(module) else nullcontext
        with exponentials():
            if made is None or not (self.regional or worthwhile(made.program)):
                write_record(directory, self.compile(spec.name, module, example, directory))
                return
            used: set[str] = set()
            for name, kind in made.kinds.items():
                example = kind.example()
                used |= self.compile(f"{spec.name} (region {name})", kind, example, directory / REGIONS / name)
        write_record(directory, used)
        (directory / PROGRAM).write_text(made.program.model_dump_json(exclude_defaults=True), encoding="utf-8")

    def outline(self, spec: EngineSpec, module: nn.Module, example: Sequence[Tensor]) -> Outline | None:
        """The module's program over regions, if it has regions.

        Raises:
            CompileError: it cannot be traced.
        """
        try:
            with torch.no_grad(), quiet_export():
                return outline(module, example)
        except JitExportError:
            raise
        except Exception as error:  # torch raises many types here, none of them ours
            raise CompileError(f"engine {spec.name} cannot be traced", found=error) from error

    def compile(self, what: str, module: nn.Module, example: Sequence[Tensor], directory: Path) -> set[str]:
        """Compile a module into a directory that is empty or not there; the kernels in it.

        Raises:
            CompileError: engine `what` could not be compiled.
        """
        from torch._inductor import aoti_compile_and_package  # heavy, and not needed to load

        # Beside the engine and not in TMPDIR: what a killed build leaves is then removed with the rest of it.
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=directory.parent) as scratch, quiet_export():
            package = Path(scratch) / "model.pt2"

            def compiler() -> None:
                with shared_runtime(example[0].device) as settings:
                    program = torch.export.export(module, tuple(example))
                    configs = {**known(self.settings), **settings}
                    aoti_compile_and_package(program, package_path=str(package), inductor_configs=configs)

            try:
                with torch.no_grad(), quoted_paths():
                    kernels = compile_with_kernels(compiler, what)
            except Exception as error:  # see above
                raise CompileError(f"AOTInductor cannot compile engine {what}", found=error) from error
            unpack_package(package, directory)
        return kernels

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
        libraries: list[_Library] = []
        try:
            if (directory / PROGRAM).is_file():
                boxed = open_regions(directory, weights, device, libraries)
            else:
                boxed = open_library(directory, weights, device, libraries)
        except (RuntimeError, KeyError, OSError, ValueError) as error:
            for library in libraries:
                _give_back(library)
            raise BackendError(
                f"cannot open engine {spec.name}", found=error, expected="an AOTInductor engine of this bundle",
                remedy="build the bundle again",
            ) from error

        def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            with turns:
                return boxed(list(inputs))

        for library in libraries:
            weakref.finalize(run, _give_back, library)
        return run


def known(settings: Mapping[str, object]) -> dict[str, object]:
    """Those of Inductor's settings that this torch has: all of them only make code faster, smaller or sooner there."""
    from torch._inductor import config

    there = config.get_config_copy()
    return {name: value for name, value in settings.items() if name in there}


def worthwhile(program: Program) -> bool:
    """Whether to compile a module's regions and not the whole of it: where that is less to compile."""
    return program.calls > len(program.regions)


@contextmanager
def quiet_export() -> Iterator[None]:
    """Without the warnings from inside torch.export about its own calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def open_library(
    directory: Path, weights: Mapping[str, Tensor], device: torch.device, opened: list[_Library]
) -> Run:
    """A compiled module, and its library added to those opened.

    Raises:
        RuntimeError, KeyError, OSError: no library, or no such weights.
    """
    library = _take(directory, device)
    opened.append(library)
    library.lend(weights)
    run: Any = library.loader.boxed_run  # of a list, which it uses up: see `open_program`
    return run


def open_regions(
    directory: Path, weights: Mapping[str, Tensor], device: torch.device, opened: list[_Library]
) -> Run:
    """A program over compiled regions, and its libraries added to those opened.

    Raises:
        RuntimeError, KeyError, OSError, ValueError: libraries, weights or a program that do not fit; says which.
    """
    try:
        program = Program.model_validate_json((directory / PROGRAM).read_bytes())
        check(program, weights)
    except ValueError as error:
        raise ValueError(f"{PROGRAM}: {error}") from error
    libraries = {}
    for name in program.regions:
        try:
            libraries[name] = open_library(directory / REGIONS / name, {}, device, opened)
        except (RuntimeError, KeyError, OSError) as error:
            raise ValueError(f"region {name}: {error}") from error
    return open_program(program, libraries, weights, device)


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
        with opening(directory) as path:
            # path, model name, single-threaded, number of runners, device index
            self.loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", device.type == "cuda", 1, index)
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
        copied = [False] if NEWER_TORCH else []
        self.loader.load_constants(self.constants if first else {}, False, first, True, *copied)

    def release(self) -> None:
        """Let go of the weights' memory. The library must not run until it is lent weights again."""
        with torch.inference_mode(False):
            for tensor in self.constants.values():
                tensor.data = torch.empty(0)


#: Libraries that nobody uses, the oldest first, and how many of them are kept.
_idle: list[_Library] = []
_MOST_IDLE = 64
_idle_lock = Lock()


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


@contextmanager
def opening(directory: Path) -> Iterator[Path]:
    """What torch opens of an engine: its folder, or with torch before 2.13 an archive of it.

    There the source's name, of which nothing is read, says what the other files are called.
    """
    if NEWER_TORCH:
        yield directory
        return
    with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
        with zipfile.ZipFile(file, "w") as archive:
            for path in sorted(p for p in directory.rglob("*") if p.is_file()):
                name = Path("model") / path.relative_to(directory)
                archive.write(path, name)
                if name.name.endswith(".wrapper.so"):
                    archive.writestr(str(name.with_suffix(".cpp")), "")
        file.flush()
        yield Path(file.name)


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
