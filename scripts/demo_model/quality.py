"""Count how many of the demo model's pictures are right, from diffusers and from engine bundles, on the same prompts.

    python scripts/demo_model/quality.py --diffusers 50 --bundle engines/demo-4x --json quality.json --sheet quality.png

Half of the prompts are (name, colour) pairs held out of training, half are trained ones; each has its own fixed seed.
The scores are those of `jitexport.evaluate.demo`; sharpness and PSNR are medians. `jitexport evaluate` compares bundles
with the ordinary sampler's images of the same seeds; this script takes diffusers' own pipeline as well.

Counts come with Wilson's 95% interval.
"""

import argparse
import datetime
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from sources import Source, bundle_source, diffusers_source, make_pictures

from jitexport.console import PlainConsole, Table
from jitexport.evaluate.demo import DemoData, DemoPrompt, DemoScore, Judge
from jitexport.evaluate.statistics import wilson
from jitexport.models.sources import DEMO_FOLDER
from jitexport.profile import conditions

SHEET_PROMPTS, SHEET_COLUMNS, SHEET_PICTURE, SHEET_LABEL = 48, 8, 160, 14

@dataclass(frozen=True)
class Score(DemoScore):
    """The scores of an image, and what it was asked for."""

    prompt: str
    held_out: bool
    seed: int


# --- measurements -----------------------------------------------------------------------------------------------------


def score(judge: Judge, prompt: DemoPrompt, picture: Image.Image) -> Score:
    found = judge.score(prompt.name, prompt.colour, picture)
    return Score(**vars(found), prompt=prompt.text, held_out=prompt.held_out, seed=prompt.seed)


def summarise(scores: list[Score]) -> dict:
    """Counts with intervals, and medians."""
    summary: dict = {"pictures": len(scores)}
    for measure in ("name_right", "pair_right", "background_right"):
        hits = sum(getattr(score, measure) for score in scores)
        summary[measure] = {"count": hits, "interval": [round(x, 3) for x in wilson(hits, len(scores))]}
    for measure in ("sharpness", "psnr"):
        summary[measure] = round(statistics.median(getattr(score, measure) for score in scores), 3)
    return summary


# --- reports ----------------------------------------------------------------------------------------------------------


def sheet(prompts: list[DemoPrompt], pictures: list[Image.Image]) -> Image.Image:
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
    parser.add_argument("--folder", type=Path, default=DEMO_FOLDER, help="the demo model's folder")
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

    data = DemoData(args.folder)
    prompts, judge = data.prompts(args.prompts), Judge.of(data)
    results = []
    for source in sources(args):
        began = time.perf_counter()
        pictures = make_pictures(source, prompts)
        seconds = time.perf_counter() - began
        scores = [score(judge, prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)]
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

    PlainConsole(width=160).print(table(results))
    if args.json:
        report = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "scripts/demo_model/quality.py", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "conditions": conditions(),
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy", "pillow")},
            "results": results,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
