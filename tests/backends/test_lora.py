"""Weights that change in prebuilt bundles: nothing is built again, and what is taken out is gone bit by bit."""

from __future__ import annotations

import pytest
import torch

import jitexport
from jitexport.backends.eager import EagerBackend
from jitexport.errors import InputError
from tests.backends.conftest import Case
from tests.lora.test_pipeline import adapter

BACKENDS = ["aoti", "inductor", "onnx"]


def picture(pipe):
    return pipe("red apple", generator=torch.Generator().manual_seed(1), output_type="pt").images


@pytest.fixture(scope="module")
def tuned(tiny_flux, tmp_path_factory):
    """A fine-tuned checkpoint of the same architecture."""
    from diffusers import FluxPipeline

    folder = tmp_path_factory.mktemp("models") / "tuned"
    pipeline = FluxPipeline.from_pretrained(tiny_flux, dtype=torch.float32)
    with torch.no_grad():
        for component in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
            for parameter in component.parameters():
                parameter.mul_(1.05)
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_and_checkpoints(bundle_of, tiny_flux, tuned, backend):
    """Every picture equals the one of the eager bundle whose weights changed alike, which equals diffusers'."""
    pipe, eager = (jitexport.load(bundle_of(Case(name))) for name in (backend, "eager"))
    state = adapter(eager)
    before = picture(pipe)

    def same_as_eager():
        torch.testing.assert_close(picture(pipe), picture(eager), atol=2e-4, rtol=0)

    for p in (pipe, eager):
        p.load_lora(state, scale=0.7)
    with_adapter = picture(pipe)
    assert (with_adapter - before).abs().max() > 1e-3
    same_as_eager()

    for p in (pipe, eager):
        p.load_lora(adapter(eager, seed=1), scale=-0.5)
    assert (picture(pipe) - with_adapter).abs().max() > 1e-3
    same_as_eager()

    pipe.unload_lora()
    assert torch.equal(picture(pipe), before)

    pipe.load_lora(state)
    for p in (pipe, eager):
        p.load_checkpoint(tuned)
    assert (picture(pipe) - before).abs().max() > 1e-3
    same_as_eager()
    pipe.load_checkpoint(tiny_flux)
    assert torch.equal(picture(pipe), before)


def test_engines_with_copies_of_the_weights_say_so(bundle_of, monkeypatch, tiny_flux):
    """As TensorRT's: the pipeline must not change weights that nothing reads."""
    bundle = bundle_of(Case("eager"))
    state = adapter(jitexport.load(bundle))
    monkeypatch.setattr(EagerBackend, "live_weights", False)
    pipe = jitexport.load(bundle)
    before = picture(pipe)
    for change in (
        lambda: pipe.load_lora(state), pipe.unload_lora, lambda: pipe.load_checkpoint(tiny_flux)
    ):
        with pytest.raises(InputError, match="hold copies of the weights") as caught:
            change()
        assert "onnx" in caught.value.remedy
    assert torch.equal(picture(pipe), before)


@pytest.mark.parametrize("name", ["tensorrt", "torch-tensorrt", "onnx-tensorrt"])
def test_tensorrt_is_such_a_backend(name):
    assert not jitexport.registry.backend(name).live_weights
