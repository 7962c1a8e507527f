"""torch.compile: the stage modules, compiled where the bundle is loaded, from a cache that the bundle carries.

The artifact of an engine is what `torch.compiler.save_cache_artifacts` gives and, for CPUs, the libraries of its C++
kernels, which are not in there. With both, opening an engine traces its module again, which takes seconds, and compiles
nothing. Torch finds the libraries by the compiler's version and command line, which has the folders of Python and torch
in it, and the graph by torch's settings. Where those are others, it compiles again, with the same results: that is
said in the log.

Caches. Bundles use neither the user's caches nor their settings, and leave theirs alone: while an engine is built or
opened, torch's caches are in a folder of its own (`private_cache`), under the lock that torch holds while it compiles.

Guards. Torch checks before each call whether a graph still fits, and would compile another one where the number of
threads or the default dtype has changed. Here `Engine` checks the inputs, nothing else changes, and all guards are off.

Regions. A module may name its functions for repeated blocks in an attribute `regions`. Each is compiled once and called
for all blocks (`torch.compiler.nested_compile_region`). They are marked on the module that is compiled here, so what
other backends export has no marks. Torch can also find repeated regions by itself (`use_graph_deduplication`); that
gave NaN for a FLUX stage in torch 2.13.

Reading the cache unpickles: `load_cache_artifacts` only splits bytes, its parts are unpickled when the module is
traced. They also hold source code that is run. So these artifacts are code, like any other engine.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import secrets
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import CodeType

import torch
from torch import Tensor, nn

from jitexport import processes
from jitexport.backends.base import Backend, RawEngine, assign_weights
from jitexport.backends.commands import INSTALL_COMPILER, cpp_compiler, quoted_paths, without_compiler
from jitexport.backends.eager import as_engine
from jitexport.errors import BackendError, CompileError
from jitexport.kernels.native import compile_with_kernels, native_kernels, write_record
from jitexport.specs import DTYPES, EngineSpec

logger = logging.getLogger(__name__)

CACHE = "cache.bin"
LIBRARIES = "libraries"
#: What torch has to be told to find the cache's entries: the number of threads that CPU kernels are made for.
INFO = "engine.json"


class InductorBackend(Backend):
    """Needs the model's code (the `build` extra) and a C++ compiler, or Triton, where the bundle is loaded."""

    name = "inductor"
    summary = "torch.compile, its cache kept in the bundle, shared weights"
    host_fields = ("system", "machine", "cpu", "torch", "python", "device", "cuda", "gpu")
    capturable = True
    quantizes = True
    kernels = True

    def missing(self, device: torch.device) -> str | None:
        if device.type == "cuda" and not torch.cuda.is_available():
            return "no CUDA device is visible to torch"
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            return "torch.compile needs Triton for CUDA: install a CUDA build of torch"
        if cpp_compiler() is None:
            return f"torch.compile asks for a C++ compiler ({without_compiler()}): {INSTALL_COMPILER}"
        return None

    def build(self, spec: EngineSpec, module: nn.Module, example: Sequence[Tensor], directory: Path) -> None:
        device, threads = example[0].device, torch.get_num_threads()
        # Beside the engine and not in TMPDIR: what a killed build leaves is then removed with the rest of it.
        scratch = tempfile.mkdtemp(prefix=".scratch-", dir=directory.parent)
        with private_cache(Path(scratch)) as cache, quoted_paths():
            try:
                if device.type == "cpu":
                    write_libraries(vector_trials(), cache)
                kernels = compile_with_kernels(lambda: compiled(module, device, threads)(example), spec.name)
                saved = torch.compiler.save_cache_artifacts()
            except Exception as error:  # torch raises many types here, none of them ours
                raise CompileError(f"torch.compile cannot compile engine {spec.name}", found=error) from error
            if saved is None:
                raise CompileError(
                    f"torch.compile kept no cache of engine {spec.name}",
                    remedy="unset what switches torch.compile or its caches off (TORCH_COMPILE_DISABLE and the like)",
                )
            write_libraries(read_libraries(cache), directory / LIBRARIES)
        (directory / CACHE).write_bytes(saved[0])
        info = {"threads": threads, "kernels": bool(kernels)}
        (directory / INFO).write_text(json.dumps(info), encoding="utf-8")
        write_record(directory, kernels)

    def load(
        self,
        spec: EngineSpec,
        directory: Path,
        weights: Mapping[str, Tensor],
        module: Callable[[], nn.Module],
        device: torch.device,
    ) -> RawEngine:
        made = assign_weights(module(), weights)
        with private_cache(own_folder(os.getpid())) as cache, quoted_paths(), ExitStack() as stack:
            try:
                info = json.loads((directory / INFO).read_text(encoding="utf-8"))
                threads = info["threads"]
                if info["kernels"]:
                    stack.enter_context(native_kernels())
                link_libraries(directory / LIBRARIES, cache)
                if torch.compiler.load_cache_artifacts((directory / CACHE).read_bytes()) is None:
                    raise ValueError(f"{CACHE} is not a cache of torch.compile")
                misses = cache_misses()
                run = compiled(made, device, threads)
                # The first call is what traces, and finds everything else in the cache.
                run([torch.zeros(s.shape, dtype=DTYPES[s.dtype], device=device) for s in spec.inputs])
            except Exception as error:  # see above
                raise BackendError(
                    f"cannot open engine {spec.name}", found=error, expected="a torch.compile cache of this bundle",
                    remedy="build the bundle again",
                ) from error
            if cache_misses() > misses or any(not p.is_symlink() for p in cache.rglob("*.so")):
                logger.warning(
                    "engine %s was compiled again: its cache is for another compiler, another place of Python and "
                    "torch, or other settings of torch; build the bundle here to open it without compiling", spec.name
                )
        return run


