"""Tiles of one fixed shape against decoding at once."""

import json
import math
from dataclasses import asdict
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from jitexport.errors import InputError
from jitexport.tiling import Tiling
from tests.scripting import script


def some(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def local(scale):
    """A linear decoder without a halo: each latent makes its own pixels, all of them different."""

    def decode(latents):
        pixels = latents[:, :3]
        for axis, n in enumerate(scale, start=2 - len(scale) + latents.dim() - 2):
            length = pixels.shape[axis]
            place = torch.arange(n).repeat(length).reshape(-1, *[1] * (latents.dim() - axis - 1))
            pixels = pixels.repeat_interleave(n, dim=axis) * (1 + 0.1 * place)
        return pixels

    return decode


def fixed(tile, decode):
    """An engine: takes its own shape only, and counts its calls."""

    def engine(latents):
        assert latents.shape[-len(tile) :] == tile and latents.is_contiguous()
        engine.calls += 1
        return decode(latents)

    engine.calls = 0
    return engine


CASES = [
    # latents, tile, overlap, scale, number of tiles
    ((1, 4, 16, 16), (8, 8), (2, 2), (8, 8), 9),
    ((2, 4, 13, 9), (8, 8), (2, 2), (8, 8), 4),  # not divided by tiles
    ((1, 4, 15, 8), (8, 8), (2, 0), (4, 2), 3),  # the first and the third tile overlap as well
    ((1, 4, 8, 8), (8, 8), (7, 7), (8, 8), 1),
    ((1, 4, 9, 7), (3, 2), (0, 0), (2, 3), 12),
    ((1, 3, 5, 10, 7), (4, 4), (1, 1), (16, 16), 6),  # video, time left whole
    ((1, 3, 7, 6, 5), (3, 4, 4), (1, 2, 1), (4, 2, 2), 12),  # and divided
]


@pytest.mark.parametrize(("shape", "tile", "overlap", "scale", "calls"), CASES)
def test_tiles_of_a_local_decoder_make_the_whole(shape, tile, overlap, scale, calls):
    latents, tiling, decode = some(*shape), Tiling(tile, overlap), local(scale)
    engine = fixed(tile, decode)
    found = tiling.decode(latents, engine, scale)
    torch.testing.assert_close(found, decode(latents), rtol=0, atol=1e-6)
    assert engine.calls == tiling.calls(shape[-len(tile) :]) == calls


@given(st.data())
def test_tiles_cover_every_axis_evenly(data):
    tile = data.draw(st.integers(1, 12))
    overlap = data.draw(st.integers(0, tile - 1))
    size = data.draw(st.integers(tile, 60))
    starts, _ = Tiling((tile, 1), (overlap, 0)).starts((size, 1))
    assert starts[0] == 0 and starts[-1] == size - tile
    steps = [b - a for a, b in pairwise(starts)]
    assert all(1 <= step <= tile - overlap for step in steps) and (not steps or max(steps) - min(steps) <= 1)
    assert len(starts) == 1 + math.ceil((size - tile) / (tile - overlap))  # no more than needed


def halo(kernel, scale):
    """Zero-padded convolution, then larger pixels: near a tile's border it sees less than in the middle."""

    def decode(latents):
        field = F.conv2d(latents.reshape(-1, 1, *latents.shape[-2:]), kernel[None, None], padding="same")
        return field.reshape(latents.shape).repeat_interleave(scale, -1).repeat_interleave(scale, -2)

    return decode


def test_seams_of_a_decoder_with_a_halo_fade():
    """Without an overlap the seam is a jump; with one the error falls, and is gone where tiles see all they need."""
    kernel = torch.full((3, 3), 1 / 9)
    latents, scale = some(1, 2, 24, 24).abs() + 1, 4
    exact = halo(kernel, scale)(latents)
    errors = [
        (Tiling((8, 8), (o, o)).decode(latents, fixed((8, 8), halo(kernel, scale)), (scale, scale)) - exact).abs()
        for o in (0, 2, 4)
    ]
    worst = [error[..., scale:-scale, scale:-scale].max().item() for error in errors]
    assert worst[1] < 0.9 * worst[0] and worst[2] < 0.6 * worst[0]
    starts, _ = Tiling((8, 8), (2, 2)).starts((24, 24))
    assert starts == (0, 5, 10, 16)  # rows 1 to 4 are the first tile's alone, and it sees one row around them
    assert errors[1][..., : 5 * scale, : 5 * scale].max() < 1e-5


def test_weights_rise_linearly_from_nothing():
    """The second of two tiles is the one that gives 1: what comes out is its weight."""
    calls = iter([0.0, 1.0])
    found = Tiling((4, 1), (2, 0)).decode(
        torch.zeros(1, 1, 6, 1), lambda tile: torch.full((1, 1, 16, 1), next(calls)), (4, 1)
    )
    expected = torch.cat([torch.zeros(8), torch.arange(8) / 8, torch.ones(8)])
    torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=1e-7)


