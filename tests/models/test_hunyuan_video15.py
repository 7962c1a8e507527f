import json
import os
import re
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideo15Pipeline
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from PIL import Image
from safetensors.torch import load_file, save_file

import jitexport
from jitexport.cli import main
from jitexport.errors import InputError, JitExportError, ModelNotFoundError, UnsupportedModelError
from jitexport.evaluate.sources import bundle_source
from jitexport.flops import count_flops, step_cost
from jitexport.grid import TokenGrid
from jitexport.models.autoencoders import HunyuanDecode
from jitexport.models.hunyuan_video15 import HunyuanVideo15Adapter
from jitexport.models.published import HUNYUAN_SIZES, HUNYUAN_VIDEO15
from jitexport.plan import CustomSchedule
from jitexport.schedule import StageSchedule, make_stages, split_steps, uniform_sigmas
from jitexport.specs import DTYPES
from jitexport.verify import verify
from tests import tiny_hunyuan_video15 as tiny
from tests.parity import assert_same, seeded

PROMPTS = ["a fox on the snow", "", 'a house with "Hello" and “Hé 🎉” on it, "Hello"', "a fox on the snow " * 9]

# diffusers rounds timesteps to the model's dtype before it makes angles, we do not: bf16 keeps these exactly.
SIGMAS = (1.0, 0.512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_hunyuan_video15(tmp_path_factory.mktemp("hunyuan") / "tiny")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(folder, dtype):
    return tiny.short_texts(HunyuanVideo15Pipeline.from_pretrained(folder, dtype=DTYPES[dtype]))


@pytest.fixture(scope="module")
def adapter(folder, dtype):
    return HunyuanVideo15Adapter.from_folder(folder, DTYPES[dtype])


@pytest.fixture(scope="module")
def small(folder):
    return HunyuanVideo15Adapter.from_folder(folder, torch.float32)


def texts(dtype, batch):
    """Random states of both encoders with 0/1 masks: each video another number of tokens, the first no glyphs."""
    generator = torch.Generator().manual_seed(batch)

    def states(tokens, width):
        return torch.randn(batch, tokens, width, generator=generator).to(DTYPES[dtype])

    lengths, glyph_lengths = torch.tensor([[9], [14], [1]])[:batch], torch.tensor([[0], [5], [20]])[:batch]
    mask = (torch.arange(tiny.TEXT_TOKENS) < lengths).long()
    glyph_mask = (torch.arange(tiny.GLYPH_TOKENS) < glyph_lengths).long()
    return states(tiny.TEXT_TOKENS, 32), mask, states(tiny.GLYPH_TOKENS, 24), glyph_mask


@torch.no_grad()
def theirs(pipe, tokens, grid, texts, sigma):
    """diffusers' transformer as its pipeline calls it for text to video, [B, N, C] -> [B, N, C]."""
    latents = tokens.unflatten(1, grid).movedim(-1, 1)
    states, mask, glyphs, glyph_mask = texts
    velocity = pipe.transformer(
        hidden_states=torch.cat([latents, torch.zeros_like(latents), torch.zeros_like(latents[:, :1])], dim=1),
        timestep=torch.full((len(tokens),), sigma * 1000).to(tokens.dtype),
        encoder_hidden_states=states,
        encoder_attention_mask=mask.to(tokens.dtype),
        encoder_hidden_states_2=glyphs,
        encoder_attention_mask_2=glyph_mask.to(tokens.dtype),
        image_embeds=torch.zeros(len(tokens), tiny.IMAGE_TOKENS, 16, dtype=tokens.dtype),
        return_dict=False,
    )[0]
    return velocity.flatten(2).mT


@torch.no_grad()
def ours(adapter, tokens, places, where, texts, sigmas, step):
    """The adapter's modules as a runtime calls them: tokens [B, m, C] at `places` [P, 3] [`where` [B, m]]."""
    states, mask, glyphs, glyph_mask = texts
    levels = torch.tensor(sigmas)
    context, keys = adapter.module("condition")(states, mask.float(), glyphs, glyph_mask.float(), levels)
    positions = adapter.geometry.positions
    angles = positions.gather(positions.tables(places), where)
    vectors = adapter.constants(levels)["modulation"]
    return adapter.module("stage0")(tokens, angles["cos"], angles["sin"], context[step], keys, vectors[step])


def encoded(adapter, prompts):
    """The text engine's inputs."""
    encodings = [tokenizer.reader().encode(prompts) for tokenizer in adapter.tokenizers()]
    return [part for encoding in encodings for part in (encoding.ids, encoding.mask)]


# --- parity with diffusers ---


def test_text(adapter, pipe, dtype):
    """Prompts with and without quotations, empty and too long: states of both encoders, and which count."""
    with torch.no_grad():
        states, mask, glyphs, glyphs_mask = adapter.module("text")(*encoded(adapter, PROMPTS))
        expected = pipe.encode_prompt(PROMPTS, batch_size=len(PROMPTS))
    assert [int(m.sum()) for m in expected[3]] == [0, 0, tiny.GLYPH_TOKENS, 0]
    for found, found_mask, wanted, wanted_mask in ((states, mask, *expected[:2]), (glyphs, glyphs_mask, *expected[2:])):
        assert torch.equal(found_mask, wanted_mask.float())
        assert_same(found[wanted_mask.bool()], wanted[wanted_mask.bool()], dtype)
        assert found.isfinite().all()


@pytest.mark.parametrize(
    ("grid", "batch", "sigma"), [(tiny.GRID, 3, SIGMAS[1]), ((1, 4, 7), 1, SIGMAS[0]), ((4, 3, 2), 2, SIGMAS[1])]
)
def test_condition_and_stage(adapter, pipe, dtype, grid, batch, sigma):
    """All tokens, texts of several lengths: the velocity of diffusers' transformer."""
    n = TokenGrid(grid).tokens
    tokens = torch.randn(batch, n, tiny.CHANNELS, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    given, where = texts(dtype, batch), torch.arange(n).expand(batch, -1)
    found = ours(adapter, tokens, TokenGrid(grid).coordinates(), where, given, [0.9, sigma, 0.1], 1)
    assert_same(found, theirs(pipe, tokens, grid, given, sigma), dtype)


@pytest.mark.parametrize("m", [1, 7, 44])
def test_stage_on_some_tokens(adapter, pipe, dtype, m):
    """Tokens anywhere in space and time, others in each video: diffusers' transformer with their rows of its tables."""
    grid = TokenGrid(tiny.GRID)
    generator = torch.Generator().manual_seed(m)
    tokens = torch.randn(2, m, tiny.CHANNELS, generator=generator).to(DTYPES[dtype])
    chosen = torch.stack([torch.randperm(grid.tokens, generator=generator)[:m] for _ in range(2)])
    given = texts(dtype, 2)
    found = ours(adapter, tokens, grid.coordinates(), chosen, given, SIGMAS, 1)
    rope = pipe.transformer.rope
    tables = rope(torch.empty(1, 1, *tiny.GRID))
    for b in range(2):
        one = slice(b, b + 1)
        rope.forward = lambda _, b=b: tuple(table[chosen[b]] for table in tables)
        expected = theirs(pipe, tokens[one], (m, 1, 1), [t[one] for t in given], SIGMAS[1])
        del rope.forward
        assert_same(found[one], expected, dtype)


def test_padding_does_not_count(small):
    """What padded rows of either text hold changes nothing, bit by bit."""
    tokens = torch.randn(2, 45, tiny.CHANNELS)
    given, where = texts("fp32", 2), torch.arange(45).expand(2, -1)
    places = small.geometry.grid.coordinates()
    found = ours(small, tokens, places, where, given, SIGMAS, 0)
    states, mask, glyphs, glyph_mask = given
    other = (states + 9 * (1 - mask[..., None]), mask, glyphs - 9 * (1 - glyph_mask[..., None]), glyph_mask)
    assert torch.equal(ours(small, tokens, places, where, other, SIGMAS, 0), found)
    assert not torch.equal(ours(small, tokens, places, where, (states + 1, *given[1:]), SIGMAS, 0), found)


@pytest.mark.parametrize(("grid", "batch"), [(tiny.GRID, 1), ((1, 4, 5), 1), ((2, 3, 2), 2)])
def test_decode(pipe, dtype, grid, batch):
    tokens = torch.randn(batch, TokenGrid(grid).tokens, tiny.CHANNELS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = HunyuanDecode(pipe.vae, TokenGrid(grid))(tokens)
        latents = tokens.unflatten(1, grid).movedim(-1, 1) / pipe.vae.config.scaling_factor
        # One by one: the masks that diffusers makes for several do not fit its queries.
        video = torch.cat([pipe.vae.decode(one, return_dict=False)[0] for one in latents.to(pipe.vae.dtype).split(1)])
    expected = pipe.video_processor.postprocess_video(video.float(), output_type="pt").transpose(1, 2)
    frames, height, width = grid
    assert found.shape == (batch, 3, 4 * frames - 3, 8 * height, 8 * width)
    assert found.min() >= 0 and found.max() <= 1
    assert_same(found, expected, dtype)


def test_decode_in_tiles(folder):
    """Tiles of 2 x 2 latents, each as diffusers decodes it alone; what is no tile is refused."""
    adapter = HunyuanVideo15Adapter.from_folder(folder, torch.float32, {"tile": 16})
    tiles = adapter.geometry.tiles
    assert tiles.tiling.tile == (2, 2)
    spec = adapter.decoder_spec("decode", 1)
    assert spec.inputs[0].shape == (1, 4, 3, 2, 2) and spec.outputs[0].shape == (1, 3, 9, 16, 16)
    latents, decode = torch.randn(1, 4, *tiny.GRID), adapter.module("decode")
    vae = tiny.hunyuan_video15().vae
    with torch.no_grad():
        video = tiles.decode(latents, decode)
        tile = vae.decode(latents[..., :2, :2] / vae.config.scaling_factor, return_dict=False)[0]
    assert video.shape == (1, 3, *(tiny.FRAMES, tiny.HEIGHT, tiny.WIDTH))
    torch.testing.assert_close(decode(latents[..., :2, :2]), (tile / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)
    for tile in (8, 20):
        with pytest.raises(InputError, match="no tile"):
            HunyuanVideo15Adapter.from_folder(folder, torch.float32, {"tile": tile})


def test_frames_do_not_depend_on_later_ones(small):
    latents = torch.randn(1, 45, tiny.CHANNELS)
    other = latents.clone()
    other[:, 30:] += 1  # the last of 3 latent frames
    with torch.no_grad():
        first, second = (small.module("decode")(x) for x in (latents, other))
    torch.testing.assert_close(first[:, :, :5], second[:, :, :5])
    assert not torch.allclose(first[:, :, 5:], second[:, :, 5:])


@pytest.mark.parametrize("text", ["Text \"a\". ", "é 🎉\n\t~", "a </s> b", "<extra_id_3>x", " <pad>", "x" * 300, ""])
@pytest.mark.parametrize("length", [20, 256])
def test_byte_tokenizer(folder, text, length):
    """Ids and masks of transformers' slow ByT5Tokenizer."""
    from transformers import ByT5Tokenizer

    from jitexport.models.folders import read_tokenizer
    from jitexport.prompting import Tokenizer

    slow = ByT5Tokenizer.from_pretrained(folder / "tokenizer_2")
    expected = slow(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    found = read_tokenizer(folder / "tokenizer_2", Tokenizer("", "", length)).reader().encode([text])
    assert torch.equal(found.ids, expected.input_ids) and torch.equal(found.mask, expected.attention_mask)


# --- whole bundles ---


@pytest.fixture(scope="module")
def ordinary(folder):
    """diffusers' pipeline; videos one by one in its autoencoder, which cannot take several."""
    pipe = tiny.short_texts(HunyuanVideo15Pipeline.from_pretrained(folder))
    pipe.vae.enable_slicing()
    return pipe


@pytest.fixture(scope="module", params=[1, 2])
def dense(request, folder, make_bundle):
    """All tokens at every one of 4 native steps."""
    return jitexport.load(make_bundle(str(folder), method="dense", custom=CustomSchedule((4,)), batch=request.param))


@pytest.mark.parametrize("negative", [None, "a house", "“river” " * 9])
def test_a_bundle_makes_diffusers_videos(dense, ordinary, negative):
    """Prompts of all kinds, with the guider's guidance, with and without a negative prompt."""
    size = {"height": tiny.HEIGHT, "width": tiny.WIDTH, "num_frames": tiny.FRAMES}
    common = {"negative_prompt": negative, "output_type": "pt"}
    with torch.no_grad():
        expected = ordinary(PROMPTS, num_inference_steps=4, generator=seeded(0, 1, 2, 3), **size, **(
            common | {"negative_prompt": None if negative is None else [negative] * len(PROMPTS)}
        )).frames
    found = dense(PROMPTS, generator=seeded(0, 1, 2, 3), **common).frames
    assert found.shape == expected.shape == (4, tiny.FRAMES, 3, tiny.HEIGHT, tiny.WIDTH)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found[0] - found[1]).abs().max() > 0.01


def test_guidance_is_an_argument_here_and_the_guiders_there(dense, ordinary):
    """1 is one pass; another scale is the guider's with that scale."""
    size = {"height": tiny.HEIGHT, "width": tiny.WIDTH, "num_frames": tiny.FRAMES, "num_inference_steps": 4}
    for scale in (1.0, 3.0):
        ordinary.guider = ordinary.guider.new(guidance_scale=scale)
        expected = ordinary("a fox", generator=seeded(5), output_type="latent", **size).frames
        found = dense("a fox", generator=seeded(5), guidance_scale=scale, output_type="latent", **size).frames
        torch.testing.assert_close(found, expected.flatten(2).mT, atol=1e-4, rtol=1e-4)
    ordinary.guider = ordinary.guider.new(guidance_scale=6.0)


def test_embeddings_instead_of_prompts(dense, ordinary):
    names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
    with torch.no_grad():
        given = dict(zip(names, ordinary.encode_prompt(PROMPTS[:1]), strict=True))
        other = dict(zip(names, ordinary.encode_prompt([""]), strict=True))
    expected = dense(PROMPTS[0], generator=seeded(0), output_type="latent").frames
    negative = {f"negative_{name}": value for name, value in other.items()}
    found = dense(**given, **negative, generator=seeded(0), output_type="latent").frames
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


SCHEDULES = {"jit": CustomSchedule((1, 1, 2), (0.35, 0.62, 1.0)), "ras": CustomSchedule((4,), (0.25,))}


@pytest.mark.parametrize(("method", "custom"), SCHEDULES.items())
def test_methods_run_on_the_grid_of_a_video(folder, make_bundle, method, custom):
    """Three frames of 5 x 3 tokens: a video of a seed is the same alone and beside others; the bundle verifies."""
    path = make_bundle(str(folder), method=method, custom=custom, batch=2, settings={"tile": 24})
    pipe = jitexport.load(path)
    together = pipe(PROMPTS[:3], generator=seeded(0, 1, 2), output_type="pt").frames
    assert together.shape == (3, tiny.FRAMES, 3, tiny.HEIGHT, tiny.WIDTH) and together.isfinite().all()
    for i in range(3):
        alone = pipe(PROMPTS[i], generator=seeded(i), output_type="pt").frames
        torch.testing.assert_close(together[i], alone[0], atol=1e-4, rtol=0)
    assert verify(path).passed


@pytest.mark.parametrize("method", ["ralu", "bottleneck"])
def test_methods_that_change_the_resolution_are_refused(folder, make_bundle, method):
    with pytest.raises(JitExportError, match="resolution changes are for images"):
        make_bundle(str(folder), method=method, custom=CustomSchedule((1, 2, 2) if method == "ralu" else (1, 2)))


def test_videos_are_written_as_mp4_and_as_frames(folder, make_bundle, tmp_path):
    """By the command line, several of them; not as a picture."""
    av = pytest.importorskip("av")
    bundle = make_bundle(str(folder), method="dense", custom=CustomSchedule((4,)), batch=1)
    for output, more in ((tmp_path / "fox.mp4", ["--fps", "12"]), (tmp_path / "frames", [])):
        asked = ["generate", str(bundle), "a fox", "-o", str(output), "--seed", "3", "--num-images", "2", *more]
        with pytest.raises(SystemExit) as end:
            main(asked)
        assert end.value.code == 0
    for i in range(2):
        with av.open(str(tmp_path / f"fox-{i}.mp4")) as container:
            sizes = [(frame.height, frame.width) for frame in container.decode(video=0)]
            assert container.streams.video[0].average_rate == 12
        assert sizes == [(tiny.HEIGHT, tiny.WIDTH)] * tiny.FRAMES
    pipe = jitexport.load(bundle)
    expected = pipe("a fox", generator=seeded(4)).frames[0]
    found = [Image.open(path) for path in sorted((tmp_path / "frames-1").iterdir())]
    assert [a.tobytes() for a in found] == [b.tobytes() for b in expected]
    with pytest.raises(SystemExit) as end:
        main(["generate", str(bundle), "a fox", "-o", str(tmp_path / "fox.png")])
    assert end.value.code == InputError.exit_code


def test_evaluations_refuse_videos(folder, make_bundle):
    with pytest.raises(InputError, match="makes videos, and these scores are of images"):
        bundle_source(make_bundle(str(folder), method="dense", custom=CustomSchedule((4,)), batch=1))


def test_eight_bits(folder, make_bundle):
    """The blocks' layers are quantized, and a bundle's video is about the same."""
    custom = CustomSchedule((1, 2), (0.5, 1.0))
    paths = [make_bundle(str(folder), custom=custom, batch=1, quantization=kind) for kind in (None, "int8")]
    exact, rough = (jitexport.load(path) for path in paths)
    quantized = {n for n, t in rough.weights.tensors.items() if t.dtype == torch.int8}
    assert len(quantized) == 2 * 12 and all("transformer_blocks." in name for name in quantized)
    expected, found = (
        pipe("a fox", generator=seeded(0), output_type="latent").frames for pipe in (exact, rough)
    )
    assert 0 < (found - expected).norm() <= 0.05 * expected.norm()


def lora(path, names, width=64):
    """A file of low-rank changes of square layers, the same for each under its names."""
    generator = torch.Generator().manual_seed(0)
    parts = {kind: torch.randn(*shape, generator=generator) for kind, shape in
             (("lora_A", (2, width)), ("lora_B", (width, 2)))}
    save_file({f"{name}.{kind}.weight": value.clone() for name in names for kind, value in parts.items()}, path)
    return path


@pytest.fixture(scope="module")
def loaded(folder, make_bundle):
    """A pipeline of which every user leaves the weights as they were."""
    return jitexport.load(make_bundle(str(folder), method="dense", custom=CustomSchedule((4,)), batch=1))


def test_adapters_in_diffusers_and_in_the_authors_names(loaded, tmp_path):
    def video():
        return loaded("a fox", generator=seeded(0), output_type="latent").frames

    plain = video()
    loaded.load_lora(lora(tmp_path / "d.safetensors", ["transformer.transformer_blocks.0.attn.to_add_out"]))
    expected = video()
    loaded.unload_lora()
    loaded.load_lora(lora(tmp_path / "a.safetensors", ["diffusion_model.double_blocks.0.txt_attn_proj"]))
    found = video()
    loaded.unload_lora()
    assert torch.equal(found, expected)
    assert (expected - plain).abs().max() > 1e-3
    assert torch.equal(video(), plain)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.transformer_blocks.0.norm1.linear",
        "transformer.norm_out.linear",
        "transformer.time_embed.timestep_embedder.linear_1",
        "diffusion_model.double_blocks.1.txt_mod.linear",
        "lora_unet_final_layer_adaLN_modulation_1",
    ],
)
def test_adapters_of_layers_that_are_constants_are_refused(loaded, tmp_path, name):
    with pytest.raises(JitExportError, match=r"(?s)constants of the bundle.*build a bundle") as caught:
        loaded.load_lora(lora(tmp_path / "x.safetensors", [name]))
    assert name in str(caught.value)


def test_another_checkpoint_brings_its_own_constants(loaded, folder, make_bundle, tmp_path):
    """Of two checkpoints that differ in what makes modulation, one loaded into the other's bundle is itself."""
    copy = shutil.copytree(folder, tmp_path / "model")
    path = copy / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["transformer_blocks.0.norm1.linear.bias"] += 0.5
    save_file(weights, path, metadata={"format": "pt"})
    other = jitexport.load(make_bundle(str(copy), method="dense", custom=CustomSchedule((4,)), batch=1))
    expected, plain = (p("a fox", generator=seeded(0), output_type="latent").frames for p in (other, loaded))
    loaded.load_checkpoint(copy)
    found = loaded("a fox", generator=seeded(0), output_type="latent").frames
    loaded.load_checkpoint(folder)
    assert torch.equal(found, expected) and not torch.allclose(expected, plain)
    assert torch.equal(loaded("a fox", generator=seeded(0), output_type="latent").frames, plain)


# --- noise levels and sizes ---


@pytest.mark.parametrize("name", HUNYUAN_VIDEO15)
@pytest.mark.parametrize("n", [1, 4, 18, 50])
def test_native_sigmas_are_the_pipelines(small, name, n, monkeypatch):
    config = HUNYUAN_VIDEO15[name].configs["scheduler"]
    monkeypatch.setitem(small.configs, "scheduler", config)
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 0.0, n + 1, dtype=torch.float64)[:-1].numpy())
    assert small.native_sigmas(n) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-7)
    assert small.shift(n) == pytest.approx({"hunyuan-video-1.5": 5.0, "hunyuan-video-1.5-720p": 9.0}[name], rel=1e-6)


