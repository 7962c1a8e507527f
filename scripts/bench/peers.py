"""The demo model made faster in different ways, side by side: same prompts, same seeds, same noise, one machine.

    python scripts/bench/peers.py                      # run again until it says that nothing is left
    python scripts/bench/peers.py --prompts 2 --only diffusers-50-fp32 --only ours-aoti-bf16-4x --out out/try

Every contender makes one image a prompt, from the same initial noise. A run works for --seconds and stops; the next
one goes on from what lies in --out, image by image, each part of a contender after a warm-up of its own (compiling
and calibrating fall into it). When nothing is left, the report is written: JSON, Markdown and a picture.

- seconds: from prompt to PNG, one image, median and 90th percentile;
- PSNR to 50 steps: to the picture of 50 ordinary fp32 steps of the same seed (median), at 256 x 256;
- the other scores: means over the prompts of what `jitexport evaluate` measures on the demo model's pictures;
- machine: rate of fp32 matrix products beside the contender's own parts, relative to the median over all contenders;
  a contender far from 1 was measured on a machine that was faster or slower than usual, and is marked.
"""

import json
import math
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from contenders import REFERENCE, Contender, Setting, contenders
from harness import CPU, Facts, Pieces, facts, parser, write
from PIL import Image

from jitexport.console import Table, err, out
from jitexport.evaluate.demo import DemoData
from jitexport.evaluate.evaluation import demo_prompts
from jitexport.evaluate.metrics import MEASURES, DemoScorer, SceneScorer
from jitexport.evaluate.prompts import PromptSet
from jitexport.evaluate.report import spread_labels
from jitexport.evaluate.scoring import Picture, Scorer
from jitexport.models.sources import DEMO_FOLDER
from jitexport.png import encode_png
from jitexport.profile.measure import Timing, matmul_rate

UNSTEADY = 0.1  # a contender whose machine differed by more than this is marked


# --- measuring, in pieces ---------------------------------------------------------------------------------------------