def test_weights_of_four_tiles_are_products():
    ones = iter(torch.eye(4))  # tile i gives 1 in channel i, so that each channel is the weight of its tile
    found = Tiling((4, 4), (2, 2)).decode(
        torch.zeros(1, 1, 6, 6), lambda tile: next(ones).reshape(1, 4, 1, 1).repeat(1, 1, 4, 4), (1, 1)
    )[0]
    rise = torch.tensor([0, 0, 0, 0.5, 1, 1])
    for weight, (row, column) in zip(found, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        expected = torch.outer(rise if row else 1 - rise, rise if column else 1 - rise)
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_stay_between_those_of_the_tiles(dtype):
    """So that pictures in [0, 1] stay there, to the last bit, and a constant stays itself."""
    tiling, decode = Tiling((3, 5, 5), (1, 2, 3)), local((2, 3, 3))
    latents = some(1, 3, 8, 16, 14).to(dtype)

    def clamped(tile):
        return decode(tile).clamp(0, 1).to(dtype)

    found = tiling.decode(latents, clamped, (2, 3, 3))
    assert found.dtype == dtype and found.min() == 0 and found.max() == 1
    third = torch.full((1, 3, 6, 15, 15), 1 / 3, dtype=dtype)
    assert tiling.decode(latents, lambda tile: third, (2, 3, 3)).unique().tolist() == [third.max().item()]


def causal(scale):
    """Each latent makes `scale` frames, the first of all only its last one; all are told apart by numbers in time."""

    def decode(latents):
        frames = latents.repeat_interleave(scale, 2)
        step = torch.arange(frames.shape[2]) % scale
        return (frames + 0.1 * step.reshape(-1, 1, 1))[:, :, scale - 1 :]

    return decode


@pytest.mark.parametrize(
    ("time", "tile", "overlap", "calls"), [(31, 8, 2, 5), (9, 4, 1, 3), (4, 4, 0, 1), (5, 4, 3, 2)]
)
def test_time_of_causal_decoders(time, tile, overlap, calls):
    """31 latents are 121 frames: a tile's frames go where its latents are, four to each but the first."""
    latents, decode = some(1, 2, time, 3, 3), causal(4)
    engine = fixed((tile, 3, 3), decode)
    found = Tiling((tile, 3, 3), (overlap, 0, 0)).decode(latents, engine, (4, 1, 1), first_frame_alone=True)
    assert found.shape[2] == 4 * (time - 1) + 1 and engine.calls == calls
    torch.testing.assert_close(found, decode(latents), rtol=0, atol=1e-6)


def test_a_tiles_first_frame_counts_only_at_the_start():
    """It was decoded without what came before."""

    def decode(tile):
        frames = causal(4)(tile).clone()
        frames[:, :, 0] = 1000
        return frames

    found = Tiling((4, 2, 2), (1, 0, 0)).decode(torch.zeros(1, 1, 10, 2, 2), decode, (4, 1, 1), first_frame_alone=True)
    assert (found == 1000).any(dim=(0, 1, 3, 4)).tolist() == [True] + [False] * 36


def test_frames_that_no_tile_makes_are_refused():
    with pytest.raises(InputError, match="would be missing"):
        Tiling((4, 2, 2), (0, 0, 0)).decode(torch.zeros(1, 1, 8, 2, 2), causal(4), (4, 1, 1), first_frame_alone=True)


def test_latents_smaller_than_a_tile_get_smaller_tiles_and_never_other_pixels():
    tiling, latents = Tiling((16, 16), (4, 4)), some(1, 4, 5, 40)
    with pytest.raises(InputError, match="smaller than a tile") as caught:
        tiling.decode(latents, local((8, 8)), (8, 8))
    assert "(5, 40)" in caught.value.found
    small = tiling.fitted((5, 40))
    assert small == Tiling((5, 16), (4, 4)) and tiling.fitted((40, 40)) == tiling
    found = small.decode(latents, fixed((5, 16), local((8, 8))), (8, 8))
    torch.testing.assert_close(found, local((8, 8))(latents), rtol=0, atol=1e-6)
    assert tiling.fitted((1, 1)) == Tiling((1, 1), (0, 0))


def test_json_gives_the_same_back():
    tiling = Tiling((8, 16, 16), (2, 4, 4))
    assert Tiling(**json.loads(json.dumps(asdict(tiling)))) == tiling


@pytest.mark.parametrize(
    ("tile", "overlap"), [((8,), (2,)), ((8, 8), (2,)), ((8, 8), (8, 2)), ((0, 8), (0, 2)), ((8, 8), (-1, 2))]
)
def test_what_are_no_tiles_is_refused(tile, overlap):
    with pytest.raises(InputError, match="no tiles"):
        Tiling(tile, overlap)


def test_engines_and_latents_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="another size"):
        Tiling((4, 4), (1, 1)).decode(torch.zeros(1, 3, 8, 8), local((2, 4)), (4, 4))
    with pytest.raises(InputError, match="other axes"):
        Tiling((4, 4, 4), (1, 1, 1)).decode(torch.zeros(1, 3, 8, 8), local((2, 2)), (2, 2, 2))
    with pytest.raises(InputError, match="other axes"):
        Tiling((4, 4), (1, 1)).decode(torch.zeros(1, 3, 8, 8), local((2, 2)), (2,))


