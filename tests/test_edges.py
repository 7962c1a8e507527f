import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from jitexport.edges import CANNY_HIGH, CANNY_LOW, canny, latent_edges, picture_edges, sobel


def reference_canny(grey):
    """Canny pixel by pixel as OpenCV documents it, with hysteresis by connected components."""
    gx, gy = (ndimage.sobel(grey, axis=a, mode="nearest") for a in (1, 0))
    magnitude = np.abs(gx) + np.abs(gy)
    h, w = grey.shape

    def at(y, x):
        return magnitude[y, x] if 0 <= y < h and 0 <= x < w else 0.0

    weak = np.zeros((h, w), bool)
    for y in range(h):
        for x in range(w):
            m, angle = magnitude[y, x], math.degrees(math.atan2(abs(gy[y, x]), abs(gx[y, x])))
            if angle < 22.5:
                peak = m > at(y, x - 1) and m >= at(y, x + 1)
            elif angle > 67.5:
                peak = m > at(y - 1, x) and m >= at(y + 1, x)
            else:
                side = -1 if gx[y, x] * gy[y, x] < 0 else 1
                peak = m > at(y - 1, x - side) and m > at(y + 1, x + side)
            weak[y, x] = peak and m > CANNY_LOW
    labels, _ = ndimage.label(weak, structure=np.ones((3, 3)))
    kept = np.unique(labels[weak & (magnitude > CANNY_HIGH)])
    return np.isin(labels, kept[kept > 0])


def blob(seed, size=(40, 56)):
    noise = np.random.default_rng(seed).normal(size=size)
    smooth = ndimage.gaussian_filter(noise, 3)
    return np.floor((smooth - smooth.min()) / np.ptp(smooth) * 255)


@pytest.mark.parametrize("seed", range(3))
def test_canny_is_the_reference(seed):
    grey = blob(seed)
    steps = np.floor(grey / 64) * 64  # flat regions with sharp borders, as objects have
    for picture in (grey, steps):
        found = canny(torch.tensor(picture, dtype=torch.float32)[None])[0].numpy()
        np.testing.assert_array_equal(found, reference_canny(picture))
    assert found.any() and not found.all()


def test_sobel_is_scipys():
    x = torch.randn(1, 1, 7, 9, dtype=torch.float64)
    for found, axis in zip(sobel(x), (1, 0), strict=True):
        np.testing.assert_allclose(found[0, 0], ndimage.sobel(x[0, 0].numpy(), axis=axis, mode="nearest"))


def disc(size=64):
    y, x = np.mgrid[:size, :size]
    inside = (y - 20) ** 2 + (x - 40) ** 2 < 100
    return torch.tensor(np.stack([inside, inside, ~inside]), dtype=torch.float32)[None]


def test_cells_on_an_outline_are_the_strongest():
    strength = picture_edges(disc(), (8, 8))
    assert strength.shape == (1, 64)
    rim = [r * 8 + c for r in range(8) for c in range(8) if on_rim(r, c)]
    top = strength[0].topk(len(rim) // 2).indices.tolist()
    assert set(top) <= set(rim)


def on_rim(row, column):
    """Whether the circle passes through the cell or within a pixel of it."""
    corners = [math.hypot(8 * row + dy - 20, 8 * column + dx - 40) for dy in (-1, 8) for dx in (-1, 8)]
    return min(corners) <= 10 <= max(corners)


def test_cells_without_edges_are_told_apart_by_their_slope():
    ramp = torch.linspace(0, 0.3, 32).expand(1, 3, 32, 32).clone()
    ramp[..., :16] = 0
    strength = picture_edges(ramp, (4, 4)).view(4, 4)
    assert (strength[:, 3] > strength[:, 0]).all() and strength.max() < 1e-3


def test_pictures_of_a_batch_do_not_see_each_other():
    pictures = torch.cat([disc(), 1 - disc(), torch.zeros(1, 3, 64, 64)])
    together = picture_edges(pictures, (8, 8))
    for i in range(3):
        assert torch.equal(together[i], picture_edges(pictures[i : i + 1], (8, 8))[0])


def test_latent_gradient_is_the_mean_length_over_channels():
    y = torch.randn(2, 30, 3)
    field = y.view(2, 5, 6, 3).numpy()
    lengths = [
        np.mean(
            [np.hypot(*(ndimage.sobel(f[..., c], axis=a, mode="nearest") for a in (0, 1))) for c in range(3)], axis=0
        )
        for f in field
    ]
    expected = np.stack([(v / v.mean()).reshape(-1) for v in lengths])
    np.testing.assert_allclose(latent_edges(y, (5, 6)), expected, rtol=1e-5)
