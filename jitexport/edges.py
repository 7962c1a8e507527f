"""How strong the edges of a picture, or of latents, are in each cell of a grid. Fixed shapes, no host sync."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Thresholds of Canny's hysteresis for grey values from 0 to 255 (RALU, released code).
CANNY_LOW, CANNY_HIGH = 100.0, 200.0

#: How far a weak edge may be from a strong one, in pixels along the edge. Unbounded in theory; fixed work here.
HYSTERESIS_REACH = 64

_TAN_22_5 = 2**0.5 - 1


def sobel(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical derivatives of x [B, C, H, W] with 3 x 3 Sobel kernels, the border repeated."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    smooth = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    across = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    return smooth[..., 2:] - smooth[..., :-2], across[..., 2:, :] - across[..., :-2, :]


def canny(grey: Tensor, low: float = CANNY_LOW, high: float = CANNY_HIGH) -> Tensor:
    """Canny's edges, as OpenCV defines them: Sobel 3 x 3, |gx| + |gy|, four directions, no smoothing first.

    Args:
        grey: whole grey values from 0 to 255, [B, H, W].

    Returns:
        Edge pixels, bool [B, H, W].
    """
    gx, gy = (g[:, 0] for g in sobel(grey[:, None]))
    magnitude = gx.abs() + gy.abs()
    padded = F.pad(magnitude, (1, 1, 1, 1))
    h, w = magnitude.shape[-2:]

    def at(dy: int, dx: int) -> Tensor:
        return padded[:, 1 + dy : 1 + dy + h, 1 + dx : 1 + dx + w]

    flat = gy.abs() < gx.abs() * _TAN_22_5
    steep = gy.abs() > gx.abs() * (_TAN_22_5 + 2)
    rising = gx * gy < 0
    along_x = (magnitude > at(0, -1)) & (magnitude >= at(0, 1))
    along_y = (magnitude > at(-1, 0)) & (magnitude >= at(1, 0))
    falling_diagonal = (magnitude > at(-1, -1)) & (magnitude > at(1, 1))
    rising_diagonal = (magnitude > at(-1, 1)) & (magnitude > at(1, -1))
    diagonal = torch.where(rising, rising_diagonal, falling_diagonal)
    thin = torch.where(flat, along_x, torch.where(steep, along_y, diagonal)) & (magnitude > low)
    edges = (thin & (magnitude > high)).to(grey)
    for _ in range(HYSTERESIS_REACH):  # weak pixels next to an edge join it
        edges = F.max_pool2d(edges, 3, stride=1, padding=1) * thin
    return edges > 0


def picture_edges(pictures: Tensor, shape: tuple[int, int]) -> Tensor:
    """Share of Canny's edge pixels in each cell; where cells have equally many, their mean gradient decides.

    Args:
        pictures: [B, 3, H, W] in [0, 1].
        shape: rows and columns of cells, which divide H and W.

    Returns:
        [B, cells].
    """
    red, green, blue = pictures.float().unbind(1)
    grey = ((0.299 * red + 0.587 * green + 0.114 * blue) * 255).floor()
    gx, gy = sobel(grey[:, None])
    slope = (gx.abs() + gy.abs())[:, 0] / 2040  # at most 1
    return F.adaptive_avg_pool2d(canny(grey) + 1e-3 * slope, shape).flatten(1)


def latent_edges(y: Tensor, shape: tuple[int, int]) -> Tensor:
    """Length of the gradient of latents y [B, N, C], mean over channels, relative to the picture's mean. [B, N]."""
    gx, gy = sobel(y.transpose(1, 2).unflatten(2, shape))
    strength = (gx.square() + gy.square()).sqrt().mean(1).flatten(1)
    return strength / strength.mean(1, keepdim=True).clamp(min=1e-12)


def strongest_cells(strength: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the k strongest cells, [B, k], and of the others, both ascending; equal ones: lowest index first."""
    order = strength.argsort(dim=1, descending=True, stable=True)
    return order[:, :k].sort(dim=1).values, order[:, k:].sort(dim=1).values


def beside(strength: Tensor, shape: tuple[int, int], threshold: float) -> Tensor:
    """Strength [B, cells] from the threshold on; below it, less than that: the share of such cells around."""
    above = strength >= threshold
    around = F.avg_pool2d(above.to(strength).unflatten(1, shape), 3, stride=1, padding=1).flatten(1)
    return torch.where(above, strength, (around - 1) + 1e-3 * strength)
