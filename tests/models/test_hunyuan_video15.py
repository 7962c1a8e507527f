import pytest
import torch
from diffusers import HunyuanVideo15Pipeline

from jitexport.grid import TokenGrid
from jitexport.models.hunyuan_video15 import (
    HIDDEN,
    HunyuanCondition,
    HunyuanDecode,
    HunyuanStage,
    modulation,
    modulation_layers,
)
from jitexport.positions import Rotary
from jitexport.specs import DTYPES
from tests import tiny_hunyuan_video15 as tiny

# diffusers rounds timesteps to the model's dtype before it makes angles, we do not: bf16 keeps these exactly.
SIGMAS = (1.0, 0.512)


def assert_same(found, expected, dtype):
    """fp32: to 1e-5 of the largest values. bf16, which keeps 8 bits: 2% of the whole."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if dtype == "fp32":
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    else:
        assert (found.float() - expected.float()).norm() <= 0.02 * expected.float().norm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_hunyuan_video15(tmp_path_factory.mktemp("hunyuan") / "tiny")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(folder, dtype):
    return tiny.short_texts(HunyuanVideo15Pipeline.from_pretrained(folder, dtype=DTYPES[dtype]))


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
def ours(pipe, tokens, positions, texts, sigmas, step):
    model = pipe.transformer
    states, mask, glyphs, glyph_mask = texts
    levels = torch.tensor(sigmas)
    context, keys = HunyuanCondition(model)(states, (1.0 - mask) * HIDDEN, glyphs, (1.0 - glyph_mask) * HIDDEN, levels)
    vectors = modulation(model.time_embed, modulation_layers(model), levels)
    cos, sin = Rotary((8, 12, 12), 256.0, 0).tables(positions)
    return HunyuanStage(model)(tokens, cos, sin, context[step], keys, vectors[step])


# --- parity with diffusers ---


@pytest.mark.parametrize("m", [1, 7, 44])
def test_stage_on_some_tokens(pipe, dtype, m):
    """Tokens anywhere in space and time, others in each video: as diffusers' transformer with a rotary of theirs."""
    grid = TokenGrid(tiny.GRID)
    generator = torch.Generator().manual_seed(m)
    tokens = torch.randn(2, m, tiny.CHANNELS, generator=generator).to(DTYPES[dtype])
    chosen = torch.stack([torch.randperm(grid.tokens, generator=generator)[:m] for _ in range(2)])
    given = texts(dtype, 2)
    found = ours(pipe, tokens, grid.coordinates()[chosen], given, SIGMAS, 1)
    rope = pipe.transformer.rope
    tables = rope(torch.empty(1, 1, *tiny.GRID))
    for b in range(2):
        one = slice(b, b + 1)
        rope.forward = lambda _, b=b: tuple(table[chosen[b]] for table in tables)
        expected = theirs(pipe, tokens[one], (m, 1, 1), [t[one] for t in given], SIGMAS[1])
        del rope.forward
        assert_same(found[one], expected, dtype)


@pytest.mark.parametrize(
    ("grid", "batch", "sigma"), [(tiny.GRID, 3, SIGMAS[1]), ((1, 4, 7), 1, SIGMAS[0]), ((4, 3, 2), 2, SIGMAS[1])]
)
def test_condition_and_stage(pipe, dtype, grid, batch, sigma):
    """All tokens, texts of several lengths: the velocity of diffusers' transformer."""
    tokens = torch.randn(batch, TokenGrid(grid).tokens, tiny.CHANNELS, generator=torch.Generator().manual_seed(0))
    tokens, given = tokens.to(DTYPES[dtype]), texts(dtype, batch)
    found = ours(pipe, tokens, TokenGrid(grid).coordinates().expand(batch, -1, -1), given, [0.9, sigma, 0.1], 1)
    assert_same(found, theirs(pipe, tokens, grid, given, sigma), dtype)


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
