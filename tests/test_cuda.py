"""Bundles on a CUDA device, of tiny models: against the eager pipeline on the CPU, and the loop as a graph against the
loop step by step.

Nothing here runs without a device.
"""

import json
import subprocess
import sys
import threading

import pytest
import torch
from PIL import Image

import jitexport
from jitexport import quant
from jitexport.choice import choose
from jitexport.kernels.linear import product_8bit
from jitexport.plan import CustomSchedule
from jitexport.verify import verify
from tests.parity import seeded
from tests.tiny_families import FAMILIES

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
JIT = CustomSchedule((2, 1, 2), (0.35, 0.62, 1.0))
METHODS = {
    "dense": CustomSchedule((3,)),
    "jit": JIT,
    "ralu": CustomSchedule((1, 2, 2)),
    "bottleneck": CustomSchedule((1, 2, 2)),
    "ras": CustomSchedule((7,), (0.25,)),
}
CACHES = ("reuse", "taylor", "taylor:order=2", "meancache", "foca", "taylorseer", "teacache", "delta-dit", "toca")
COMPUTED = "computed=0+1+3+5"
#: What compiled bundles are compared in: the family's model, backend and dtype.
COMPILED = [
    ("FluxPipeline", "aoti", "fp32"),
    ("FluxPipeline", "aoti", "bf16"),
    ("FluxPipeline", "inductor", "fp32"),
    ("StableDiffusion3Pipeline", "aoti", "bf16"),
    ("QwenImagePipeline", "aoti", "fp32"),
    ("Flux2KleinPipeline", "aoti", "bf16"),
    ("HunyuanVideo15Pipeline", "aoti", "fp32"),
]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a family's tiny model."""
    made = {}

    def save(family):
        if family not in made:
            made[family] = str(FAMILIES[family](tmp_path_factory.mktemp("cuda") / family))
        return made[family]

    return save


def latents(pipe, seed=0, **more):
    """With a second pass where the family is usually guided so."""
    if pipe.defaults.guidance.passes == 2:
        more = {"negative_prompt": "the snow"} | more
    found = pipe("a red fox", generator=seeded(seed), output_type="latent", **more).images
    assert found.isfinite().all() and found.std() > 0.01
    return found.float().cpu()


