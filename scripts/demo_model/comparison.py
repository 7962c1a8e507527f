"""Dense sampling and all acceleration methods on the demo model: quality, latency, FLOPs, one report.

    python scripts/demo_model/comparison.py                    # builds what engines/ lacks, makes images, reports
    python scripts/demo_model/comparison.py --backend eager    # nothing to compile: seconds instead of minutes to build

Results go to docs/results/comparison.{md,json,html,png}, images to out/evaluation, from where an interrupted run goes
on (--minutes 3 stops after a while). Latencies are measured one source at a time; where other programs run too,
`--only latency` takes them apart from the rest.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jitexport import registry
from jitexport.build import build
from jitexport.bundle.reading import read_manifest
from jitexport.choice import choose
from jitexport.errors import JitExportError
from jitexport.evaluate import Evaluation, compare, write_report
from jitexport.evaluate.evaluation import Progress, demo_prompts, generate
from jitexport.evaluate.metrics import MEASURES
from jitexport.evaluate.report import curves, markdown_table, sheet_image
from jitexport.evaluate.sources import Source, bundle_source, relabelled
from jitexport.evaluate.statistics import Score
from jitexport.plan import parse_custom

REFERENCE = "dense-50"
#: What says how good an image is, whatever 50 steps make of its seed: of a model of scenes, and of one of pictures.
QUALITY = ("right", "objects", "demo_psnr")


@dataclass(frozen=True)
class Recipe:
    """How a bundle of the comparison is built: `jitexport build` with these options."""

    method: str
    speedup: float | None = None
    preset: str | None = None
    steps: str | None = None
    ratios: str | None = None
    cache: str | None = None


#: Everything that is compared. A method or preset is added by a line; what is not registered is left out, and said.
RECIPES = {
    REFERENCE: Recipe("dense", speedup=1),
    "dense-18": Recipe("dense", steps="18"),
    "dense-11": Recipe("dense", steps="11"),
    "dense-7": Recipe("dense", steps="7"),
    "dense-5": Recipe("dense", steps="5"),
    "jit-4x": Recipe("jit", 4),
    "jit-7x": Recipe("jit", 7),
    "jit-4x-paper": Recipe("jit", 4, "paper"),
    "jit-7x-paper": Recipe("jit", 7, "paper"),
    "jit-4x-released": Recipe("jit", 4, "released"),
    "jit-7x-released": Recipe("jit", 7, "released"),
    "ralu-5x": Recipe("ralu", 5),
    "ralu-7x": Recipe("ralu", 7),
    "bottleneck-5x": Recipe("bottleneck", 5),
    "bottleneck-7x": Recipe("bottleneck", 7),
    "ras-3x": Recipe("ras", 3),
    "ras-5x": Recipe("ras", 5),
    "dense-5x-taylor": Recipe("dense", 5, cache="taylor"),
    "dense-10x-taylor": Recipe("dense", 10, cache="taylor"),
    "dense-taylorseer-7": Recipe("dense", 1, cache="taylorseer:every=7"),
    "dense-delta-dit-5": Recipe("dense", 1, cache="delta-dit:every=5"),
    "dense-toca-5": Recipe("dense", 1, cache="toca:every=5"),
    "jit-5x-taylor": Recipe("jit", 5, cache="taylor"),
    "jit-7x-taylor": Recipe("jit", 7, cache="taylor"),
    "jit-10x-taylor": Recipe("jit", 10, cache="taylor"),
}


class OutOfTime(Exception):
    """The time that was given is over; what was made is kept."""


class Printing:
    """Progress as lines on stderr, with an estimate."""

    def __init__(self) -> None:
        self.work = self.done = 0.0
        self.since = time.monotonic()

    def begin(self, work: float) -> None:
        self.work = work

    def step(self, name: str) -> None:
        spent = time.monotonic() - self.since
        left = f", about {spent / self.done * (self.work - self.done):.0f} s left" if self.done else ""
        print(f"{name}{left}", flush=True)

    def advance(self, work: float) -> None:
        self.done += work


class Deadline:
    """Progress that stops a run when its time is over."""

    def __init__(self, progress: Progress, minutes: float | None) -> None:
        self.progress = progress
        self.end = time.monotonic() + 60 * minutes if minutes else None

    def begin(self, work: float) -> None:
        self.progress.begin(work)

    def step(self, name: str) -> None:
        self.progress.step(name)

    def advance(self, work: float) -> None:
        self.progress.advance(work)
        if self.end is not None and time.monotonic() > self.end:
            raise OutOfTime("time is over; start it again to go on")


def built(name: str, folder: Path, backend: str) -> Path:
    """The bundle of a recipe: the one in `folder` if it still can be read, else a new one."""
    path = folder / f"{name}-{backend}"
    try:
        read_manifest(path)
        return path
    except JitExportError:
        pass  # not there, or of another format
    recipe = RECIPES[name]
    print(f"building {path}", flush=True)
    return build(
        "demo", output=path, speedup=recipe.speedup, method=recipe.method, preset=recipe.preset, cache=recipe.cache,
        backend=backend,
        custom=parse_custom(recipe.steps, recipe.ratios) if recipe.steps else None, replace=True,
        command=("python", "scripts/demo_model/comparison.py"),
    ).path  # fmt: skip


def write_results(
    stem: Path, evaluation: Evaluation, *, title: str, table: str, command: str, extra: dict[str, object] | None = None
) -> None:
    """The table as Markdown and everything as JSON, each with the conditions that it was taken under."""
    said = ", ".join(f"{k} {v}" for k, v in evaluation.conditions.items() if isinstance(v, str | int | float))
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(
        f"# {title}\n\n{len(evaluation.prompts.prompts)} prompts, one seed each, half of the pairs held out of "
        f"training; reference: {evaluation.reference.description}. Intervals: 95%, over prompts.\n\n{table}\n"
        f"`{command}`; {said}.\n",
        encoding="utf-8",
    )
    rows = [
        {
            "label": row.label, "method": row.method, "description": row.description, "steps": row.steps,
            "tflops": round(row.tflops, 6), "latency": row.latency and asdict(row.latency),
            "scores": {name: asdict(score) for name, score in row.scores.items()},
        }
        for row in evaluation.rows
    ]  # fmt: skip
    report = {
        "command": command, "conditions": evaluation.conditions, "prompts": len(evaluation.prompts.prompts),
        "missing": evaluation.missing, "rows": rows, **(extra or {}),
    }  # fmt: skip
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def usual_arguments(doc: str, prompts: int) -> argparse.ArgumentParser:
    """What scripts take that compare ways of making the demo model's images."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--folder", type=Path, default=Path("out/evaluation"), help="images, kept from run to run")
    parser.add_argument("--output", "-o", type=Path, default=Path("docs/results"))
    parser.add_argument("--minutes", type=float, help="stop after about that long, to be started again")
    return parser


