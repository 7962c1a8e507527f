"""The token grid: which positions a model's latent tokens have, and how latents are packed into tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from jitexport.errors import ScheduleError


@dataclass(frozen=True)
class TokenGrid:
    """A row-major grid of latent tokens: (H, W) for images, (T, H, W) for video.

    Token n sits at the multi-index that `torch.unravel_index(n, shape)` gives.

    Raises:
        ScheduleError: the shape is not two or three positive integers.
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3) or any(int(n) != n or n < 1 for n in self.shape):
            raise ScheduleError(
                "a token grid needs positive sizes", found=self.shape, expected="(H, W) or (T, H, W), each at least 1"
            )

    @property
    def tokens(self) -> int:
        """N, the number of tokens of the full grid."""
        return math.prod(self.shape)

    def halved(self) -> TokenGrid:
        """The grid of cells of 2 x 2 tokens: a quarter of them, on the last two axes.

        Raises:
            ScheduleError: an odd number of rows or columns.
        """
        *frames, height, width = self.shape
        if height % 2 or width % 2:
            raise ScheduleError(
                "half the resolution needs an even number of token rows and columns", found=self.shape,
                remedy="another image size, or a method that keeps the resolution",
            )
        return TokenGrid((*frames, height // 2, width // 2))

    def coordinates(self, device: torch.device | str | None = None) -> Tensor:
        """Integer coordinates of every token, [N, 2] or [N, 3]. Not to be changed: they are made once."""
        return _coordinates(self.shape, device)

    def unflatten(self, y: Tensor) -> Tensor:
        """[B, N, C] -> [B, *shape, C]."""
        return y.unflatten(1, self.shape)


@cache
def _coordinates(shape: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    axes = [torch.arange(n, device=device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def consecutive(batch: int, n: int, device: torch.device | str | None = None, first: int = 0) -> Tensor:
    """Indices first .. first + n - 1 for each image, [B, n]."""
    return torch.arange(first, first + n, device=device).expand(batch, -1)


def gather_tokens(y: Tensor, index: Tensor) -> Tensor:
    """S^T y: the tokens of y [B, N, C] at index [B, m], as [B, m, C]."""
    return y.flatten(0, 1).index_select(0, _rows(y, index)).unflatten(0, index.shape)


def scatter_tokens(y: Tensor, index: Tensor, u: Tensor) -> Tensor:
    """Copy of y [B, N, C] whose tokens at index [B, m] are u [B, m, C]."""
    return y.flatten(0, 1).index_copy(0, _rows(y, index), u.flatten(0, 1)).unflatten(0, y.shape[:2])


def _rows(y: Tensor, index: Tensor) -> Tensor:
    """Index of tokens among those of all images; whole rows are copied several times faster than by `gather`."""
    batch, tokens, _ = y.shape
    if batch == 1:
        return index.flatten()
    return (index + torch.arange(batch, device=index.device)[:, None] * tokens).flatten()


def pack(latents: Tensor, patch: int) -> Tensor:
    """Patches of latents as tokens, in diffusers' order: [B, C, (T,) pH, pW] -> [B, (T*)H*W, C*p*p]."""
    b, c, *frames, h, w = latents.shape
    patches = latents.reshape(b, c, -1, h // patch, patch, w // patch, patch)
    return patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(b, math.prod((*frames, h // patch, w // patch)), -1)


def unpack(tokens: Tensor, grid: TokenGrid, patch: int) -> Tensor:
    """Inverse of `pack`: [B, (T*)H*W, C*p*p] -> [B, C, (T,) pH, pW]."""
    b, _, c = tokens.shape
    *frames, h, w = grid.shape
    c //= patch * patch
    patches = tokens.reshape(b, -1, h, w, c, patch, patch).permute(0, 4, 1, 2, 5, 3, 6)
    return patches.reshape(b, c, *frames, h * patch, w * patch)
