import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import save_file

import jitexport
from jitexport.build import build
from jitexport.errors import InputError, UnsupportedModelError
from jitexport.flops import count_flops, step_cost
from jitexport.grid import TokenGrid, pack, unpack
from jitexport.models.encoders import SD3Text
from jitexport.models.naming import Resolver
from jitexport.models.published import SD3
from jitexport.models.sd3 import PATCH, SD3Adapter, SD3Condition, SD3Stage
from jitexport.models.sd3_names import NAMING
from jitexport.models.sincos import SinCos, cropped, published_table, read_table
from jitexport.models.single_file import read_single_file
from jitexport.models.sources import config_adapter, find_source, load_adapter, published
from jitexport.plan import CustomSchedule
from jitexport.schedule import StageSchedule, make_stages, uniform_sigmas
from jitexport.specs import DTYPES
from tests import tiny, tiny_sd3
from tests.parity import assert_same

PROMPTS = ["a red fox in the snow", "", "a dog under the green tree near a river on a hill in the sky"]
GRIDS = [(12, 8), (5, 7)]


@pytest.fixture(scope="module", params=["3", "3.5-medium"])
def folder(request, tmp_path_factory):
    return tiny_sd3.save_sd3(tmp_path_factory.mktemp("sd3") / "model", medium35=request.param == "3.5-medium")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(folder, dtype):
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if not (folder / name).is_dir()}
    return StableDiffusion3Pipeline.from_pretrained(folder, dtype=DTYPES[dtype], **absent)


def embeddings(pipe, prompts=PROMPTS):
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=tiny.TEXT_TOKENS
        )
    return embeds, pooled


