import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps
from safetensors.torch import load_file, save_file

import jitexport
from jitexport.bundle.reading import read_manifest
from jitexport.errors import InputError, ScheduleError, UnsupportedModelError
from jitexport.flops import count_flops
from jitexport.models.naming import Resolver
from jitexport.models.published import QWEN_IMAGE_CONFIGS
from jitexport.models.qwen_image import DROPPED, NAMING, TEMPLATE, QwenImageAdapter
from jitexport.models.sources import config_adapter, find_source, load_adapter
from jitexport.plan import CustomSchedule, plan
from jitexport.schedule import StageSchedule, beta_sigmas, make_stages, split_steps, uniform_sigmas
from jitexport.solving import PAPER_PRESETS
from jitexport.specs import DTYPES
from jitexport.verify import verify
from tests import tiny_qwen_image as tiny
from tests.parity import assert_same, seeded

PROMPTS = ["a red fox in the snow", "", "the red fox under the green trees of the image, a quantity of snow, a fox"]

# diffusers makes the angles of time in the model's dtype, we in fp32: bf16 keeps these values exactly.
SIGMAS = (1.0, 0.5)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny-qwen-image")


@pytest.fixture(scope="module")
def pipe(folder, dtype):
    pipe = QwenImagePipeline.from_pretrained(folder, dtype=DTYPES[dtype])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def adapters(folder, dtype):
    """The adapter for a token grid: reading it once is enough, the components do not depend on sizes."""
    made = QwenImageAdapter.from_folder(folder, DTYPES[dtype])

    def of(grid=tiny.GRID):
        made.geometry = made.geometry_of(made.configs, made.settings() | {"height": grid[0] * 8, "width": grid[1] * 8})
        return made

    return of


@pytest.fixture(scope="module")
def small(folder):
    return QwenImageAdapter.from_folder(folder, torch.float32)


def randn(*shape, dtype="fp32", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


@torch.no_grad()
def encoded(adapter, prompts):
    """What the text engine makes of prompts."""
    fast = adapter.tokenizers()[0].reader().encode(prompts)
    return adapter.module("text")(fast.ids, fast.mask)


@torch.no_grad()
def theirs(pipe, tokens, shape, prompts, sigma, angles=None):
    """diffusers' transformer as QwenImagePipeline calls it; `angles` for tokens that are not the whole grid."""
    embeds, mask = pipe.encode_prompt(prompts, max_sequence_length=tiny.TEXT_TOKENS)
    model = pipe.transformer
    hook = None if angles is None else model.pos_embed.register_forward_hook(lambda m, x, out: (angles, out[1]))
    try:
        return model(
            hidden_states=tokens,
            timestep=torch.full((len(tokens),), sigma * 1000).to(tokens.dtype) / 1000,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *shape)]] * len(tokens),
            return_dict=False,
        )[0]
    finally:
        if hook is not None:
            hook.remove()


@torch.no_grad()
def ours(adapter, tokens, where, prompts, sigma):
    """The velocity of tokens at grid places `where` [B, m]."""
    sigmas = torch.tensor([0.9, sigma, 0.1])
    context, mask = adapter.module("condition")(*encoded(adapter, prompts))
    positions, places = adapter.geometry.positions, adapter.geometry.grid.coordinates()
    angles = positions.gather(positions.tables(places), where)
    modulation = adapter.constants(sigmas)["modulation"][1]
    return adapter.module("stage0")(tokens, *angles.values(), context, mask, modulation)


# --- parity with diffusers ---


def test_the_template_is_the_pipelines(pipe, small):
    assert pipe.prompt_template_encode == TEMPLATE and pipe.prompt_template_encode_start_idx == DROPPED
    before = pipe.tokenizer(TEMPLATE.partition("{}")[0]).input_ids
    assert len(before) == DROPPED  # of the tests' tokenizer as of Qwen's