def test_native_sigmas_are_those_that_a_call_used(adapter, pipe, dtype):
    pipe("a fox", height=40, width=24, num_frames=5, num_inference_steps=3, output_type="latent")
    assert adapter.native_sigmas(3) == tuple(pipe.scheduler.sigmas.tolist())


def test_usual_sizes_are_the_pipelines():
    processor = HunyuanVideo15ImageProcessor(vae_scale_factor=16)
    for target, size in HUNYUAN_SIZES.items():
        assert processor.calculate_default_height_width(9, 16, target) == size


def test_settings_come_from_the_folder_or_the_caller(folder, small, tmp_path):
    assert small.settings() == {
        "height": tiny.HEIGHT,
        "width": tiny.WIDTH,
        "frames": tiny.FRAMES,
        "max_sequence_length": tiny.TEXT_TOKENS,
        "glyph_length": tiny.GLYPH_TOKENS,
        "tile": 256,
        "guidance_scale": 6.0,
        "num_inference_steps": 50,
        "quantization": None,
        "features": None,
    }
    geometry = small.geometry
    assert (geometry.grid.shape, geometry.frames, geometry.latent_shape) == (tiny.GRID, 9, (4, 3, 5, 3))
    assert geometry.drawn == ((4, 3, 5, 3), 1)  # noise as `prepare_latents` draws it
    other = HunyuanVideo15Adapter.from_folder(folder, torch.float32, {"frames": 1, "height": 16, "width": 32})
    assert (other.geometry.grid.shape, other.geometry.frames) == ((1, 2, 4), 1)
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "jitexport.json").unlink()
    plain = HunyuanVideo15Adapter.from_folder(copy, torch.float32, {"height": 480, "width": 848})
    assert (plain.geometry.frames, plain.geometry.text_tokens, plain.defaults.num_inference_steps) == (121, 1256, 50)
    assert (plain.defaults.guidance.true, plain.defaults.guidance.negative) == (6.0, "")


