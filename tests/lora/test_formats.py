"""Every format against its own arithmetic, W + scale * alpha / r * B A and what else it has, layer by layer."""

import json

import pytest
import torch
from safetensors.torch import save_file

from jitexport.errors import InputError, ModelNotFoundError
from jitexport.lora import read_lora
from jitexport.lora.parts import PARTS, split_key
from jitexport.models.flux_names import NAMING, aliases

D, MLP, TEXT = 8, 32, 12
DOUBLE, SINGLE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.1"


def linear(out, into):
    return {"weight": (out, into), "bias": (out,)}


@pytest.fixture(scope="module")
def shapes():
    """Of a FLUX model of one double and two single blocks, and a layer of each text encoder."""
    modules = {}
    for stream, ff in (("norm1", "ff"), ("norm1_context", "ff_context")):
        modules[f"{DOUBLE}.{stream}.linear"] = linear(6 * D, D)
        modules[f"{DOUBLE}.{ff}.net.0.proj"], modules[f"{DOUBLE}.{ff}.net.2"] = linear(MLP, D), linear(D, MLP)
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        modules[f"{DOUBLE}.attn.{name}"] = linear(D, D)
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        modules[f"{DOUBLE}.attn.{name}"] = {"weight": (4,)}
    for i in range(2):
        block = f"transformer.single_transformer_blocks.{i}"
        modules |= {f"{block}.attn.{name}": linear(D, D) for name in ("to_q", "to_k", "to_v")}
        modules |= {f"{block}.attn.{name}": {"weight": (4,)} for name in ("norm_q", "norm_k")}
        modules[f"{block}.proj_mlp"], modules[f"{block}.proj_out"] = linear(MLP, D), linear(D, D + MLP)
        modules[f"{block}.norm.linear"] = linear(3 * D, D)
    embed = "transformer.time_text_embed"
    for name, into in (("timestep_embedder", 16), ("guidance_embedder", 16), ("text_embedder", TEXT)):
        modules[f"{embed}.{name}.linear_1"], modules[f"{embed}.{name}.linear_2"] = linear(D, into), linear(D, D)
    modules["transformer.x_embedder"], modules["transformer.context_embedder"] = linear(D, 16), linear(D, TEXT)
    modules["transformer.norm_out.linear"], modules["transformer.proj_out"] = linear(2 * D, D), linear(16, D)
    modules["text_encoder.encoder.layers.0.self_attn.q_proj"] = linear(TEXT, TEXT)
    modules["text_encoder.encoder.layers.0.mlp.fc1"] = linear(24, TEXT)
    modules["text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"] = {"weight": (TEXT, TEXT)}
    modules["text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wi_0"] = {"weight": (24, TEXT)}
    return {f"{module}.{leaf}": shape for module, leaves in modules.items() for leaf, shape in leaves.items()}


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(rank, out, into, seed=0):
    return rand(rank, into, seed=seed), rand(out, rank, seed=seed + 1)


def delta(change, scale=1.0, weight=None):
    return change.delta(torch.zeros(change.shape) if weight is None else weight, scale)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# --- names: {format's name: ours} ------------------------------------------------------------------------------------

Q = f"{DOUBLE}.attn.to_q"
ENDS = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "peft, whole model": (".lora_A.default.weight", ".lora_B.default.weight"),
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "older diffusers": (".lora.down.weight", ".lora.up.weight"),
    "oldest diffusers": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}
