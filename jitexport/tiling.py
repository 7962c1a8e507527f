"""Decoding latents in tiles of one fixed shape, in space and, where wanted, in time, blended where they overlap.

A decoder of a large picture or video needs more memory than a machine has, and an engine has one fixed shape. So one
engine decodes all tiles, one after the other.

As in diffusers' `tiled_decode`, a tile's weight rises linearly where it overlaps the one before, from 0 in its first
row. Two things differ. There tiles stand `tile - overlap` apart and those at the far border are cut off, down to a
strip of `overlap` latents; here every tile has its full size, and the same number of tiles (one fewer where the last
would be such a strip) is spread evenly, so that neighbours overlap by `overlap` or more. And where four tiles meet,
weights are products of those of rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from jitexport.errors import InputError


@dataclass(frozen=True)
class Tiling:
    """Size and overlap of tiles, in latents: plain numbers, which JSON takes and gives back as lists.

    Attributes:
        tile: (h, w), or (t, h, w) to divide time as well; time is left whole by the former.
        overlap: what neighbours have in common at the least, for each of these axes.

    Raises:
        InputError: sizes that are no tiles, or an overlap that leaves no way forward.
    """

    tile: tuple[int, ...]
    overlap: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("tile", "overlap"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        right = len(self.tile) in (2, 3) and len(self.overlap) == len(self.tile)
        if not right or any(not 0 <= o < n for n, o in zip(self.tile, self.overlap, strict=True)):
            raise InputError(
                "no tiles", found=f"tile {self.tile}, overlap {self.overlap}",
                expected="(h, w) or (t, h, w) for both, each overlap at least 0 and smaller than its tile",
            )

    def fitted(self, size: tuple[int, ...]) -> Self:
        """The same, with tiles no larger than latents of this size (`tile`'s axes): an engine is built for these."""
        tile = tuple(min(n, most) for n, most in zip(self.tile, size, strict=True))
        return replace(self, tile=tile, overlap=tuple(min(o, n - 1) for o, n in zip(self.overlap, tile, strict=True)))

    def starts(self, size: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Where tiles begin on each axis of latents of this size, ascending.

        Raises:
            InputError: an axis is shorter than a tile.
        """
        if len(size) != len(self.tile) or any(n < tile for n, tile in zip(size, self.tile, strict=True)):
            raise InputError(
                "latents smaller than a tile", found=f"{size}, tiles of {self.tile}",
                expected="at least one tile on each axis",
                remedy="build the engine for smaller tiles (`Tiling.fitted`)",
            )
        return tuple(map(_starts, size, self.tile, self.overlap))

    def calls(self, size: tuple[int, ...]) -> int:
        """Number of tiles that latents of this size take.

        Raises:
            InputError: an axis is shorter than a tile.
        """
        return math.prod(map(len, self.starts(size)))

    def decode(
        self,
        latents: Tensor,
        engine: Callable[[Tensor], Tensor],
        scale: tuple[int, ...],
        *,
        first_frame_alone: bool = False,
    ) -> Tensor:
        """Decode all tiles and put them together. Beside the result, a row and a slab of tiles live at once.

        Values stay between those of the tiles that they are blended from.

        Args:
            latents: [B, C, H, W] or [B, C, T, H, W].
            engine: a tile of latents, contiguous, [B, C, h, w] or [B, C, t, h, w] -> pixels in the same order of axes.
            scale: pixels per latent, for each of the tiles' axes.
            first_frame_alone: of decoders of video that are causal in time: the first latent of what they are given is
                one frame, each other one `scale[0]` frames. A tile's first frame is then the last one of its latent,
                decoded without what came before; it has weight 0 behind another tile, as diffusers drops it.

        Returns:
            Pixels [B, c, H s, W s], or [B, c, F, H s, W s]; of the engine's type.

        Raises:
            InputError: latents smaller than a tile, other axes, or an engine that gives another size.
        """
        if len(scale) != len(self.tile) or latents.dim() - 2 < len(self.tile):
            raise InputError(
                "tiles have other axes than latents or scale", found=f"latents {list(latents.shape)}, scale {scale}",
                expected=f"{len(self.tile)} axes behind batch and channels, and as many scales",
            )
        alone = first_frame_alone and len(self.tile) == 3
        axes = [
            _Axis(axis - len(self.tile), starts, tile, pixels, alone=alone and axis == 0)
            for axis, (starts, tile, pixels) in enumerate(
                zip(self.starts(tuple(latents.shape[-len(self.tile) :])), self.tile, scale, strict=True)
            )
        ]
        if alone and len(axes[0].starts) > 1 and self.overlap[0] < 1:
            raise InputError(
                "frames between two tiles would be missing", found=f"overlap {self.overlap}",
                expected="an overlap of at least 1 in time, where the first latent of a tile is one frame",
            )
        return _decode(latents, engine, axes)


@dataclass(frozen=True)
class _Axis:
    """One axis that is divided: where tiles lie among latents and among pixels.

    Attributes:
        axis: counted from the last, negative.
        starts: of the tiles, in latents.
        tile: latents of a tile.
        scale: pixels per latent.
        alone: whether a tile's first latent is one pixel.
    """

    axis: int
    starts: tuple[int, ...]
    tile: int
    scale: int
    alone: bool

    def pixels(self, latents: int) -> int:
        return (latents - 1) * self.scale + 1 if self.alone else latents * self.scale

    def blend(self, whole: Tensor, part: Tensor, number: int) -> None:
        """Put the pixels of tile `number` behind those of the tiles before, in place."""
        start, length = self.starts[number] * self.scale, self.pixels(self.tile)
        done = self.starts[number - 1] * self.scale + length - start if number else 0  # pixels that are there already
        new = length - done
        whole.narrow(self.axis, start + done, new).copy_(part.narrow(self.axis, done, new))
        if done:
            rise = torch.arange(done, dtype=torch.float32, device=part.device) / done
            rise = rise.to(part.dtype).reshape(-1, *[1] * (-1 - self.axis))
            whole.narrow(self.axis, start, done).lerp_(part.narrow(self.axis, 0, done), rise)


def _decode(latents: Tensor, engine: Callable[[Tensor], Tensor], axes: list[_Axis]) -> Tensor:
    """All pixels of latents that may still be divided along `axes`, the first of them outermost."""
    if not axes:
        return engine(latents.contiguous())
    axis, *others = axes
    whole: Tensor | None = None
    for number, start in enumerate(axis.starts):
        part = _decode(latents.narrow(axis.axis, start, axis.tile), engine, others)
        if part.shape[axis.axis] != axis.pixels(axis.tile):
            raise InputError(
                "the decoder gives tiles of another size", found=list(part.shape),
                expected=f"{axis.pixels(axis.tile)} pixels on axis {axis.axis} for {axis.tile} latents",
            )
        if len(axis.starts) == 1:
            return part
        if whole is None:
            shape = list(part.shape)
            shape[axis.axis] = axis.pixels(latents.shape[axis.axis])
            whole = part.new_empty(shape)
        axis.blend(whole, part, number)
    assert whole is not None  # there is at least one tile
    return whole


def _starts(size: int, tile: int, overlap: int) -> tuple[int, ...]:
    """As few tiles as `overlap` allows, spread evenly from border to border."""
    gaps = -(-(size - tile) // (tile - overlap))
    return tuple(i * (size - tile) // max(gaps, 1) for i in range(gaps + 1))
