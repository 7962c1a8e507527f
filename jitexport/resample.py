"""Packed latents at twice or half the resolution, and noise that fits enlarged ones.

A coarse token stands for a cell of 2 x 2 tokens of the full grid. Latents are resampled pixel by pixel: a token's patch
is unpacked first. With `patch=1` whole tokens are resampled instead, each channel on its own, whatever it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from jitexport.errors import InputError
from jitexport.grid import TokenGrid, pack, unpack


def _cubic(x: Tensor, a: float = -0.75) -> Tensor:
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


#: Interpolation kernels by name: reach in pixels, and weight at a distance. Bicubic is torch's (a = -0.75).
KERNELS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "nearest": (1, lambda x: (x.abs() < 0.5).to(x)),
    "bilinear": (1, lambda x: (1 - x.abs()).clamp(min=0)),
    "bicubic": (2, _cubic),
    "lanczos": (3, lambda x: torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), torch.zeros_like(x))),
}


def enlarging_matrix(n: int, kernel: str, device: torch.device | str | None = None) -> Tensor:
    """Interpolation of n pixels to 2 n along an axis, the border repeated: [2 n, n], rows sum to 1, fp32.

    Made on the device that uses it: a copy to a GPU could not be recorded in a CUDA graph.
    """
    reach, weight = KERNELS[kernel]
    centre = (torch.arange(2 * n, dtype=torch.float64, device=device) + 0.5) / 2 - 0.5
    taps = centre.floor().long()[:, None] + torch.arange(1 - reach, reach + 1, device=device)  # [2 n, 2 * reach]
    weights = weight(taps - centre[:, None])
    weights = weights / weights.sum(1, keepdim=True)
    place = torch.arange(n, device=device)
    return torch.where(taps.clamp(0, n - 1)[:, :, None] == place, weights[:, :, None], 0.0).sum(1).float()


@dataclass(frozen=True)
class Resampler:
    """Resolution changes by two for latents on a grid.

    Attributes:
        grid: the full token grid, (H, W), both even.
        patch: side of what a token packs, in the pixels that are resampled.
        kernel: interpolation of `up`, one of `KERNELS`.

    Raises:
        InputError: a grid with frames, or an unknown kernel.
        ScheduleError: an odd side.
    """

    grid: TokenGrid
    patch: int
    kernel: str = "nearest"

    def __post_init__(self) -> None:
        if len(self.grid.shape) != 2:
            raise InputError(
                "resolution changes are for images", found=f"a video's grid {self.grid.shape}",
                expected="a grid (H, W)", remedy="a method that keeps the resolution, as --method jit",
            )
        if self.kernel not in KERNELS:
            raise InputError("unknown interpolation", found=self.kernel, expected=f"one of: {', '.join(KERNELS)}")
        self.grid.halved()

    @cached_property
    def coarse(self) -> TokenGrid:
        """The grid of cells, N / 4 of them."""
        return self.grid.halved()

    @cached_property
    def nearest(self) -> Resampler:
        """The same with nearest neighbours, which `down` undoes."""
        return replace(self, kernel="nearest")

    def cells(self, device: torch.device | str | None = None) -> Tensor:
        """Tokens of each cell, [N / 4, 4], row by row."""
        return pack(torch.arange(self.grid.tokens, device=device).view(1, 1, *self.grid.shape), 2)[0]

    def up(self, y: Tensor) -> Tensor:
        """Interpolate: [B, N / 4, C] -> [B, N, C]."""
        x = unpack(y, self.coarse, self.patch)
        rows, columns = (enlarging_matrix(n, self.kernel, x.device) for n in x.shape[-2:])
        return pack((rows @ x @ columns.T).contiguous(), self.patch)

    def down(self, y: Tensor) -> Tensor:
        """Average blocks of 2 x 2 pixels: [B, N, C] -> [B, N / 4, C]."""
        return pack(F.avg_pool2d(unpack(y, self.grid, self.patch), 2), self.patch)

    def pick(self, y: Tensor) -> Tensor:
        """Take the first of each block of 2 x 2 pixels, which leaves noise what it is: [B, N, C] -> [B, N / 4, C]."""
        return pack(unpack(y, self.grid, self.patch)[..., ::2, ::2].contiguous(), self.patch)

    @cached_property
    def variance(self) -> float:
        """Mean variance of white noise of variance 1 after `up`; 1 for nearest neighbours."""
        sides = [n * self.patch for n in self.coarse.shape]
        return math.prod(enlarging_matrix(n, self.kernel).double().square().sum(1).mean().item() for n in sides)

    def correlated(self, noise: Tensor, c: float) -> Tensor:
        """White noise [B, N, C] as N(0, I - c Sigma), Sigma one in each block of 2 x 2 pixels (RALU, eq. 5).

        Blocks are projections: with J = Sigma / 4 and z = (I - k J) noise, the covariance is I - (2 k - k^2) J, which
        is I - c Sigma for k = 1 - (1 - 4 c)^(1/2). So no covariance matrix is made.

        Args:
            c: 0 to 1/4.
        """
        return noise - (1 - math.sqrt(max(0.0, 1 - 4 * c))) * self.nearest.up(self.down(noise))
