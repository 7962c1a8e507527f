"""Measure the quality of the demo model's pictures, from diffusers and from engine bundles, on the same prompts.

    python scripts/demo_quality.py --diffusers 50 --bundle engines/demo-4x --json quality.json --sheet quality.png

Half of the prompts are (name, colour) pairs held out of training, half are trained ones; each has its own fixed seed.
Every picture is compared with the 1000 pictures that the data consists of, made from the atlas in the model's folder:

- name, pair: the nearest of the 1000 pictures (mean squared error of RGB at 64 x 64) has the prompted name; has the
  prompted name and colour;
- background: the median colour of the 4-pixel border at 256 x 256 is nearest to the prompted one of the ten colours;
- sharpness: mean gradient magnitude of the luminance at 128 x 128, relative to the prompted picture (median; 1 is as
  sharp as the data, and noise raises it too);
- PSNR to the prompted picture at 128 x 128 (median).

Counts come with Wilson's 95% interval.
"""

import argparse
import datetime
import json
import math
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table

FOLDER = Path(__file__).parent.parent / "jitexport" / "assets" / "demo"
SHEET_PROMPTS, SHEET_COLUMNS, SHEET_PICTURE, SHEET_LABEL = 48, 8, 160, 14
TRAINED_CHOICE_SEED = 1

# Prompts and one seed each -> pictures.
Generate = Callable[[list[str], list[int]], list[Image.Image]]


@dataclass(frozen=True)
class Prompt:
    """One prompt of the evaluation."""

    name: str
    colour: str
    held_out: bool
    seed: int
    text: str


@dataclass(frozen=True)
class Source:
    """Something that makes pictures."""

    label: str
    generate: Generate
    batch: int


@dataclass(frozen=True)
class Score:
    """What was measured on one picture."""

    prompt: str
    held_out: bool
    seed: int
    nearest: str
    name_right: bool
    pair_right: bool
    background_right: bool
    sharpness: float
    psnr: float


# --- prompts and reference pictures -----------------------------------------------------------------------------------


def choose_prompts(captions: dict, count: int) -> list[Prompt]:
    """`count` prompts, held-out and trained ones in turn, spread evenly over the objects; always the same ones."""
    names, colours = captions["names"], list(captions["colours"])
    held_out = dict(captions["held_out"])
    choice = random.Random(TRAINED_CHOICE_SEED)
    trained = {name: choice.choice([c for c in colours if c != held_out[name]]) for name in names}
    prompts = []
    for index in range(count):
        pairs, is_held_out = (held_out, True) if index % 2 == 0 else (trained, False)
        name = names[index // 2 * len(names) // math.ceil(count / 2)]
        colour = pairs[name]
        text = captions["caption"].replace("<name>", name).replace("<colour>", colour)
        prompts.append(
            Prompt(name, colour, is_held_out, names.index(name) * len(colours) + colours.index(colour), text)
        )
    return prompts


def reference_pictures(folder: Path, captions: dict) -> dict[tuple[str, str], Image.Image]:
    """The 1000 pictures of the data, 128 x 128 RGB, by (name, colour)."""
    layout = captions["reference"]
    size, columns = layout["size"], layout["columns"]
    atlas = Image.open(folder / layout["file"])
    pictures = {}
    for index, name in enumerate(captions["names"]):
        row, column = divmod(index, columns)
        box = (column * size, row * size, (column + 1) * size, (row + 1) * size)
        item = atlas.crop(box)
        for colour, rgb in captions["colours"].items():
            background = Image.new("RGBA", item.size, (*rgb, 255))
            pictures[name, colour] = Image.alpha_composite(background, item).convert("RGB")
    return pictures


# --- measurements -----------------------------------------------------------------------------------------------------


def pixels(picture: Image.Image, size: int) -> np.ndarray:
    """RGB in 0..255 at `size`: [size, size, 3]."""
    return np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BOX), dtype=np.float32)


def gradient(rgb: np.ndarray) -> float:
    """Mean gradient magnitude of the luminance: [H, W, 3] -> a number."""
    luminance = rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # [H, W]
    across, down = np.diff(luminance, axis=1)[:-1], np.diff(luminance, axis=0)[:, :-1]
    return float(np.hypot(across, down).mean())


