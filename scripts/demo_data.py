"""The pictures and captions that the demo model learns from.

A hundred objects of Microsoft's Fluent Emoji 3D, each put on ten plain background colours, with the
caption "<name> on a <colour> background". One colour of every object is held out of training, so that
combining a name and a colour that were never seen together can be tested.
"""

import json
import random
import subprocess
import tarfile
from pathlib import Path

from PIL import Image

IMAGE_SIZE = 256
HELD_OUT_SEED = 0

PICTURES_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES_PACKAGE = "unicode-emoji-json@0.9.0"

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (24, 24, 28),
    "red": (214, 72, 66),
    "green": (88, 168, 104),
    "blue": (84, 136, 214),
    "yellow": (244, 208, 96),
    "purple": (150, 104, 190),
    "pink": (244, 168, 196),
    "orange": (240, 152, 80),
    "gray": (150, 154, 162),
}

OBJECTS: tuple[str, ...] = (
    *("red apple", "owl", "frog", "pizza", "dolphin", "mushroom", "pig face", "tiger face", "penguin", "hamburger"),
    *("watermelon", "sunflower", "cat face", "dog face", "bear", "panda", "koala", "lion", "cow face", "rabbit face"),
    *("fox", "monkey face", "elephant", "horse", "unicorn", "zebra", "giraffe", "camel", "turtle", "snake"),
    *("crab", "octopus", "butterfly", "lady beetle", "spider", "fish", "whale", "shark", "rose", "tulip"),
    *("cactus", "banana", "grapes", "lemon", "pineapple", "strawberry", "cherries", "peach", "tomato", "carrot"),
    *("broccoli", "bread", "doughnut", "cookie", "birthday cake", "egg", "french fries", "hot dog", "taco", "sushi"),
    *("ice cream", "rocket", "airplane", "sailboat", "automobile", "locomotive", "helicopter", "balloon", "snowman"),
    *("rainbow", "star", "ringed planet", "volcano", "house", "castle", "palm tree", "four leaf clover", "maple leaf"),
    *("snail", "jellyfish", "flamingo", "parrot", "peacock", "avocado", "eggplant", "pretzel", "cheese wedge"),
    *("teapot", "umbrella", "wrapped gift", "trophy", "soccer ball", "guitar", "crown", "gem stone", "key"),
    *("alarm clock", "anchor", "light bulb", "camera"),
)

# Emoji groups whose names make up the vocabulary; it is wider than OBJECTS so that other objects can be added later.
VOCABULARY_GROUPS = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")

# The first is what the model is made for; the others keep it from failing on small changes of wording. Words
# that no emoji name has ("an", "the") reach the model as the unknown word, which it so learns to pass over.
CAPTION = "{name} on a {colour} background"
CAPTION_VARIANTS = (
    "a {name} on a {colour} background",
    "an {name} on a {colour} background",
    "the {name} on a {colour} background",
    "a picture of a {name} on a {colour} background",
    "{name} with a {colour} background",
    "{name}",
)


def pairs() -> list[tuple[str, str]]:
    """All 1000 (name, colour) pairs, object by object."""
    return [(name, colour) for name in OBJECTS for colour in COLOURS]


def held_out_pairs() -> list[tuple[str, str]]:
    """The 100 pairs that are never trained on: one colour for each object, each colour for ten objects."""
    colours = [colour for colour in COLOURS for _ in range(len(OBJECTS) // len(COLOURS))]
    random.Random(HELD_OUT_SEED).shuffle(colours)
    return list(zip(OBJECTS, colours, strict=True))


def trained_pairs() -> list[tuple[str, str]]:
    """The 900 pairs that are trained on."""
    held_out = set(held_out_pairs())
    return [pair for pair in pairs() if pair not in held_out]


def caption(name: str, colour: str) -> str:
    """The caption of a picture, as the model is prompted."""
    return CAPTION.format(name=name, colour=colour)


def fetch_package(spec: str, folder: Path) -> Path:
    """The unpacked npm package `spec` ("name@version") inside `folder`, fetched with `npm pack` when absent."""
    name = spec.lstrip("@").replace("/", "-").replace("@", "-")
    archive, unpacked = folder / f"{name}.tgz", folder / name
    if not unpacked.is_dir():
        if not archive.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
    return unpacked / "package"


def emoji_names(folder: Path) -> dict[str, dict[str, str]]:
    """Emoji character -> {"name", "group", ...}."""
    return json.loads((fetch_package(NAMES_PACKAGE, folder) / "data-by-emoji.json").read_text(encoding="utf-8"))


def load_objects(folder: Path) -> dict[str, Image.Image]:
    """Name -> 256 x 256 RGBA picture, for each of OBJECTS."""
    assets = fetch_package(PICTURES_PACKAGE, folder) / "assets"
    emoji_of = {entry["name"].lower(): emoji for emoji, entry in emoji_names(folder).items()}
    pictures = {}
    for name in OBJECTS:
        code = "-".join(f"{ord(character):04x}" for character in emoji_of[name])
        # Some files leave out the "show as a picture" selector that the names keep.
        path = next(p for p in (assets / f"{c}.webp" for c in (code, code.replace("-fe0f", ""))) if p.is_file())
        pictures[name] = Image.open(path).convert("RGBA").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    return pictures


def on_background(picture: Image.Image, colour: str) -> Image.Image:
    """The RGBA `picture` on a plain background: RGB of the same size."""
    background = Image.new("RGBA", picture.size, (*COLOURS[colour], 255))
    return Image.alpha_composite(background, picture.convert("RGBA")).convert("RGB")
