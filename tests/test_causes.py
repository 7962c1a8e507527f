"""What the machine refused is named, whatever a library made of it, and the bundle is not blamed."""

import errno
import subprocess
import sys

import pytest
import torch

import jitexport
from jitexport.bundle import EngineBundle
from jitexport.causes import explained, resource_error
from jitexport.errors import BackendError, CompileError, JitExportError, ManifestError, ResourceError


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


LONG = "g++ " + "-I/some/where " * 500
NO_ROOM = f"{LONG}\ncc1plus: out of memory allocating 65536 bytes"
KILLED = f"{LONG}\ng++: fatal error: Killed signal terminated program cc1plus"

MEMORY = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("std::bad_alloc"),
    CompileError("cannot compile engine stage0", found="MemoryError: "),
    CompileError("AOTInductor cannot compile", found=RuntimeError(NO_ROOM)),
    CompileError("x", found=RuntimeError(KILLED)),
    raised_from(ManifestError("the tokenizers cannot be used", remedy="build the bundle again"), MemoryError()),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda e: f"{type(e).__name__} {str(e)[:30]}")
def test_memory(error):
    with pytest.raises(ResourceError) as caught, explained("building the bundle"):
        raise error
    lines = str(caught.value).splitlines()
    assert lines[0] == "memory ran out while building the bundle" and len(lines) == 4
    assert 0 < len(caught.value.found) <= 300 and LONG not in str(caught.value)
    assert "again" not in caught.value.remedy and "--jobs 1" in caught.value.remedy


def test_threads_and_temporary_folders():
    assert "thread" in resource_error(RuntimeError("can't start new thread"), "x").message
    none = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/']")
    for error in (none, raised_from(BackendError("cannot open engine", remedy="build the bundle again"), none)):
        assert "TMPDIR" in resource_error(error, "loading the bundle").remedy


@pytest.mark.parametrize("error", [ValueError("x"), ManifestError("damaged"), FileNotFoundError(2, "gone")])
def test_other_errors_are_left_alone(error):
    with pytest.raises(type(error)) as caught, explained("x"):
        raise error
    assert caught.value is error


def test_a_circle_of_errors_ends():
    a, b = ValueError("a"), ValueError("b")
    a.__context__, b.__context__ = b, a
    assert resource_error(a, "x") is None


def test_loading_without_memory_does_not_blame_the_bundle(make_bundle, monkeypatch):
    def fail(self, device):
        raise MemoryError

    monkeypatch.setattr(EngineBundle, "weights", fail)
    with pytest.raises(ResourceError, match="memory ran out while loading the bundle\n  found:    MemoryError"):
        jitexport.load(make_bundle())


@pytest.mark.parametrize("found", [MemoryError(), "", KeyError()])
def test_what_was_found_is_never_empty(found):
    line = str(JitExportError("x", found=found)).splitlines()[1]
    assert line.removeprefix("  found:").strip()


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v works on Linux")
@pytest.mark.parametrize("limit", [400_000, 700_000, 1_500_000])
def test_a_real_limit_of_memory(make_bundle, tmp_path, limit):
    """Whatever does not fit, importing torch or loading: an image, or one message."""
    command = f"ulimit -v {limit}; exec {sys.executable} -m jitexport generate {make_bundle()} fox -o {tmp_path}/a.png"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    if done.returncode == 0:
        assert (tmp_path / "a.png").exists()
    else:
        assert done.returncode == ResourceError.exit_code, done.stderr[-2000:]
        assert "error: memory ran out" in done.stderr and "Traceback" not in done.stderr
        assert "again" not in done.stderr
