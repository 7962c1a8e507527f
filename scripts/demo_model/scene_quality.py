"""Score pictures of scenes from diffusers and from engine bundles, on the same prompts and seeds, beside true scenes.

    python scripts/demo_model/scene_quality.py --folder FOLDER --diffusers 50 --diffusers 7 --bundle engines/demo-4x \\
        --prompts 200 --json scenes.json --sheet scenes.png

Half of the captions are of combinations held out of training. The scores are those of
`jitexport.evaluate.scene_scores`; the first row is true scenes of the same captions after the model's autoencoder,
which is the most that any sampler can reach. In the table:

- right, objects, number, background, clean: counts with Wilson's 95% interval, of objects the share of those asked for;
- sharpness: median over pictures in which something was found;
- bands: structure at four scales, finest first, as ten times the decimal logarithm of its ratio to that of true scenes;
- Frechet: distance to `--true` other true scenes, with the same number of features from each source;
- diversity: mean distance between `--seeds` pictures of one prompt, over that of true scenes; over `--diverse` prompts.

`--sheet` puts all sources side by side, `--shown` prompts under each other.
"""

import argparse
import datetime
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from data import load_objects
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFont
from scene_finder import PICTURES, through
from sources import Source, bundle_source, diffusers_source, make_pictures

from jitexport.console import PlainConsole, Table
from jitexport.evaluate.finder import scene_finder
from jitexport.evaluate.scene_scores import SceneFeatures, SceneScore, band_energies, diversity, score
from jitexport.evaluate.scenes import (
    Scene,
    ScenePrompt,
    draw_scene,
    draw_scene_for,
    parse,
    render,
    scene_prompts,
)  # fmt: skip
from jitexport.evaluate.statistics import frechet, wilson
from jitexport.models.sources import DEMO_FOLDER
from jitexport.profile import conditions

TRUE_SEED, DIVERSE_SEED = 1000, 100_000
TRUE = "true scenes"
SHARES = {
    "right": "right", "count_right": "number", "background_right": "background", "clean": "clean",
}  # fmt: skip
SHEET_PICTURE, SHEET_HEAD, SHEET_LABEL = 128, 22, 14


