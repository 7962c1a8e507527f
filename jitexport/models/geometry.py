"""Sizes of images and videos: in pixels, in latents, in tokens, and in the tiles that a decoder takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jitexport.errors import InputError
from jitexport.grid import TokenGrid
from jitexport.positions import Positions
from jitexport.tiling import Tiling


@dataclass(frozen=True)
class TiledDecoder:
    """A decoder that is run tile by tile: see `jitexport.tiling`.

    Attributes:
        tiling: of latents.
        scale: pixels per latent, for each axis of a tile.
        first_frame_alone: of decoders of video whose first latent is one frame.
    """

    tiling: Tiling
    scale: tuple[int, ...]
    first_frame_alone: bool = False

    def decode(self, latents: Tensor, engine: Callable[[Tensor], Tensor]) -> Tensor:
        """Latents [B, C, (T,) H, W] -> pictures [B, 3, (F,) H s, W s], by an engine for one tile."""
        return self.tiling.decode(latents, engine, self.scale, first_frame_alone=self.first_frame_alone)

    def sides(self, latents: tuple[int, ...], frames: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A tile of latents of this size ((T,) H, W), and the pixels ((F,) h, w) that it becomes."""
        divided = len(self.tiling.tile)
        tile = (*latents[: len(latents) - divided], *self.tiling.tile)
        pixels = tuple(n * scale for n, scale in zip(self.tiling.tile, self.scale, strict=True))
        if divided < len(latents):
            return tile, (frames or latents[0], *pixels)
        if self.first_frame_alone and len(latents) == 3:
            return tile, (pixels[0] - self.scale[0] + 1, *pixels[1:])
        return tile, pixels


@dataclass(frozen=True)
class ModelGeometry:
    """The sizes of one image or video that a runtime needs to know.

    Attributes:
        grid: the full token grid.
        latent_shape: (C, H, W) of one image's latents before packing, (C, T, H, W) of a video's.
        patch: side of a token's patch in latent pixels.
        height, width: of the image in pixels.
        positions: what stage engines read about where tokens are.
        text_tokens: that the transformer sees beside the image's.
        frames: of a video; None for images.
        drawn_patch: side of the patches that noise is drawn in, where it is not `patch`: diffusers draws some models'
            noise in packed form.
        tiles: how the decoder is run where it cannot take the whole: its engine then takes latents [B, C, (t,) h, w] of
            a tile, not tokens.
    """

    grid: TokenGrid
    latent_shape: tuple[int, ...]
    patch: int
    height: int
    width: int
    positions: Positions
    text_tokens: int
    frames: int | None = None
    drawn_patch: int | None = None
    tiles: TiledDecoder | None = None

    @property
    def channels(self) -> int:
        """C, channels of a token."""
        return self.latent_shape[0] * self.patch**2

    @property
    def drawn(self) -> tuple[tuple[int, ...], int]:
        """Shape of one image's noise as diffusers draws it, and side of its patches."""
        patch = self.drawn_patch or self.patch
        *frames, height, width = self.grid.shape
        return (self.channels // patch**2, *frames, height * patch, width * patch), patch


def image_grid(settings: Mapping[str, Any], pixels: int) -> TokenGrid:
    """The token grid of an image whose tokens are `pixels` wide and high.

    Raises:
        InputError: height or width is not a multiple of that.
    """
    height, width = settings["height"], settings["width"]
    if height % pixels or width % pixels or height < pixels or width < pixels:
        raise InputError(
            "image size does not fit the token grid", found=f"{height} x {width}",
            expected=f"height and width that are multiples of {pixels}",
        )
    return TokenGrid((height // pixels, width // pixels))


def tiles(size: tuple[int, int], tile: int, pixels: int) -> TiledDecoder | None:
    """How latents of a size (H, W) are decoded in tiles of so many pixels; None where one tile takes them whole.

    Raises:
        InputError: a tile that is no multiple of a latent's pixels, or of less than two of them.
    """
    if tile % pixels or tile < 2 * pixels:
        raise InputError("no tile of latents", found=tile, expected=f"a multiple of {pixels}, {2 * pixels} or more")
    side = tile // pixels
    if max(size) <= side:
        return None
    return TiledDecoder(Tiling((side, side), (side // 4, side // 4)).fitted(size), (pixels, pixels))
