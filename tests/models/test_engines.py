"""Engines of the families that are not FLUX.1, on ONNX Runtime and AOTInductor, in the place of eager ones, fp32.

Covered: ONNX graphs of every engine of a family but for FLUX.2-klein's text, whose 29 layers take a minute and run the
code of Qwen-Image's text; AOTInductor engines of the stages by regions, masks of padding among their inputs, and of
Qwen-Image's decoder. Each engine agrees with its eager module, and together they make the eager pipeline's image, with
a second pass for the negative prompt.

Not covered: AOTInductor engines of text, conditions and the other decoders, and whole bundles, which the tests of
backends build of FLUX.1, and scripts/families.py of all families by every method.
"""

from functools import partial

import pytest
import torch

from jitexport import registry
from jitexport.building.comparing import compare, tolerance
from jitexport.building.reference import eager_pipeline
from jitexport.kernels import native
from jitexport.plan import CustomSchedule, plan
from tests import tiny_hunyuan_video15
from tests.compiled import compiled_engines
from tests.tiny_families import FAMILIES

CPU = torch.device("cpu")
SHORT = "a fox"  # leaves padding, which masks hide
OTHERS = {family: save for family, save in FAMILIES.items() if family != "FluxPipeline"}
#: What AOTInductor compiles: stages, and a decoder that scales its latents by numbers of the configuration.
COMPILED = {*((family, "stage0") for family in OTHERS), ("QwenImagePipeline", "decode")}


@pytest.fixture(scope="module", params=OTHERS)
def eager(request, tmp_path_factory):
    """The adapter of a family's tiny model, and its eager pipeline of one stage, two steps."""
    folder = FAMILIES[request.param](tmp_path_factory.mktemp("engines") / "model")
    adapter = registry.family(request.param).from_folder(folder, torch.float32, {})
    made = plan(adapter, method="dense", custom=CustomSchedule((2,)), dtype="fp32")
    options = {"batch": 1, "dtype": "fp32", "device": CPU}
    return adapter, eager_pipeline(adapter, made.schedule, made.method, made.options, **options)


def image(pipe):
    """With the family's usual guidance."""
    generator = torch.Generator().manual_seed(0)
    return pipe(SHORT, negative_prompt="the snow", generator=generator, output_type="pt").images


def chosen(backend, family, engine):
    """Whether an engine of a family is tested on a backend."""
    if backend == "aoti":
        return (family, engine) in COMPILED
    return (family, engine) != ("Flux2KleinPipeline", "text")


@pytest.mark.parametrize("name", ["onnx", "aoti"])
def test_engines_make_the_eager_image(eager, name, tmp_path, monkeypatch):
    adapter, pipe = eager
    backend = registry.backend(name)
    if reason := backend.cannot_build(CPU, None):
        pytest.skip(reason)
    with torch.no_grad():
        expected = image(pipe)
        engines = compiled_engines(name, pipe, adapter, tmp_path, partial(chosen, name, adapter.family))
        for engine in engines.items():
            monkeypatch.setitem(pipe.engines, *engine)
        found = image(pipe)
    assert expected.std() > 0.01 and not torch.equal(found, expected)
    assert (found - expected).norm() <= tolerance("fp32", torch.device("cpu")) * expected.norm()


def test_our_kernels_hide_padding(tmp_path, monkeypatch):
    """In a compiled stage with heads of 64 channels, in fp32, also on CPUs where PyTorch's products would be faster.

    Of HunyuanVideo-1.5, whose text comes after the video and is not rotated.
    """
    has = torch.cpu.get_capabilities()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has | {"amx_tile": False})
    monkeypatch.setattr(native, "AVX512", native.AVX512._replace(dtypes=(torch.float32,)))
    backend = registry.backend("aoti")
    if reason := backend.cannot_build(CPU, None) or native.missing():
        pytest.skip(reason)
    folder = tiny_hunyuan_video15.save_hunyuan_video15(
        tmp_path / "model", attention_head_dim=64, rope_axes_dim=(16, 24, 24)
    )
    adapter = registry.family("HunyuanVideo15Pipeline").from_folder(folder, torch.float32, {})
    made = plan(adapter, method="dense", custom=CustomSchedule((2,)), dtype="fp32")
    pipe = eager_pipeline(adapter, made.schedule, made.method, made.options, batch=1, dtype="fp32", device=CPU)
    stage = made.schedule.stages[0]
    with torch.no_grad():
        condition, _ = pipe.prepare([SHORT])
        where = torch.arange(stage.tokens)[None]
        tokens = torch.randn(pipe.engines[stage.name].spec.inputs[0].shape, generator=torch.Generator().manual_seed(0))
        spec, module = pipe.engines[stage.name].spec, adapter.module(stage.name)
        inputs = pipe.stage_inputs(where, condition)(spec, tokens, 0)
        (directory := tmp_path / "engine").mkdir()
        backend.build(spec, module, inputs, directory)
        assert native.read_record(directory).startswith("attention")
        engine = backend.load(spec, directory, dict(adapter.tensors()), lambda: module, CPU)
        found, expected = engine(inputs)[0], module(*inputs)
        named = {s.name: x for s, x in zip(spec.inputs, inputs, strict=True)}
        seen = module(*(named | {"key_mask": torch.zeros_like(named["key_mask"])}).values())
    assert compare([found], [expected])[0] < 1e-5 < 1e-3 < compare([seen], [expected])[0]
