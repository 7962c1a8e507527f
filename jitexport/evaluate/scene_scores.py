"""Scores of pictures that were asked for as scenes, in the manner of GenEval: is what was asked for there, and no more?

One picture and its request give a `SceneScore`. Sets of pictures are compared with true scenes by

- `band_energies`: how much structure there is at four scales, noise, edges, parts and layout;
- `SceneFeatures` with `jitexport.evaluate.statistics.frechet`: channel means and deviations of the last block of the
  demo model's own VAE encoder, which needs no download; not comparable with FID;
- `diversity`: how far the pictures of one prompt are from each other in these features.

All of it at 128 x 128 pixels, which the reference pictures of the objects have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from jitexport.evaluate.demo import LUMINANCE
from jitexport.evaluate.finder import FULL, Finder, Seen, to_array
from jitexport.evaluate.scenes import Request, fits
from jitexport.evaluate.scoring import EncoderMaps
from jitexport.models.sources import DEMO_FOLDER

MOST_UNEXPLAINED = 0.03  # share of a picture that may be neither object nor background
BAND_SIGMAS = (0.0, 0.7, 1.4, 2.8, 5.6)  # pixels of FULL


@dataclass(frozen=True)
class SceneScore:
    """What was measured on one picture.

    Attributes:
        objects: share of the objects asked for that are there.
        count_right: whether as many objects are there as were asked for.
        colour_right: whether the background's colour is; None where it was left open.
        texture_right: likewise.
        clean: whether nothing is there that was not asked for, known object or not.
        sharpness: gradient inside the objects over that of their pictures; None without objects.
    """

    objects: float
    count_right: bool
    colour_right: bool | None
    texture_right: bool | None
    clean: bool
    sharpness: float | None

    @property
    def objects_right(self) -> bool:
        """Whether all objects that were asked for are there."""
        return self.objects == 1

    @property
    def background_right(self) -> bool:
        """Whether nothing that was said of the background is wrong."""
        return self.colour_right is not False and self.texture_right is not False

    @property
    def right(self) -> bool:
        """Whether all of it is right."""
        return self.objects_right and self.count_right and self.background_right and self.clean


def score(finder: Finder, request: Request, picture: Image.Image) -> SceneScore:
    """Scores of a picture that was made for a request."""
    return score_seen(finder, request, picture, finder(picture))


def score_seen(finder: Finder, request: Request, picture: Image.Image, seen: Seen) -> SceneScore:
    """The same, where what the finder sees is known already."""
    there = most_matched(seen.names, request.terms)
    return SceneScore(
        objects=there / len(request.terms),
        count_right=len(seen.objects) == len(request.terms),
        colour_right=None if request.colour is None else seen.colour == request.colour,
        texture_right=None if request.texture is None else seen.texture == request.texture,
        clean=there == len(seen.objects) and seen.unexplained <= MOST_UNEXPLAINED,
        sharpness=sharpness(finder, seen, picture),
    )


def most_matched(names: Sequence[str], terms: Sequence[str]) -> int:
    """How many terms can have an object of their own; for at most three terms and a handful of objects."""
    missing = [""] * len(terms)
    return max(
        sum(fits(name, term) for name, term in zip(order, terms, strict=True))
        for order in permutations([*names, *missing], len(terms))
    )


def sharpness(finder: Finder, seen: Seen, picture: Image.Image) -> float | None:
    """Mean gradient of the luminance inside the objects over that of their pictures in the same places."""
    if not seen.objects:
        return None
    whole = to_array(picture, FULL)
    made = wanted = 0.0
    for found in seen.objects:
        inside = ndimage.binary_erosion(finder.outline(found.thing, FULL))
        made += float(gradient(whole)[inside].sum())
        wanted += float(gradient(finder.drawn(found.thing, FULL))[inside].sum())
    return made / wanted if wanted else None


def gradient(rgb: np.ndarray) -> np.ndarray:
    """Gradient magnitude of the luminance: [H, W, 3] -> [H, W]."""
    return np.hypot(*np.gradient(rgb @ LUMINANCE))


def band_energies(picture: Image.Image) -> np.ndarray:
    """Decimal logarithm of the mean squared luminance in four bands of scale, finest first: [4]."""
    luminance = to_array(picture, FULL) @ LUMINANCE
    levels = [ndimage.gaussian_filter(luminance, sigma) if sigma else luminance for sigma in BAND_SIGMAS]
    energies = [float(np.square(fine - coarse).mean()) for fine, coarse in pairwise(levels)]
    return np.log10(np.array(energies) + 1e-9)


class SceneFeatures:
    """Features of pictures: channel means and deviations of the last block of the demo model's VAE encoder.

    Args:
        folder: the model's.
    """

    def __init__(self, folder: Path = DEMO_FOLDER) -> None:
        from diffusers import AutoencoderKL

        self.maps = EncoderMaps(AutoencoderKL.from_pretrained(folder / "vae").float().eval().encoder)

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """Features of a picture: [2 C]."""
        x = self.maps(torch.from_numpy(to_array(picture, FULL)).permute(2, 0, 1)[None])[-1]  # [1, C, H, W]
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], dim=1)[0].double().numpy()


def diversity(features: np.ndarray) -> float:
    """Mean distance between pictures of the same prompt: features [prompts, seeds, d]; two seeds at least."""
    distances = np.linalg.norm(features[:, :, None] - features[:, None], axis=-1)  # [P, S, S]
    seeds = features.shape[1]
    return float(distances.sum((1, 2)).mean() / (seeds * (seeds - 1)))
