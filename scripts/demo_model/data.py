"""The pictures that the demo model learns from: a hundred objects of Microsoft's Fluent Emoji 3D.

`jitexport.evaluate.scenes` puts them into scenes and writes their captions.
"""

import json
import subprocess
import tarfile
from pathlib import Path

from PIL import Image

from jitexport.evaluate.scenes import OBJECTS

IMAGE_SIZE = 256

PICTURES_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES_PACKAGE = "unicode-emoji-json@0.9.0"


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
