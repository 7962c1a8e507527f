"""Break bundles and builds on purpose and count what gets through. Nothing may.

    python scripts/faults/run.py                           # the demo model with the eager backend, full counts
    python scripts/faults/run.py --scale 0.02 --only flips,kills
    python scripts/faults/run.py --backend aoti --bundle engines/demo-4x --json

Every run is seeded. The exit code is 1 if anything got through. What cannot be tried here is printed with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from builds import bad_disks, competing_builds, kills
from damage import bit_flips, manifest_mutations, replacements, truncations
from outcomes import Outcome
from running import concurrent_images, load_cycles

from jitexport.build import build

KINDS = ("flips", "truncations", "replacements", "manifests", "kills", "disks", "competing", "threads", "cycles")


def run_all(
    model: str, backend: str, bundle: Path | None, work: Path, kinds: tuple[str, ...], scale: float, seed: int
) -> Iterator[Outcome]:
    """All faults, `scale` times the full counts of each (at least one)."""

    def n(full: int) -> int:
        return max(1, round(full * scale))

    def rng(kind: str) -> random.Random:
        return random.Random(f"{seed} {kind}")

    if bundle is None:
        bundle = build(model, output=work / "whole", backend=backend).path
    copied = Path(shutil.copytree(bundle, work / "damaged"))
    if "flips" in kinds:
        yield bit_flips(copied, n(1000), rng("flips"))
    if "truncations" in kinds:
        yield truncations(copied, n(100), rng("truncations"))
    if "replacements" in kinds:
        yield from replacements(copied, n(100), rng("replacements"))
    if "manifests" in kinds:
        yield manifest_mutations(copied, n(10_000), rng("manifests"))
    if "kills" in kinds:
        yield kills(model, backend, work, n(50), rng("kills"))
    if "disks" in kinds:
        yield from bad_disks(model, backend, work, n(10))
    if "competing" in kinds:
        yield competing_builds(model, backend, work, max(2, n(10)))
    if "threads" in kinds:
        yield concurrent_images(bundle, 8, n(50), rng("threads"))
    if "cycles" in kinds:
        yield load_cycles(bundle, max(30, n(300)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a registered model or a diffusers folder")
    parser.add_argument("--backend", default="eager", help="of the builds that are interrupted")
    parser.add_argument("--bundle", type=Path, help="bundle to damage a copy of; built from --model by default")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full counts")
    parser.add_argument("--only", default=",".join(KINDS), help=f"comma-separated: {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    kinds = tuple(arguments.only.split(","))
    if wrong := set(kinds) - set(KINDS):
        parser.error(f"unknown: {', '.join(sorted(wrong))}")

    outcomes, started = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="jitexport-faults-") as work:
        for outcome in run_all(
            arguments.model, arguments.backend, arguments.bundle, Path(work), kinds, arguments.scale, arguments.seed
        ):
            outcomes.append(outcome)
            seconds = time.monotonic() - started
            print(
                f"{seconds:7.0f} s  {outcome.name:28} {outcome.held} of {outcome.cases} held  {outcome.note}",
                file=sys.stderr, flush=True,
            )
            for failure in outcome.failures[:5]:
                print(f"             {failure}", file=sys.stderr)
    if arguments.json:
        print(json.dumps([asdict(o) for o in outcomes], indent=1))
    else:
        print("| fault | cases | held | note |\n|---|---|---|---|")
        for o in outcomes:
            print(f"| {o.name} | {o.cases} | {o.held} | {o.note} |")
    return int(any(o.failures for o in outcomes))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
