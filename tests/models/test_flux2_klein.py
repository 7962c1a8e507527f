import json
import shutil
from functools import cache

import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import jitexport
from jitexport.bundle.reading import read_manifest
from jitexport.cli import app
from jitexport.errors import InputError, UnsupportedModelError
from jitexport.flops import count_flops
from jitexport.guidance import Guidance
from jitexport.models.flux2_klein import NAMING, TEMPLATE, KleinAdapter, log_shift
from jitexport.models.naming import Resolver
from jitexport.models.single_file import read_single_file
from jitexport.models.sources import config_adapter, find_source, load_adapter
from jitexport.plan import CustomSchedule, plan
from jitexport.quant import QuantizedLinear
from jitexport.schedule import Stage, StageSchedule, make_stages, uniform_sigmas
from jitexport.specs import DTYPES
from tests import tiny_flux2_klein as tiny
from tests.parity import assert_same, seeded

PROMPTS = ["a red fox", "", "a long prompt about a red fox that goes on until the template's end is cut off"]

# diffusers makes the angles of time in the model's dtype, we in fp32: bf16 keeps these values exactly.
SIGMAS = (1.0, 0.512)

SIZES = [(tiny.HEIGHT, tiny.WIDTH), (20, 28)]  # 12 x 8 and 5 x 7 tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("klein")
    return {name: tiny.save_klein(root / name, distilled=name == "distilled") for name in ("base", "distilled")}


@pytest.fixture(scope="module")
def folder(folders):
    return folders["base"]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(folder, dtype):
    return Flux2KleinPipeline.from_pretrained(folder, dtype=DTYPES[dtype])


@pytest.fixture(scope="module", params=SIZES)
def adapter(request, folder, dtype):
    height, width = request.param
    return KleinAdapter.from_folder(folder, DTYPES[dtype], {"height": height, "width": width})


@pytest.fixture(scope="module")
def small(folder):
    return KleinAdapter.from_folder(folder, torch.float32)


@pytest.fixture(scope="module")
def published():
    """Each published model without weights, once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = config_adapter(find_source(name), torch.bfloat16)
        return made[name]

    return get


def embeddings(pipe, prompts):
    with torch.no_grad():
        return pipe.encode_prompt(prompts, max_sequence_length=tiny.TEXT_TOKENS)[0]


def ids_of(grid):
    return Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 1, *grid.shape))[0]


@torch.no_grad()
def theirs(pipe, tokens, ids, embeds, sigma):
    """diffusers' transformer as Flux2KleinPipeline calls it."""
    return pipe.transformer(
        hidden_states=tokens,
        timestep=torch.full((len(tokens),), sigma * 1000).to(tokens.dtype) / 1000,
        guidance=None,
        encoder_hidden_states=embeds,
        txt_ids=pipe._prepare_text_ids(embeds),
        img_ids=ids,
        return_dict=False,
    )[0]


@torch.no_grad()
def ours(adapter, tokens, where, embeds, sigma):
    positions = adapter.geometry.positions
    places = positions.gather(positions.tables(adapter.geometry.grid.coordinates()), where)
    constant = adapter.constants(torch.tensor([0.9, sigma]))["modulation"]
    context = adapter.module("condition")(embeds)
    return adapter.module("stage0")(tokens, places["cos"], places["sin"], context, constant[1])


# --- parity with diffusers, module by module ---


def test_text(adapter, pipe, dtype):
    """A prompt, none, and one that is cut: states at padding too, and the same ids."""
    (tokenizer,) = adapter.tokenizers()
    given = tokenizer.reader().encode(PROMPTS)
    assert given.ids.shape == (3, tiny.TEXT_TOKENS) and given.cut == PROMPTS[2:]
    with torch.no_grad():
        assert_same(adapter.module("text")(given.ids, given.mask), embeddings(pipe, PROMPTS), dtype)


def test_the_template_is_qwens(pipe):
    """The one of the tiny pipeline is written like the published one's, and ours is what it makes of a prompt."""
    turn = [{"role": "user", "content": "a red fox"}]
    made = pipe.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert TEMPLATE.replace("{}", "a red fox") == made