class Results:
    """What has been measured, in a folder: a JSON file and a folder of pictures for each contender."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def read(self, name: str) -> dict[str, Any]:
        path = self.out / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else {"seconds": {}, "rates": [], "error": None}

    def write(self, name: str, result: dict[str, Any]) -> None:
        write(self.out, name, result)

    def picture(self, name: str, path: str) -> Path:
        return self.out / name / path


def measure(contender: Contender, setting: Setting, prompts: PromptSet, results: Results, pieces: Pieces) -> bool:
    """Make pictures until all are there (True) or time is up; an error is noted as the contender's result."""
    result = results.read(contender.name)
    missing = [(text, seed, path) for text, seed, path in prompts if path not in result["seconds"]]
    if result["error"] or not missing:
        return True
    err.print(f"{contender.name}: {len(missing)} of {prompts.images} left")
    try:
        make = contender.open(setting)
        encode_png(make(setting.warmup_prompt, 0))
        result["rates"].append(matmul_rate(torch.float32, CPU))
        for text, seed, path in missing:
            if pieces.left < 0:
                return False
            start = time.perf_counter()
            data = encode_png(make(text, seed))
            seconds = time.perf_counter() - start
            file = results.picture(contender.name, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            result["seconds"][path] = seconds
            results.write(contender.name, result)
    except Exception as error:  # a peer that does not run here is a result, not the end of the comparison
        traceback.print_exc()
        lines = str(error).splitlines()
        result["error"] = f"{type(error).__name__}: {lines[0] if lines else ''}"
    result["rates"].append(matmul_rate(torch.float32, CPU))
    results.write(contender.name, result)
    return True


# --- report -----------------------------------------------------------------------------------------------------------


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.square(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean()
    return 10 * math.log10(255**2 / max(error, 1e-2))


def interval(values: list[float], statistic: Callable[..., np.ndarray]) -> list[float]:
    """The 95% interval of a statistic that drawing as many prompts again and again gives."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    return [float(bound) for bound in np.percentile(statistic(drawn, axis=1), (2.5, 97.5))]


def demo_scorer(prompts: PromptSet) -> Scorer:
    """What `jitexport evaluate` measures on the demo model's pictures."""
    return (SceneScorer if DemoData().scenes else DemoScorer)(SimpleNamespace(prompts=prompts))


def summarise(
    contender: Contender, result: dict[str, Any], prompts: PromptSet, results: Results, scorer: Scorer
) -> dict[str, Any]:
    """One row of the report.

    `judged` is what ways that take as long are compared by, with its interval: the objects found where the model draws
    scenes, which it may place anywhere, and the likeness to 50 steps where a prompt means one picture.
    """
    row: dict[str, Any] = {"name": contender.name, "what": contender.what, "error": result["error"]}
    if result["error"]:
        return row
    pictures = {path: Image.open(results.picture(contender.name, path)).convert("RGB") for _, _, path in prompts}
    wanted = {path: Image.open(results.picture(REFERENCE, path)).convert("RGB") for path in pictures}
    decibels = [psnr(pictures[path], wanted[path]) for path in pictures]
    scores = [scorer(Picture(pictures[path]), Picture(wanted[path]), text) for text, _, path in prompts]
    timing = Timing.of([result["seconds"][path] for path in pictures])
    objects = [one["objects"] for one in scores if "objects" in one]
    judged = (statistics.mean(objects), interval(objects, np.mean)) if objects else (
        statistics.median(decibels), interval(decibels, np.median)
    )  # fmt: skip
    return row | {
        "images": prompts.images,
        "median": timing.median,
        "p90": timing.p90,
        "psnr": statistics.median(decibels),
        "scores": {name: statistics.mean(one[name] for one in scores) for name in scorer.names},
        "judged": judged[0],
        "judged_interval": judged[1],
        "rate": statistics.median(result["rates"]),
    }


def markdown(rows: list[dict[str, Any]], known: Facts) -> str:
    """The report as a page."""
    base = next(r["median"] for r in rows if r["name"] == REFERENCE)
    done = sorted((r for r in rows if not r["error"]), key=lambda r: -r["median"])
    usual = statistics.median(r["rate"] for r in done)
    names = list(done[0]["scores"])
    titles = [MEASURES[name].title for name in names]
    lines = [
        "# The demo model made faster in different ways",
        "",
        f"{done[0]['images']} prompts, one seed each, 256 x 256, batch 1, prompt to PNG. PSNR is to the picture of 50 "
        "ordinary fp32 steps of the same seed (median); the scores after it are means over the prompts; in brackets, "
        "for what is compared below, the 95% interval; machine is the rate of matrix products beside the contender's "
        f"runs, relative to the median over all: more than {UNSTEADY:.0%} off is marked with !.",
        "",
        f"| | median s | p90 s | times faster | {judged_title(done)} | PSNR, dB | {' | '.join(titles)} | machine |",
        "|---" * (len(names) + 7) + "|",
    ]
    for r in done:
        machine = r["rate"] / usual
        mark = "!" if abs(machine - 1) > UNSTEADY else ""
        reference = r["name"] == REFERENCE
        cells = [f"{r['scores'][name]:.{max(MEASURES[name].digits, 2)}f}" for name in names]
        lines.append(
            f"| {r['what']} | {r['median']:.3f} | {r['p90']:.3f} | {base / r['median']:.2f} "
            f"| {'' if reference and not by_objects(r) else judgement(r)} "
            f"| {'' if reference else format(r['psnr'], '.1f')} | {' | '.join(cells)} | {machine:.2f}{mark} |"
        )
    lines += ["", f"## At equal latency: {judged_title(done)}", "", *at_equal_latency(done, base)]
    failed = [f"- {r['what']}: {r['error']}" for r in rows if r["error"]]
    lines += ["", "Did not run:", "", *failed] if failed else []
    lines += ["", *(f"- {k}: {v}" for k, v in known.items() if v is not None), ""]
    return "\n".join(lines)


def by_objects(row: dict[str, Any]) -> bool:
    """Whether ways are compared by the objects found, and not by likeness to 50 steps."""
    return "objects" in row["scores"]


def judged_title(rows: list[dict[str, Any]]) -> str:
    return MEASURES["objects"].title if by_objects(rows[0]) else "PSNR to 50 steps, dB"


def judgement(row: dict[str, Any]) -> str:
    digits = 2 if by_objects(row) else 1
    value, low, high = (f"{x:.{digits}f}" for x in (row["judged"], *row["judged_interval"]))
    return f"{value} ({low} to {high})"


#: Ways of one kind, by the beginnings of their names; the first that fits.
GROUPS = {
    "few steps": ("diffusers-", "compile-", "openvino-", "ours-dense-5x ", "ours-dense-10x ", "ours-dense-20x "),
    "diffusers' caches": ("first-block", "taylorseer", "magcache"),
    "cache-dit": ("cache-dit",),
    "jitexport, temporal alone": ("ours-dense-",),
    "jitexport, temporal and spatial": ("ours-jit-", "ours-ralu-"),
    "jitexport, spatial alone": ("ours-", "bundle-", "plain-jit-"),
}
WIDTH = 1.5  # of a band of latencies: the longest over the shortest


def at_equal_latency(rows: list[dict[str, Any]], base: float) -> list[str]:
    """A table of what is best among the ways of one kind that take about as long."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "-50-" not in f"{row['name']}-":  # 50 steps are what others are measured by
            kind = next(g for g, starts in GROUPS.items() if f"{row['name']} ".startswith(starts))
            band = found.setdefault(math.floor(math.log(row["median"], WIDTH)), {})
            if kind not in band or band[kind]["judged"] < row["judged"]:
                band[kind] = row
    lines = [f"| seconds | times faster | {' | '.join(GROUPS)} |", "|---" * (len(GROUPS) + 2) + "|"]
    for band, best in sorted(found.items(), reverse=True):
        low, high = WIDTH**band, WIDTH ** (band + 1)
        cells = [
            f"{judgement(row)}: {row['name']}, {row['median']:.2f} s" if (row := best.get(group)) else ""
            for group in GROUPS
        ]
        lines.append(f"| {low:.2f} to {high:.2f} | {base / high:.1f} to {base / low:.1f} | {' | '.join(cells)} |")
    return lines


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Latency against what the ways are compared by."""
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, axis = plt.subplots(figsize=(11, 7), layout="constrained")
    groups = {"ours": "#08519c", "bundle": "#08519c", "plain": "#6baed6", "compile": "#e6550d", "cache": "#31a354"}
    groups |= {"first": "#31a354", "taylorseer": "#31a354", "magcache": "#31a354", "diffusers": "#636363"}
    groups |= {"openvino": "#756bb1"}
    for r in rows:
        if r["error"] or r["name"] == REFERENCE:
            continue
        colour = groups[r["name"].split("-")[0]]
        axis.plot([r["median"], r["p90"]], [r["judged"]] * 2, color=colour, linewidth=1)
        axis.plot(r["median"], r["judged"], "o", color=colour)
        axis.annotate(r["name"], (r["median"], r["judged"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.margins(x=0.12)
    axis.grid(alpha=0.3)
    axis.set_xlabel("s from prompt to PNG, median (line: to the 90th percentile)")
    axis.set_ylabel(judged_title([r for r in rows if not r["error"]]))
    figure.draw_without_rendering()  # where labels are is known only then
    spread_labels(axis)
    figure.savefig(path, dpi=110)


def report(chosen: list[Contender], prompts: PromptSet, results: Results, folder: Path, name: str) -> None:
    """NAME.json, NAME.md and NAME.png in a folder."""
    scorer = demo_scorer(prompts)
    rows = [summarise(c, results.read(c.name), prompts, results, scorer) for c in chosen]
    known = facts("diffusers", "transformers", "cache-dit", "openvino", "onnxruntime")
    write(folder, name, {"conditions": known, "rows": rows}, markdown(rows, known))
    picture(rows, folder / f"{name}.png")
    done = sorted((r for r in rows if not r["error"]), key=lambda r: -r["median"])
    table = Table("", "median s", "p90 s", judged_title(done), "PSNR dB")
    for r in done:
        table.add_row(r["what"], f"{r['median']:.3f}", f"{r['p90']:.3f}", judgement(r), f"{r['psnr']:.1f}")
    out.print(table)
    err.print(f"wrote {folder}/{name}.json, {name}.md and {name}.png")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--prompts", type=int, default=16, help="an even number, at most 200")
    arguments.add_argument("--seconds", type=float, default=160, help="begin no image after this time")
    arguments.add_argument("--only", action="append", default=[], metavar="NAME", help="repeatable; see --list")
    arguments.add_argument("--bundle", type=Path, action="append", default=[], help="measure this one too; repeatable")
    arguments.add_argument("--out", type=Path, default=Path("out/peers"), help="pieces and pictures")
    arguments.add_argument("--report", type=Path, help="folder of the report; the pieces' by default")
    arguments.add_argument("--name", default="peers", help="what the report's files are called")
    arguments.add_argument("--list", action="store_true", help="print the contenders' names and stop")
    args = arguments.parse_args()
    if not (2 <= args.prompts <= 200 and args.prompts % 2 == 0):
        arguments.error(f"--prompts must be an even number from 2 to 200, not {args.prompts}")
    every = list(contenders(args.bundle))
    if args.list:
        for c in every:
            print(f"{c.name:28} {c.what}")
        return
    if unknown := set(args.only) - {c.name for c in every}:
        arguments.error(f"no such contender: {', '.join(sorted(unknown))}; see --list")
    chosen = [c for c in every if not args.only or c.name in args.only or c.name == REFERENCE]

    prompts = demo_prompts(args.prompts)
    defaults = json.loads((DEMO_FOLDER / "jitexport.json").read_text(encoding="utf-8"))
    args.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(DEMO_FOLDER, args.out, defaults)
    results = Results(args.out)
    pieces = Pieces(args.seconds)
    left = list(chosen)
    while left and pieces.left > 0 and measure(left[0], setting, prompts, results, pieces):
        left.pop(0)
    if left:
        pieces.stop("contenders", [contender.name for contender in left])
    report(chosen, prompts, results, args.report or args.out, args.name)


if __name__ == "__main__":
    main()