def positions(pipe, grid, places):
    config = pipe.transformer.config
    table = published_table(pipe.transformer.inner_dim, config.pos_embed_max_size, config.sample_size // PATCH)
    return cropped(table, config.pos_embed_max_size, grid).tables(places)["positions"]


@torch.no_grad()
def ours(pipe, tokens, where, embeds, pooled, sigmas, step):
    modulation, context = SD3Condition(pipe.transformer)(embeds, pooled, torch.tensor(sigmas))
    return SD3Stage(pipe.transformer)(tokens, where, modulation[step], context)


@torch.no_grad()
def theirs(pipe, latents, embeds, pooled, sigma):
    return pipe.transformer(
        hidden_states=latents,
        timestep=torch.full((len(latents),), sigma * 1000),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0]


def test_text(pipe, dtype):
    """Prompts of several lengths, an empty one, and one that is cut."""
    config = pipe.transformer.config
    module = SD3Text(
        pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3,
        tokens=tiny.TEXT_TOKENS, width=config.joint_attention_dim,
    )
    tokenizers = [(pipe.tokenizer, tiny.CLIP_TOKENS), (pipe.tokenizer_2, tiny.CLIP_TOKENS)]
    tokenizers += [(pipe.tokenizer_3, tiny.TEXT_TOKENS)] if pipe.tokenizer_3 else []
    ids = [
        t(PROMPTS, padding="max_length", max_length=n, truncation=True, return_tensors="pt").input_ids
        for t, n in tokenizers
    ]
    with torch.no_grad():
        states, pooled = module(*ids)
    expected_states, expected_pooled = embeddings(pipe)
    assert_same(states, expected_states, dtype)
    assert_same(pooled, expected_pooled, dtype)


@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize("sigma", [1.0, 0.512])
@pytest.mark.parametrize("batch", [1, 2])
def test_condition_and_stage(pipe, dtype, shape, sigma, batch):
    grid = TokenGrid(shape)
    latents = torch.randn(batch, 4, 2 * shape[0], 2 * shape[1], generator=torch.Generator().manual_seed(0))
    latents = latents.to(DTYPES[dtype])
    embeds, pooled = embeddings(pipe, PROMPTS[:batch])
    where = positions(pipe, shape, grid.coordinates()).expand(batch, -1, -1)
    found = ours(pipe, pack(latents, PATCH), where, embeds, pooled, [0.9, sigma, 0.1], 1)
    assert_same(unpack(found, grid, PATCH), theirs(pipe, latents, embeds, pooled, sigma), dtype)


@torch.no_grad()
def on_some_tokens(pipe, latents, chosen, *rest):
    """diffusers' transformer on one image's tokens at `chosen` alone, as a picture of a single row."""
    embed = pipe.transformer.pos_embed
    whole = embed(latents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "forward", lambda _: whole[:, chosen])
        return pack(theirs(pipe, latents[:, :, :PATCH, :1].expand(-1, -1, -1, PATCH * len(chosen)), *rest), PATCH)


@pytest.mark.parametrize("m", [1, 33, 95])
def test_stage_on_some_tokens(pipe, dtype, m):
    """Random subsets, another for each image."""
    shape, generator = (12, 8), torch.Generator().manual_seed(m)
    latents = torch.randn(2, 4, 24, 16, generator=generator).to(DTYPES[dtype])
    chosen = torch.stack([torch.randperm(96, generator=generator)[:m] for _ in range(2)])
    embeds, pooled = embeddings(pipe, PROMPTS[:2])
    tokens = torch.stack([t[c] for t, c in zip(pack(latents, PATCH), chosen, strict=True)])
    where = positions(pipe, shape, TokenGrid(shape).coordinates())[chosen]
    found = ours(pipe, tokens, where, embeds, pooled, [0.512], 0)
    for b in range(2):
        one = slice(b, b + 1)
        expected = on_some_tokens(pipe, latents[one], chosen[b], embeds[one], pooled[one], 0.512)
        assert_same(found[one], expected, dtype)


def test_decode(folder):
    adapter = SD3Adapter.from_folder(folder, torch.float32, {"height": 20, "width": 28})
    latents = torch.randn(2, 4, 10, 14, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = adapter.module("decode")(pack(latents, PATCH))
        vae = adapter.components["vae"]
        picture = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    torch.testing.assert_close(found, (picture / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)


# --- positions ---


@pytest.mark.parametrize("grid", [(12, 8), (5, 7), (18, 18)])
def test_positions_are_the_middle_of_diffusers_table(grid):
    pipe = tiny_sd3.sd3(medium35=True)
    expected = pipe.transformer.pos_embed.cropped_pos_embed(2 * grid[0], 2 * grid[1])[0]
    assert torch.equal(positions(pipe, grid, TokenGrid(grid).coordinates()), expected)


def test_places_between_tokens():
    """Half a token further is half a step further: what a table of twice the size has there."""
    table = published_table(32, 18, 8)
    finer = get_2d_sincos_pos_embed(32, 36, base_size=8).view(36, 36, 32)
    found = table.tables(torch.tensor([[3.5, 2.0], [0.5, 17.5]]))["positions"]
    torch.testing.assert_close(found, torch.stack([finer[7, 4], finer[1, 35]]).float(), atol=1e-6, rtol=0)


def test_positions_are_gathered():
    table = published_table(32, 18, 8)
    tables = table.tables(TokenGrid((3, 4)).coordinates())
    where = torch.tensor([[0, 5], [11, 2]])
    assert torch.equal(table.gather(tables, where)["positions"], tables["positions"][where])
    assert table.specs(2, 2, "bf16")[0].shape == (2, 2, 32)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("made_by", [SinCos(32, (0.0, 0.0), 8 / 18), SinCos(32, (-16.0, -16.0), 0.25),
                                     SinCos(32, (3.0, -40.0), 1.7)])  # fmt: skip
def test_tables_of_checkpoints_say_what_they_are_made_by(stored, made_by):
    """diffusers' coordinates, or others, through rounding of every kind."""
    expected = published_table(32, 18, 8)
    values = made_by.tables(TokenGrid((18, 18)).coordinates())["positions"].to(stored)
    found = read_table(values[None], 18, expected)
    assert (found == expected) == (made_by == expected)
    where = torch.tensor([[0.0, 0.0], [16.5, 3.25], [17.0, 17.0]])
    torch.testing.assert_close(found.tables(where), made_by.tables(where), atol=3e-3, rtol=0)


@pytest.mark.parametrize("change", [lambda t: t[:, ::-1].copy(), lambda t: t + (t[:, :1] > 0.5) * 0.01])
def test_tables_of_another_kind_are_refused(change):
    expected = published_table(32, 18, 8)
    values = expected.tables(TokenGrid((18, 18)).coordinates())["positions"].numpy()
    with pytest.raises(UnsupportedModelError, match="table of positions"):
        read_table(torch.from_numpy(change(values))[None], 18, expected)


# --- names ---


def authors_shapes(transformer):
    """{name of the authors' checkpoint: shape} of a transformer, written out from their modules."""
    config, d = transformer.config, transformer.inner_dim
    linear = {
        "t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d),
        "y_embedder.mlp.0": (d, config.pooled_projection_dim), "y_embedder.mlp.2": (d, d),
        "context_embedder": (d, config.joint_attention_dim),
        "final_layer.adaLN_modulation.1": (2 * d, d), "final_layer.linear": (PATCH**2 * config.out_channels, d),
    }
    norms = []
    for i, block in enumerate(transformer.transformer_blocks):
        attentions = ["x_block.attn", "context_block.attn"] + ["x_block.attn2"] * block.use_dual_attention
        last = block.context_pre_only
        linear |= {f"joint_blocks.{i}.{a}.qkv": (3 * d, d) for a in attentions}
        linear |= {f"joint_blocks.{i}.{a}.proj": (d, d) for a in attentions if not (last and "context" in a)}
        norms += [f"joint_blocks.{i}.{a}.ln_{x}" for a in attentions for x in "qk" if config.qk_norm]
        for stream, vectors in (("x", 9 if block.use_dual_attention else 6), ("context", 2 if last else 6)):
            linear[f"joint_blocks.{i}.{stream}_block.adaLN_modulation.1"] = (vectors * d, d)
            if not (last and stream == "context"):
                linear[f"joint_blocks.{i}.{stream}_block.mlp.fc1"] = (4 * d, d)
                linear[f"joint_blocks.{i}.{stream}_block.mlp.fc2"] = (d, 4 * d)
    shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    shapes |= {f"{name}.weight": (config.attention_head_dim,) for name in norms}
    shapes |= {"x_embedder.proj.weight": (d, config.in_channels, PATCH, PATCH), "x_embedder.proj.bias": (d,)}
    return shapes | {"pos_embed": tuple(transformer.pos_embed.pos_embed.shape)}


@pytest.mark.parametrize("medium35", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_checkpoint_in_the_authors_names(tmp_path, medium35, prefix):
    """What diffusers' own conversion makes of it, tensor by tensor."""
    transformer = tiny_sd3.sd3(medium35=medium35).transformer
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in authors_shapes(transformer).items()}
    save_file({prefix + name: value for name, value in values.items()}, tmp_path / "sd3.safetensors")
    theirs = {f"model.diffusion_model.{name}": value for name, value in values.items()}
    expected = convert_sd3_transformer_checkpoint_to_diffusers(theirs)
    shapes = {f"transformer.{name}": tuple(value.shape) for name, value in transformer.state_dict().items()}
    found = read_single_file(tmp_path / "sd3.safetensors", NAMING, shapes, torch.float32)
    assert found.keys() == {f"transformer.{name}" for name in expected}
    assert all(torch.equal(found[f"transformer.{name}"], value) for name, value in expected.items())


def test_a_checkpoint_in_diffusers_names(tmp_path):
    """With its table of positions, which is no layer's weight."""
    state = {name: value.contiguous() for name, value in tiny_sd3.sd3(medium35=True).transformer.state_dict().items()}
    save_file(state, tmp_path / "sd3.safetensors")
    shapes = {f"transformer.{name}": tuple(value.shape) for name, value in state.items()}
    found = read_single_file(tmp_path / "sd3.safetensors", NAMING, shapes, torch.float32)
    assert all(torch.equal(found[f"transformer.{name}"], value) for name, value in state.items())


@pytest.fixture(scope="module")
def names():
    """Of all parameters."""
    pipe = tiny_sd3.sd3(medium35=True)
    parts = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    return [f"{part}.{name}" for part in parts for name, _ in getattr(pipe, part).named_parameters()]


BLOCK = "transformer.transformer_blocks.0"


@pytest.mark.parametrize(
    ("name", "modules"),
    {
        "transformer.transformer_blocks.0.attn2.to_q": [f"{BLOCK}.attn2.to_q"],
        "base_model.model.transformer_blocks.0.ff_context.net.2": [f"{BLOCK}.ff_context.net.2"],
        "lora_unet_joint_blocks_0_x_block_attn2_qkv": [f"{BLOCK}.attn2.to_{x}" for x in "qkv"],
        "lora_unet_joint_blocks_0_context_block_mlp_fc1": [f"{BLOCK}.ff_context.net.0.proj"],
        "diffusion_model.joint_blocks.0.context_block.attn.qkv": [f"{BLOCK}.attn.add_{x}_proj" for x in "qkv"],
        "lycoris_transformer_blocks_0_attn_to_added_qkv": [f"{BLOCK}.attn.add_{x}_proj" for x in "qkv"],
        "lora_te2_text_model_encoder_layers_1_mlp_fc1": ["text_encoder_2.text_model.encoder.layers.1.mlp.fc1"],
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q": [
            "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"
        ],
        "diffusion_model.joint_blocks.1.x_block.attn2.qkv": None,  # that block looks at the image once
        "diffusion_model.joint_blocks.3.x_block.mlp.fc1": None,  # a block that the model does not have
    }.items(),
)
def test_names_in_adapters(names, name, modules):
    target = Resolver(NAMING, names).find(name)
    assert (None if target is None else list(target.modules)) == modules


# --- the adapter ---


@pytest.fixture(scope="module")
def adapter(folder):
    return SD3Adapter.from_folder(folder, torch.float32)


@pytest.mark.parametrize("shifting", [{"shift": 3.0}, {"use_dynamic_shifting": True}])
@pytest.mark.parametrize("n", [1, 4, 28])
def test_native_sigmas_are_the_pipelines(tmp_path, shifting, n):
    pipe = tiny_sd3.sd3(medium35=False)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**shifting)
    pipe.save_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe("a fox", height=20, width=28, num_inference_steps=n, output_type="latent", max_sequence_length=4)
    adapter = SD3Adapter.from_folder(tmp_path, torch.float32, {"height": 20, "width": 28})
    assert adapter.native_sigmas(n) == tuple(pipe.scheduler.sigmas.tolist())


@pytest.mark.parametrize(("shifting", "shift"), [({"shift": 3.0}, 3.0), ({"use_dynamic_shifting": True}, 1.8776)])
def test_shift_is_the_curves_and_not_the_last_steps(shifting, shift):
    source = SD3["sd3"]
    configs = {**source.configs, "scheduler": dict(FlowMatchEulerDiscreteScheduler(**shifting).config)}
    adapter = SD3Adapter.from_configs(configs, SD3Adapter.usual(configs) | {"height": 256}, torch.float32)
    sigmas = adapter.native_sigmas(1000)
    assert adapter.shift(28) == pytest.approx(shift, abs=1e-3)
    assert sigmas[500] == pytest.approx(adapter.shift(28) / (1 + adapter.shift(28)), abs=2e-3)
    assert adapter.native_sigmas(2)[1] < 0.01


def test_published_noise_levels():
    """Of 28 and of 4 steps."""
    adapter = config_adapter(published("sd3"), torch.bfloat16)
    assert adapter.native_sigmas(28)[-4:] == pytest.approx((0.1998, 0.1109, 0.0089, 0), abs=1e-4)
    assert adapter.native_sigmas(4) == pytest.approx((1, 0.8577, 0.6022, 0.0089, 0), abs=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_specs_describe_what_the_modules_take_and_give(adapter, batch):
    schedule = StageSchedule(make_stages(96, [2, 1, 2], [0.35, 0.62, 1.0]), uniform_sigmas(5))
    specs = adapter.specs(schedule, batch, "fp32")
    assert [s.name for s in specs] == ["text", "condition", "stage2", "stage1", "stage0", "decode"]
    assert len(specs[0].inputs) == (3 if "text_encoder_3" in adapter.components else 2)
    for spec in specs:
        inputs = [torch.zeros(s.shape, dtype=DTYPES[s.dtype]) for s in spec.inputs]
        with torch.no_grad():
            out = adapter.module(spec.name)(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        assert [(tuple(t.shape), t.dtype) for t in out] == [(s.shape, DTYPES[s.dtype]) for s in spec.outputs]


@pytest.mark.parametrize("name", ["text", "condition", "stage1", "decode"])
def test_modules_export(adapter, name):
    """With every shape fixed, on meta tensors, as backends take them."""
    again = SD3Adapter.from_configs(adapter.configs, adapter.settings(), torch.float32)
    schedule = StageSchedule(make_stages(96, [1, 1], [0.35, 1.0]), uniform_sigmas(2))
    spec = next(s for s in again.specs(schedule, 2, "fp32") if s.name == name)
    inputs = tuple(torch.empty(s.shape, dtype=DTYPES[s.dtype], device="meta") for s in spec.inputs)
    with torch.no_grad():
        program = torch.export.export(again.module(name), inputs)
    outputs = next(n for n in program.graph.nodes if n.op == "output").args[0]
    assert [tuple(o.meta["val"].shape) for o in outputs] == [s.shape for s in spec.outputs]


def test_from_configs_rebuilds_the_same_modules(adapter):
    configs = json.loads(json.dumps(adapter.configs, default=str))
    rebuilt = SD3Adapter.from_configs(configs, adapter.settings(), torch.float32)
    assert rebuilt.geometry == adapter.geometry and rebuilt.defaults == adapter.defaults
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in adapter.tensors()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in rebuilt.tensors()} == shapes
    assert "transformer.pos_embed.pos_embed" not in shapes


def test_modules_name_their_parameters_as_the_model_does(adapter):
    known = dict(adapter.tensors())
    for name in ("text", "condition", "stage0", "decode"):
        parameters = dict(adapter.module(name).named_parameters(remove_duplicate=False))
        assert parameters and all(p is known[full] for full, p in parameters.items())


def test_a_checkpoint_with_coordinates_of_its_own(tmp_path):
    """Its table, not diffusers', in the geometry of the model and of its configurations."""
    pipe = tiny_sd3.sd3(medium35=False)
    made_by = SinCos(32, (-3.0, -3.0), 0.25)
    pipe.transformer.pos_embed.pos_embed.copy_(made_by.tables(TokenGrid((18, 18)).coordinates())["positions"])
    expected = pipe.transformer.pos_embed.cropped_pos_embed(24, 16)[0]
    pipe.save_pretrained(tmp_path)
    adapter = SD3Adapter.from_folder(tmp_path, torch.float32, {"height": 48, "width": 32})
    configs = json.loads(json.dumps(adapter.configs, default=str))
    again = SD3Adapter.from_configs(configs, adapter.settings(), torch.float32)
    for one in (adapter, again):
        found = one.geometry.positions.tables(one.geometry.grid.coordinates())["positions"]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "change",
    [{"in_channels": 9}, {"qk_norm": "layer_norm"}, {"patch_size": 1}, {"pos_embed_max_size": None}],
)
def test_transformers_of_other_kinds_are_refused(adapter, change):
    configs = {**adapter.configs, "transformer": {**adapter.configs["transformer"], **change}}
    with pytest.raises(UnsupportedModelError, match="not Stable Diffusion 3's"):
        SD3Adapter.check(configs, adapter.settings())


@pytest.mark.parametrize("name", ["StableDiffusion3Img2ImgPipeline", "StableDiffusion3ControlNetPipeline"])
def test_other_pipelines_of_the_model_are_refused(folder, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "model")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    with pytest.raises(UnsupportedModelError, match="no model family") as caught:
        build(str(copy), output=tmp_path / "bundle", backend="eager")
    assert caught.value.found == name


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"height": 30}, "token grid"), ({"height": 76}, "table of positions"), ({"max_sequence_length": 513}, "text")],
)
def test_sizes_that_the_model_cannot_have(folder, settings, error):
    with pytest.raises(InputError, match=error):
        SD3Adapter.from_folder(folder, torch.float32, settings)