NAMES = {
    "transformer.transformer_blocks.0.attn.to_q": Q,
    "transformer_blocks.0.attn.to_q": Q,
    "base_model.model.transformer_blocks.0.attn.to_q": Q,
    "base_model.model.transformer.transformer_blocks.0.attn.to_q": Q,
    "diffusion_model.transformer_blocks.0.attn.to_q": Q,
    "lora_transformer_transformer_blocks_0_attn_to_q": Q,
    "lycoris_transformer_blocks_0_attn_to_q": Q,
    "lora_transformer_transformer_blocks_0_ff_net_0_proj": f"{DOUBLE}.ff.net.0.proj",
    "lora_transformer_transformer_blocks_0_ff_context_net_2": f"{DOUBLE}.ff_context.net.2",
    "lora_transformer_single_transformer_blocks_1_proj_mlp": f"{SINGLE}.proj_mlp",
    "lora_unet_double_blocks_0_img_attn_proj": f"{DOUBLE}.attn.to_out.0",
    "lora_unet_double_blocks_0_txt_attn_proj": f"{DOUBLE}.attn.to_add_out",
    "lora_unet_double_blocks_0_img_mlp_0": f"{DOUBLE}.ff.net.0.proj",
    "lora_unet_double_blocks_0_img_mlp_2": f"{DOUBLE}.ff.net.2",
    "lora_unet_double_blocks_0_txt_mlp_0": f"{DOUBLE}.ff_context.net.0.proj",
    "lora_unet_double_blocks_0_img_mod_lin": f"{DOUBLE}.norm1.linear",
    "lora_unet_double_blocks_0_txt_mod_lin": f"{DOUBLE}.norm1_context.linear",
    "lora_unet_single_blocks_1_linear2": f"{SINGLE}.proj_out",
    "lora_unet_single_blocks_1_modulation_lin": f"{SINGLE}.norm.linear",
    "lora_unet_img_in": "transformer.x_embedder",
    "lora_unet_txt_in": "transformer.context_embedder",
    "lora_unet_time_in_in_layer": "transformer.time_text_embed.timestep_embedder.linear_1",
    "lora_unet_time_in_out_layer": "transformer.time_text_embed.timestep_embedder.linear_2",
    "lora_unet_vector_in_in_layer": "transformer.time_text_embed.text_embedder.linear_1",
    "lora_unet_guidance_in_out_layer": "transformer.time_text_embed.guidance_embedder.linear_2",
    "lora_unet_final_layer_linear": "transformer.proj_out",
    "diffusion_model.double_blocks.0.img_mlp.2": f"{DOUBLE}.ff.net.2",
    "model.diffusion_model.final_layer.linear": "transformer.proj_out",
    "double_blocks.0.img_attn.proj": f"{DOUBLE}.attn.to_out.0",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": "text_encoder.encoder.layers.0.self_attn.q_proj",
    "text_encoder.encoder.layers.0.mlp.fc1": "text_encoder.encoder.layers.0.mlp.fc1",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": "text_encoder.encoder.layers.0.self_attn.q_proj",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": "text_encoder.encoder.layers.0.mlp.fc1",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": "text_encoder.encoder.layers.0.mlp.fc1",
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q":
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    "lora_te2_encoder_block_0_layer_0_SelfAttention_q": "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0":
        "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wi_0",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q":
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
}  # fmt: skip


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("name", NAMES)
def test_low_rank_under_every_name(shapes, name, ends):
    out, into = shapes[f"{NAMES[name]}.weight"]
    down, up = pair(2, out, into)
    state = {name + ends[0]: down, name + ends[1]: up, f"{name}.alpha": torch.tensor(6.0)}
    ((ours, change),) = read_lora(state, NAMING, shapes).items()
    assert ours == f"{NAMES[name]}.weight"
    close(delta(change, 0.5), 0.5 * 6 / 2 * up @ down)