@pytest.mark.parametrize("settings", [{"frames": 8}, {"height": 44}, {"width": 4}])
def test_sizes_that_the_grid_does_not_divide(folder, settings):
    with pytest.raises(InputError, match="does not fit"):
        HunyuanVideo15Adapter.from_folder(folder, torch.float32, settings)


# --- look-alikes ---


def edited(folder, target, file, **changes):
    copy = shutil.copytree(folder, target / "model", copy_function=os.link)
    path = copy / file
    values = json.loads(path.read_text()) | changes
    path.unlink()
    path.write_text(json.dumps(values))
    return copy


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer/config.json", {"task_type": "i2v"}, "another task than text to video"),
        ("guider/guider_config.json", {"guidance_rescale": 0.7}, "guider"),
        ("guider/guider_config.json", {"use_original_formulation": True}, "guider"),
        ("guider/guider_config.json", {"stop": 0.5}, "guider"),
        ("guider/guider_config.json", {"_class_name": "AdaptiveProjectedGuidance"}, "guider"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "sampler"),
    ],
)
def test_models_that_only_resemble_it_are_refused(folder, tmp_path, part, changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        HunyuanVideo15Adapter.from_folder(edited(folder, tmp_path, part, **changes), torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"use_meanflow": True}, "mean flow"), ({"in_channels": 4}, "transformer"), ({"patch_size": 2}, "transformer")],
)
def test_transformers_that_only_resemble_it_are_refused(small, changes, message):
    configs = small.configs | {"transformer": small.configs["transformer"] | changes}
    with pytest.raises(UnsupportedModelError, match=message):
        HunyuanVideo15Adapter.from_configs(configs, small.settings(), torch.float32)


