"""Compare JiT's settings on the demo model: exact and relaxed micro-flow, both Beta values, and the presets.

    python scripts/demo_model/presets.py engines/demo-4x engines/demo-7x --prompts 40 --json docs/results/presets.json

Engines depend on token counts only, so one bundle serves all settings. Scores are those of quality.py, over the
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
from quality import score, summarise
from sources import Source, generators, make_pictures

import jitexport
from jitexport.console import PlainConsole, Table
from jitexport.evaluate.demo import DemoData, Judge
from jitexport.methods.jit import JiT
from jitexport.profile import conditions
from jitexport.schedule import beta_sigmas

RELEASED_TIMES = {"timesteps": JiT.options("released")["timesteps"]}
RELAXED = {"microflow": "relaxed"}
#: What differs from the preset `paper`.
VARIANTS = {
    "paper: exact, Beta(1.4, 0.42)": {},
    "exact, Beta(1.4, 0.425)": RELEASED_TIMES,
    "relaxed, Beta(1.4, 0.42)": RELAXED,
    "relaxed, Beta(1.4, 0.425)": RELAXED | RELEASED_TIMES,
    "released: and a blur of at least 1 token": JiT.options("released"),
    "default: exact, initial noise, ITA on clean, that blur": JiT.options("default"),
}


def variant(pipe: jitexport.Pipeline, changes: dict[str, object]) -> jitexport.Pipeline:
    """The pipeline with other settings of the method."""
    options = JiT.options("paper") | changes
    changed = copy.copy(pipe)
    changed.method = JiT(pipe.geometry.grid, options)
    times = options["timesteps"]
    changed.schedule = replace(pipe.schedule, sigmas=beta_sigmas(pipe.schedule.nfe, times["alpha"], times["beta"]))
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    data = DemoData()
    prompts, judge = data.prompts(args.prompts), Judge.of(data)
    table = Table("bundle", "settings", "name", "pair", "background", "sharpness", "PSNR dB")
    rows = []
    for path in args.bundles:
        pipe = jitexport.load(path)
        for name, changes in VARIANTS.items():
            changed = variant(pipe, changes)

            def generate(texts: list[str], seeds: list[int], pipe: jitexport.Pipeline = changed) -> list:
                return pipe(texts, generator=generators(seeds)).images

            label = f"{path.name}, {name}"
            began = time.perf_counter()
            pictures = make_pictures(Source(label, generate, pipe.batch_size), prompts)
            scores = [score(judge, prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)]
            row = {"bundle": path.name, "settings": name} | summarise(scores)
            row["seconds"] = round(time.perf_counter() - began, 1)
            rows.append(row)
            table.add_row(
                path.name,
                name,
                *(str(row[m]["count"]) for m in ("name_right", "pair_right", "background_right")),
                f"{row['sharpness']:.2f}",
                f"{row['psnr']:.2f}",
            )
    PlainConsole(width=140).print(table)
    if args.json:
        report = {
            "command": shlex.join(["python", "scripts/demo_model/presets.py", *sys.argv[1:]]),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "conditions": conditions(),
            "prompts": args.prompts,
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