# --- the published models, on meta tensors ---


@pytest.mark.parametrize(
    ("name", "billions", "tflop", "guidance", "steps"),
    [
        ("sd3", 2.028, 8.90, 7.0, 28),
        ("sd3.5-medium", 2.243, 11.24, 7.0, 28),
        ("sd3.5-large", 8.057, 31.11, 7.0, 28),
        ("sd3.5-large-turbo", 8.057, 31.11, 1.0, 4),
    ],
)
def test_published_sizes(name, billions, tflop, guidance, steps):
    """Parameters without the table of positions, FLOPs of a pass, 4096 image and 333 text tokens."""
    adapter = config_adapter(published(name), torch.bfloat16)
    parameters = sum(p.numel() for p in adapter.components["transformer"].parameters())
    assert parameters / 1e9 == pytest.approx(billions, abs=1e-3)
    assert (adapter.geometry.grid.tokens, adapter.geometry.channels, adapter.geometry.text_tokens) == (4096, 64, 333)
    specs = {s.name: s for s in adapter.specs(StageSchedule(make_stages(4096, [1], [1.0]), (1.0, 0.0)), 1, "bf16")}
    step, condition = (count_flops(adapter.module(n), specs[n]) for n in ("stage0", "condition"))
    assert step / 1e12 == pytest.approx(tflop, abs=0.01) and condition < 0.001 * step
    assert step_cost(adapter, "bf16")(4096) == pytest.approx(step + condition, rel=1e-6)
    assert (adapter.defaults.guidance.true, adapter.defaults.num_inference_steps) == (guidance, steps)


