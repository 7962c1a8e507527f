import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from jitexport.errors import InputError, ScheduleError
from jitexport.grid import TokenGrid, pack, unpack
from jitexport.resample import KERNELS, Resampler, enlarging_matrix

GRID = TokenGrid((6, 4))


def field(tokens=24, channels=8, batch=2, seed=0):
    return torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_enlarging_keeps_constants(kernel, n):
    matrix = enlarging_matrix(n, kernel)
    assert matrix.shape == (2 * n, n)
    torch.testing.assert_close(matrix.sum(1), torch.ones(2 * n))


@pytest.mark.parametrize("kernel", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("patch", [1, 2])
def test_up_is_torchs_interpolation_of_the_unpacked_latents(kernel, patch):
    resampler = Resampler(GRID, patch, kernel)
    x = torch.randn(2, 3, 3 * patch, 2 * patch)
    align = {} if kernel == "nearest" else {"align_corners": False}
    expected = pack(F.interpolate(x, scale_factor=2, mode=kernel, **align), patch)
    torch.testing.assert_close(resampler.up(pack(x, patch)), expected, atol=1e-6, rtol=0)


def test_lanczos_is_pillows_away_from_the_border():
    x = np.random.default_rng(0).random((12, 12), dtype=np.float32)
    expected = np.asarray(Image.fromarray(x).resize((24, 24), Image.Resampling.LANCZOS))
    found = Resampler(TokenGrid((24, 24)), 1, "lanczos").up(torch.tensor(x).view(1, 144, 1)).view(24, 24)
    np.testing.assert_allclose(found[6:-6, 6:-6], expected[6:-6, 6:-6], atol=1e-5)


def test_cells_are_blocks_of_two_by_two_tokens():
    assert Resampler(TokenGrid((2, 4)), 2).cells().tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize("patch", [1, 2])
def test_down_and_pick_undo_nearest_neighbours(patch):
    resampler = Resampler(GRID, patch, "bilinear")
    low = field(6)
    high = resampler.nearest.up(low)
    assert torch.equal(resampler.pick(high), low)
    torch.testing.assert_close(resampler.down(high), low)


def test_pixels_of_a_coarse_token_become_its_four_tokens():
    """With patches of 2 each latent pixel fills a token; with `patch=1` each token repeats the patch."""
    low = torch.arange(4.0).view(1, 1, 4)  # one cell, one channel, pixels 0 1 / 2 3
    grid = TokenGrid((2, 2))
    assert Resampler(grid, 2).up(low)[0].tolist() == [[0.0] * 4, [1.0] * 4, [2.0] * 4, [3.0] * 4]
    assert Resampler(grid, 1).up(low)[0].tolist() == [[0.0, 1.0, 2.0, 3.0]] * 4


@pytest.mark.parametrize("patch", [1, 2])
def test_picked_noise_is_some_of_the_noise(patch):
    y = field()
    picked = unpack(Resampler(GRID, patch).pick(y), TokenGrid((3, 2)), patch)
    assert torch.equal(picked, unpack(y, GRID, patch)[..., ::2, ::2])


@pytest.mark.parametrize("kernel", KERNELS)
def test_variance_after_enlarging(kernel):
    resampler = Resampler(TokenGrid((40, 40)), 1, kernel)
    measured = resampler.up(field(400, 2000, 1)).var().item()
    assert resampler.variance == pytest.approx(measured, rel=0.02)
    assert (resampler.variance == pytest.approx(1)) == (kernel == "nearest")


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("c", [0.0, 0.0177, 0.1, 0.25])
def test_correlated_noise_has_the_blocks_covariance(patch, c):
    """N(0, I - c Sigma), Sigma ones in blocks of 2 x 2 pixels: Monte Carlo over 40,000 samples."""
    grid, samples = TokenGrid((4, 2)), 40_000
    z = Resampler(grid, patch).correlated(field(8, patch**2, samples), c)
    pixels = unpack(z, grid, patch)[:, 0]  # [samples, 4 p, 2 p]
    h, w = pixels.shape[1:]
    block = torch.arange(h)[:, None] // 2 * w + torch.arange(w) // 2
    sigma = (block.flatten()[:, None] == block.flatten()).double()
    expected = torch.eye(h * w, dtype=torch.float64) - c * sigma
    found = torch.cov(pixels.flatten(1).double().T)
    assert (found - expected).abs().max() < 6 / math.sqrt(samples)
    assert pixels.mean(0).abs().max() < 6 / math.sqrt(samples)


def test_noise_of_16384_tokens_takes_no_covariance_matrix():
    grid = TokenGrid((128, 128))
    z = Resampler(grid, 2).correlated(field(grid.tokens, 64, 1), 0.02)  # N x N would be a gigabyte
    assert z.shape == (1, 16384, 64) and z.std().item() == pytest.approx(math.sqrt(0.98), rel=0.01)


@pytest.mark.parametrize(
    ("shape", "kernel", "error", "message"),
    [
        ((5, 4), "nearest", ScheduleError, "even number"),
        ((2, 4, 4), "nearest", InputError, "for images"),
        ((4, 4), "cubic", InputError, "unknown interpolation"),
    ],
)
def test_what_cannot_be_resampled(shape, kernel, error, message):
    with pytest.raises(error, match=message):
        Resampler(TokenGrid(shape), 2, kernel)
