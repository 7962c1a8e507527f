"""Scores that only the demo model can have: its pictures are known, so what it draws can be compared with them.

Every image is compared with the 1000 pictures that the model's data consists of, made from the atlas in its folder:

- name, pair: the nearest of the 1000 pictures (mean squared error of RGB at 64 x 64) has the prompted name; has the
  prompted name and colour;
- background: the median colour of the 4-pixel border at 256 x 256 is nearest to the prompted one of the ten colours;
- sharpness: mean gradient magnitude of the luminance at 128 x 128, relative to the prompted picture (1 is as sharp as
  the data, and noise raises it too);
- PSNR to the prompted picture at 128 x 128.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jitexport.models.sources import DEMO_FOLDER

TRAINED_CHOICE_SEED = 1


@dataclass(frozen=True)
class DemoPrompt:
    """A prompt of the demo model: an object, a background colour, and whether the pair was held out of training."""

    name: str
    colour: str
    held_out: bool
    seed: int
    text: str


@dataclass(frozen=True)
class DemoScore:
    """What was measured on one image; see the module. `nearest` is "name, colour" of the nearest picture."""

    nearest: str
    name_right: bool
    pair_right: bool
    background_right: bool
    sharpness: float
    psnr: float


@dataclass(frozen=True)
class DemoData:
    """Captions and pictures of the demo model's data.

    Attributes:
        folder: the model's folder, with `captions.json` and the atlas of pictures.
    """

    folder: Path = DEMO_FOLDER

    @cached_property
    def captions(self) -> dict[str, Any]:
        """Names, colours, held-out pairs and the caption's form."""
        return json.loads((self.folder / "captions.json").read_text(encoding="utf-8"))

    @property
    def scenes(self) -> bool:
        """Whether the model draws the scenes of `jitexport.evaluate.scenes`, and not one picture for a caption."""
        return bool(self.captions.get("scenes"))

    @cached_property
    def sprites(self) -> dict[str, Image.Image]:
        """The objects, 128 x 128 RGBA, by name."""
        layout = self.captions["reference"]
        size, columns = layout["size"], layout["columns"]
        atlas = Image.open(self.folder / layout["file"])
        sprites = {}
        for index, name in enumerate(self.captions["names"]):
            row, column = divmod(index, columns)
            sprites[name] = atlas.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
        return sprites

    @cached_property
    def pictures(self) -> dict[tuple[str, str], Image.Image]:
        """The 1000 pictures, 128 x 128 RGB, by (name, colour)."""
        pictures = {}
        for name, item in self.sprites.items():
            for colour, rgb in self.captions["colours"].items():
                background = Image.new("RGBA", item.size, (*rgb, 255))
                pictures[name, colour] = Image.alpha_composite(background, item).convert("RGB")
        return pictures

    def prompts(self, count: int) -> list[DemoPrompt]:
        """`count` prompts, held-out and trained ones in turn, spread evenly over the objects; always the same ones."""
        names, colours = self.captions["names"], list(self.captions["colours"])
        held_out = dict(self.captions["held_out"])
        choice = random.Random(TRAINED_CHOICE_SEED)
        trained = {name: choice.choice([c for c in colours if c != held_out[name]]) for name in names}
        prompts = []
        for index in range(count):
            pairs, is_held_out = (held_out, True) if index % 2 == 0 else (trained, False)
            name = names[index // 2 * len(names) // math.ceil(count / 2)]
            colour = pairs[name]
            seed = names.index(name) * len(colours) + colours.index(colour)
            prompts.append(DemoPrompt(name, colour, is_held_out, seed, self.caption(name, colour)))
        return prompts

    def caption(self, name: str, colour: str) -> str:
        """The prompt for an object on a colour."""
        return self.captions["caption"].replace("<name>", name).replace("<colour>", colour)

    def parse(self, text: str) -> tuple[str, str] | None:
        """(name, colour) of a prompt in the captions' form, or None."""
        found = re.fullmatch(self.caption("(.+)", "(.+)"), text)
        if found is None:
            return None
        name, colour = found.groups()
        return (name, colour) if (name, colour) in self.pictures else None


class Judge:
    """Compares images with the data's pictures."""

    def __init__(self, pictures: Mapping[tuple[str, str], Image.Image], colours: Mapping[str, list[int]]) -> None:
        self.pictures = pictures
        self.pairs = list(pictures)
        self.small = np.stack([pixels(picture, 64).ravel() for picture in pictures.values()])  # [1000, 64 * 64 * 3]
        self.colours = list(colours)
        self.colour_values = np.array(list(colours.values()), dtype=np.float32)  # [10, 3]

    @classmethod
    def of(cls, data: DemoData) -> Judge:
        """A judge with a model's data."""
        return cls(data.pictures, data.captions["colours"])

    def score(self, name: str, colour: str, image: Image.Image) -> DemoScore:
        """Scores of an image that was asked for as an object on a colour."""
        found = self.pairs[int(np.square(self.small - pixels(image, 64).ravel()).mean(1).argmin())]
        distances = np.square(self.colour_values - border_colour(image)).sum(1)
        wanted, made = pixels(self.pictures[name, colour], 128), pixels(image, 128)
        error = max(float(np.square(wanted - made).mean()), 1e-6)
        return DemoScore(
            nearest=", ".join(found),
            name_right=found[0] == name,
            pair_right=found == (name, colour),
            background_right=self.colours[int(distances.argmin())] == colour,
            sharpness=gradient(made) / gradient(wanted),
            psnr=10 * math.log10(255**2 / error),
        )


#: Weights of red, green and blue in a colour's luminance (ITU-R BT.601).
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def pixels(image: Image.Image, size: int) -> np.ndarray:
    """RGB in 0..255 at `size`: [size, size, 3]."""
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BOX), dtype=np.float32)


def gradient(rgb: np.ndarray) -> float:
    """Mean gradient magnitude of the luminance: [H, W, 3] -> a number."""
    luminance = rgb @ LUMINANCE  # [H, W]
    across, down = np.diff(luminance, axis=1)[:-1], np.diff(luminance, axis=0)[:, :-1]
    return float(np.hypot(across, down).mean())


def border_colour(image: Image.Image, width: int = 4) -> np.ndarray:
    """Median colour of the outermost pixels: [3]."""
    rgb = pixels(image, 256)
    inside = np.zeros(rgb.shape[:2], dtype=bool)
    inside[width:-width, width:-width] = True
    return np.median(rgb[~inside], axis=0)
