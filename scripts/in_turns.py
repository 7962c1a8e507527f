"""Bundles of one model beside diffusers and the loop that is not compiled: one image of each in turn, round by round.

    python scripts/in_turns.py engines/demo-4x engines/demo-4x-int8 engines/demo-7x engines/demo-7x-int8

On a machine whose speed changes from minute to minute, what is measured minutes apart cannot be compared. Here every
round has an image of each way; the ratio to diffusers is taken within a round, its median and range over rounds.
Seconds are from prompt to PNG. The first round warms up and is left out.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import jitexport
from jitexport.bundle.manifest import Manifest
from jitexport.bundle.reading import read_manifest
from jitexport.console import PlainConsole, Table, track
from jitexport.png import encode_png
from jitexport.profile import conditions
from jitexport.profile.measure import matmul_rate
from jitexport.profile.peers import diffusers_call, diffusers_pipeline, eager_bundle
from jitexport.quant import unquantized
from jitexport.runtime import Pipeline
from jitexport.specs import DTYPES

PROMPT = "red apple on a blue background"

#: A seed -> images.
Way = Callable[[int], Sequence[Image.Image]]


def pipeline_way(pipe: Pipeline) -> Way:
    pipe = copy.copy(pipe)
    pipe.set_progress_bar_config(disable=True)
    return lambda seed: pipe(PROMPT, generator=torch.Generator().manual_seed(seed)).images


def plain(manifest: Manifest) -> dict[str, Any]:
    """A model's settings without what is an engine's own."""
    return unquantized(manifest.model.settings) | {"features": None}


def ways(bundles: Sequence[Path]) -> dict[str, Way]:
    """diffusers first, then each schedule of the bundles in eager fp32, then the bundles."""
    manifests = {path: read_manifest(path) for path in bundles}
    first = next(iter(manifests.values()))
    steps = first.schedule.reference_steps
    pipe = diffusers_pipeline(first, "fp32")
    found: dict[str, Way] = {
        f"diffusers, {steps} steps, eager fp32": lambda seed: diffusers_call(pipe, first, [PROMPT], [seed], steps)
    }
    for path, manifest in manifests.items():
        if manifest.model != first.model and plain(manifest) != plain(first):
            raise SystemExit(f"{path} is of another model or size than {bundles[0]}")
        if manifest.batch != 1:
            raise SystemExit(f"{path} is for batches of {manifest.batch}: ratios are of single images")
        speedup = manifest.schedule.speedup or manifest.schedule.predicted_speedup
        method = manifest.method.name if manifest.cache is None else f"{manifest.method.name}, {manifest.cache.name}"
        label = f"{method} {speedup:.3g}x, eager fp32"
        if label not in found:
            found[label] = pipeline_way(eager_bundle(manifest, "fp32"))
    return found | {
        f"{path.name}: {manifest.backend} {manifest.precision}": pipeline_way(jitexport.load(path))
        for path, manifest in manifests.items()
    }


def seconds_of(way: Way, seed: int) -> float:
    start = time.perf_counter()
    for image in way(seed):
        encode_png(image)
    return time.perf_counter() - start


def summary(rounds: Sequence[Sequence[float]], labels: Sequence[str]) -> list[dict[str, object]]:
    """Median seconds of each way, and median and range over rounds of how many times faster than the first it is."""
    rows = []
    for i, label in enumerate(labels):
        mine, ratios = [r[i] for r in rounds], [r[0] / r[i] for r in rounds]
        rows.append({
            "way": label, "seconds": mine, "median": statistics.median(mine), "faster": statistics.median(ratios),
            "least": min(ratios), "most": max(ratios),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", help="of one model, for one image at a time")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = ways(args.bundles)
    dtype = read_manifest(args.bundles[0]).dtype
    before = matmul_rate(DTYPES[dtype], torch.device("cpu"))
    rounds = [
        [seconds_of(way, i) for way in found.values()] for i in track(range(args.rounds + 1), "rounds")
    ][1:]
    after = matmul_rate(DTYPES[dtype], torch.device("cpu"))
    facts = conditions() | {f"{dtype} products before and after, GFLOP/s": f"{before / 1e9:.0f}, {after / 1e9:.0f}"}
    rows = summary(rounds, list(found))
    if args.json:
        print(json.dumps({"conditions": facts, "rows": rows}, indent=1))
        return
    table = Table("prompt to PNG", "median s", "times faster", "least to most", title=f"{args.rounds} rounds")
    for r in rows:
        table.add_row(r["way"], f"{r['median']:.3f}", f"{r['faster']:.2f}", f"{r['least']:.2f} to {r['most']:.2f}")
    console = PlainConsole(width=100)
    console.print(table)
    console.print(", ".join(f"{k} {v}" for k, v in facts.items() if v is not None))


if __name__ == "__main__":
    main()