@pytest.mark.parametrize("sigma", SIGMAS)
def test_condition_and_stage(adapter, pipe, dtype, sigma):
    """All tokens, three images at once: the velocity of diffusers' transformer."""
    grid = adapter.geometry.grid
    tokens = torch.randn(3, grid.tokens, tiny.CHANNELS, generator=seeded(0)[0]).to(DTYPES[dtype])
    embeds = embeddings(pipe, PROMPTS)
    expected = theirs(pipe, tokens, ids_of(grid), embeds, sigma)
    assert_same(ours(adapter, tokens, torch.arange(grid.tokens).expand(3, -1), embeds, sigma), expected, dtype)


@pytest.mark.parametrize("m", [1, 33])
def test_stage_on_some_tokens(adapter, pipe, dtype, m):
    """Random subsets, another for each image: diffusers' transformer called with those tokens and their img_ids."""
    grid = adapter.geometry.grid
    generator = torch.Generator().manual_seed(m)
    tokens = torch.randn(2, m, tiny.CHANNELS, generator=generator).to(DTYPES[dtype])
    where = torch.stack([torch.randperm(grid.tokens, generator=generator)[:m] for _ in range(2)])
    embeds = embeddings(pipe, PROMPTS[:2])
    found = ours(adapter, tokens, where, embeds, SIGMAS[1])
    for b in range(2):
        one = slice(b, b + 1)
        expected = theirs(pipe, tokens[one], ids_of(grid)[where[b]], embeds[one], SIGMAS[1])
        assert_same(found[one], expected, dtype)


def test_decode(adapter, pipe, dtype):
    """As the pipeline finishes: running statistics undone, 2 x 2 pixels of latents apart, decoded."""
    grid, geometry = adapter.geometry.grid, adapter.geometry
    tokens = torch.randn(2, grid.tokens, tiny.CHANNELS, generator=seeded(0)[0])
    with torch.no_grad():
        found = adapter.module("decode")(tokens)
        latents = tokens.mT.unflatten(2, grid.shape)
        bn = pipe.vae.bn
        mean, variance = (x.view(1, -1, 1, 1).float() for x in (bn.running_mean, bn.running_var))
        latents = latents * torch.sqrt(variance + pipe.vae.config.batch_norm_eps) + mean
        picture = pipe.vae.decode(pipe._unpatchify_latents(latents).to(pipe.vae.dtype), return_dict=False)[0]
    expected = pipe.image_processor.postprocess(picture.float(), output_type="pt")
    assert found.shape == (2, 3, geometry.height, geometry.width) and found.dtype == torch.float32
    assert_same(found, expected, dtype)