def test_a_disabled_guider_has_one_pass(folder, tmp_path):
    copy = edited(folder, tmp_path, "guider/guider_config.json", enabled=False)
    assert HunyuanVideo15Adapter.from_folder(copy, torch.float32).defaults.guidance.true == 1.0


def test_a_missing_guider_is_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(copy / "guider")
    with pytest.raises(ModelNotFoundError, match="incomplete") as caught:
        HunyuanVideo15Adapter.from_folder(copy, torch.float32)
    assert "guider" in str(caught.value.found)


# --- specs, names ---


@pytest.mark.parametrize("batch", [1, 2])
def test_specs_describe_what_the_modules_take_and_give(adapter, dtype, batch):
    """Every module runs on tensors of its spec and answers with tensors of its spec; constants as their specs."""
    schedule = StageSchedule(make_stages(45, [2, 1, 2], [0.35, 0.62, 1.0]), uniform_sigmas(5))
    specs = adapter.specs(schedule, batch, dtype)
    assert [s.name for s in specs] == ["text", "condition", "stage2", "stage1", "stage0", "decode"]
    for spec in specs:
        inputs = [torch.ones(s.shape, dtype=DTYPES[s.dtype]) for s in spec.inputs]
        with torch.no_grad():
            out = adapter.module(spec.name)(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        assert [(tuple(t.shape), t.dtype) for t in out] == [(s.shape, DTYPES[s.dtype]) for s in spec.outputs]
    assert [s.name for s in specs[1].outputs if s.per_step] == ["context"]
    constants = adapter.constants(torch.tensor(uniform_sigmas(5)[:-1]))
    expected = {s.name: (s.shape, DTYPES[s.dtype]) for s in adapter.constant_specs(5, dtype)}
    assert {name: (tuple(t.shape), t.dtype) for name, t in constants.items()} == expected


def test_every_module_exports(small):
    schedule = StageSchedule(make_stages(45, [1], [1.0]), uniform_sigmas(1))
    for spec in small.specs(schedule, 2, "fp32"):
        inputs = tuple(torch.ones(s.shape, dtype=DTYPES[s.dtype]) for s in spec.inputs)
        with torch.no_grad():
            torch.export.export(small.module(spec.name), inputs)


def test_modules_name_their_parameters_as_the_model_does(small, folder):
    """The names are the checkpoint's, and what only makes constants or sees pictures is in no engine."""
    known = dict(small.tensors())
    for name in ("text", "condition", "stage0", "decode"):
        parameters = dict(small.module(name).named_parameters(remove_duplicate=False))
        assert parameters and all(p is known[full] for full, p in parameters.items())
    stored = {f"transformer.{name}" for name in load_file(folder / "transformer/diffusion_pytorch_model.safetensors")}
    ours = {name for name in known if name.startswith("transformer.")}
    gone = stored - ours
    assert ours <= stored
    pattern = r"\.(norm1|norm1_context|norm_out)\.linear\.|time_embed|image_embedder"
    assert gone and all(re.search(pattern, name) for name in gone)
    assert not any(p.requires_grad for p in known.values())


def test_from_configs_rebuilds_the_same_modules(small):
    """Shapes and names without weights, from what a manifest keeps as JSON."""
    configs = json.loads(json.dumps(small.configs, default=str))
    rebuilt = HunyuanVideo15Adapter.from_configs(configs, small.settings(), torch.float32)
    assert rebuilt.geometry == small.geometry and rebuilt.defaults == small.defaults
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in small.tensors()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in rebuilt.tensors()} == shapes
    assert all(t.is_meta for _, t in rebuilt.tensors())


