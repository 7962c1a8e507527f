"""ONNX Runtime: what the graphs hold, and which providers there are."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from jitexport import registry
from jitexport.backends.onnx import GRAPH, NAMES
from jitexport.build import build
from jitexport.errors import BackendError, BackendUnavailableError
from tests.backends.conftest import CPU, Case

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def test_graphs_hold_no_weights_and_name_no_file(built):
    made = built(Case("onnx"))
    for name in made.specs:
        model = onnx.load(made.root / name / GRAPH, load_external_data=False)
        outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        listed = json.loads((made.root / name / NAMES).read_text())
        assert sorted(t.name for t in outside) == listed
        assert set(listed) <= made.weights.keys()
        assert {e.value for t in outside for e in t.external_data if e.key == "location"} == {"weights"}
        floats = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert sum(len(t.raw_data) for t in floats) < 4096
        assert sorted(p.name for p in (made.root / name).iterdir()) == [GRAPH, NAMES]
        assert b".py" not in (made.root / name / GRAPH).read_bytes(), "stack traces of the build"


def test_linear_layers_read_weights_as_torch_keeps_them(built):
    made = built(Case("onnx"))
    model = onnx.load(made.root / "stage1" / GRAPH, load_external_data=False)
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    gemms = [n for n in model.graph.node if n.op_type == "Gemm"]
    # 2 embedders and the output, 12 in the double block, 5 in each single one; the text is embedded in `condition`
    assert len(gemms) == 2 + 12 + 2 * 5
    for node in gemms:
        assert shapes[node.input[1]] == tuple(made.weights[node.input[1]].shape)


def test_another_weight_is_not_merged_with_an_equal_one(built):
    """A new checkpoint may make them differ, so equal values at build time mean nothing."""
    made = built(Case("onnx"))
    weights = dict(made.weights)
    query, key = (f"transformer.single_transformer_blocks.0.attn.norm_{x}.weight" for x in "qk")
    assert {query, key} <= set(json.loads((made.root / "stage1" / NAMES).read_text()))
    weights[key] = weights[key] * 3
    assert not torch.equal(
        made.load("stage1", weights)(*made.inputs["stage1"])[0], made.load("stage1")(*made.inputs["stage1"])[0]
    )


def test_bf16_on_the_cpu_is_refused_before_the_model_is_read(tmp_path):
    with pytest.raises(BackendUnavailableError, match="--dtype fp32"):
        build(str(tmp_path), backend="onnx", dtype="bf16", output=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("name", "provider"), [("onnx", "CUDAExecutionProvider"), ("onnx-tensorrt", "TensorrtExecutionProvider")]
)
def test_a_missing_provider_says_how_to_get_it(name, provider, monkeypatch):
    backend = registry.backend(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    reason = backend.missing(torch.device("cuda"))
    assert provider in reason
    assert "onnxruntime-gpu" in reason


def test_without_onnxruntime_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "jitexport[onnx]" in registry.backend("onnx").missing(CPU)


def test_a_silent_fall_back_to_another_provider_is_an_error(built, monkeypatch):
    made = built(Case("onnx"))
    session = SimpleNamespace(get_providers=lambda: ["SomeOtherProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: session)
    with pytest.raises(BackendError, match="another device"):
        made.load("decode")


@pytest.mark.parametrize("damage", ["graph", "names", "missing weight"])
def test_a_damaged_artifact_is_a_backend_error(built, tmp_path, damage):
    made = built(Case("onnx"))
    source, weights = made.root / "decode", dict(made.weights)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if damage == "graph":
        (tmp_path / GRAPH).write_bytes((source / GRAPH).read_bytes()[:-100])
    elif damage == "names":
        (tmp_path / NAMES).write_text('["vae.decoder.conv_in.weight"]')
    else:
        del weights["vae.decoder.conv_in.weight"]
    with pytest.raises(BackendError, match="cannot open engine decode"):
        made.backend.load(made.specs["decode"], tmp_path, weights, lambda: None, CPU)
