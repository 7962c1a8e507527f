"""Precision and recall of the finder of objects on true scenes, as they are and after the model's autoencoder.

    python scripts/demo_model/scene_finder.py --scenes 225 --json finder.json

Scenes are made from the full-size pictures of the objects (from npm, see `data.py`), the finder has the small ones
of the model's folder. An object counts as found if one of its name was found; places are not compared.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from data import load_objects
from diffusers import AutoencoderKL
from PIL import Image

from jitexport.evaluate.finder import Finder, scene_finder
from jitexport.evaluate.scene_scores import MOST_UNEXPLAINED, score_seen
from jitexport.evaluate.scenes import Request, Scene, draw_scene, render
from jitexport.models.sources import DEMO_FOLDER

SEED = 77
PICTURES = Path.home() / ".cache" / "jitexport" / "demo-training" / "pictures"


@torch.inference_mode()
def through(vae: AutoencoderKL, picture: Image.Image) -> Image.Image:
    """A picture after encoding and decoding."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0].clamp(-1, 1)
    return Image.fromarray(((decoded + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


class Counts:
    """What the finder got right and wrong."""

    def __init__(self) -> None:
        self.right = self.wrong = self.missed = self.scenes = 0
        self.names = self.colours = self.textures = self.clean = self.all = 0
        self.confused: Counter[str] = Counter()

    def add(self, finder: Finder, scene: Scene, picture: Image.Image) -> None:
        seen = finder(picture)
        true, found = Counter(scene.names), Counter(seen.names)
        self.scenes += 1
        self.right += (true & found).total()
        self.wrong += (found - true).total()
        self.missed += (true - found).total()
        self.names += true == found
        self.colours += seen.colour == scene.background.colour
        self.textures += seen.texture == scene.background.texture
        self.clean += seen.unexplained <= MOST_UNEXPLAINED
        request = Request(scene.names, scene.background.colour, scene.background.texture)
        self.all += score_seen(finder, request, picture, seen).right
        self.confused.update(f"false {name}" for name in (found - true).elements())
        self.confused.update(f"missed {name}" for name in (true - found).elements())
        if seen.texture != scene.background.texture:
            self.confused[f"{scene.background.texture} taken for {seen.texture}"] += 1

    def summary(self) -> dict:
        shares = {name: getattr(self, name) / self.scenes for name in ("names", "colours", "textures", "clean", "all")}
        return {
            "scenes": self.scenes,
            "objects": self.right + self.missed,
            "precision": self.right / max(1, self.right + self.wrong),
            "recall": self.right / (self.right + self.missed),
            **shares,
            "confused": dict(self.confused.most_common(12)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=225)
    parser.add_argument("--data", type=Path, default=PICTURES, help="folder for the npm packages")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    args = parser.parse_args()
    sprites, finder = load_objects(args.data), scene_finder()
    vae = AutoencoderKL.from_pretrained(DEMO_FOLDER / "vae").float().eval()
    counts = {"true scenes": Counts(), "through the autoencoder": Counts()}
    began = time.process_time()
    for index in range(args.scenes):
        scene = draw_scene(np.random.default_rng((SEED, index)))
        picture = render(scene, sprites)
        counts["true scenes"].add(finder, scene, picture)
        counts["through the autoencoder"].add(finder, scene, through(vae, picture))
        if index % 25 == 24:
            print(index + 1, {name: count.summary() for name, count in counts.items()}, flush=True)
    result = {name: count.summary() for name, count in counts.items()}
    print(json.dumps(result, indent=1), f"\n{time.process_time() - began:.0f} processor seconds")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