@pytest.mark.parametrize("prompts", [PROMPTS, [""], PROMPTS[2:], ["a fox", " {} ", "über 42\n\nfoxes"]])
def test_text(adapters, pipe, dtype, prompts):
    """Prompts of several lengths, an empty one, one that is cut: states and which of them count."""
    states, mask = encoded(adapters(), prompts)
    with torch.no_grad():
        expected, valid = pipe.encode_prompt(prompts, max_sequence_length=tiny.TEXT_TOKENS)
    valid = torch.ones(expected.shape[:2]) if valid is None else valid  # all of them, as the pipeline says it
    length = expected.shape[1]
    assert torch.equal(mask[:, :length], valid.float()) and not mask[:, length:].any()
    assert_same(states[:, :length][valid.bool()], expected[valid.bool()], dtype)
    assert states.isfinite().all()


@pytest.mark.parametrize("shape", [tiny.GRID, (4, 4), (3, 8), (1, 9)])
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_stage(adapters, pipe, dtype, shape, sigma, batch):
    """All tokens, several images at once, on odd and even grids: the velocity of diffusers' transformer."""
    n = math.prod(shape)
    tokens = randn(batch, n, 16, dtype=dtype)
    expected = theirs(pipe, tokens, shape, PROMPTS[:batch], sigma)
    found = ours(adapters(shape), tokens, torch.arange(n).expand(batch, -1), PROMPTS[:batch], sigma)
    assert_same(found, expected, dtype)


@pytest.mark.parametrize("m", [1, 7, 34])
def test_stage_on_some_tokens(adapters, pipe, dtype, m):
    """Random subsets, another for each image: diffusers' transformer on those tokens, with their angles."""
    n, generator = math.prod(tiny.GRID), torch.Generator().manual_seed(m)
    tokens = randn(2, m, 16, dtype=dtype)
    where = torch.stack([torch.randperm(n, generator=generator)[:m] for _ in range(2)])
    found = ours(adapters(), tokens, where, PROMPTS[:2], SIGMAS[1])
    every, _ = pipe.transformer.pos_embed([(1, *tiny.GRID)], max_txt_seq_len=1, device=torch.device("cpu"))
    for b in range(2):
        expected = theirs(pipe, tokens[b : b + 1], tiny.GRID, PROMPTS[b : b + 1], SIGMAS[1], every[where[b]])
        assert_same(found[b : b + 1], expected, dtype)


def test_padding_is_not_seen(small):
    """Whatever stands behind a text's end, the image does not see it."""
    states, mask = encoded(small, PROMPTS[:1])
    other = torch.where(mask[..., None] == 0, 100 * torch.randn_like(states), states)
    tokens, where = randn(1, 35, 16), torch.arange(35)[None]
    positions = small.geometry.positions
    angles = positions.gather(positions.tables(small.geometry.grid.coordinates()), where).values()
    modulation = small.constants(torch.tensor([0.5]))["modulation"][0]
    with torch.no_grad():
        a, b = (
            small.module("stage0")(tokens, *angles, *small.module("condition")(x, mask), modulation)
            for x in (states, other)
        )
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [tiny.GRID, (4, 4), (3, 8)])
def test_decode(adapters, pipe, dtype, shape):
    height, width = shape[0] * 8, shape[1] * 8
    latents = randn(2, math.prod(shape), 16)
    config = pipe.vae.config
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        found = adapters(shape).module("decode")(latents)
        unpacked = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        picture = pipe.vae.decode((unpacked * std + mean).to(pipe.vae.dtype), return_dict=False)[0][:, :, 0]
    expected = pipe.image_processor.postprocess(picture.float(), output_type="pt")
    assert found.shape == (2, 3, height, width) and found.std() > 0.01
    assert found.min() >= 0 and found.max() <= 1
    assert_same(found, expected, dtype)


def test_quantized_blocks(folder, small):
    """Every linear layer of the blocks, none outside them; velocities a few percent from the ordinary ones."""
    adapter = QwenImageAdapter.from_folder(folder, torch.float32, {"quantization": "int8"})
    quantized = {name for name, layer in adapter.components["transformer"].named_modules() if hasattr(layer, "kind")}
    assert len(quantized) == 2 * 12 and all(name.startswith("transformer_blocks.") for name in quantized)
    tokens, where = randn(2, 35, 16), torch.arange(35).expand(2, -1)
    found, expected = (ours(a, tokens, where, PROMPTS[:2], SIGMAS[1]) for a in (adapter, small))
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.05


# --- noise levels ---