FUSED = {
    "lora_unet_double_blocks_0_img_attn_qkv": [f"{DOUBLE}.attn.{n}" for n in ("to_q", "to_k", "to_v")],
    "diffusion_model.double_blocks.0.txt_attn.qkv":
        [f"{DOUBLE}.attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj")],
    "lora_unet_single_blocks_1_linear1": [f"{SINGLE}.{n}" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
    "transformer.transformer_blocks.0.attn.to_qkv": [f"{DOUBLE}.attn.{n}" for n in ("to_q", "to_k", "to_v")],
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_are_split_by_rows(shapes, name):
    sizes = [shapes[f"{module}.weight"][0] for module in FUSED[name]]
    down, up = pair(2, sum(sizes), D)
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.diff_b": rand(sum(sizes))}
    changes = read_lora(state, NAMING, shapes)
    assert set(changes) == {f"{module}.{leaf}" for module in FUSED[name] for leaf in ("weight", "bias")}
    close(torch.cat([delta(changes[f"{module}.weight"]) for module in FUSED[name]]), up @ down)
    close(torch.cat([delta(changes[f"{module}.bias"]) for module in FUSED[name]]), rand(sum(sizes)))


def test_xlabs_names(shapes):
    state, expected = {}, {}
    for name, modules, out, into in (
        ("double_blocks.0.processor.qkv_lora1", [f"{DOUBLE}.attn.{n}" for n in ("to_q", "to_k", "to_v")], 3 * D, D),
        ("double_blocks.0.processor.proj_lora2", [f"{DOUBLE}.attn.to_add_out"], D, D),
        ("single_blocks.1.processor.qkv_lora", [f"{SINGLE}.attn.{n}" for n in ("to_q", "to_k", "to_v")], 3 * D, D),
        ("single_blocks.1.processor.proj_lora", [f"{SINGLE}.proj_out"], D, D + MLP),
    ):
        down, up = pair(2, out, into, seed=out + into)
        state |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
        parts = (up @ down).split(out // len(modules))
        expected |= {f"{module}.weight": part for module, part in zip(modules, parts, strict=True)}
    changes = read_lora(state, NAMING, shapes)
    assert set(changes) == set(expected)
    for name, change in changes.items():
        close(delta(change), expected[name])


@pytest.mark.parametrize(
    "name", ["lora_unet_final_layer_adaLN_modulation_1", "diffusion_model.final_layer.adaLN_modulation.1"]
)
def test_the_output_norm_has_shift_and_scale_in_the_other_order(shapes, name):
    down, up = pair(2, 2 * D, D)
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.diff_b": rand(2 * D)}
    changes = read_lora(state, NAMING, shapes)
    shift, scale = (up @ down).chunk(2)
    close(delta(changes["transformer.norm_out.linear.weight"]), torch.cat([scale, shift]))
    close(delta(changes["transformer.norm_out.linear.bias"]), torch.cat(rand(2 * D).chunk(2)[::-1]))


# --- kinds -----------------------------------------------------------------------------------------------------------

KOHYA = "lora_unet_double_blocks_0_img_mlp_0"
OURS = f"{DOUBLE}.ff.net.0.proj"


def test_differences_of_weights_biases_and_norms(shapes):
    state = {
        f"{KOHYA}.diff": rand(MLP, D), f"{KOHYA}.diff_b": rand(MLP),
        "lora_unet_double_blocks_0_txt_attn_norm_key_norm.diff": rand(4, seed=1),
        "diffusion_model.single_blocks.1.norm.query_norm.scale.diff": rand(4, seed=2),
        "lycoris_transformer_blocks_0_attn_norm_q.w_norm": rand(4, seed=3),
    }  # fmt: skip
    changes = read_lora(state, NAMING, shapes)
    close(delta(changes[f"{OURS}.weight"], 0.5), 0.5 * rand(MLP, D))
    close(delta(changes[f"{OURS}.bias"]), rand(MLP))
    for seed, name in ((1, f"{DOUBLE}.attn.norm_added_k"), (2, f"{SINGLE}.attn.norm_q"), (3, f"{DOUBLE}.attn.norm_q")):
        close(delta(changes[f"{name}.weight"]), rand(4, seed=seed))
    assert len(changes) == 5


def test_the_bias_of_b_is_scaled_with_it(shapes):
    down, up = pair(2, MLP, D)
    state = {f"{OURS}.lora_A.weight": down, f"{OURS}.lora_B.weight": up, f"{OURS}.lora_B.bias": rand(MLP)}
    changes = read_lora(state | {f"{OURS}.alpha": torch.tensor(6)}, NAMING, shapes)
    close(delta(changes[f"{OURS}.bias"], 0.5), 0.5 * 3 * rand(MLP))


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_dora(shapes, axis):
    down, up = pair(2, MLP, D)
    weight, magnitude = rand(MLP, D, seed=5), rand(MLP if axis == "rows" else D, seed=6).abs()
    stored = magnitude[:, None] if axis == "rows" else magnitude[None]
    state = {
        f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up, f"{KOHYA}.alpha": torch.tensor(1.0),
        f"{KOHYA}.dora_scale": stored,
    }  # fmt: skip
    (change,) = read_lora(state, NAMING, shapes).values()
    merged = weight + 0.7 * 0.5 * up @ down
    expected = stored * merged / merged.norm(dim=1 if axis == "rows" else 0, keepdim=True)
    close(weight + delta(change, 0.7, weight), expected)


def test_dora_whose_norm_overflows_is_no_weight_of_zeros(shapes):
    state = {f"{KOHYA}.lora_down.weight": torch.ones(1, D), f"{KOHYA}.lora_up.weight": torch.full((MLP, 1), 1e30),
             f"{KOHYA}.dora_scale": torch.ones(MLP, 1)}  # fmt: skip
    (change,) = read_lora(state, NAMING, shapes).values()
    assert delta(change).isnan().all()


def test_dora_of_a_fused_layer(shapes):
    name = "lora_unet_single_blocks_1_linear1"
    down, up = pair(2, 3 * D + MLP, D)
    weight, magnitude = rand(3 * D + MLP, D, seed=5), rand(3 * D + MLP, 1, seed=6)
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.dora_scale": magnitude}
    merged = weight + up @ down
    expected = magnitude * merged / merged.norm(dim=1, keepdim=True)
    changes = read_lora(state, NAMING, shapes)
    parts = [f"{SINGLE}.{n}.weight" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    for part, own, wanted in zip(parts, weight.split([D, D, D, MLP]), expected.split([D, D, D, MLP]), strict=True):
        close(own + delta(changes[part], 1.0, own), wanted)
    by_column = state | {f"{name}.dora_scale": torch.ones(1, D)}
    with pytest.raises(InputError, match="cannot be split"):
        read_lora(by_column, NAMING, shapes)


def test_loha(shapes):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    a1, b1, a2, b2 = rand(3 * D, 2), rand(2, D), rand(3 * D, 2, seed=9), rand(2, D, seed=9)
    state = {f"{name}.hada_{k}": v for k, v in {"w1_a": a1, "w1_b": b1, "w2_a": a2, "w2_b": b2}.items()}
    changes = read_lora(state | {f"{name}.alpha": torch.tensor(1.0)}, NAMING, shapes)
    whole = torch.cat([delta(changes[f"{DOUBLE}.attn.{n}.weight"], 0.5) for n in ("to_q", "to_k", "to_v")])
    close(whole, 0.5 * 0.5 * (a1 @ b1) * (a2 @ b2))


@pytest.mark.parametrize("sides", ["both whole", "first whole", "none whole"])
def test_lokr(shapes, sides):
    w1 = [rand(3, 2)] if sides != "none whole" else [rand(3, 2, seed=1), rand(2, 2, seed=2)]
    w2 = [rand(D, 4)] if sides == "both whole" else [rand(D, 2, seed=3), rand(2, 4, seed=4)]
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {f"{name}.alpha": torch.tensor(6.0)}
    for key, side in (("w1", w1), ("w2", w2)):
        ends = [""] if len(side) == 1 else ["_a", "_b"]
        state |= {f"{name}.lokr_{key}{end}": value for end, value in zip(ends, side, strict=True)}
    changes = read_lora(state, NAMING, shapes)
    first, second = (side[0] if len(side) == 1 else side[0] @ side[1] for side in (w1, w2))
    factor = 1.0 if sides == "both whole" else 3.0
    whole = torch.cat([delta(changes[f"{DOUBLE}.attn.{n}.weight"]) for n in ("to_q", "to_k", "to_v")])
    close(whole, factor * torch.kron(first, second))


# --- strengths -------------------------------------------------------------------------------------------------------


def stored(folder, header=None, config=None, rank=2, **tensors):
    down, up = pair(rank, MLP, D)
    state = {f"{OURS}.lora_A.weight": down, f"{OURS}.lora_B.weight": up}
    save_file(state | {k.replace("__", "."): v for k, v in tensors.items()}, folder / "adapter.safetensors", header)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter.safetensors"


def metadata(**config):
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}


PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("header", "config", "factor"),
    [
        (None, None, 1),
        ({"alpha": "8", "rank": "2"}, None, 4),
        ({"alpha": "8"}, None, 4),
        ({"lora_alpha": "8.0", "r": "2"}, None, 4),
        ({"format": "pt"}, None, 1),
        (metadata(r=2, lora_alpha=8), None, 4),
        (metadata(r=2), None, 4),  # PEFT's own default is 8
        (metadata(r=2, lora_alpha=8, use_rslora=True), None, 8 / 2**0.5),
        (metadata(r=2, lora_alpha=8, alpha_pattern={"ff.net.0.proj": 4}), None, 2),
        (metadata(r=2, lora_alpha=8, alpha_pattern={r"transformer_blocks\.\d+\.ff\..*": 4}), None, 2),
        (metadata(r=2, lora_alpha=8, alpha_pattern={"net.0.pro": 4}), None, 4),  # the whole end of the name
        (metadata(r=2, lora_alpha=8, alpha_pattern={"proj": 4, ".*": 2}), None, 2),  # the first one counts
        (metadata(r=16, lora_alpha=8, rank_pattern={r".*\.net\.0\.proj": 2}), None, 4),
        (None, PEFT, 4),
        (None, PEFT | {"alpha_pattern": {r"^transformer_blocks\.0\..*": 6}}, 3),
        (metadata(r=2, lora_alpha=8), PEFT, 4),
        ({"alpha": "8", "rank": "2"} | metadata(r=2, lora_alpha=8), PEFT, 4),
    ],
)
def test_strength_from_wherever_it_stands(shapes, tmp_path, header, config, factor):
    path = stored(tmp_path, header, config)
    down, up = pair(2, MLP, D)
    for source in (path, tmp_path, str(path)):
        (change,) = read_lora(source, NAMING, shapes).values()
        close(delta(change), factor * up @ down)


@pytest.mark.parametrize(
    ("header", "config", "message"),
    [
        ({"alpha": "8", "rank": "4"}, None, "another rank"),
        ({"alpha": "eight"}, None, "positive number"),
        ({"alpha": "nan"}, None, "positive number"),
        ({"alpha": "4"}, PEFT, "conflicting strengths"),
        (metadata(r=2, lora_alpha=4), PEFT, "conflicting strengths"),
        (metadata(r=3, lora_alpha=4), None, "another rank"),
        (None, PEFT | {"r": 0}, "positive number"),
        (None, PEFT | {"lora_alpha": None}, "positive number"),
        (None, PEFT | {"alpha_pattern": {"(": 4}}, "regular expression"),
        (None, PEFT | {"alpha_pattern": [1]}, "table of patterns"),
        (None, PEFT | {"peft_type": "VERA"}, "another kind"),
        (None, PEFT | {"init_lora_weights": "pissa_niter_16"}, "changes the base weights"),
        (None, PEFT | {"use_dora": True}, "lacks its DoRA magnitude"),
        (None, [1], "no JSON object"),
        ({"lora_adapter_metadata": "{"}, None, "not JSON"),
    ],
)
def test_strengths_that_disagree_or_mean_nothing(shapes, tmp_path, header, config, message):
    stored(tmp_path, header, config)
    with pytest.raises(InputError, match=message):
        read_lora(tmp_path, NAMING, shapes)


def test_alpha_tensors_must_agree_with_the_settings(shapes, tmp_path):
    path = stored(tmp_path, metadata(r=2, lora_alpha=8), **{f"{OURS.replace('.', '__')}__alpha": torch.tensor(8.0)})
    assert read_lora(path, NAMING, shapes)[f"{OURS}.weight"].factor == 4
    path = stored(tmp_path, metadata(r=2, lora_alpha=8), **{f"{OURS.replace('.', '__')}__alpha": torch.tensor(2.0)})
    with pytest.raises(InputError, match="conflicting strengths"):
        read_lora(path, NAMING, shapes)


def test_a_peft_folder_beside_other_files(shapes, tmp_path):
    stored(tmp_path, config=PEFT).rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "optimizer.safetensors").write_bytes(b"")
    assert read_lora(tmp_path, NAMING, shapes)[f"{OURS}.weight"].factor == 4
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(ModelNotFoundError, match="must hold one adapter"):
        read_lora(tmp_path, NAMING, shapes)


