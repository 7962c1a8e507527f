"""Compare JiT's settings on the demo model: exact and relaxed micro-flow, both Beta values, and the released code's
lower limit of the blur with its other values.

    python scripts/compare_presets.py engines/demo-4x engines/demo-7x --prompts 40 --json docs/results/presets.json

Engines depend on token counts only, so one bundle serves all settings. Scores are those of demo_quality.py, over the
same prompts and seeds; the reference of the PSNR is the prompted picture.
"""

import argparse
import copy
import datetime
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from demo_quality import Source, generators, make_pictures, score, summarise
from rich.console import Console
from rich.table import Table

import jitexport
from jitexport.evaluate.demo import DemoData, Judge
from jitexport.methods.jit import JiT
from jitexport.profile import conditions
from jitexport.schedule import BETA_PAPER, BETA_RELEASED, beta_sigmas

BETAS = {"0.42": BETA_PAPER, "0.425": BETA_RELEASED}
BLURS = {"none": None, "1": (1.0, 10.0)}
#: Micro-flow, Beta's second parameter, least sigma of the blur. The first is the preset `paper`, the last `released`.
VARIANTS = (
    ("exact", "0.42", "none"),
    ("exact", "0.425", "none"),
    ("relaxed", "0.42", "none"),
    ("relaxed", "0.425", "none"),
    ("relaxed", "0.425", "1"),
)


def variant(pipe: jitexport.Pipeline, microflow: str, beta: str, blur: str) -> jitexport.Pipeline:
    """The pipeline with other settings of the method."""
    a, b = BETAS[beta]
    options = JiT.options("paper") | {
        "timesteps": {"kind": "beta", "alpha": a, "beta": b},
        "microflow": microflow,
        "blur_sigma_range": BLURS[blur],
    }
    changed = copy.copy(pipe)
    changed.method = JiT(pipe.geometry.grid, options)
    changed.schedule = replace(pipe.schedule, sigmas=beta_sigmas(pipe.schedule.nfe, a, b))
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    data = DemoData()
    prompts, judge = data.prompts(args.prompts), Judge.of(data)
    table = Table("bundle", "micro-flow", "beta", "least blur", "name", "pair", "background", "sharpness", "PSNR dB")
    rows = []
    for path in args.bundles:
        pipe = jitexport.load(path)
        for microflow, beta, blur in VARIANTS:
            changed = variant(pipe, microflow, beta, blur)

            def generate(texts: list[str], seeds: list[int], pipe: jitexport.Pipeline = changed) -> list:
                return pipe(texts, generator=generators(seeds)).images

            label = f"{path.name}, {microflow}, {beta}, {blur}"
            began = time.perf_counter()
            pictures = make_pictures(Source(label, generate, pipe.batch_size), prompts)
            scores = [score(judge, prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)]
            row = {"bundle": path.name, "microflow": microflow, "beta": beta, "least_blur": blur} | summarise(scores)
            row["seconds"] = round(time.perf_counter() - began, 1)
            rows.append(row)
            table.add_row(
                path.name,
                microflow,
                beta,
                blur,
                *(str(row[m]["count"]) for m in ("name_right", "pair_right", "background_right")),
                f"{row['sharpness']:.2f}",
                f"{row['psnr']:.2f}",
            )
    Console(width=140).print(table)
    if args.json:
        report = {
            "command": shlex.join(["python", "scripts/compare_presets.py", *sys.argv[1:]]),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "conditions": conditions(),
            "prompts": args.prompts,
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