def border_colour(picture: Image.Image, width: int = 4) -> np.ndarray:
    """Median colour of the outermost pixels: [3]."""
    rgb = pixels(picture, 256)
    inside = np.zeros(rgb.shape[:2], dtype=bool)
    inside[width:-width, width:-width] = True
    return np.median(rgb[~inside], axis=0)


class Judge:
    """Compares pictures with the reference pictures."""

    def __init__(self, references: dict[tuple[str, str], Image.Image], colours: dict[str, list[int]]) -> None:
        self.references = references
        self.pairs = list(references)
        self.small = np.stack([pixels(picture, 64).ravel() for picture in references.values()])  # [1000, 64 * 64 * 3]
        self.colours = list(colours)
        self.colour_values = np.array(list(colours.values()), dtype=np.float32)  # [10, 3]

    def score(self, prompt: Prompt, picture: Image.Image) -> Score:
        name, colour = self.pairs[int(np.square(self.small - pixels(picture, 64).ravel()).mean(1).argmin())]
        distances = np.square(self.colour_values - border_colour(picture)).sum(1)
        wanted, made = pixels(self.references[prompt.name, prompt.colour], 128), pixels(picture, 128)
        error = max(float(np.square(wanted - made).mean()), 1e-6)
        return Score(
            prompt=prompt.text,
            held_out=prompt.held_out,
            seed=prompt.seed,
            nearest=f"{name}, {colour}",
            name_right=name == prompt.name,
            pair_right=(name, colour) == (prompt.name, prompt.colour),
            background_right=self.colours[int(distances.argmin())] == prompt.colour,
            sharpness=gradient(made) / gradient(wanted),
            psnr=10 * math.log10(255**2 / error),
        )


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a share."""
    share = hits / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (centre - spread) / scale, (centre + spread) / scale


def summarise(scores: list[Score]) -> dict:
    """Counts with intervals, and medians."""
    summary: dict = {"pictures": len(scores)}
    for measure in ("name_right", "pair_right", "background_right"):
        hits = sum(getattr(score, measure) for score in scores)
        summary[measure] = {"count": hits, "interval": [round(x, 3) for x in wilson(hits, len(scores))]}
    for measure in ("sharpness", "psnr"):
        summary[measure] = round(statistics.median(getattr(score, measure) for score in scores), 3)
    return summary


# --- sources ----------------------------------------------------------------------------------------------------------


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def diffusers_source(folder: Path, steps: int, dtype: str, batch: int) -> Source:
    """The model's folder in diffusers' own pipeline."""
    from diffusers import FluxPipeline

    defaults = json.loads((folder / "jitexport.json").read_text(encoding="utf-8"))
    pipeline = FluxPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        settings = {**defaults, "num_inference_steps": steps}
        return pipeline(prompts, generator=generators(seeds), **settings).images

    return Source(f"diffusers, {steps} steps, {dtype}", generate, batch)


def bundle_source(path: Path) -> Source:
    """An engine bundle."""
    import jitexport

    pipeline = jitexport.load(path)

    def generate(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return pipeline(prompts, generator=generators(seeds)).images

    return Source(path.name, generate, pipeline.batch_size)


def make_pictures(source: Source, prompts: list[Prompt]) -> list[Image.Image]:
    """One picture a prompt, in batches, with a progress bar."""
    pictures: list[Image.Image] = []
    starts = range(0, len(prompts), source.batch)
    for start in track(starts, description=source.label, console=Console(stderr=True)):
        chunk = prompts[start : start + source.batch]
        pictures += source.generate([prompt.text for prompt in chunk], [prompt.seed for prompt in chunk])
    return pictures


# --- reports ----------------------------------------------------------------------------------------------------------


def sheet(prompts: list[Prompt], pictures: list[Image.Image]) -> Image.Image:
    """Contact sheet of SHEET_PROMPTS pictures with their prompts; held-out pairs are marked with a star."""
    count = min(SHEET_PROMPTS, len(prompts))
    rows, cell = math.ceil(count / SHEET_COLUMNS), SHEET_PICTURE + SHEET_LABEL
    page = Image.new("RGB", (SHEET_COLUMNS * SHEET_PICTURE, rows * cell), "white")
    draw = ImageDraw.Draw(page)
    for index in range(count):
        # Pairs of neighbours stay together, so that held-out and trained prompts are shown in equal number.
        chosen = index // 2 * (len(prompts) // 2) // max(count // 2, 1) * 2 + index % 2
        prompt, picture = prompts[chosen], pictures[chosen]
        left, top = index % SHEET_COLUMNS * SHEET_PICTURE, index // SHEET_COLUMNS * cell
        page.paste(picture.resize((SHEET_PICTURE, SHEET_PICTURE), Image.Resampling.LANCZOS), (left, top))
        label = f"{prompt.name}, {prompt.colour}{' *' if prompt.held_out else ''}"
        draw.text((left + 3, top + SHEET_PICTURE + 1), label, fill="black")
    return page


def table(results: list[dict]) -> Table:
    """All sources, held-out and trained prompts apart."""
    view = Table(title="Counts with Wilson 95% intervals; medians")
    for column in ("source", "prompts", "name", "pair", "background", "sharpness", "PSNR dB", "s/picture"):
        view.add_column(column, justify="left" if column in ("source", "prompts") else "right")

    def count(summary: dict, measure: str) -> str:
        low, high = summary[measure]["interval"]
        return f"{summary[measure]['count']}/{summary['pictures']} ({low:.0%}-{high:.0%})"

    for result in results:
        for group in ("held out", "trained"):
            summary = result[group]
            view.add_row(
                result["source"],
                group,
                *(count(summary, measure) for measure in ("name_right", "pair_right", "background_right")),
                f"{summary['sharpness']:.2f}",
                f"{summary['psnr']:.1f}",
                f"{result['seconds_per_picture']:.2f}",
            )
    return view


def sources(args: argparse.Namespace) -> Iterator[Source]:
    """The sources asked for, each loaded when its turn comes."""
    for steps in args.diffusers:
        yield diffusers_source(args.folder, steps, args.dtype, args.batch)
    for path in args.bundle:
        yield bundle_source(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=int, action="append", default=[], metavar="STEPS", help="repeatable")
    parser.add_argument("--bundle", type=Path, action="append", default=[], metavar="PATH", help="repeatable")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the demo model's folder")
    parser.add_argument("--prompts", type=int, default=200, help="an even number, at most 200")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="for diffusers")
    parser.add_argument("--batch", type=int, default=8, help="prompts at once in diffusers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results here")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write a contact sheet here, one file a source")
    args = parser.parse_args()
    if not args.diffusers and not args.bundle:
        parser.error("nothing to measure: give --diffusers STEPS, --bundle PATH, or both")
    if not (2 <= args.prompts <= 200 and args.prompts % 2 == 0):
        parser.error(f"--prompts must be an even number from 2 to 200, not {args.prompts}")

    captions = json.loads((args.folder / "captions.json").read_text(encoding="utf-8"))
    prompts = choose_prompts(captions, args.prompts)
    judge = Judge(reference_pictures(args.folder, captions), captions["colours"])
    results = []
    for source in sources(args):
        began = time.perf_counter()
        pictures = make_pictures(source, prompts)
        seconds = time.perf_counter() - began
        scores = [judge.score(prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)]
        results.append(
            {
                "source": source.label,
                "seconds_per_picture": round(seconds / len(prompts), 4),
                "held out": summarise([score for score in scores if score.held_out]),
                "trained": summarise([score for score in scores if not score.held_out]),
                "pictures": [asdict(score) for score in scores],
            }
        )
        if args.sheet:
            several = len(args.diffusers) + len(args.bundle) > 1
            name = f"{args.sheet.stem}-{len(results)}{args.sheet.suffix}" if several else args.sheet.name
            sheet(prompts, pictures).save(args.sheet.with_name(name))

    Console(width=160).print(table(results))
    if args.json:
        report = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "scripts/demo_quality.py", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy", "pillow")},
            "results": results,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