# --- bundles ---


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory):
    """Builds and loads eager bundles in fp32, each once."""
    root, made = tmp_path_factory.mktemp("bundles"), {}

    def make(**options):
        key = str(sorted(options.items()))
        if key not in made:
            made[key] = jitexport.load(
                build(str(folder), output=root / str(len(made)), backend="eager", dtype="fp32", **options).path
            )
            made[key].set_progress_bar_config(disable=True)
        return made[key]

    return make


def generators(batch):
    return [torch.Generator().manual_seed(i) for i in range(batch)]


@pytest.mark.parametrize("dtype", ["fp32"], indirect=True)
@pytest.mark.parametrize("size", [(48, 32), (20, 28)])
@pytest.mark.parametrize(
    ("prompts", "more"),
    [
        (PROMPTS[:1], {}),
        (PROMPTS[1:], {"guidance_scale": 4.5, "negative_prompt": ["a blue house", ""]}),
        (PROMPTS[::2], {"guidance_scale": 1.0}),
        (PROMPTS[:2], {"prompt_2": PROMPTS[1:], "negative_prompt": ["the river"] * 2}),
    ],
)
def test_one_stage_of_all_tokens_is_diffusers_own_call(bundle, pipe, size, prompts, more):
    batch, steps = len(prompts), 3
    settings = {"height": size[0], "width": size[1], "num_inference_steps": steps}
    ours = bundle(speedup=1, settings=settings, batch=batch)
    pipe.set_progress_bar_config(disable=True)
    asked = {"generator": generators(batch), "output_type": "pt", **more}
    expected = pipe(
        prompts, height=size[0], width=size[1], num_inference_steps=steps,
        max_sequence_length=tiny.TEXT_TOKENS, **asked,
    ).images
    found = ours(prompts, **asked | {"generator": generators(batch)}).images
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "steps", "ratios"),
    [
        ("jit", (1, 1, 1), (0.35, 0.62, 1.0)),
        ("ralu", (1, 1, 1), None),
        ("bottleneck", (1, 1, 1), None),
        ("ras", (1, 1, 1), (1.0, 0.5, 1.0)),
    ],
)
def test_every_method_runs(bundle, method, steps, ratios):
    pipe = bundle(method=method, custom=CustomSchedule(steps, ratios))
    images = pipe("a red fox", negative_prompt="the snow", generator=generators(1)[0], output_type="pt").images
    other = pipe("a red fox", negative_prompt="the river", generator=generators(1)[0], output_type="pt").images
    assert images.shape == (1, 3, 48, 32) and images.isfinite().all() and not torch.equal(images, other)