def error(found, expected):
    """Relative to the whole."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_eager_bundle_makes_the_images_of_the_cpu(family, model, make_bundle):
    here = jitexport.load(make_bundle(model(family), custom=JIT, device="cuda"))
    there = jitexport.load(make_bundle(model(family), custom=JIT, device="cpu"))
    assert error(latents(here), latents(there)) < 1e-3
    assert here.graph is not None and here.graph.level == "loop"
    assert error(latents(here, 1), latents(there, 1)) < 1e-3
    assert error(latents(here, 1), latents(here, 0)) > 0.01


@pytest.mark.parametrize(("family", "backend", "dtype"), COMPILED)
def test_a_compiled_bundle_makes_the_eager_images(family, backend, dtype, model, make_bundle):
    options = {"custom": JIT, "device": "cuda", "dtype": dtype}
    eager = jitexport.load(make_bundle(model(family), **options))
    path = make_bundle(model(family), backend=backend, **options)
    for graphs in (False, True):
        pipe = jitexport.load(path, cuda_graphs=graphs)
        for seed in (0, 1):
            allowed = 1e-3 if dtype == "fp32" else 0.1
            assert error(latents(pipe, seed), latents(eager, seed)) < allowed
    assert pipe.graph.level == "loop"
    assert verify(path).passed


@pytest.mark.parametrize("method", METHODS)
def test_the_graph_of_every_method_is_its_loop(method, make_bundle):
    path = make_bundle(method=method, custom=METHODS[method], device="cuda", batch=2)
    recorded, plain = jitexport.load(path), jitexport.load(path, cuda_graphs=False)
    for seed in range(3):
        assert error(latents(recorded, seed), latents(plain, seed)) < 1e-5
    assert recorded.graph.level == "loop"


@pytest.mark.parametrize("method", ["dense", "jit"])
@pytest.mark.parametrize("cache", CACHES)
def test_the_graph_of_every_cache_is_its_loop(method, cache, make_bundle):
    custom = CustomSchedule((7,)) if method == "dense" else CustomSchedule((2, 2, 3), (0.35, 0.62, 1.0))
    name = f"{cache}{',' if ':' in cache else ':'}{COMPUTED}"
    path = make_bundle(method=method, custom=custom, cache=name, device="cuda")
    recorded, plain = jitexport.load(path), jitexport.load(path, cuda_graphs=False)
    there = jitexport.load(make_bundle(method=method, custom=custom, cache=name, device="cpu"))
    for seed in range(2):
        found = latents(recorded, seed)
        assert error(found, latents(plain, seed)) < 1e-5
        assert error(found, latents(there, seed)) < 1e-3
    assert recorded.graph.level == "loop"


@pytest.mark.parametrize("kind", sorted(quant.KINDS))
def test_layers_in_8_bits(kind, make_bundle):
    if kind not in quant.available(CUDA):
        pytest.skip(f"no {kind} on {torch.cuda.get_device_name()}")
    # Products in 8 bits want channels in multiples of 16.
    options = {"custom": CustomSchedule((2, 2), (0.35, 1.0)), "device": "cuda", "dtype": "bf16"}
    exact = jitexport.load(make_bundle(**options))
    eager = jitexport.load(make_bundle(**options, quantization=kind))
    compiled = jitexport.load(make_bundle(**options, quantization=kind, backend="aoti"))
    expected = latents(exact)
    assert 1e-4 < error(latents(eager), expected) < 0.2
    assert error(latents(compiled), expected) < 0.2
    assert compiled.graph.level == eager.graph.level == "loop"


@pytest.mark.parametrize("rows", [1, 10, 16, 17, 33])
@pytest.mark.parametrize("kind", sorted(quant.KINDS))
def test_8_bit_products_of_any_number_of_rows(kind, rows):
    if kind not in quant.available(CUDA):
        pytest.skip(f"no {kind} on {torch.cuda.get_device_name()}")
    x, (weight, scale) = torch.randn(rows, 64), quant.quantize(torch.randn(48, 64), kind)
    exact = x @ (weight.float() * scale).T
    found = product_8bit(x.to(CUDA), weight.to(CUDA), scale[:, 0].to(CUDA)).cpu()
    assert found.shape == exact.shape and error(found, exact) < (0.01 if kind == "int8" else 0.05)


def test_what_is_left_to_the_machine():
    made = choose()
    assert (made.device, made.backend) == ("cuda", "aoti")
    assert made.dtype == ("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32")


def test_threads_take_turns_on_one_pipeline(make_bundle):
    pipe = jitexport.load(make_bundle(custom=JIT, device="cuda"))
    expected = [latents(pipe, seed) for seed in range(8)]
    found = [None] * 8

    def work(first):
        for seed in range(first, 8, 4):
            found[seed] = latents(pipe, seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, alone in zip(found, expected, strict=True):
        assert error(mine, alone) < 1e-6


def test_callbacks_and_interrupts_run_the_loop_step_by_step(make_bundle):
    pipe = jitexport.load(make_bundle(custom=JIT, device="cuda"))
    steps = []
    found = latents(pipe, callback_on_step_end=lambda p, i, t, tensors: steps.append(i))
    assert steps == [0, 1, 2, 3, 4] and error(found, latents(pipe)) < 1e-5


def test_adapters_change_the_weights_that_a_graph_reads(make_bundle):
    pipe = jitexport.load(make_bundle(custom=JIT, device="cuda"))
    before = latents(pipe)
    down, up = torch.randn(3, 32), torch.randn(32, 3)
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    pipe.load_lora({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    assert error(latents(pipe), before) > 1e-3
    pipe.unload_lora()
    assert error(latents(pipe), before) < 1e-5


def test_the_command_line_builds_and_generates(tiny_flux, tmp_path):
    bundle, picture = tmp_path / "bundle", tmp_path / "image.png"
    for words in (
        ("build", "--model", str(tiny_flux), "--steps", "2,2", "--ratios", "0.35,1.0", "--output", str(bundle)),
        ("generate", str(bundle), "a red fox", "--seed", "0", "--output", str(picture)),
    ):
        done = subprocess.run([sys.executable, "-m", "jitexport", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    facts = json.loads((bundle / "manifest.json").read_text())
    assert (facts["host"]["device"], facts["backend"]) == ("cuda", "aoti")
    assert Image.open(picture).size == (32, 48)