def compiled(module: nn.Module, device: torch.device, threads: int) -> RawEngine:
    """A module compiled for the shapes of its first call, on CPUs with kernels for a number of threads."""
    regions = getattr(module, "regions", ())
    for name in regions:
        setattr(module, name, torch.compiler.nested_compile_region(getattr(module, name)))

    def forward(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return module(*inputs)

    # Torch keeps what it compiles with the code that it compiled. Code of its own lets an engine have versions of its
    # own, in any number, and give them up.
    forward.__code__ = forward.__code__.replace()
    run = as_engine(
        torch.compile(
            forward, dynamic=False, fullgraph=True,
            options={
                "cpp.threads": threads,
                "cpp.dynamic_threads": True,  # that only decides how loops are cut; see jitexport.backends.aoti
                "cpp_cache_precompile_headers": False,  # they would be made anew in every empty cache
                # One C++ file for a graph, which compiles faster than one for each kernel; torch has none for regions.
                "cpp_wrapper": device.type == "cpu" and not regions,
                "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
            },
        )
    )
    weakref.finalize(run, _forget, forward.__code__)
    return run


def _forget(code: CodeType) -> None:
    """Give up what torch has compiled for a code object."""
    from torch._C._dynamo.eval_frame import reset_code

    reset_code(code)


@contextmanager
def private_cache(folder: Path) -> Iterator[Path]:
    """Torch's caches, on disk and in memory, empty and in a folder that is removed at the end.

    Other threads' torch.compile waits meanwhile: where caches are is a matter of the process's environment.
    """
    from torch._dynamo.convert_frame import compile_lock
    from torch._inductor import config
    from torch._inductor.utils import clear_caches
    from torch.compiler._cache import CacheArtifactManager

    places = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    # AOTInductor leaves notes on what it compiled last in the settings, which are part of what a cache is found by.
    settings = config.patch({"aot_inductor.metadata": {}})
    with compile_lock, settings, CacheArtifactManager.with_fresh_cache():
        before = {name: os.environ.get(name) for name in places}
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            os.environ |= places
            clear_caches()
            yield folder
        finally:
            clear_caches()
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            shutil.rmtree(folder, ignore_errors=True)  # libraries in use stay mapped


@functools.cache
def own_folder(process: int) -> Path:
    """Where a process's private cache is: always the same place, so that no library is mapped twice."""
    return Path(tempfile.gettempdir()) / f"jitexport-{process}-{secrets.token_hex(8)}"


def read_libraries(folder: Path) -> dict[str, bytes]:
    """Shared libraries anywhere in a folder, by their place in it."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.so")}


def write_libraries(libraries: Mapping[str, bytes], folder: Path) -> None:
    """Put them into another folder, at the same places."""
    for name, content in libraries.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def link_libraries(source: Path, cache: Path) -> None:
    """Let torch find an engine's libraries where it would put them itself."""
    for library in source.rglob("*.so"):
        link = cache / library.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library.resolve())


@functools.cache
def vector_trials() -> dict[str, bytes]:
    """Libraries by which a new process finds out what vector extensions its compiler has, by their place in the cache.

    From a process of its own: in this one they may have been tried before, and their names depend on what was found.
    """
    trial = processes.python("from jitexport.backends.commands import vector_extensions; vector_extensions()")
    with tempfile.TemporaryDirectory(prefix="jitexport-") as folder:
        subprocess.run(
            trial, check=True, capture_output=True, env=processes.environment(TORCHINDUCTOR_CACHE_DIR=folder)
        )
        return read_libraries(Path(folder))


def cache_misses() -> int:
    """Graphs that torch did not find in its cache, in this process."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_miss"]
