"""The demo model made faster in different ways, side by side: same prompts, same seeds, same noise, one machine.

    python scripts/bench/peers.py                      # run again until it says that nothing is left
    python scripts/bench/peers.py --prompts 2 --only diffusers-50-fp32 --only ours-aoti-bf16-4x --out out/try

Every contender makes one image a prompt, from the same initial noise. A run works for --seconds and stops; the next
one goes on from what lies in --out, image by image, each part of a contender after a warm-up of its own (compiling
and calibrating fall into it). When nothing is left, the report is written: JSON, Markdown and a picture.

- seconds: from prompt to PNG, one image, median and 90th percentile;
- PSNR to 50 steps: to the picture of 50 ordinary fp32 steps of the same seed (median), at 256 x 256;
- PSNR to data, name, pair, background, sharpness: against the data, see jitexport/evaluate/demo.py;
- machine: rate of fp32 matrix products beside the contender's own parts, relative to the median over all contenders;
  a contender far from 1 was measured on a machine that was faster or slower than usual, and is marked.
"""

import json
import math
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import REFERENCE, Contender, Setting, contenders
from harness import CPU, Facts, Pieces, facts, parser, write
from PIL import Image

from jitexport.console import Table, err, out
from jitexport.evaluate.demo import DemoData, DemoPrompt, Judge
from jitexport.evaluate.report import spread_labels
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

    def picture(self, name: str, prompt: DemoPrompt) -> Path:
        return self.out / name / f"{prompt.text.replace(' ', '-')}.png"


def measure(
    contender: Contender, setting: Setting, prompts: list[DemoPrompt], results: Results, pieces: Pieces
) -> bool:
    """Make pictures until all are there (True) or time is up; an error is noted as the contender's result."""
    result = results.read(contender.name)
    missing = [p for p in prompts if p.text not in result["seconds"]]
    if result["error"] or not missing:
        return True
    err.print(f"{contender.name}: {len(missing)} of {len(prompts)} left")
    try:
        make = contender.open(setting)
        encode_png(make(setting.warmup_prompt, 0))
        result["rates"].append(matmul_rate(torch.float32, CPU))
        for prompt in missing:
            if pieces.left < 0:
                return False
            start = time.perf_counter()
            data = encode_png(make(prompt.text, prompt.seed))
            seconds = time.perf_counter() - start
            path = results.picture(contender.name, prompt)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            result["seconds"][prompt.text] = seconds
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