# --- refused ---------------------------------------------------------------------------------------------------------

GOOD = {f"{KOHYA}.lora_down.weight": pair(2, MLP, D)[0], f"{KOHYA}.lora_up.weight": pair(2, MLP, D)[1]}


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", (2, TEXT), "not the model's"),
        ("lora_te3_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", (2, TEXT), "not the model's"),
        ("lora_unet_double_blocks_7_img_mlp_0.lora_down.weight", (2, D), "not the model's"),
        (f"{KOHYA}.lora_mid.weight", (2, 2, 1, 1), "Tucker"),
        (f"{KOHYA}.oft_blocks", (2, 2, 2), "OFT"),
        (f"{KOHYA}.a1.weight", (2, 2), "GLoRA"),
        (f"{KOHYA}.set_weight", (MLP, D), "replaces a weight"),
        (f"{KOHYA}.scalar", (1,), "learned factor"),
        (f"{KOHYA}.weight", (MLP, D), "replaces a weight"),
        (f"{KOHYA}.diff", (MLP, D), "in two ways"),
        (f"{KOHYA}.hada_w1_a", (MLP, 2), "no kind"),
        (f"{KOHYA}.dora_scale", (3,), "another shape"),
        (f"{KOHYA}.alpha", (3,), "one number"),
        (f"{KOHYA}.diff_b", (3,), "another shape"),
        ("lora_unet_double_blocks_0_txt_mlp_0.dora_scale", (MLP,), "low-rank pair"),
        ("lora_unet_double_blocks_0_txt_mlp_0.alpha", (), "low-rank pair"),
        ("lora_unet_double_blocks_0_txt_mlp_0.lokr_w1", (2, 2), "no LoKr"),
        ("lora_unet_double_blocks_0_txt_mlp_0.hada_w1_a", (2, 2), "no LoHa"),
        (f"{OURS}.lora_A.weight", (2, D), "two tensors change the same weight"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q.diff_b", (TEXT,), "has no"),
        (".lora_down.weight", (2, 2), "not understood"),
        ("", (2,), "not understood"),
    ],
)
def test_keys_beside_good_ones_are_refused_by_name(shapes, key, shape, message):
    with pytest.raises(InputError, match=message) as error:
        read_lora(GOOD | {key: torch.ones(shape)}, NAMING, shapes)
    assert key.rpartition(".lora_A")[0] in str(error.value) or key in str(error.value) or message == "has no"