SHIFTING = {
    "qwen-image": QWEN_IMAGE_CONFIGS["scheduler"],
    "lightning": {
        "use_dynamic_shifting": True, "base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None,
    },
    "static": {"shift": 3.0, "use_dynamic_shifting": False},
}  # fmt: skip


def with_scheduler(adapter, changes):
    """The same sizes with another scheduler, without weights."""
    scheduler = dict(FlowMatchEulerDiscreteScheduler(**changes).config)
    return QwenImageAdapter.from_configs(adapter.configs | {"scheduler": scheduler}, adapter.settings(), torch.float32)


@pytest.mark.parametrize("shifting", SHIFTING)
@pytest.mark.parametrize("n", [2, 4, 50])
def test_native_sigmas_are_the_pipelines(small, shifting, n):
    """As `QwenImagePipeline.__call__` sets them."""
    reference = FlowMatchEulerDiscreteScheduler(**SHIFTING[shifting])
    config = reference.config
    mu = calculate_shift(35, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    retrieve_timesteps(reference, n, "cpu", sigmas=np.linspace(1.0, 1 / n, n), mu=mu)
    assert with_scheduler(small, SHIFTING[shifting]).native_sigmas(n) == tuple(reference.sigmas.tolist())


def test_native_sigmas_are_those_that_a_call_used(small, pipe):
    pipe("a fox", height=tiny.HEIGHT, width=tiny.WIDTH, num_inference_steps=5, output_type="latent")
    assert small.native_sigmas(5) == tuple(pipe.scheduler.sigmas.tolist())
    assert small.native_sigmas(5)[-2:] == pytest.approx((0.02, 0.0), abs=1e-6)


@pytest.mark.parametrize(("shifting", "expected"), [("lightning", 3.0), ("static", 3.0)])
def test_shift(small, shifting, expected):
    """Sigmas of a shift h are h u / (1 + (h - 1) u) of even u."""
    adapter = with_scheduler(small, SHIFTING[shifting])
    assert adapter.shift(4) == pytest.approx(expected)
    u = torch.linspace(1, 1 / 4, 4)
    torch.testing.assert_close(torch.tensor(adapter.native_sigmas(4)[:-1]), expected * u / (1 + (expected - 1) * u))


# --- reading a folder ---


def test_settings(small):
    assert small.settings() == {
        "height": tiny.HEIGHT, "width": tiny.WIDTH, "max_sequence_length": tiny.TEXT_TOKENS, "guidance_scale": 4.0,
        "num_inference_steps": 50, "quantization": None, "features": None,
    }  # fmt: skip
    guidance = small.defaults.guidance
    assert (guidance.true, guidance.argument, guidance.negative) == (4.0, "true_cfg_scale", None)
    assert guidance.distilled is None and guidance.rescaled and small.defaults.num_inference_steps == 50
    assert (small.geometry.grid.shape, small.geometry.latent_shape) == (tiny.GRID, (4, 14, 10))


@pytest.mark.parametrize("size", [(60, 40), (56, 44), (4, 40)])
def test_sizes_that_the_grid_does_not_divide(folder, size):
    with pytest.raises(InputError, match="multiples of 8"):
        QwenImageAdapter.from_folder(folder, torch.float32, {"height": size[0], "width": size[1]})


def test_more_text_than_the_model_reads(folder):
    with pytest.raises(InputError, match="1024"):
        QwenImageAdapter.from_folder(folder, torch.float32, {"max_sequence_length": 1025})


def edited(folder, target, part, **changes):
    copy = shutil.copytree(folder, target / "model")
    path = copy / part
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


@pytest.mark.parametrize("name", ["zero_cond_t", "use_layer3d_rope", "use_additional_t_cond", "guidance_embeds"])
def test_transformers_of_other_models_are_refused(small, name):
    configs = small.configs | {"transformer": small.configs["transformer"] | {name: True}}
    with pytest.raises(UnsupportedModelError, match=rf"(?s)Edit or Qwen-Image-Layered.*{name}"):
        QwenImageAdapter.check(configs, small.settings())


def test_autoencoders_of_other_pictures_are_refused(small):
    configs = small.configs | {"vae": small.configs["vae"] | {"input_channels": 4}}
    with pytest.raises(UnsupportedModelError, match=r"(?s)Layered.*4 channels"):
        QwenImageAdapter.check(configs, small.settings())


@pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageLayeredPipeline"])
def test_other_pipelines_are_refused_by_name(folder, tmp_path, name):
    copy = edited(folder, tmp_path, "model_index.json", _class_name=name)
    with pytest.raises(UnsupportedModelError, match=rf"(?s){name}.*QwenImagePipeline"):
        load_adapter(find_source(str(copy)), torch.float32)


def test_from_configs_rebuilds_the_same_modules(small):
    """Shapes and names without weights, from what a manifest keeps as JSON."""
    configs = json.loads(json.dumps(small.configs, default=str))
    rebuilt = QwenImageAdapter.from_configs(configs, small.settings(), torch.float32)
    assert rebuilt.geometry == small.geometry and rebuilt.defaults == small.defaults
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in small.tensors()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in rebuilt.tensors()} == shapes
    assert all(t.is_meta for _, t in rebuilt.tensors())
    assert rebuilt.constants(torch.ones(3, device="meta"))["modulation"].is_meta