def likeness(values: list[float]) -> dict[str, Any]:
    """The median, and the 95% interval that drawing as many prompts again and again gives."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return {"psnr": statistics.median(values), "psnr_interval": [float(low), float(high)]}


def summarise(
    contender: Contender, result: dict[str, Any], prompts: list[DemoPrompt], results: Results, judge: Judge
) -> dict[str, Any]:
    """One row of the report."""
    row: dict[str, Any] = {"name": contender.name, "what": contender.what, "error": result["error"]}
    if result["error"]:
        return row
    pictures = {p: Image.open(results.picture(contender.name, p)).convert("RGB") for p in prompts}
    scores = [judge.score(p.name, p.colour, picture) for p, picture in pictures.items()]
    wanted = [Image.open(results.picture(REFERENCE, p)).convert("RGB") for p in prompts]
    timing = Timing.of([result["seconds"][p.text] for p in prompts])
    return row | {
        "images": len(prompts),
        "median": timing.median,
        "p90": timing.p90,
        **likeness([psnr(a, b) for a, b in zip(pictures.values(), wanted, strict=True)]),
        "psnr_data": statistics.median(s.psnr for s in scores),
        "name_right": sum(s.name_right for s in scores),
        "pair_right": sum(s.pair_right for s in scores),
        "background_right": sum(s.background_right for s in scores),
        "sharpness": statistics.median(s.sharpness for s in scores),
        "rate": statistics.median(result["rates"]),
    }


def markdown(rows: list[dict[str, Any]], known: Facts) -> str:
    """The report as a page."""
    base = next(r["median"] for r in rows if r["name"] == REFERENCE)
    done = sorted((r for r in rows if not r["error"]), key=lambda r: -r["median"])
    usual = statistics.median(r["rate"] for r in done)
    lines = [
        "# The demo model made faster in different ways",
        "",
        f"{done[0]['images']} prompts, one seed each, 256 x 256, batch 1, prompt to PNG. "
        "The first PSNR is to the picture of 50 ordinary fp32 steps of the same seed, the second to the data's picture "
        "of what was asked for; in brackets the 95% interval of the median; names, pairs and backgrounds are counts of "
        "prompts that were answered (see "
        "`jitexport/evaluate/demo.py`); machine is the rate of matrix products beside the contender's runs, relative "
        f"to the median over all: more than {UNSTEADY:.0%} off is marked with !.",
        "",
        "| | median s | p90 s | times faster | dB to 50 steps | dB to data | name | pair | background | sharpness "
        "| machine |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in done:
        machine = r["rate"] / usual
        mark = "!" if abs(machine - 1) > UNSTEADY else ""
        lines.append(
            f"| {r['what']} | {r['median']:.3f} | {r['p90']:.3f} | {base / r['median']:.2f} "
            f"| {'' if r['name'] == REFERENCE else decibels(r)} | {r['psnr_data']:.1f} "
            f"| {r['name_right']} | {r['pair_right']} | {r['background_right']} | {r['sharpness']:.2f} "
            f"| {machine:.2f}{mark} |"
        )
    lines += ["", "## At equal latency", "", *at_equal_latency(done, base)]
    failed = [f"- {r['what']}: {r['error']}" for r in rows if r["error"]]
    lines += ["", "Did not run:", "", *failed] if failed else []
    lines += ["", *(f"- {k}: {v}" for k, v in known.items() if v is not None), ""]
    return "\n".join(lines)


def decibels(row: dict[str, Any]) -> str:
    low, high = row["psnr_interval"]
    return f"{row['psnr']:.1f} ({low:.1f} to {high:.1f})"


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
    """A table of what is closest to 50 steps among the ways of one kind that take about as long."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "-50-" not in f"{row['name']}-":  # 50 steps are what others are measured by
            kind = next(g for g, starts in GROUPS.items() if f"{row['name']} ".startswith(starts))
            band = found.setdefault(math.floor(math.log(row["median"], WIDTH)), {})
            if kind not in band or band[kind]["psnr"] < row["psnr"]:
                band[kind] = row
    lines = [f"| seconds | times faster | {' | '.join(GROUPS)} |", "|---" * (len(GROUPS) + 2) + "|"]
    for band, best in sorted(found.items(), reverse=True):
        low, high = WIDTH**band, WIDTH ** (band + 1)
        cells = [
            f"{decibels(row)}: {row['name']}, {row['median']:.2f} s" if (row := best.get(group)) else ""
            for group in GROUPS
        ]
        lines.append(f"| {low:.2f} to {high:.2f} | {base / high:.1f} to {base / low:.1f} | {' | '.join(cells)} |")
    return lines


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Latency against likeness to the 50-step picture."""
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
        axis.plot([r["median"], r["p90"]], [r["psnr"]] * 2, color=colour, linewidth=1)
        axis.plot(r["median"], r["psnr"], "o", color=colour)
        axis.annotate(r["name"], (r["median"], r["psnr"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.margins(x=0.12)
    axis.grid(alpha=0.3)
    axis.set_xlabel("s from prompt to PNG, median (line: to the 90th percentile)")
    axis.set_ylabel("PSNR to the picture of 50 ordinary fp32 steps, dB")
    figure.draw_without_rendering()  # where labels are is known only then
    spread_labels(axis)
    figure.savefig(path, dpi=110)


def report(chosen: list[Contender], prompts: list[DemoPrompt], results: Results, folder: Path, name: str) -> None:
    """NAME.json, NAME.md and NAME.png in a folder."""
    judge = Judge.of(DemoData())
    rows = [summarise(c, results.read(c.name), prompts, results, judge) for c in chosen]
    known = facts("diffusers", "transformers", "cache-dit", "openvino", "onnxruntime")
    write(folder, name, {"conditions": known, "rows": rows}, markdown(rows, known))
    picture(rows, folder / f"{name}.png")
    table = Table("", "median s", "p90 s", "PSNR dB", "pair")
    for r in sorted((r for r in rows if not r["error"]), key=lambda r: -r["median"]):
        table.add_row(r["what"], f"{r['median']:.3f}", f"{r['p90']:.3f}", f"{r['psnr']:.1f}", str(r["pair_right"]))
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

    prompts = DemoData().prompts(args.prompts)
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
