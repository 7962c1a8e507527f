"""What a bundle costs at rest and at start: disk, memory of one stage against all, and time to the first image.

    python scripts/bench/footprint.py engines/demo-4x --repeats 5

Every figure comes from fresh processes; medians over repeats. Memory is the resident set after each opened engine has
run once.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from harness import facts, parser, said

from jitexport.bundle.reading import read_manifest
from jitexport.console import Table, out

MEMORY = """
import sys, torch
from jitexport.bundle import EngineBundle
from jitexport.runtime import EngineOpener
from jitexport.specs import DTYPES
bundle = EngineBundle.open(sys.argv[1], "size")
opener = EngineOpener(bundle)
with torch.inference_mode():
    for entry in bundle.manifest.engines:
        if entry.name in sys.argv[2:]:
            spec = entry.spec()
            engine = opener.open(entry)
            engine(*(torch.zeros(s.shape, dtype=DTYPES[s.dtype]) for s in spec.inputs))
            globals()[entry.name] = engine  # stays open
pages = int(open("/proc/self/statm").read().split()[1])
print(pages * 4096)
"""

FIRST_IMAGE = """
import time
began = time.perf_counter()
import io, sys, torch, jitexport
pipe = jitexport.load(sys.argv[1], verify=sys.argv[2])
loaded = time.perf_counter()
image = pipe("red apple on a blue background", generator=torch.Generator().manual_seed(0)).images[0]
image.save(io.BytesIO(), format="PNG")
print(loaded - began, time.perf_counter() - began)
"""


def fresh(code: str, *arguments: str) -> list[float]:
    """Run code in a new interpreter and return the numbers that it prints."""
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(run.stderr)
    return [float(x) for x in run.stdout.split()]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--json", action="store_true")
    args = arguments.parse_args()

    manifest = read_manifest(args.bundle)
    stages = [f"stage{s.index}" for s in manifest.schedule.stages]
    path = str(args.bundle)

    def memory(*names: str) -> float:
        return statistics.median(fresh(MEMORY, path, *names)[0] for _ in range(args.repeats))

    sizes = {"weights": 0, "engines": 0, "rest": 0}
    for file in manifest.files:
        top = file.path.split("/")[0]
        sizes[top if top in sizes else "rest"] += file.size
    none, one, every = memory(), memory("stage0"), memory(*stages)
    starts = {
        verify: [fresh(FIRST_IMAGE, path, verify) for _ in range(args.repeats)] for verify in ("full", "size")
    }
    report = {
        "bytes": sizes,
        "rss_no_engine": none,
        "rss_one_stage": one,
        "rss_all_stages": every,
        "rss_ratio": every / one,
        "seconds_to_load": {v: statistics.median(s[0] for s in runs) for v, runs in starts.items()},
        "seconds_to_first_image": {v: statistics.median(s[1] for s in runs) for v, runs in starts.items()},
    }
    if args.json:
        print(json.dumps(report | {"conditions": facts()}))
        return
    table = Table(f"{args.bundle}, median of {args.repeats} fresh processes", "")
    for name, size in sizes.items():
        table.add_row(f"{name} on disk", f"{size / 1e6:.1f} MB")
    table.add_row("memory, weights loaded, no engine", f"{none / 1e6:.0f} MB")
    table.add_row("memory, stage0 open and run", f"{one / 1e6:.0f} MB")
    table.add_row(f"memory, {len(stages)} stages open and run", f"{every / 1e6:.0f} MB ({every / one:.3f} times)")
    for verify in starts:
        table.add_row(f'import and load, verify="{verify}"', f"{report['seconds_to_load'][verify]:.2f} s")
        table.add_row(f'... and first image, verify="{verify}"', f"{report['seconds_to_first_image'][verify]:.2f} s")
    out.print(table)
    out.print(said(facts()), soft_wrap=True)


if __name__ == "__main__":
    main()