def test_modules_name_their_parameters_as_the_model_does(small, folder):
    """And together they have every weight that is left: nothing is carried along that no engine reads."""
    known = dict(small.tensors())
    used = set()
    for name in ("text", "condition", "stage0", "decode"):
        parameters = dict(small.module(name).named_parameters(remove_duplicate=False))
        assert parameters and all(p is known[full] for full, p in parameters.items())
        used |= parameters.keys()
    assert used == known.keys() and not any(p.requires_grad for p in known.values())
    pipe = QwenImagePipeline.from_pretrained(folder)
    theirs = {f"{c}.{n}" for c in small.components for n, _ in getattr(pipe, c).named_parameters()}
    assert known.keys() < theirs
    gone = {name for name in theirs - known.keys() if name.startswith("transformer.")}
    assert gone and all(any(part in name for part in ("_mod.1.", "time_text_embed", "norm_out")) for name in gone)


def test_names_in_adapters(small):
    found = Resolver(NAMING, [name for name, _ in small.tensors()]).find
    expected = ("transformer.transformer_blocks.1.attn.to_add_out",)
    for name in (
        "transformer.transformer_blocks.1.attn.to_add_out",
        "transformer_blocks.1.attn.to_add_out",
        "diffusion_model.transformer_blocks.1.attn.to_add_out",
        "lora_unet_transformer_blocks_1_attn_to_add_out",
    ):
        assert found(name).modules == expected
    fused = found("transformer_blocks.0.attn.to_qkv")
    assert fused.modules == tuple(f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv") and fused.partial
    assert found("transformer_blocks.0.img_mod.1") is None  # in no engine


def test_a_transformer_in_one_file(small, folder, tmp_path):
    """As ComfyUI has it, whose names are diffusers' behind a prefix."""
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({f"model.diffusion_model.{name}": value for name, value in weights.items()}, tmp_path / "one.safetensors")
    other = QwenImageAdapter.from_file(tmp_path / "one.safetensors", folder, torch.float32)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(other.tensors(), small.tensors(), strict=True))
    sigmas = torch.tensor(SIGMAS)
    assert torch.equal(*(a.constants(sigmas)["modulation"] for a in (other, small)))


# --- specs ---


def three_stages(tokens):
    return StageSchedule(make_stages(tokens, [2, 1, 2], [0.35, 0.62, 1.0]), uniform_sigmas(5))


