"""TensorRT: engines are built and their plans parsed here, without a GPU; running one needs a GPU."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from jitexport import registry
from jitexport.backends import tensorrt
from jitexport.backends.base import Source
from jitexport.backends.tensorrt import INFO, PLAN, TensorRTBackend, build_plan, export_graph, varying_axes
from jitexport.build import build
from jitexport.building.comparing import compare
from jitexport.errors import BackendUnavailableError, CompileError, HostMismatchError
from jitexport.models.flux import FluxAdapter
from jitexport.plan import CustomSchedule
from jitexport.runtime import load
from jitexport.specs import EngineSpec, TensorSpec
from jitexport.verify import verify
from tests.backends.conftest import CPU, Case

CUDA = torch.device("cuda")
rtx = pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(tensorrt, "_LIBRARIES", ("tensorrt_rtx",))
    return TensorRTBackend()


def scale_sources(tokens=(4, 8)):
    """A module of the shape of a stage, small: tokens [1, m, 4] and a vector [1, 4]."""

    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, tokens, vector):
            return self.linear(tokens) * vector[:, None]

    module = Scale().eval()
    vector = TensorSpec("vector", (1, 4), "fp32")
    specs = [
        EngineSpec(
            f"stage{i}", (TensorSpec("tokens", (1, m, 4), "fp32"), vector), (TensorSpec("out", (1, m, 4), "fp32"),)
        )
        for i, m in enumerate(tokens)
    ]
    return [Source(s, module, [torch.zeros(i.shape) for i in s.inputs]) for s in specs]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_bundle_for_another_gpu(backend, tiny_flux, tmp_path, dtype):
    """All stages in one plan, weights in there only, and a manifest that claims no verification."""
    made = build(
        str(tiny_flux), backend="tensorrt", target="sm_89", dtype=dtype, output=tmp_path / "bundle",
        custom=CustomSchedule((2, 1, 1), (0.35, 0.62, 1.0)),
    ).manifest
    assert (made.host.device, made.host.gpu) == ("cuda", "sm_89")
    assert made.weights == ()
    directories = {e.name: e.directory for e in made.engines}
    assert directories["stage0"] == directories["stage1"] == directories["stage2"]
    assert len(set(directories.values())) == 4
    assert all(e.relative_error is None and e.max_error is None for e in made.engines)
    stages = tmp_path / "bundle" / directories["stage0"]
    assert json.loads((stages / INFO).read_text())["profiles"] == ["stage2", "stage1", "stage0"]
    files = {f.path for f in made.files if f.path.startswith("engines/")}
    assert files == {f"{d}/{name}" for d in directories.values() for name in (PLAN, INFO)}
    with pytest.raises(BackendUnavailableError, match=r"CUDA(.|\n)*expected: the GPU that .* built for, sm_89"):
        load(tmp_path / "bundle")
    with pytest.raises(BackendUnavailableError, match="cuda only"):
        load(tmp_path / "bundle", device="cpu")


def test_a_bundle_for_another_gpu_is_refused_by_this_one(backend, tiny_flux, tmp_path, monkeypatch):
    build(
        str(tiny_flux), backend="tensorrt", target="sm_89", dtype="fp32", output=tmp_path / "bundle",
        custom=CustomSchedule((1,), (1.0,)),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(TensorRTBackend, "load", lambda *_: pytest.fail("an engine was opened"))
    for opens in (load, verify):
        with pytest.raises(HostMismatchError, match=r"found: +gpu sm_90\n +expected: gpu sm_89\n +remedy: "):
            opens(tmp_path / "bundle")


@pytest.mark.parametrize("target", TensorRTBackend.targets)
def test_targets(backend, tmp_path, target):
    assert backend.cannot_build(CUDA, target) is None
    backend.build_group(scale_sources(), tmp_path, target)
    assert (tmp_path / PLAN).stat().st_size > 1000
    assert json.loads((tmp_path / INFO).read_text()) == {
        "library": "tensorrt_rtx", "version": rtx.__version__, "profiles": ["stage0", "stage1"],
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == [INFO, PLAN]


@pytest.mark.parametrize("target", ["sm_75", "sm_90", "sm_100", "ampere"])
def test_other_targets_are_refused(backend, tmp_path, target):
    assert target in backend.cannot_build(CUDA, target)
    with pytest.raises(BackendUnavailableError, match="sm_80, sm_86, sm_89, sm_120"):
        build(str(tmp_path), backend="tensorrt", target=target, output=tmp_path / "bundle")


def test_weights_are_stored_once_for_all_stages(backend, tmp_path):
    """Plans also hold kernels, so it is the growth with the weights that is compared."""

    def size(width, stages):
        sources = scale_sources((4, 8, 16)[:stages])
        for s in sources:
            s.module.linear = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 4))
        folder = tmp_path / f"{width}-{stages}"
        folder.mkdir()
        backend.build_group(sources, folder, "sm_89")
        return (folder / PLAN).stat().st_size

    added = 4 * (1 << 18) * 9  # fp32 of 9 numbers for each unit of width
    assert size(1 << 18, 3) - size(4, 3) < 1.2 * added


def test_only_what_differs_is_symbolic():
    assert varying_axes([s.spec for s in scale_sources()]) == [[1], []]
    assert varying_axes([s.spec for s in scale_sources((4,))]) == [[], []]


def test_a_graph_that_tensorrt_cannot_read(backend, tmp_path):
    (tmp_path / "graph.onnx").write_bytes(b"no graph")
    with pytest.raises(CompileError, match="cannot read the graph of stage0, stage1"):
        build_plan(rtx, tmp_path / "graph.onnx", [s.spec for s in scale_sources()], "sm_89")


def test_what_is_missing(backend, monkeypatch):
    assert "cuda only" in backend.missing(CPU)
    if not torch.cuda.is_available():
        assert "--target" in backend.missing(CUDA)
        assert backend.cannot_build(CUDA, None) == backend.missing(CUDA)
    monkeypatch.setattr(tensorrt, "_LIBRARIES", ("no_such_library",))
    assert "jitexport[tensorrt]" in backend.missing(CUDA)
    assert "jitexport[tensorrt]" in backend.cannot_build(CUDA, "sm_89")


def test_tensorrt_itself_is_preferred_and_builds_for_its_own_gpu_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__spec__=object()))
    assert tensorrt.installed() == "tensorrt"
    assert "tensorrt_rtx builds for others" in registry.backend("tensorrt").cannot_build(CUDA, "sm_89")


@pytest.mark.parametrize("name", [n for n in registry.BACKENDS if n != "tensorrt"])
def test_other_backends_build_for_this_machine_only(name, tmp_path):
    with pytest.raises(BackendUnavailableError, match="this machine"):
        build(str(tmp_path), backend=name, target="sm_89", output=tmp_path / "bundle")


@pytest.mark.parametrize("group", [["text"], ["condition"], ["stage1", "stage0"], ["decode"]], ids=lambda g: g[0])
def test_the_graph_that_tensorrt_reads_computes_what_eager_does(built, tiny_flux, tmp_path, group):
    """Run by ONNX Runtime, at the shapes of every profile: the nearest to running the engine that needs no GPU."""
    onnxruntime = pytest.importorskip("onnxruntime")
    made = built(Case("eager"))
    adapter = FluxAdapter.from_folder(tiny_flux, torch.float32, {"max_sequence_length": 10})
    export_graph([Source(made.specs[n], adapter.module(n), made.inputs[n]) for n in group], tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    for name in group:
        feed = {s.name: t.numpy() for s, t in zip(made.specs[name].inputs, made.inputs[name], strict=True)}
        outputs = [torch.from_numpy(o) for o in session.run(None, feed)]
        assert compare(outputs, made.reference[name](*made.inputs[name]))[0] < 1e-5


def test_the_graph_is_of_the_operations_of_a_gpu(tiny_flux, built, tmp_path):
    """On CPUs bf16 attention runs in blocks of queries, as many as the example has; that must not be in the graph."""
    onnx = pytest.importorskip("onnx")
    made = built(Case("eager", dtype="bf16"))
    adapter = FluxAdapter.from_folder(tiny_flux, torch.bfloat16, {"max_sequence_length": 10})
    names = ["stage1", "stage0"]
    export_graph([Source(made.specs[n], adapter.module(n), made.inputs[n]) for n in names], tmp_path / "graph.onnx")
    nodes = onnx.load(tmp_path / "graph.onnx", load_external_data=False).graph.node
    assert sum(n.op_type == "Softmax" for n in nodes) == 3  # one for each block
    assert not any("Sequence" in n.op_type for n in nodes)
