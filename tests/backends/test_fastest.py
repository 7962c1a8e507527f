"""Choosing the fastest backend for each engine. What the candidates do is tested with them."""

from __future__ import annotations

import importlib.util
import json
import time

import pytest
import torch
from torch import nn

import jitexport
from jitexport import registry
from jitexport.backends import fastest
from jitexport.backends.base import Engine
from jitexport.backends.eager import EagerBackend
from jitexport.backends.fastest import CHOICE, FastestBackend, choose
from jitexport.backends.onnx import ONNXBackend
from jitexport.errors import BackendError, CompileError, MissingDependencyError
from jitexport.plan import CustomSchedule
from jitexport.specs import EngineSpec, TensorSpec
from tests.backends.conftest import CPU
from tests.backends.test_lora import picture

SPEC = EngineSpec("stage0", (TensorSpec("x", (3, 8), "fp32"),), (TensorSpec("y", (3, 8), "fp32"),))
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Slow(EagerBackend):
    """Takes its time at every run."""

    def load(self, *arguments):
        run = super().load(*arguments)

        def slow(inputs):
            time.sleep(0.002)
            return run(inputs)

        return slow

    def build(self, spec, module, example, directory):
        (directory / "slow").write_text("")


class Broken(EagerBackend):
    def build(self, *_):
        raise CompileError("no such operator")


class Lacking(EagerBackend):
    def build(self, *_):
        raise MissingDependencyError("not installed")


class Unloadable(EagerBackend):
    def load(self, *_):
        raise BackendError("cannot be opened")


class Elsewhere(EagerBackend):
    def missing(self, device):
        return "needs another machine"


@pytest.fixture
def candidates(monkeypatch):
    def set_to(**kinds):
        monkeypatch.setattr(fastest, "CANDIDATES", kinds)

    return set_to


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh()).requires_grad_(False)


def chosen(folder):
    return json.loads((folder / CHOICE).read_text())


@pytest.mark.parametrize("order", [("slow", "fast"), ("fast", "slow")])
def test_the_fastest_is_kept_and_nothing_of_the_others(candidates, module, tmp_path, order):
    kinds = {"slow": Slow, "fast": EagerBackend}
    candidates(**{name: kinds[name] for name in order})
    FastestBackend().build(SPEC, module, [X], tmp_path)
    said = chosen(tmp_path)
    assert said["chosen"] == "fast" and said["seconds"]["slow"] > said["seconds"]["fast"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["fast", CHOICE])


@pytest.mark.parametrize(
    ("seconds", "name"),
    [
        ({"a": 1.0}, "a"), ({"a": 1.0, "b": 0.98}, "a"), ({"a": 1.0, "b": 0.9}, "b"), ({"a": 1.0, "b": 1.5}, "a"),
        ({"a": 1.0, "b": 0.9, "c": 0.89}, "b"), ({"a": 1.0, "b": 0.9, "c": 0.5}, "c"),
    ],
)
def test_a_small_gain_does_not_change_the_choice(seconds, name):
    assert choose(seconds) == name


def test_candidates_that_fail_are_left_out(candidates, module, tmp_path, caplog):
    candidates(broken=Broken, lacking=Lacking, unloadable=Unloadable, elsewhere=Elsewhere, slow=Slow)
    FastestBackend().build(SPEC, module, [X], tmp_path)
    assert chosen(tmp_path)["chosen"] == "slow"
    assert {p.name for p in tmp_path.iterdir()} == {"slow", CHOICE}
    for name in ("broken: no such operator", "lacking: not installed", "unloadable: cannot be opened"):
        assert name in caplog.text


def test_without_any_the_reasons_are_given(candidates, module, tmp_path):
    candidates(broken=Broken, unloadable=Unloadable)
    with pytest.raises(CompileError, match=r"stage0[\s\S]*no such operator[\s\S]*cannot be opened"):
        FastestBackend().build(SPEC, module, [X], tmp_path)


def test_dtypes_that_a_candidate_lacks_leave_it_out():
    backend = FastestBackend()
    assert set(backend.candidates(CPU, "bf16")) == {"aoti"}
    if ONNXBackend().missing(CPU) is None:
        assert set(backend.candidates(CPU, "fp32")) == {"aoti", "onnx"}


def test_on_a_gpu_a_graph_can_record_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    made = FastestBackend().candidates(torch.device("cuda"), "bf16")
    assert set(made) == {"aoti", "aoti-autotuned"} and all(b.capturable and b.live_weights for b in made.values())


@pytest.mark.parametrize("text", [None, "{", "[]", '{"chosen": "../x"}', '{"chosen": ["aoti"]}'])
def test_a_choice_that_is_none_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / CHOICE).write_text(text)
    with pytest.raises(BackendError, match="cannot open engine stage0"):
        FastestBackend().load(SPEC, tmp_path, {}, lambda: None, CPU)


def test_the_real_candidates_agree_and_read_the_weights_they_are_given(module, tmp_path, capfd):
    FastestBackend().build(SPEC, module, [X], tmp_path)
    assert set(chosen(tmp_path)["seconds"]) == set(FastestBackend().candidates(CPU, "fp32"))
    assert "AUTOTUNE" not in capfd.readouterr().err.upper()
    weights = {name: p * 2 for name, p in module.named_parameters()}
    engine = Engine(SPEC, FastestBackend().load(SPEC, tmp_path, weights, lambda: module, CPU), CPU)
    expected = torch.tanh(X @ weights["0.weight"].T + weights["0.bias"])
    torch.testing.assert_close(engine(X)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_bundle_of_it(candidates, make_bundle):
    """Built and loaded as any other, each engine by the backend that its choice names."""
    candidates(slow=Slow, eager=EagerBackend)
    custom = CustomSchedule((1,), (1.0,))
    path = make_bundle(backend="fastest", custom=custom)
    assert {chosen(folder)["chosen"] for folder in (path / "engines").iterdir()} <= {"slow", "eager"}
    assert torch.equal(picture(jitexport.load(path)), picture(jitexport.load(make_bundle(custom=custom))))


def test_it_is_registered():
    backend = registry.backend("fastest")
    assert isinstance(backend, FastestBackend) and backend.missing(CPU) is None
    assert set(backend.host_fields) >= set(ONNXBackend.host_fields)
