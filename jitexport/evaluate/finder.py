"""Finds the objects of the demo model's scenes in a picture, and tells the background.

Objects are known pictures at unknown places, sizes and mirrorings, so they are found by matching:

1. At 48 x 48 pixels, every object in five sizes, those of scenes and around them, and both mirrorings is compared with
   the picture in all places at once (by FFT): how much better than the background's colour does it explain what is
   inside its outline? A peak is where the logarithm of the ratio of the squared deviations, times the root of the
   number of pixels, is largest.
2. The peaks are placed more exactly at 64 x 64 pixels, over sizes and places around each.
3. A peak is an object if its normalised correlation (all channels together) is at least LEAST_CORRELATION and the
   object explains at least LEAST_EXPLAINED of the squared deviation, inside its outline, from the median colour just
   outside of it: a part of a smooth background that looks like an egg is explained by its surroundings as well as by
   the egg. What explains most comes first, and what lies over an object that was found before is dropped.

The background's colour is that of whose tones most pixels outside the objects are. Its texture is read from how these
lie between base and second tone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import fft, ndimage

from jitexport.evaluate.demo import DemoData, pixels
from jitexport.evaluate.scene_words import COLOURS, OBJECTS
from jitexport.evaluate.scenes import QUARTER, SIZE, Thing, accent

COARSE, FINE, FULL = 48, 64, 128  # pixels a side at which objects are looked for, placed, and compared
COARSE_SIDES = (0.9 * QUARTER, QUARTER, 1.1 * QUARTER, 0.9 * SIZE, SIZE)  # of canvases, in pixels of SIZE
LEAST_CORRELATION = 0.9
LEAST_EXPLAINED = 0.8
COARSE_NOISE = 0.05  # in 0..1, of a channel: what a known picture that lies half a pixel off is wrong by
LEAST_PEAK = 2.0
PEAKS, PEAKS_AN_OBJECT = 120, 4
OVERLAP = 0.08  # share of the smaller outline that may lie over another, widened by a pixel
TOLERANCE = 24.0  # how far from a background's tones its pixels may be, in 0..255 of RGB


@dataclass(frozen=True)
class Found:
    """An object in a picture.

    Attributes:
        thing: what and where, in pixels of SIZE.
        correlation: with the known picture inside the outline.
        explained: share of the deviation from its surroundings that the known picture explains.
    """

    thing: Thing
    correlation: float
    explained: float


@dataclass(frozen=True)
class Seen:
    """What is in a picture.

    Attributes:
        objects: what was found.
        colour: the background's.
        texture: the background's, a key of TEXTURES.
        unexplained: share of the picture that is neither object nor background.
    """

    objects: tuple[Found, ...]
    colour: str
    texture: str
    unexplained: float

    @property
    def names(self) -> tuple[str, ...]:
        """The objects' names, sorted."""
        return tuple(sorted(found.thing.name for found in self.objects))


def to_array(picture: Image.Image, side: int) -> np.ndarray:
    """RGB in 0..1 at `side`: [side, side, 3]."""
    return pixels(picture, side) / 255


