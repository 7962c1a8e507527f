"""Torch-TensorRT: without a GPU, what is refused, and which of the library's documented calls are made.

The stand-in keeps the library's contract and leaves the engines out: `dynamo.compile` turns an exported program into a
module, `save` writes a module as an exported program, `load` reads that.
"""

from __future__ import annotations

import importlib.machinery
from types import SimpleNamespace

import pytest
import torch

from jitexport import registry
from jitexport.backends.torch_tensorrt import INFO, PROGRAM, TorchTensorRTBackend
from jitexport.build import build
from jitexport.doctor import examine
from jitexport.errors import (
    BackendError,
    BackendUnavailableError,
    CompileError,
    HostMismatchError,
    MissingDependencyError,
)
from jitexport.specs import EngineSpec, TensorSpec
from tests.backends.conftest import CPU

CUDA = torch.device("cuda")
SPEC = EngineSpec("stage0", (TensorSpec("x", (2, 3), "fp32"),), (TensorSpec("y", (2, 3), "fp32"),))
X = torch.arange(6.0).reshape(2, 3)


@pytest.fixture
def library(monkeypatch):
    """A stand-in for torch_tensorrt that notes its calls."""
    calls = {}

    def compile(program, **options):
        calls["compile"] = options
        assert isinstance(program, torch.export.ExportedProgram)
        return program.module()

    def save(module, path, **options):
        calls["save"] = options
        torch.export.save(torch.export.export(module, tuple(options["arg_inputs"])), path)

    fake = SimpleNamespace(
        __version__="2.13.0", __spec__=importlib.machinery.ModuleSpec("torch_tensorrt", None), calls=calls,
        dynamo=SimpleNamespace(compile=compile), save=save, load=torch.export.load,
    )
    monkeypatch.setitem(__import__("sys").modules, "torch_tensorrt", fake)
    return fake


@pytest.fixture
def backend():
    return registry.backend("torch-tensorrt")


@pytest.fixture
def built(library, backend, tmp_path):
    module = torch.nn.Linear(3, 3)
    backend.build(SPEC, module, [X], tmp_path)
    return module, tmp_path


def load(backend, folder):
    return backend.load(SPEC, folder, {}, lambda: pytest.fail("weights are in the program"), CPU)


def test_an_engine_is_written_and_read_without_compiling_again(library, backend, built):
    module, folder = built
    assert {p.name for p in folder.iterdir()} == {PROGRAM, INFO}
    library.dynamo.compile = lambda *a, **k: pytest.fail("compiled at load")
    (y,) = load(backend, folder)([X])
    assert torch.equal(y, module(X))


def test_the_calls_are_the_documented_ones(library, built):
    given = library.calls["compile"]
    assert all(torch.equal(a, b) for a, b in zip(given["arg_inputs"], [X], strict=True))
    assert given["device"] == CPU
    assert given["disable_tf32"] and given["immutable_weights"]
    assert not given["timing_cache_path"].startswith("/tmp/torch_tensorrt_engine_cache")
    assert library.calls["save"]["output_format"] == "exported_program"


def test_another_version_of_the_library_is_refused(library, backend, built):
    library.__version__ = "2.14.0"
    with pytest.raises(HostMismatchError, match=r"torch-tensorrt==2\.13\.0"):
        load(backend, built[1])


def test_a_damaged_program_is_a_backend_error(backend, built):
    (built[1] / PROGRAM).write_bytes(b"no program")
    with pytest.raises(BackendError, match="cannot open engine stage0"):
        load(backend, built[1])


def test_what_the_library_cannot_compile_is_a_compile_error(library, backend, tmp_path):
    def refuse(program, **options):
        raise RuntimeError("no converter")

    library.dynamo.compile = refuse
    with pytest.raises(CompileError, match="no converter"):
        backend.build(SPEC, torch.nn.Linear(3, 3), [X], tmp_path)
    assert not list(tmp_path.iterdir())


def test_it_says_that_it_needs_a_gpu(backend, monkeypatch, tmp_path):
    assert "NVIDIA GPU" in backend.missing(CPU)
    assert "NVIDIA GPU" in examine()["backends"]["torch-tensorrt"]
    with pytest.raises(BackendUnavailableError, match="NVIDIA GPU"):
        build(str(tmp_path), backend="torch-tensorrt", output=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_missing_gpu_and_a_missing_library_are_told_apart(backend, library, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in backend.missing(CUDA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.missing(CUDA) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install torch-tensorrt" in backend.missing(CUDA)


def test_without_the_library(backend, tmp_path):
    if TorchTensorRTBackend().missing(CUDA) is None:
        pytest.skip("it is installed")
    with pytest.raises(MissingDependencyError, match="pip install torch-tensorrt"):
        backend.build(SPEC, torch.nn.Linear(3, 3), [X], tmp_path)


def test_its_weights_cannot_change(backend):
    assert backend.holds_weights and not backend.live_weights