def test_what_the_engine_gave_stays_as_it_was():
    """Engines may give the same memory each time."""
    given = torch.ones(1, 1, 4, 4)
    Tiling((4, 4), (3, 3)).decode(torch.zeros(1, 1, 6, 6), lambda tile: given, (1, 1))
    assert (given == 1).all()


def test_along_one_axis_it_is_what_diffusers_does():
    """Where both have the same tiles, and away from corners, of which diffusers weighs the second column twice."""
    vae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15")
    kernel = some(5, 5, seed=3)
    like = SimpleNamespace(
        tile_latent_min_height=8, tile_latent_min_width=8, tile_sample_min_height=32, tile_sample_min_width=32,
        tile_overlap_factor=0.25, decoder=halo(kernel, 4),
    )  # fmt: skip
    for name in ("blend_v", "blend_h"):
        setattr(like, name, getattr(vae.AutoencoderKLHunyuanVideo15, name).__get__(like))
    latents = some(1, 3, 2, 20, 20)  # tiles at 0, 6 and 12; diffusers has strips at 18 as well
    theirs = vae.AutoencoderKLHunyuanVideo15.tiled_decode(like, latents)
    ours = Tiling((8, 8), (2, 2)).decode(latents, fixed((8, 8), halo(kernel, 4)), (4, 4))
    assert theirs.shape == ours.shape
    inside = torch.ones(72, dtype=torch.bool)
    blended = torch.cat([torch.arange(a, a + 8) for a in (24, 48)])
    alone = inside.clone()
    alone[blended] = False
    for rows, columns in ((inside, alone), (alone, inside)):
        a, b = (x[..., :72, :72][..., rows, :][..., columns] for x in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert not torch.allclose(ours, theirs, atol=1e-2)  # elsewhere they differ


@pytest.mark.parametrize("factor", [1, 4])
def test_memory_is_a_few_times_the_result(factor):
    latents, tiling = torch.zeros(1, 3, 4 * factor, 32 * factor, 8), Tiling((4, 8, 8), (1, 2, 2))
    pixels = torch.zeros(1, 3, 8, 64, 64)
    with script("bench/scale").Living() as living:
        found = tiling.decode(latents, lambda tile: pixels.clone(), (2, 8, 8))
    assert living.peak < 2.5 * found.nbytes