class Finder:
    """Finds the objects whose pictures it was given.

    Args:
        sprites: square RGBA pictures of the objects, by name.
    """

    def __init__(self, sprites: Mapping[str, Image.Image]) -> None:
        self.sprites = dict(sprites)
        self.names = list(sprites)
        self.template = lru_cache(maxsize=20_000)(self._template)
        variants = [(side, mirrored) for side in COARSE_SIDES for mirrored in (False, True)]
        self.variants = variants
        # By variant and name: the transform of the centred template, [V, O, 3, H, W'], of its mask, [V, O, H, W'],
        # and where its canvas may be centred, [V, O, H, W].
        pictures, masks, allowed = [], [], []
        self.pixels = np.ones((len(variants), len(self.names)), dtype=np.float32)
        self.power = np.ones_like(self.pixels)
        self.colour_sums = np.zeros((*self.pixels.shape, 3), dtype=np.float32)
        for v, (side, mirrored) in enumerate(variants):
            for o, name in enumerate(self.names):
                rgb, mask = self.template(name, mirrored, max(1, round(side * COARSE / SIZE)))
                centred = np.zeros((COARSE, COARSE, 4), dtype=np.float32)
                inside = rgb * mask[..., None]
                self.pixels[v, o] = mask.sum()
                self.power[v, o], self.colour_sums[v, o] = np.square(inside).sum(), inside.sum((0, 1))
                n = len(mask)
                centred[:n, :n, :3], centred[:n, :n, 3] = inside, mask
                spectrum = fft.rfft2(np.roll(centred, (-(n // 2), -(n // 2)), (0, 1)), axes=(0, 1)).conj()
                pictures.append(spectrum[..., :3].transpose(2, 0, 1).astype(np.complex64))
                masks.append(spectrum[..., 3].astype(np.complex64))
                allowed.append(_allowed(mask))
        shape = (len(variants), len(self.names))
        self.picture_spectra = np.stack(pictures).reshape(*shape, *pictures[0].shape)
        self.mask_spectra = np.stack(masks).reshape(*shape, *masks[0].shape)
        self.allowed = np.stack(allowed).reshape(*shape, *allowed[0].shape)

    def _template(self, name: str, mirrored: bool, side: int) -> tuple[np.ndarray, np.ndarray]:
        """An object at a size: RGB in 0..1, [side, side, 3], and where it is opaque, [side, side]."""
        sprite = self.sprites[name]
        if mirrored:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # Pillow weighs colours by their opacity when it resizes.
        small = np.asarray(sprite.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0), dtype=np.float32)
        return small[..., :3] / 255, small[..., 3] > 192

    def __call__(self, picture: Image.Image) -> Seen:
        """What is in a picture of any size; it is taken as square."""
        fine = to_array(picture, FINE)
        placed = [self._place(fine, *peak) for peak in self._peaks(to_array(picture, COARSE))]
        objects = self._choose([one for one in placed if one])
        return Seen(tuple(objects), *self._background(picture, objects))

    def _peaks(self, rgb: np.ndarray) -> list[tuple[str, bool, float, float, float]]:
        """Where objects may be: name, mirrored, canvas side, and its centre's row and column; in shares of a side."""
        border = np.concatenate([rgb[:2].reshape(-1, 3), rgb[-2:].reshape(-1, 3), rgb[:, :2].reshape(-1, 3)])
        background = np.median(np.concatenate([border, rgb[:, -2:].reshape(-1, 3)]), axis=0)
        rgb = rgb - background  # what the background explains is what is left of the picture's power
        spectrum = fft.rfft2(rgb, axes=(0, 1)).astype(np.complex64)  # [H, W', 3]
        squares = fft.rfft2(np.square(rgb).sum(2)).astype(np.complex64)
        offset = float(background @ background)
        best = np.zeros((len(self.names), COARSE, COARSE), dtype=np.float32)
        which = np.zeros(best.shape, dtype=np.int16)
        weighted = (spectrum @ background).astype(np.complex64)
        for v in range(len(self.variants)):
            product = sum(self.picture_spectra[v, :, c] * spectrum[..., c] for c in range(3))
            product -= self.mask_spectra[v] * weighted
            both, square = fft.irfft2(np.stack([product, self.mask_spectra[v] * squares]), s=(COARSE, COARSE))
            # Squared deviation from the object's picture, whose colours are seen from the background's: T - b.
            power = self.power[v] - 2 * self.colour_sums[v] @ background + self.pixels[v] * offset
            noise = COARSE_NOISE**2 * self.pixels[v][:, None, None]
            error = np.maximum(square - 2 * both + power[:, None, None], 0) + 3 * noise
            weight = np.log((np.maximum(square, 0) + 3 * noise) / error) * np.sqrt(self.pixels[v])[:, None, None]
            weight[~self.allowed[v]] = 0
            better = weight > best
            best[better] = weight[better]
            which[better] = v
        peak = (best == ndimage.maximum_filter(best, size=(1, 5, 5))) & (best > LEAST_PEAK)
        order = np.argwhere(peak)
        order = order[np.argsort(-best[peak])]
        first = [one for rank, one in enumerate(order) if (order[:rank, 0] == one[0]).sum() < PEAKS_AN_OBJECT][:PEAKS]
        peaks = []
        for o, row, column in first:
            side, mirrored = self.variants[which[o, row, column]]
            n = max(1, round(side * COARSE / SIZE))
            centre = ((row - n // 2 + n / 2) / COARSE, (column - n // 2 + n / 2) / COARSE)
            peaks.append((self.names[o], mirrored, side / SIZE, *centre))
        return peaks

    def _place(
        self, rgb: np.ndarray, name: str, mirrored: bool, side: float, row: float, column: float, reach: int = 3
    ) -> Found | None:
        """The best size and place around a peak, or None if the object is not there."""
        best: tuple[float, int, int, int] | None = None
        padded = np.pad(rgb, ((FINE, FINE), (FINE, FINE), (0, 0)), mode="edge")
        shift_rows, shift_columns = (shift.ravel() for shift in np.mgrid[: 2 * reach + 1, : 2 * reach + 1])
        sizes = sorted({round(side * FINE * factor) for factor in (0.92, 0.96, 1.0, 1.04, 1.08)})
        for n in sizes:
            colours, mask = self.template(name, mirrored, n)
            if mask.sum() < 12:
                continue
            top, left = round(row * FINE - n / 2) + FINE - reach, round(column * FINE - n / 2) + FINE - reach
            rows, columns = np.nonzero(mask)
            part = slice(None, None, max(1, len(rows) // 200))  # a part of the pixels is enough to tell places apart
            rows, columns = rows[part, None], columns[part, None]
            inside = padded[top + rows + shift_rows, left + columns + shift_columns]  # [m, R * R, 3]
            errors = np.square(inside - colours[rows, columns]).mean((0, 2))  # [R * R]
            k = int(errors.argmin())
            if best is None or errors[k] < best[0]:
                best = float(errors[k]), n, int(top + shift_rows[k]), int(left + shift_columns[k])
        if best is None:
            return None
        _, n, top, left = best
        colours, mask = self.template(name, mirrored, n)
        inside = padded[top : top + n, left : left + n][mask]  # [m, 3]
        error = float(np.square(inside - colours[mask]).mean())
        a, b = inside - inside.mean(), colours[mask] - colours[mask].mean()
        correlation = float((a * b).sum() / math.sqrt(max(float(np.square(a).sum() * np.square(b).sum()), 1e-9)))
        wide = np.pad(mask, 4)
        ring = ndimage.binary_dilation(wide, iterations=4) & ~ndimage.binary_dilation(wide, iterations=2)
        rows, columns = np.nonzero(ring)
        rows, columns = rows + top - 4, columns + left - 4
        within = (rows >= FINE) & (rows < 2 * FINE) & (columns >= FINE) & (columns < 2 * FINE)
        around = padded[rows[within], columns[within]]
        if len(around) == 0:
            return None
        deviation = float(np.square(inside - np.median(around, axis=0)).mean())
        explained = 1 - error / max(deviation, 1e-9) if deviation > 1e-3 else 0.0
        if correlation < LEAST_CORRELATION or explained < LEAST_EXPLAINED:
            return None
        unit = SIZE / FINE
        thing = Thing(name, (left - FINE) * unit, (top - FINE) * unit, n * unit, mirrored)
        return Found(thing, correlation, explained)

    def outline(self, thing: Thing, side: int) -> np.ndarray:
        """Where in a picture an object is opaque: [side, side]."""
        return self._whole(thing, side)[1]

    def drawn(self, thing: Thing, side: int) -> np.ndarray:
        """An object in its place, on black: RGB in 0..1, [side, side, 3]."""
        return self._whole(thing, side)[0]

    def _whole(self, thing: Thing, side: int) -> tuple[np.ndarray, np.ndarray]:
        n = max(1, round(thing.side * side / SIZE))
        colours, mask = self.template(thing.name, thing.mirrored, n)
        top, left = side + round(thing.top * side / SIZE), side + round(thing.left * side / SIZE)
        picture = np.zeros((3 * side, 3 * side, 4), dtype=np.float32)  # objects may stand out of the picture
        picture[top : top + n, left : left + n, :3] = colours * mask[..., None]
        picture[top : top + n, left : left + n, 3] = mask
        inner = picture[side : 2 * side, side : 2 * side]
        return inner[..., :3], inner[..., 3] > 0

    def _choose(self, candidates: list[Found]) -> list[Found]:
        """The best of those that lie over each other: correlation counts, and the part of the picture explained."""
        outlines = {id(one): self.outline(one.thing, FINE) for one in candidates}
        rank = {
            id(one): one.explained * float(significance(one.correlation, outlines[id(one)].sum())) for one in candidates
        }
        chosen: list[Found] = []
        for one in sorted(candidates, key=lambda one: -rank[id(one)]):
            mine = outlines[id(one)]
            if all(
                (mine & ndimage.binary_dilation(outlines[id(other)])).sum()
                <= OVERLAP * min(mine.sum(), outlines[id(other)].sum())
                for other in chosen
            ):
                chosen.append(one)
        return chosen

    def _background(self, picture: Image.Image, objects: list[Found]) -> tuple[str, str, float]:
        """Colour and texture of the background, and the share of the picture that is neither that nor an object."""
        rgb = to_array(picture, FULL) * 255
        covered = np.zeros((FULL, FULL), dtype=bool)
        for one in objects:
            covered |= self.outline(one.thing, FULL)
        free = ~ndimage.binary_dilation(covered, iterations=3)
        if free.sum() < 100:
            free = np.ones_like(free)
        tones = {colour: tone(rgb, colour) for colour in COLOURS}  # where between base and accent, and how far from it
        share = {colour: float((tones[colour][1][free] < TOLERANCE).mean()) for colour in COLOURS}
        colour = max(share, key=share.__getitem__)
        where, distance = tones[colour]
        of_it = free & (distance < TOLERANCE)
        return colour, tell_texture(where, of_it), float((free & ~of_it).mean())


def scene_finder() -> Finder:
    """A finder of the objects that scenes are made of."""
    sprites = DemoData().sprites
    return Finder({name: sprites[name] for name in OBJECTS})


def significance(correlation: np.ndarray | float, values: np.ndarray | float) -> np.ndarray:
    """Fisher's z of a correlation of so many values, in its standard deviations; over 0.995 it counts as that."""
    return np.arctanh(np.clip(correlation, -0.995, 0.995)) * np.sqrt(values)


def _allowed(mask: np.ndarray) -> np.ndarray:
    """Where the middle of a canvas may be, so that the object is in the picture: [COARSE, COARSE]."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    allowed = np.zeros((COARSE, COARSE), dtype=bool)
    if len(rows):
        half = len(mask) // 2
        first, last = half - rows[0] - 1, COARSE + half - rows[-1]
        left, right = half - columns[0] - 1, COARSE + half - columns[-1]
        allowed[max(0, first) : last + 1, max(0, left) : right + 1] = True
    return allowed


def tone(rgb: np.ndarray, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """Where pixels lie between a background's base, 0, and the end of its gradient, 1; and how far off that line."""
    base, end = np.array(COLOURS[colour], dtype=np.float32), accent(colour)
    along = np.clip((rgb - base) @ (end - base) / np.square(end - base).sum(), 0, 1)
    return along, np.linalg.norm(rgb - base - along[..., None] * (end - base), axis=-1)


def tell_texture(where: np.ndarray, of_it: np.ndarray) -> str:
    """The texture of a background.

    Args:
        where: place of each pixel between the background's tones, [H, W].
        of_it: pixels of the background.
    """
    values = where[of_it]
    if len(values) < 50 or values.std() < 0.08:
        return "plain"
    row, column = np.nonzero(of_it)
    plane = np.column_stack([row, column, np.ones(len(row))])
    rest = values - plane @ np.linalg.lstsq(plane, values, rcond=None)[0]
    return "gradient" if rest.var() < 0.2 * values.var() else "plain"