@pytest.mark.parametrize("batch", [1, 3])
def test_specs_describe_what_the_modules_take_and_give(folder, dtype, batch):
    """Every module runs on tensors of its spec and answers with tensors of its spec."""
    adapter = QwenImageAdapter.from_folder(folder, DTYPES[dtype], {"height": 48})
    schedule = three_stages(30)
    specs = adapter.specs(schedule, batch, dtype)
    assert [s.name for s in specs] == ["text", "condition", "stage2", "stage1", "stage0", "decode"]
    for spec in specs:
        inputs = [torch.zeros(s.shape, dtype=DTYPES[s.dtype]) for s in spec.inputs]
        with torch.no_grad():
            out = adapter.module(spec.name)(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        assert [(tuple(t.shape), t.dtype) for t in out] == [(s.shape, DTYPES[s.dtype]) for s in spec.outputs]
    constants = adapter.constants(torch.tensor(schedule.sigmas[:-1]))
    (spec,) = adapter.constant_specs(5, dtype)
    assert (tuple(constants[spec.name].shape), constants[spec.name].dtype) == (spec.shape, DTYPES[spec.dtype])


# --- Qwen-Image's own configuration, on meta tensors ---


@pytest.fixture(scope="module")
def published():
    return config_adapter(find_source("qwen-image"), torch.bfloat16)


def test_published_size(published):
    stage = sum(p.numel() for p in published.components["transformer"].parameters())
    once = sum(p.numel() for p in published.once.parameters())
    assert (stage + once) / 1e9 == pytest.approx(20.43, abs=0.005) and once / 1e9 == pytest.approx(6.8, abs=0.05)
    language = sum(p.numel() for p in published.components["text_encoder"].parameters())
    assert language / 1e9 == pytest.approx(7.07, abs=0.01)  # Qwen2.5-VL-7B without pictures and head
    assert (published.geometry.grid.tokens, published.geometry.channels, published.geometry.text_tokens) == (
        4096, 64, 512,
    )  # fmt: skip
    assert published.shift(50) == pytest.approx(2.0008, abs=1e-4)
    assert published.native_sigmas(50)[:3] == pytest.approx((1.0, 0.98970, 0.97919), abs=1e-5)


def traced(layers, **settings):
    """The published model with fewer of its equal blocks and layers, and all engines of the 4x schedule."""
    source = find_source("qwen-image")
    source.configs["transformer"] = source.configs["transformer"] | {"num_layers": layers}
    text = source.configs["text_encoder"]["text_config"] | {"num_hidden_layers": layers}
    source.configs["text_encoder"] = {"text_config": text, "vision_config": {"depth": 1}}
    adapter = config_adapter(source, torch.bfloat16, settings)
    nfe, ratios = PAPER_PRESETS[4.0]
    stages = make_stages(adapter.geometry.grid.tokens, split_steps(nfe), ratios)
    schedule = StageSchedule(stages, beta_sigmas(nfe, 1.4, 0.42))
    return adapter, schedule, {s.name: s for s in adapter.specs(schedule, 1, "bf16")}


def cost_of_a_pass(stage="stage0", **settings):
    """FLOPs with all 60 blocks, from those with one and with two: every block costs the same."""
    costs = []
    for layers in (1, 2):
        adapter, _, specs = traced(layers, **settings)
        costs.append(sum(count_flops(adapter.module(name), specs[name]) for name in ("condition", stage)))
    return costs[0] + 59 * (costs[1] - costs[0])


@pytest.mark.parametrize(
    ("size", "text", "teraflops"),
    [
        ((1024, 1024), 128, 70.6), ((1024, 1024), 512, 78.3), ((1024, 1024), 1024, 88.9), ((1328, 1328), 512, 141.0),
        ((928, 1664), 512, 120.5),
    ],
)  # fmt: skip
def test_flops_of_a_pass(size, text, teraflops):
    cost = cost_of_a_pass(height=size[0], width=size[1], max_sequence_length=text)
    assert cost / 1e12 == pytest.approx(teraflops, abs=0.05)


def test_flops_of_the_4x_preset():
    """50 steps cost 4.14 times as much as 7, 4 and 7 at 1433, 2539 and 4096 tokens."""
    _, schedule, _ = traced(1)
    costs = {s.name: cost_of_a_pass(s.name) for s in schedule.engines}
    total = sum(stage.steps * costs[stage.name] for stage in schedule.stages)
    assert 50 * costs["stage0"] / total == pytest.approx(4.14, abs=0.01)


@pytest.mark.parametrize("size", [(1024, 1024), (1328, 1328), (928, 1664)])
def test_published_model_traces(size):
    """Shapes through the modules of the 4x schedule, also on an odd grid."""
    adapter, _, specs = traced(2, height=size[0], width=size[1])
    assert adapter.geometry.grid.shape == (size[0] // 16, size[1] // 16)
    for spec in specs.values():
        inputs = [torch.empty(s.shape, dtype=DTYPES[s.dtype], device="meta") for s in spec.inputs]
        with torch.no_grad():
            out = adapter.module(spec.name)(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        assert [tuple(t.shape) for t in out] == [s.shape for s in spec.outputs]


def test_stages_export():
    """torch.export takes a stage of the real sizes, on an odd grid, with every shape fixed."""
    adapter, _, specs = traced(1, height=1328, width=1328)
    inputs = tuple(torch.empty(s.shape, dtype=DTYPES[s.dtype], device="meta") for s in specs["stage1"].inputs)
    with torch.no_grad():
        program = torch.export.export(adapter.module("stage1"), inputs)
    output = next(n for n in program.graph.nodes if n.op == "output").args[0][0].meta["val"]
    assert tuple(output.shape) == (1, round(0.62 * 6889), 64)


@pytest.mark.parametrize("name", ["text", "condition", "decode"])
def test_other_engines_export(small, name):
    """And give what the modules give."""
    spec = next(s for s in small.specs(three_stages(35), 2, "fp32") if s.name == name)
    inputs = tuple(torch.ones(s.shape, dtype=DTYPES[s.dtype]) for s in spec.inputs)
    with torch.no_grad():
        program = torch.export.export(small.module(name), inputs)
        found, expected = program.module()(*inputs), small.module(name)(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


# --- bundles ---

STEPS = 4


@pytest.fixture(scope="module")
def dense(folder, make_bundle):
    """Pipelines of one stage of all tokens on the model's own noise levels, by images and passes of an engine run."""

    def made(batch=1, passes=1, **settings):
        options = {"method": "dense", "custom": CustomSchedule((STEPS,), (1.0,)), "settings": settings}
        return jitexport.load(make_bundle(str(folder), batch=batch, passes=passes, **options))

    return made


@pytest.fixture(scope="module")
def reference(folder):
    """diffusers' own call, from seed to pixels."""
    pipe = QwenImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def call(prompt, size=(tiny.HEIGHT, tiny.WIDTH), **options):
        return pipe(
            prompt, height=size[0], width=size[1], num_inference_steps=STEPS, max_sequence_length=tiny.TEXT_TOKENS,
            output_type="pt", **options,
        ).images  # fmt: skip

    return call


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    "guidance", [{}, {"negative_prompt": " "}, {"negative_prompt": "a tree of snow", "true_cfg_scale": 2.5}]
)
def test_all_tokens_at_every_step_is_the_pipeline(dense, reference, prompt, guidance):
    """Without and with a second pass, whose text is shorter or longer than the first's."""
    found = dense()(prompt, generator=seeded(3), output_type="pt", **guidance).images
    close(found, reference(prompt, generator=seeded(3), **guidance))


def test_embeddings_instead_of_prompts(dense, folder):
    """As `encode_prompt` gives them, padded to the bundle's length, their mask of whole numbers."""
    pipe = dense()
    embeds, mask = QwenImagePipeline.from_pretrained(folder).encode_prompt(["a red fox", "a red fox in the snow"])
    more = tiny.TEXT_TOKENS - mask.shape[1]
    embeds, mask = (torch.nn.functional.pad(t, (0, 0, 0, more)[-2 * (t.ndim - 1) :]) for t in (embeds, mask))
    found = pipe(
        prompt_embeds=embeds[:1].detach(), prompt_embeds_mask=mask[:1], negative_prompt_embeds=embeds[1:].detach(),
        negative_prompt_embeds_mask=mask[1:], generator=seeded(3), output_type="pt",
    ).images  # fmt: skip
    expected = pipe("a red fox", negative_prompt="a red fox in the snow", generator=seeded(3), output_type="pt").images
    close(found, expected)


def low_rank(name, out, into):
    generator = torch.Generator().manual_seed(1)
    return {
        f"{name}.lora_A.weight": 0.3 * torch.randn(2, into, generator=generator),
        f"{name}.lora_B.weight": 0.3 * torch.randn(out, 2, generator=generator),
    }


def test_lora_is_diffusers(dense, folder):
    state = low_rank("transformer.transformer_blocks.1.attn.add_k_proj", 32, 32)
    state |= low_rank("transformer.transformer_blocks.0.img_mlp.net.2", 32, 128)
    tuned = QwenImagePipeline.from_pretrained(folder, dtype=torch.float32)
    tuned.set_progress_bar_config(disable=True)
    tuned.load_lora_weights(dict(state))
    options = {"prompt": "a fox", "negative_prompt": "", "output_type": "pt"}
    expected = tuned(
        height=tiny.HEIGHT, width=tiny.WIDTH, num_inference_steps=STEPS, generator=seeded(3), **options
    ).images  # fmt: skip
    pipe = dense()
    before = pipe(**options, generator=seeded(3)).images
    pipe.load_lora(state)
    close(pipe(**options, generator=seeded(3)).images, expected)
    assert (before - expected).abs().max() > 1e-3
    pipe.unload_lora()
    assert torch.equal(pipe(**options, generator=seeded(3)).images, before)


@pytest.mark.parametrize("name", ["transformer.transformer_blocks.0.img_mod.1", "lora_unet_norm_out_linear"])
def test_lora_of_modulation_is_refused_with_the_remedy(dense, name):
    with pytest.raises(InputError, match=r"(?s)constants of the bundle.*build a bundle") as caught:
        dense().load_lora(low_rank(name, 192, 32))
    assert name in str(caught.value)


def test_guidance_changes_the_image(dense):
    a, b = (dense()("a fox", generator=seeded(3), output_type="pt", **g).images for g in ({}, {"negative_prompt": ""}))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("passes", [1, 2])
def test_several_images_at_once_are_the_pipelines(dense, reference, passes):
    """Prompts and negative prompts of several lengths; a batch that is not full; both passes in one run."""
    negative = ["snow", "", "a green image of the system"]
    found = dense(2, passes)(PROMPTS, negative_prompt=negative, generator=seeded(3, 4, 5), output_type="pt").images
    close(found, reference(PROMPTS, negative_prompt=negative, generator=seeded(3, 4, 5)))
    one = dense(2, passes)(PROMPTS[:2], generator=seeded(3, 4), output_type="pt").images
    close(one, reference(PROMPTS[:2], generator=seeded(3, 4)))


@pytest.mark.parametrize("size", [(24, 64), (48, 48)])
def test_other_sizes_are_the_pipelines(dense, reference, size):
    found = dense(height=size[0], width=size[1])("a fox", generator=seeded(3), output_type="pt").images
    close(found, reference("a fox", size, generator=seeded(3)))


METHODS = {
    "jit": CustomSchedule((2, 1, 2), (0.4, 0.7, 1.0)),
    "ras": CustomSchedule((7,), (0.4,)),
    "ralu": CustomSchedule((1, 2, 2)),
    "bottleneck": CustomSchedule((1, 2, 2)),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(folder, make_bundle, method):
    """With and without a second pass; on an odd grid where the method has no halved one."""
    size = {"height": 48, "width": 32} if method in ("ralu", "bottleneck") else {}
    path = make_bundle(str(folder), method=method, custom=METHODS[method], batch=2, passes=1, settings=size)
    pipe = jitexport.load(path)
    prompts = ["a red fox", "the snow"]
    alone, guided = (
        pipe(prompts, generator=seeded(0, 1), output_type="pt", **options).images
        for options in ({}, {"negative_prompt": ["", "trees"]})
    )
    assert alone.shape == guided.shape == (2, 3, size.get("height", 56), size.get("width", 40))
    assert alone.isfinite().all() and guided.isfinite().all() and (alone - guided).abs().max() > 1e-3
    first = pipe(prompts[0], negative_prompt="", generator=seeded(0), output_type="pt").images
    close(first[0], guided[0])
    result = verify(path)
    assert result.passed and all(r.exact for r in result.engines)


@pytest.mark.parametrize("method", ["ralu", "bottleneck"])
def test_methods_that_halve_the_grid_refuse_odd_ones(folder, method):
    with pytest.raises(ScheduleError, match="even number of token rows"):
        plan(load_adapter(find_source(str(folder)), torch.float32), method=method, custom=METHODS[method])


def test_bundles_have_no_weights_that_no_engine_reads(folder, make_bundle, dense):
    path = make_bundle(str(folder), method="jit", custom=METHODS["jit"], batch=2, passes=1, settings={})
    manifest = read_manifest(path)
    assert [c.name for c in manifest.constants] == ["modulation"]
    pipe = dense()
    assert not any("img_mod" in name or "vae.encoder" in name for name in pipe.weights.tensors)