@dataclass(frozen=True)
class Truth:
    """True scenes, as they look after the model's autoencoder."""

    sprites: dict[str, Image.Image]
    vae: AutoencoderKL

    def seen(self, scene: Scene) -> Image.Image:
        """A scene's picture."""
        return through(self.vae, render(scene, self.sprites))

    def source(self) -> Source:
        """What makes a true scene of each prompt."""

        def generate(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
            draws = [np.random.default_rng((TRUE_SEED, seed)) for seed in seeds]
            return [self.seen(draw_scene_for(parse(text), rng)) for text, rng in zip(prompts, draws, strict=True)]

        return Source(TRUE, generate, 8)


@dataclass(frozen=True)
class Measured:
    """What was measured on a source's pictures."""

    scores: list[SceneScore]
    bands: np.ndarray  # [4]
    features: np.ndarray  # [prompts, d]
    diversity: float | None
    seconds: float  # a picture


class Meter:
    """Measures sources."""

    def __init__(self, prompts: list[ScenePrompt], diverse: list[ScenePrompt], seeds: int) -> None:
        self.finder = scene_finder()
        self.features = SceneFeatures()
        self.prompts, self.diverse, self.seeds = prompts, diverse, seeds

    def __call__(self, source: Source) -> tuple[Measured, list[Image.Image]]:
        began = time.perf_counter()
        pictures = make_pictures(source, self.prompts)
        seconds = (time.perf_counter() - began) / len(pictures)
        scores = [
            score(self.finder, prompt.request, picture)
            for prompt, picture in zip(self.prompts, pictures, strict=True)
        ]  # fmt: skip
        spread = None
        if self.diverse:
            again = [
                replace(prompt, seed=DIVERSE_SEED + self.seeds * index + i)
                for index, prompt in enumerate(self.diverse) for i in range(self.seeds)
            ]  # fmt: skip
            found = np.stack([self.features(picture) for picture in make_pictures(source, again)])
            spread = diversity(found.reshape(len(self.diverse), self.seeds, -1))
        bands = np.stack([band_energies(picture) for picture in pictures]).mean(0)
        features = np.stack([self.features(picture) for picture in pictures])
        return Measured(scores, bands, features, spread, seconds), pictures


def summarise(measured: Measured, true: Measured, reference: np.ndarray, chosen: Callable[[int], bool]) -> dict:
    """The numbers of a source on the prompts of chosen numbers."""
    scores = [one for index, one in enumerate(measured.scores) if chosen(index)]
    summary: dict = {"pictures": len(scores)}
    for name in SHARES:
        hits = sum(getattr(one, name) for one in scores)
        summary[name] = {"count": hits, "interval": [round(x, 3) for x in wilson(hits, len(scores))]}
    summary["objects"] = round(sum(one.objects for one in scores) / len(scores), 4)
    found = [one.sharpness for one in scores if one.sharpness is not None]
    summary["sharpness"] = round(statistics.median(found), 3) if found else None
    summary["bands"] = [round(10 * float(x), 2) for x in measured.bands - true.bands]
    summary["frechet"] = round(frechet(reference, measured.features), 3)
    if measured.diversity is not None and true.diversity:
        summary["diversity"] = round(measured.diversity / true.diversity, 3)
    return summary


def table(results: list[dict]) -> Table:
    view = Table(title="Counts with Wilson 95% intervals")
    heads = ("source", *SHARES.values(), "objects", "held out, trained: right", "sharpness", "bands dB", "Frechet")
    for head in (*heads, "diversity", "s/picture"):
        view.add_column(head, justify="left" if head == "source" else "right")
    for result in results:
        whole, n = result["all"], result["all"]["pictures"]
        counts = [
            f"{whole[name]['count']}/{n} ({whole[name]['interval'][0]:.0%}-{whole[name]['interval'][1]:.0%})"
            for name in SHARES
        ]
        parts = [f"{result[part]['right']['count']}/{result[part]['pictures']}" for part in ("held out", "trained")]
        view.add_row(
            result["source"], *counts, f"{whole['objects']:.1%}", ", ".join(parts), f"{whole['sharpness'] or 0:.2f}",
            " ".join(f"{x:+.1f}" for x in whole["bands"]), f"{whole['frechet']:.3f}",
            f"{whole.get('diversity', float('nan')):.2f}", f"{result['seconds_per_picture']:.2f}",
        )  # fmt: skip
    return view


def sheet(prompts: list[ScenePrompt], columns: dict[str, list[Image.Image]], shown: int) -> Image.Image:
    """Sources side by side, prompts under each other in two halves; held-out combinations have a star."""
    count = min(shown, len(prompts))
    half, cell = (count + 1) // 2, SHEET_PICTURE + SHEET_LABEL
    labels = [prompt.text + " *" * prompt.held_out for prompt in prompts[:count]]
    longest = max(ImageFont.load_default(10).getlength(label) for label in labels)
    wide = max(len(columns) * (SHEET_PICTURE + 2), math.ceil(longest)) + 12
    page = Image.new("RGB", (2 * wide, SHEET_HEAD + half * cell), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for index in range(count):
        left, top = index // half * wide, SHEET_HEAD + index % half * cell
        draw.text((left, top), labels[index], fill="black", font=ImageFont.load_default(10))
        for column, (title, pictures) in enumerate(columns.items()):
            x = left + column * (SHEET_PICTURE + 2)
            draw.text((x, 4), title, fill="black", font=font)
            small = pictures[index].resize((SHEET_PICTURE, SHEET_PICTURE), Image.Resampling.LANCZOS)
            page.paste(small, (x, top + SHEET_LABEL - 1))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=int, action="append", default=[], metavar="STEPS", help="repeatable")
    parser.add_argument("--bundle", type=Path, action="append", default=[], metavar="PATH", help="repeatable")
    parser.add_argument("--folder", type=Path, default=DEMO_FOLDER, help="of the model that diffusers runs")
    parser.add_argument("--data", type=Path, default=PICTURES, help="folder for the npm packages")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--true", type=int, default=1000, help="true scenes that sets are compared with")
    parser.add_argument("--diverse", type=int, default=0, help="prompts of which several pictures are made")
    parser.add_argument("--seeds", type=int, default=4, help="so many of each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="for diffusers")
    parser.add_argument("--batch", type=int, default=8, help="prompts at once in diffusers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results here")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write a contact sheet here")
    parser.add_argument("--shown", type=int, default=24, help="prompts on the sheet")
    args = parser.parse_args()
    if not 2 <= args.prompts <= 1000:
        parser.error(f"--prompts must be from 2 to 1000, not {args.prompts}")

    truth = Truth(load_objects(args.data), AutoencoderKL.from_pretrained(args.folder / "vae").float().eval())
    prompts = scene_prompts(args.prompts)
    meter = Meter(prompts, prompts[: args.diverse], args.seeds)
    others = [draw_scene(np.random.default_rng((TRUE_SEED + 1, index))) for index in range(args.true)]
    reference = np.stack([meter.features(truth.seen(scene)) for scene in others])
    true, pictures = meter(truth.source())
    measured, columns = {TRUE: true}, {}
    made = [partial(diffusers_source, args.folder, steps, args.dtype, args.batch) for steps in args.diffusers]
    made += [partial(bundle_source, path) for path in args.bundle]
    for make in made:
        source = make()
        measured[source.label], columns[source.label] = meter(source)
    parts = {
        "all": lambda _: True,
        "held out": lambda index: prompts[index].held_out,
        "trained": lambda index: not prompts[index].held_out,
    }
    results = [
        {
            "source": label,
            "seconds_per_picture": round(one.seconds, 4),
            **{part: summarise(one, true, reference, chosen) for part, chosen in parts.items()},
            "pictures": [
                {"prompt": prompt.text, "held_out": prompt.held_out, "seed": prompt.seed, **asdict(score)}
                for prompt, score in zip(prompts, one.scores, strict=True)
            ],
        }
        for label, one in measured.items()
    ]
    if args.sheet:
        sheet(prompts, columns or {TRUE: pictures}, args.shown).save(args.sheet)
    PlainConsole(width=220).print(table(results))
    if args.json:
        report = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "scripts/demo_model/scene_quality.py", *sys.argv[1:]]),
            "conditions": conditions(),
            "results": results,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