#: Names of diffusers' weights, and what the authors' checkpoints call them.
AUTHORS = [
    (r"^transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.linear"),
    (r"^transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.linear"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_([qkv])\.", r"double_blocks.\1.img_attn_\2."),
    (r"^transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj\.", r"double_blocks.\1.txt_attn_\2."),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_([qk])\.", r"double_blocks.\1.img_attn_\2_norm."),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_added_([qk])\.", r"double_blocks.\1.txt_attn_\2_norm."),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn_proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn_proj"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.fc1"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.fc2"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.fc1"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.fc2"),
    (r"refiner_blocks\.(\d+)\.attn\.to_out\.0", r"refiner_blocks.\1.self_attn_proj"),
    (r"refiner_blocks\.(\d+)\.ff\.net\.0\.proj", r"refiner_blocks.\1.mlp.fc1"),
    (r"refiner_blocks\.(\d+)\.ff\.net\.2", r"refiner_blocks.\1.mlp.fc2"),
    (r"refiner_blocks\.(\d+)\.norm_out\.linear", r"refiner_blocks.\1.adaLN_modulation.1"),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.", r"txt_in.individual_token_refiner.blocks."),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1", "txt_in.t_embedder.mlp.0"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2", "txt_in.t_embedder.mlp.2"),
    (r"^context_embedder\.time_text_embed\.text_embedder", "txt_in.c_embedder"),
    (r"^context_embedder\.proj_in", "txt_in.input_embedder"),
    (r"^context_embedder_2\.norm", "byt5_in.layernorm"),
    (r"^context_embedder_2\.linear_", "byt5_in.fc"),
    (r"^time_embed\.timestep_embedder\.linear_1", "time_in.mlp.0"),
    (r"^time_embed\.timestep_embedder\.linear_2", "time_in.mlp.2"),
    (r"^image_embedder\.norm_in", "vision_in.proj.0"),
    (r"^image_embedder\.linear_1", "vision_in.proj.1"),
    (r"^image_embedder\.linear_2", "vision_in.proj.3"),
    (r"^image_embedder\.norm_out", "vision_in.proj.4"),
    (r"^x_embedder", "img_in"),
    (r"^cond_type_embed", "cond_type_embedding"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
]


def authors(weights):
    """A transformer's weights as its authors keep them: other names, a refiner's q, k and v in one, shift first."""
    fused = {}
    for name in [n for n in weights if "refiner_blocks" in n and ".attn.to_q." in n]:
        parts = [weights.pop(name.replace("to_q", f"to_{x}")) for x in "qkv"]
        fused[name.replace("attn.to_q", "self_attn_qkv")] = torch.cat(parts)
    renamed = {}
    for name, value in (weights | fused).items():
        if name.startswith("norm_out.linear"):
            value = torch.cat(value.chunk(2)[::-1])
        for ours, their in AUTHORS:
            name = re.sub(ours, their, name)
        renamed[name] = value.contiguous()
    return renamed


def test_a_transformer_in_its_authors_file(folder, small, tmp_path):
    """Every weight of such a file finds its place, those of constants included."""
    weights = authors(load_file(folder / "transformer/diffusion_pytorch_model.safetensors"))
    assert not any(re.match(r"transformer_blocks|context_embedder|norm_out", name) for name in weights)
    save_file(weights, tmp_path / "model.safetensors")
    read = HunyuanVideo15Adapter.from_file(tmp_path / "model.safetensors", folder, torch.float32)
    expected = dict(small.tensors())
    assert all(torch.equal(value, expected[name]) for name, value in read.tensors())
    sigmas = torch.tensor(SIGMAS)
    assert torch.equal(read.constants(sigmas)["modulation"], small.constants(sigmas)["modulation"])


# --- the published models, on meta tensors ---


def published(name, **changes):
    """A published model, with changes of its transformer, and a language model of 3 of its 28 layers."""
    model = HUNYUAN_VIDEO15[name]
    configs = model.configs | {"transformer": model.configs["transformer"] | changes}
    configs |= {"text_encoder": configs["text_encoder"] | {"num_hidden_layers": 3}}
    settings = HunyuanVideo15Adapter.usual(configs) | model.settings
    return HunyuanVideo15Adapter.from_configs(configs, settings, torch.bfloat16)


def costs(name, tokens):
    """FLOPs of a pass of 54 blocks, which are all alike, from those of 1 and 2; for each number of tokens."""
    first, second = (step_cost(published(name, num_layers=n), "bf16") for n in (1, 2))
    return [first(m) + 53 * (second(m) - first(m)) for m in tokens]


def test_published_size():
    adapter = published("hunyuan-video-1.5")
    engines = sum(p.numel() for p in adapter.components["transformer"].parameters())
    once = sum(p.numel() for p in adapter.once.parameters())
    assert engines / 1e9 == pytest.approx(5.59, abs=0.005) and once / 1e9 == pytest.approx(2.73, abs=0.005)
    assert adapter.geometry.text_tokens == 1256 and adapter.geometry.channels == 32
    (modulation,) = adapter.constant_specs(18, "bf16")
    assert modulation.shape == (18, 54 * 12 * 2048 + 2 * 2048)


@pytest.mark.parametrize(
    ("name", "grid", "tflop", "ratio"),
    [("hunyuan-video-1.5", (31, 30, 53), 1405, 4.99), ("hunyuan-video-1.5-720p", (31, 45, 80), 6248, 5.15)],
)
def test_published_flops(name, grid, tflop, ratio):
    """A pass, and what the 4x schedule of 18 steps saves of 50: attention makes it more than 4."""
    model = HUNYUAN_VIDEO15[name]
    settings = HunyuanVideo15Adapter.usual(model.configs) | model.settings
    assert HunyuanVideo15Adapter.geometry_of(model.configs, settings).grid.shape == grid
    tokens = TokenGrid(grid).tokens
    stages = make_stages(tokens, split_steps(18), [0.35, 0.62, 1.0])
    passes = costs(name, [s.tokens for s in stages])
    assert passes[-1] / 1e12 == pytest.approx(tflop, abs=0.5)
    accelerated = sum(s.steps * flops for s, flops in zip(stages, passes, strict=True))
    assert 50 * passes[-1] / accelerated == pytest.approx(ratio, abs=0.005)


def test_published_decoder_traces():
    """All 121 frames of a tile at once, frame-causal attention within; 15 tiles make the video."""
    adapter = published("hunyuan-video-1.5", num_layers=1)
    tiles = adapter.geometry.tiles
    assert (tiles.tiling.tile, tiles.tiling.overlap, tiles.tiling.calls((30, 53))) == ((16, 16), (4, 4), 15)
    spec = adapter.decoder_spec("decode", 1)
    assert spec.inputs[0].shape == (1, 32, 31, 16, 16) and spec.outputs[0].shape == (1, 3, 121, 256, 256)
    with torch.no_grad():
        out = adapter.module("decode")(torch.empty(spec.inputs[0].shape, device="meta"))
    assert tuple(out.shape) == spec.outputs[0].shape
    assert count_flops(adapter.module("decode"), spec) / 1e12 == pytest.approx(198, abs=1)