def test_one_weight_may_not_be_changed_under_two_names(shapes):
    down, up = pair(2, 3 * D, D)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    state = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    state |= {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up[:D]}
    with pytest.raises(InputError, match="two parts of the adapter"):
        read_lora(state, NAMING, shapes)


@pytest.mark.parametrize("source", [None, 7, "", b"x", "a\0b", ["x"]])
def test_what_is_no_adapter_at_all(shapes, source):
    with pytest.raises(InputError, match="an adapter is"):
        read_lora(source, NAMING, shapes)


def test_every_module_of_the_model_has_a_name_of_the_authors(shapes):
    """So that a checkpoint in their names can give every tensor."""
    modules = {name.rpartition(".")[0] for name in shapes}
    named = {m for target in aliases(modules).values() if not target.partial for m in target.modules}
    assert named == modules - {m for m in modules if m.startswith("text_encoder_2")}


def test_a_part_is_what_its_end_says():
    assert split_key("x.lora_A.weight") == ("x", "down")
    assert split_key("x.lora_B.bias") == ("x", "up_bias")
    assert split_key("x.lora_B.style.bias") == ("x", "up_bias")
    assert split_key("x.lokr_w2_b") == ("x", "lokr_w2_b")
    assert split_key("x.lora_magnitude_vector.default.weight") == ("x", "magnitude")
    assert len({pattern.pattern for pattern, _ in PARTS}) == len(PARTS)