def test_adapters_change_a_bundle_and_leave_it(bundle, tmp_path):
    """In the names of kohya, whose projections hold diffusers' three."""
    pipe = bundle(method="jit", custom=CustomSchedule((1, 1, 1), (0.35, 0.62, 1.0)))
    generator, name = torch.Generator().manual_seed(0), "lora_unet_joint_blocks_0_x_block_attn_qkv"
    factors = {f"{name}.lora_down.weight": (4, 32), f"{name}.lora_up.weight": (96, 4)}
    save_file({k: torch.randn(shape, generator=generator) for k, shape in factors.items()}, tmp_path / "x.safetensors")

    def image():
        return pipe("a red fox", generator=generators(1)[0], output_type="pt").images

    before = image()
    pipe.load_lora(tmp_path / "x.safetensors")
    assert (image() - before).abs().max() > 1e-3
    pipe.unload_lora()
    assert torch.equal(image(), before)


def test_a_build_chooses_passes_and_says_nothing_of_its_own_prompt(folder, tmp_path, caplog):
    """The faster way to run two passes is in the manifest; the tiny tokenizers cut a prompt that nobody wrote."""
    options = {"custom": CustomSchedule((1,), (1.0,)), "backend": "eager", "dtype": "fp32"}
    manifest = build(str(folder), output=tmp_path / "x", **options).manifest
    assert not [r for r in caplog.records if "cut to" in r.getMessage()]
    reason = manifest.chosen["passes"]
    twice, at_once = map(float, re.findall(r"([\d.e+]+) ms", reason))
    assert manifest.passes == (1 if twice <= at_once else 2)
    assert build(str(folder), output=tmp_path / "y", passes=2, **options).manifest.chosen.get("passes") is None


def test_eight_bits(bundle):
    """The blocks' layers are quantized, and the image is about the same."""
    custom = CustomSchedule((1, 2), (0.5, 1.0))
    exact, rough = (bundle(method="jit", custom=custom, quantization=kind) for kind in (None, "int8"))
    quantized = {n for n, t in rough.weights.tensors.items() if t.dtype == torch.int8}
    assert quantized and all("transformer_blocks." in name and "norm" not in name for name in quantized)
    expected, found = (
        pipe("a fox", generator=generators(1)[0], output_type="latent").images for pipe in (exact, rough)
    )
    assert 0 < (found - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["sd3.5-large-turbo", "stabilityai/stable-diffusion-3.5-large-turbo"])
def test_settings_of_a_published_model_go_with_its_weights(folder, name):
    """Nothing in SD3.5-large-turbo's folder says that it takes four steps without guidance."""
    source = replace(find_source(name), folder=folder)
    defaults = load_adapter(source, torch.float32).defaults
    assert (defaults.guidance.true, defaults.num_inference_steps) == (1.0, 4)
    defaults = load_adapter(source, torch.float32, {"num_inference_steps": 8, "guidance_scale": None}).defaults
    assert (defaults.guidance.true, defaults.num_inference_steps) == (1.0, 8)
