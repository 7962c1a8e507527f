import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from jitexport.errors import UnsupportedModelError
from jitexport.grid import TokenGrid, pack, unpack
from jitexport.models.sd3 import PATCH, SD3Condition, SD3Stage, SD3Text, SinCos, cropped, published_table, read_table
from jitexport.specs import DTYPES
from tests import tiny, tiny_sd3
from tests.models.test_flux import assert_same

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