def against_50_steps(sources: Sequence[Source], args: argparse.Namespace) -> Evaluation:
    """Sources of uncompiled images beside the ordinary sampler's, untimed.

    Raises:
        SystemExit: the time of `--minutes` is over.
    """
    reference = built(REFERENCE, args.folder / "bundles", "eager")
    try:
        return compare(
            sources, relabelled(bundle_source(reference), REFERENCE), reference, demo_prompts(args.prompts),
            args.folder / "images", timed=0, progress=Deadline(Printing(), args.minutes),
        )  # fmt: skip
    except OutOfTime as stopped:
        raise SystemExit(str(stopped)) from None


def against_dense(evaluation: Evaluation) -> str:
    """Who wins at equal cost: differences to dense sampling with as many steps as the same cost would pay for."""
    wanted = (*QUALITY, "psnr", "vae_distance", "sharpness")
    measures = [m for m in wanted if m in evaluation.measures]
    columns = {(m, by): evaluation.against_dense(m, by=by) for by in ("latency", "tflops") for m in measures}
    heads = [f"{MEASURES[m].title}, equal {'latency' if by == 'latency' else 'FLOPs'}" for m, by in columns]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in evaluation.rows:
        scores = [column.get(row.label) for column in columns.values()]
        if any(scores):
            lines.append("| " + " | ".join([row.label, *("" if s is None else signed(s) for s in scores)]) + " |")
    return (
        "Differences to dense sampling at the same cost, prompt by prompt; its rows are interpolated:"
        "\n\n" + "\n".join(lines) + "\n"
    )


def signed(score: Score) -> str:
    """A difference and its interval as text."""
    limits = "" if score.low is None else f" ({score.low:+.3g} to {score.high:+.3g})"
    return f"{score.value:+.3g}{limits}"


def chosen(names: Sequence[str]) -> list[str]:
    """Recipes to run, without those of methods that are not registered."""
    absent = sorted({RECIPES[n].method for n in names} - registry.METHODS.keys())
    if absent:
        print(f"not registered, left out: {', '.join(absent)}", flush=True)
    return [n for n in names if RECIPES[n].method not in absent]


def main() -> None:
    parser = usual_arguments(__doc__, prompts=48)
    parser.add_argument("--backend", default="auto", help="of the bundles: the machine's (default), aoti, eager, onnx")
    parser.add_argument("--bundles", type=Path, default=Path("engines"), help="taken from here, or built here")
    parser.add_argument("--sources", nargs="+", choices=RECIPES, metavar="NAME", help="some of them; all by default")
    parser.add_argument("--timed", type=int, default=5, help="images that a latency is the median of")
    parser.add_argument("--only", choices=("build", "latency", "images"), help="do a part, and write no report")
    args = parser.parse_args()

    names = chosen(args.sources or list(RECIPES))
    names = [REFERENCE, *(n for n in names if n != REFERENCE)]
    backend = choose(backend=args.backend).backend
    paths = {name: built(name, args.bundles, backend) for name in names}
    if args.only == "build":
        return
    sources: list[Source] = [relabelled(bundle_source(path), name) for name, path in paths.items()]
    prompts, images = demo_prompts(args.prompts), args.folder / "images"
    progress = Deadline(Printing(), args.minutes)
    try:
        timed = 0 if args.only == "images" else args.timed
        if args.only:
            generate(sources, prompts, images, timed=timed, progress=progress, images=args.only == "images")
            return
        evaluation = compare(
            sources[1:], sources[0], paths[REFERENCE], prompts, images, timed=timed, progress=progress
        )
    except OutOfTime as stopped:
        raise SystemExit(str(stopped)) from None
    stem = args.output / "comparison"
    write_results(
        stem, evaluation, title="Dense sampling and acceleration methods on the demo model",
        table=markdown_table(evaluation) + "\n![Quality against latency and FLOPs](comparison.png)\n\n"
        + against_dense(evaluation),
        command=f"python scripts/demo_model/comparison.py --backend {backend} --prompts {args.prompts}",
    )  # fmt: skip
    stem.with_suffix(".png").write_bytes(curves(evaluation))
    sheet_image(evaluation).save(stem.with_name("comparison-sheet.webp"), quality=82, method=6)
    print(write_report(evaluation, stem.with_suffix(".html"), title="Dense sampling and acceleration methods", size=96))


if __name__ == "__main__":
    main()