@pytest.mark.parametrize("batch", [1, 2])
def test_specs_describe_what_the_modules_take_and_give(small, batch):
    """Every module runs on tensors of its spec and answers with tensors of its spec."""
    schedule = StageSchedule(make_stages(96, [2, 1, 2], [0.35, 0.62, 1.0]), uniform_sigmas(5))
    specs = small.specs(schedule, batch, "fp32", preview=True)
    assert [s.name for s in specs] == ["text", "condition", "stage2", "stage1", "stage0", "preview", "decode"]
    for spec in specs:
        inputs = [torch.zeros(s.shape, dtype=DTYPES[s.dtype]) for s in spec.inputs]
        with torch.no_grad():
            out = small.module(spec.name)(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        assert [(tuple(t.shape), t.dtype) for t in out] == [(s.shape, DTYPES[s.dtype]) for s in spec.outputs]
    (constant,) = small.constant_specs(5, "fp32")
    assert small.constants(torch.ones(5))[constant.name].shape == constant.shape == (5, 17 * 32)


def test_no_engine_has_the_layers_of_the_modulation(small):
    """Nor the language model's last layers; the names of the rest are diffusers'."""
    names = {name for name, _ in small.tensors()}
    transformer = {n.split(".")[1] for n in names if n.startswith("transformer.")}
    blocks = {"transformer_blocks", "single_transformer_blocks"}
    assert transformer == blocks | {"x_embedder", "context_embedder", "proj_out"}
    assert max(int(n.split(".")[3]) for n in names if n.startswith("text_encoder.model.layers.")) == 26
    known = dict(small.tensors())
    for name in ("text", "condition", "stage0", "decode"):
        parameters = dict(small.module(name).named_parameters(remove_duplicate=False))
        assert parameters and all(p is known[full] for full, p in parameters.items())


# --- parity with diffusers, from seed to pixels ---


@cache
def reference(folder):
    """diffusers' own pipeline."""
    pipe = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(folder, prompts, seeds, steps=3, size=SIZES[0], **options):
    return reference(folder)(
        prompt=prompts, height=size[0], width=size[1], num_inference_steps=steps, generator=seeded(*seeds),
        max_sequence_length=tiny.TEXT_TOKENS, output_type="pt", **options,
    ).images


def dense(make_bundle, folder, steps=3, size=SIZES[0], **options):
    """One stage of all tokens on the model's own noise levels."""
    settings = {"settings": {"height": size[0], "width": size[1]}}
    custom = CustomSchedule((steps,), (1.0,))
    return jitexport.load(make_bundle(str(folder), method="dense", custom=custom, **settings, **options))


@pytest.mark.parametrize("model", ["base", "distilled"])
@pytest.mark.parametrize(("size", "batch"), list(zip(SIZES, (1, 2), strict=True)))
def test_all_tokens_at_every_step_is_the_pipeline(make_bundle, folders, model, size, batch):
    """Prompts of all lengths in batches of one and two: the base model guided against "", the distilled one not."""
    pipe = dense(make_bundle, folders[model], size=size, batch=batch)
    found = pipe(PROMPTS, generator=seeded(1, 2, 3), output_type="pt").images
    torch.testing.assert_close(found, call(folders[model], PROMPTS, (1, 2, 3), size=size), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_guidance_is_the_pipelines(make_bundle, folder, scale):
    """At a scale of 1 there is no second pass."""
    pipe = dense(make_bundle, folder)
    found = pipe(PROMPTS[0], generator=seeded(3), guidance_scale=scale, output_type="pt").images
    torch.testing.assert_close(found, call(folder, PROMPTS[0], (3,), guidance_scale=scale), atol=1e-4, rtol=0)
    assert (found - pipe(PROMPTS[0], generator=seeded(3), output_type="pt").images).abs().max() > 1e-3


def test_a_negative_prompt_is_its_embeddings_in_the_pipeline(make_bundle, folder):
    """diffusers takes a negative prompt as embeddings only."""
    negative = embeddings(reference(folder), "a dog")
    pipe = dense(make_bundle, folder)
    found = pipe(PROMPTS[0], negative_prompt="a dog", generator=seeded(3), output_type="pt").images
    expected = call(folder, PROMPTS[0], (3,), negative_prompt_embeds=negative)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - pipe(PROMPTS[0], generator=seeded(3), output_type="pt").images).abs().max() > 1e-3


def test_latents_are_given_as_to_the_pipeline(make_bundle, folder):
    """diffusers draws and takes them as channels of whole tokens."""
    given = torch.randn(1, tiny.CHANNELS, *tiny.GRID, generator=seeded(5)[0])
    found = dense(make_bundle, folder)(PROMPTS[0], latents=given, output_type="pt").images
    torch.testing.assert_close(found, call(folder, PROMPTS[0], (0,), latents=given), atol=1e-4, rtol=0)


METHODS = {
    "jit": (CustomSchedule((1, 1, 1), (0.35, 0.62, 1.0)), [33, 59, 96]),
    "ralu": (CustomSchedule((1, 1, 1)), [24, 36, 96]),
    "bottleneck": (CustomSchedule((1, 1, 1)), [24, 96]),
    "ras": (CustomSchedule((6,), (0.25,)), [24, 96]),
}


@pytest.mark.parametrize(("model", "method"), [("distilled", "jit"), *(("base", method) for method in METHODS)])
def test_every_method_runs_from_a_bundle(make_bundle, folders, model, method):
    """Images of seeds do not depend on their neighbours."""
    custom, tokens = METHODS[method]
    path = make_bundle(str(folders[model]), method=method, custom=custom, batch=2)
    engines = {e.name: e.inputs[0].shape[1] for e in read_manifest(path).engines}
    assert sorted(n for name, n in engines.items() if name.startswith("stage")) == tokens
    pipe = jitexport.load(path)
    together = pipe(PROMPTS, generator=seeded(0, 1, 2), output_type="pt").images
    assert together.shape == (3, 3, tiny.HEIGHT, tiny.WIDTH) and together.isfinite().all()
    alone = pipe(PROMPTS[1], generator=seeded(1), output_type="pt").images
    torch.testing.assert_close(together[1], alone[0], atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_a_distilled_model_takes_no_guidance(make_bundle, folders):
    """A scale of 1 says so, as the published examples do; diffusers ignores larger ones, which would mislead."""
    pipe = dense(make_bundle, folders["distilled"])
    options = {"output_type": "pt", "guidance_scale": 1.0}
    found = pipe(PROMPTS[0], generator=seeded(3), **options).images
    assert torch.equal(found, pipe(PROMPTS[0], generator=seeded(3), output_type="pt").images)
    for wrong in ({"guidance_scale": 4.0}, {"negative_prompt": "a dog"}):
        with pytest.raises(InputError, match="guidance"):
            pipe(PROMPTS[0], **wrong)


def test_eight_bits(folder):
    """The blocks' layers are quantized, and the velocity is about the same."""
    exact, rough = (KleinAdapter.from_folder(folder, torch.float32, {"quantization": kind}) for kind in (None, "int8"))
    quantized = {name for name, m in rough.components["transformer"].named_modules() if isinstance(m, QuantizedLinear)}
    assert len(quantized) == 2 * (8 + 4) + 2 * 2 and all("transformer_blocks." in name for name in quantized)
    tokens, embeds = torch.randn(1, 96, tiny.CHANNELS), torch.randn(1, tiny.TEXT_TOKENS, 3 * tiny.HIDDEN)
    expected, found = (ours(a, tokens, torch.arange(96)[None], embeds, SIGMAS[1]) for a in (exact, rough))
    assert 0 < (found - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["text", "condition", "stage1", "decode"])
def test_modules_export(small, name):
    """With every shape fixed, and the program does what the module does."""
    schedule = StageSchedule(make_stages(96, [1, 1], [0.35, 1.0]), uniform_sigmas(2))
    spec = next(s for s in small.specs(schedule, 1, "fp32") if s.name == name)
    inputs = tuple(torch.rand(s.shape).to(DTYPES[s.dtype]) for s in spec.inputs)
    with torch.no_grad():
        program = torch.export.export(small.module(name), inputs)
        torch.testing.assert_close(program.module()(*inputs), small.module(name)(*inputs))


# --- other weights ---


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    """The base model with another fused layer, and beside it an adapter of the difference."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("tuned") / "model")
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    values = load_file(path)
    name = "single_transformer_blocks.1.attn.to_qkv_mlp_proj.weight"
    generator = torch.Generator().manual_seed(3)
    down, up = torch.randn(2, 32, generator=generator), 0.1 * torch.randn(values[name].shape[0], 2, generator=generator)
    values[name] = values[name] + up @ down
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    adapter = {f"lora_unet_single_blocks_1_linear1.{part}": value for part, value in parts.items()}
    save_file(adapter, copy.parent / "lora.safetensors")
    save_file(values, path)
    return copy


def test_an_adapter_is_merged_into_a_fused_layer(make_bundle, folder, tuned):
    """In kohya's names: the images of diffusers' pipeline with the merged weights."""
    pipe = dense(make_bundle, folder)
    plain = pipe(PROMPTS[0], generator=seeded(3), output_type="pt").images
    pipe.load_lora(tuned.parent / "lora.safetensors")
    found = pipe(PROMPTS[0], generator=seeded(3), output_type="pt").images
    torch.testing.assert_close(found, call(tuned, PROMPTS[0], (3,)), atol=1e-4, rtol=0)
    assert (found - plain).abs().max() > 1e-3
    pipe.unload_lora()
    assert torch.equal(pipe(PROMPTS[0], generator=seeded(3), output_type="pt").images, plain)


def test_a_checkpoint_brings_its_own_modulation(make_bundle, folder, tmp_path):
    """The constants of a bundle follow the layers that no engine has."""
    copy = shutil.copytree(folder, tmp_path / "model")
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    values = load_file(path)
    values["single_stream_modulation.linear.weight"] = 2 * values["single_stream_modulation.linear.weight"]
    save_file(values, path)
    pipe = dense(make_bundle, folder)
    plain = pipe(PROMPTS[0], generator=seeded(3), output_type="pt").images
    pipe.load_checkpoint(copy)
    found = pipe(PROMPTS[0], generator=seeded(3), output_type="pt").images
    torch.testing.assert_close(found, call(copy, PROMPTS[0], (3,)), atol=1e-4, rtol=0)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "transformer.single_stream_modulation.linear",
        "transformer.norm_out.linear",
        "transformer.time_guidance_embed.timestep_embedder.linear_1",
        "diffusion_model.double_stream_modulation_img.lin",
        "lora_unet_final_layer_adaLN_modulation_1",
        "diffusion_model.time_in.in_layer",
    ],
)
def test_an_adapter_of_the_modulation_is_refused_by_name(make_bundle, folder, name):
    """A bundle has what those layers give, and not the layers."""
    pair = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(96, 2)}
    with pytest.raises(InputError, match=r"(?s)constants of the bundle.*build a bundle") as caught:
        dense(make_bundle, folder).load_lora({f"{name}.{k}": v for k, v in pair.items()})
    assert name in str(caught.value)


# --- what is not FLUX.2-klein ---


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["Flux2Pipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline"])
def test_other_pipelines_are_refused_by_name(folder, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "model")
    edit(copy / "model_index.json", _class_name=name)
    with pytest.raises(UnsupportedModelError, match=f"{name}(.|\n)*Flux2KleinPipeline"):
        load_adapter(find_source(str(copy)), torch.float32)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"guidance_embeds": True}, "FLUX.2-dev"), ({"joint_attention_dim": 64}, "does not fit the text encoder")],
)
def test_other_transformers_are_refused(small, change, says):
    configs = {name: dict(config) for name, config in small.configs.items()}
    configs["transformer"] |= change
    with pytest.raises(UnsupportedModelError, match=says):
        KleinAdapter.from_configs(configs, small.settings(), torch.float32)


def test_a_language_model_with_too_few_layers_is_refused(small):
    configs = small.configs | {"text_encoder": small.configs["text_encoder"] | {"num_hidden_layers": 20}}
    configs["text_encoder"].pop("layer_types", None)
    with pytest.raises(UnsupportedModelError, match="fewer layers"):
        KleinAdapter.from_configs(configs, small.settings(), torch.float32)


# --- settings ---


def test_a_folder_without_settings_is_run_as_the_pipeline(folders, tmp_path):
    for name, guidance, steps in (("base", 4.0, 50), ("distilled", None, 4)):
        copy = shutil.copytree(folders[name], tmp_path / name)
        (copy / "jitexport.json").unlink()
        adapter = KleinAdapter.from_folder(copy, torch.float32)
        assert (adapter.defaults.guidance.true, adapter.defaults.num_inference_steps) == (guidance, steps)
        assert (adapter.geometry.height, adapter.geometry.width, adapter.geometry.text_tokens) == (1024, 1024, 512)


def test_from_configs_rebuilds_the_same_modules(small):
    """Shapes and names without weights, from what a manifest keeps as JSON."""
    configs = json.loads(json.dumps(small.configs, default=str))
    rebuilt = KleinAdapter.from_configs(configs, small.settings(), torch.float32)
    assert rebuilt.geometry == small.geometry and rebuilt.defaults == small.defaults
    shapes = {name: tuple(t.shape) for name, t in small.tensors()}
    assert {name: tuple(t.shape) for name, t in rebuilt.tensors()} == shapes


# --- the published models, on meta tensors ---


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e9


@pytest.mark.parametrize(
    ("name", "billions", "of_stages", "tflop"),
    [("flux2-klein-4b", 3.876, 3.705, 34.82), ("flux2-klein-9b", 9.079, 8.776, 75.51)],
)
def test_published_sizes(published, name, billions, of_stages, tflop):
    """Parameters with and without the modulation, FLOPs of a pass over 4096 image and 512 text tokens."""
    adapter = published(name)
    transformer = adapter.components["transformer"]
    assert parameters(transformer, adapter.once) == pytest.approx(billions, abs=1e-3)
    assert parameters(transformer) == pytest.approx(of_stages, abs=1e-3)
    assert (adapter.geometry.grid.tokens, adapter.geometry.channels, adapter.geometry.text_tokens) == (4096, 128, 512)
    assert adapter.geometry.drawn == ((128, 64, 64), 1)
    specs = {s.name: s for s in adapter.specs(StageSchedule((Stage(0, 4096, 1),), (1.0, 0.0)), 1, "bf16")}
    flops = sum(count_flops(adapter.module(engine), specs[engine]) for engine in ("condition", "stage0"))
    assert flops / 1e12 == pytest.approx(tflop, abs=0.01)


@pytest.mark.parametrize("size", ["4b", "9b"])
def test_published_defaults(size):
    """The base models have 50 guided steps, the distilled ones, of the same configuration, four without guidance."""
    base, distilled = (find_source(f"flux2-klein-{size}{end}") for end in ("", "-distilled"))
    differ = {name for name in base.configs if base.configs[name] != distilled.configs[name]}
    assert differ == {"pipeline"} and base.hub_id.replace("-base", "") == distilled.hub_id
    for source, guidance, steps in ((base, Guidance(true=4.0, argument="guidance_scale", negative=""), 50),
                                    (distilled, Guidance(argument="guidance_scale"), 4)):
        defaults = KleinAdapter.defaults_of(source.configs, KleinAdapter.usual(source.configs) | source.settings)
        assert (defaults.guidance, defaults.num_inference_steps) == (guidance, steps)


def test_plan_by_name():
    result = CliRunner().invoke(app, ["plan", "--model", "flux2-klein-4b-distilled", "--speedup", "2"])
    assert result.exit_code == 0, result.output
    assert "34.8" in result.output


# --- noise levels ---


@pytest.mark.parametrize("tokens", [96, 1024, 4096, 4300, 4301, 9216])
@pytest.mark.parametrize("n", [1, 4, 11, 18, 50, 200])
def test_log_shift_is_the_pipelines(tokens, n):
    assert log_shift(tokens, n) == pytest.approx(compute_empirical_mu(tokens, n), rel=1e-12)


def test_native_sigmas_are_those_that_a_call_used(small, folder):
    call(folder, "a", (0,), steps=5)
    assert small.native_sigmas(5) == tuple(reference(folder).scheduler.sigmas.tolist())


@pytest.mark.parametrize("n", [4, 18])
def test_shift_is_that_of_the_noise_levels(small, n):
    h, u = small.shift(n), torch.linspace(1, 1 / n, n, dtype=torch.float64)
    assert small.native_sigmas(n)[:-1] == pytest.approx((h * u / (1 + (h - 1) * u)).tolist(), abs=1e-6)


@pytest.mark.parametrize(("n", "last"), [(18, (0.5325, 0.349, 0)), (11, (0.6784, 0.487, 0))])
def test_noise_levels_of_the_release(published, n, last):
    """Those that the release of JiT takes at 1024 x 1024 for this family: the model's own, of 18 and 11 steps."""
    assert published("flux2-klein-9b").native_sigmas(n)[-3:] == pytest.approx(last, abs=1e-4)


@pytest.mark.parametrize("preset", ["default", "paper", "released"])
@pytest.mark.parametrize(("speedup", "n"), [(4.0, 18), (7.0, 11)])
def test_jit_takes_the_models_own_noise_levels(small, preset, speedup, n):
    made = plan(small, speedup=speedup, preset=preset)
    assert made.schedule.sigmas == small.native_sigmas(n)
    assert made.options["timesteps"] == {"kind": "native"}


# --- names ---


def authors_shapes(transformer):
    """{name of the authors' checkpoint: shape} of a transformer, written out from their modules."""
    config, d = transformer.config, transformer.inner_dim
    head, mlp = config.attention_head_dim, int(config.mlp_ratio * transformer.inner_dim)
    shapes = {
        "img_in.weight": (d, config.in_channels),
        "txt_in.weight": (d, config.joint_attention_dim),
        "time_in.in_layer.weight": (d, config.timestep_guidance_channels),
        "time_in.out_layer.weight": (d, d),
        "double_stream_modulation_img.lin.weight": (6 * d, d),
        "double_stream_modulation_txt.lin.weight": (6 * d, d),
        "single_stream_modulation.lin.weight": (3 * d, d),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.linear.weight": (config.in_channels, d),
    }
    for i in range(config.num_layers):
        for stream in ("img", "txt"):
            attn = f"double_blocks.{i}.{stream}_attn"
            shapes[f"{attn}.qkv.weight"], shapes[f"{attn}.proj.weight"] = (3 * d, d), (d, d)
            shapes[f"{attn}.norm.query_norm.scale"] = shapes[f"{attn}.norm.key_norm.scale"] = (head,)
            shapes[f"double_blocks.{i}.{stream}_mlp.0.weight"] = (2 * mlp, d)
            shapes[f"double_blocks.{i}.{stream}_mlp.2.weight"] = (d, mlp)
    for i in range(config.num_single_layers):
        block = f"single_blocks.{i}"
        shapes[f"{block}.linear1.weight"], shapes[f"{block}.linear2.weight"] = (3 * d + 2 * mlp, d), (d, d + mlp)
        shapes[f"{block}.norm.query_norm.scale"] = shapes[f"{block}.norm.key_norm.scale"] = (head,)
    return shapes


def test_a_checkpoint_in_the_authors_names(tmp_path):
    """What diffusers' own conversion makes of it, tensor by tensor."""
    transformer = tiny.klein().transformer
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in authors_shapes(transformer).items()}
    save_file(values, tmp_path / "klein.safetensors")
    expected = convert_flux2_transformer_checkpoint_to_diffusers(dict(values))
    shapes = {f"transformer.{name}": tuple(value.shape) for name, value in transformer.state_dict().items()}
    found = read_single_file(tmp_path / "klein.safetensors", NAMING, shapes, torch.float32)
    assert found.keys() == {f"transformer.{name}" for name in expected}
    assert all(torch.equal(found[f"transformer.{name}"], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def names():
    """Of all parameters."""
    pipe = tiny.klein()
    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    return [f"{part}.{name}" for part, module in parts.items() for name, _ in module.named_parameters()]


DOUBLE, SINGLE = "transformer.transformer_blocks.1", "transformer.single_transformer_blocks.0"


@pytest.mark.parametrize(
    ("name", "modules"),
    {
        "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": [f"{SINGLE}.attn.to_qkv_mlp_proj"],
        "base_model.model.transformer_blocks.1.ff.linear_in": [f"{DOUBLE}.ff.linear_in"],
        "lora_unet_single_blocks_0_linear1": [f"{SINGLE}.attn.to_qkv_mlp_proj"],
        "lora_unet_double_blocks_1_txt_mlp_2": [f"{DOUBLE}.ff_context.linear_out"],
        "diffusion_model.double_blocks.1.img_attn.qkv": [f"{DOUBLE}.attn.to_{x}" for x in "qkv"],
        "lycoris_transformer_blocks_1_attn_to_added_qkv": [f"{DOUBLE}.attn.add_{x}_proj" for x in "qkv"],
        "lora_transformer_single_transformer_blocks_0_attn_to_out": [f"{SINGLE}.attn.to_out"],
        "text_encoder.model.layers.0.mlp.up_proj": ["text_encoder.model.layers.0.mlp.up_proj"],
        "diffusion_model.double_blocks.2.img_mlp.0": None,  # a block that the model does not have
        "diffusion_model.vector_in.in_layer": None,  # FLUX.1's
    }.items(),
)
def test_names_in_adapters(names, name, modules):
    target = Resolver(NAMING, names).find(name)
    assert (None if target is None else list(target.modules)) == modules
