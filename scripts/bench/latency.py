"""Latency of the demo model against speed-up, batch and backend: a CSV and a plot with error bars.

    python scripts/bench/latency.py                                  # run again until it says that nothing is left
    python scripts/bench/latency.py --backend aoti --quant int8      # the same with 8-bit layers, into the same CSV

Measures every speed-up at batch 1 and every batch at 4x, for each backend that runs here (--full: all combinations).
A run begins nothing after --seconds; what is measured is in the CSV, the bundles stay in --out, and the next run goes
on from there. With --again rows of this machine that were measured on another commit are measured anew.
"""

import csv
import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from harness import CPU, PROMPT, Pieces, parser

import jitexport
from jitexport import profile as profiling
from jitexport import registry
from jitexport.bundle.reading import read_manifest
from jitexport.choice import choose
from jitexport.console import err
from jitexport.quant import KINDS

SPEEDUPS = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0)
BATCHES = (1, 2, 4)


@dataclass(frozen=True)
class Point:
    """One bundle."""

    backend: str
    dtype: str
    quantization: str
    speedup: float
    batch: int

    @property
    def series(self) -> str:
        return " ".join(filter(None, (self.backend, self.dtype, self.quantization)))

    @property
    def name(self) -> str:
        return f"{self.series.replace(' ', '-')}-{self.speedup:g}x-batch{self.batch}"


@dataclass(frozen=True)
class Row:
    """A line of the CSV. Seconds are of a whole batch, from prompts to PNGs; `denoise` is the loop alone.

    `ceiling_share` is that of the full stage's engine. `matmul` is in GFLOP/s, in the dtype of the row.
    """

    backend: str
    dtype: str
    quantization: str
    speedup: float
    batch: int
    repeats: int
    p10: float
    median: float
    p90: float
    denoise: float
    overhead: float
    predicted: float
    realised: float
    ceiling_share: float
    matmul: float
    date: str
    cpu: str
    torch: str
    commit: str

    @property
    def point(self) -> Point:
        return Point(self.backend, self.dtype, self.quantization, self.speedup, self.batch)


def points(backends: list[str], full: bool, quantization: str = "") -> Iterator[Point]:
    for name in backends or [n for n in registry.BACKENDS if n != "auto"]:  # whose engines are the others'
        backend = registry.backend(name)
        if reason := backend.cannot_build(CPU, None):
            err.print(f"{name} left out: {reason}")
            continue
        if quantization and quantization not in backend.quantizations(CPU):
            err.print(f"{name} left out: no {quantization} layers")
            continue
        dtype = choose("cpu", name).dtype
        for speedup, batch in itertools.product(SPEEDUPS, BATCHES):
            if full or batch == 1 or speedup == 4:
                yield Point(name, dtype, quantization, speedup, batch)


def measure(point: Point, path: Path, repeats: int) -> Row:
    manifest = read_manifest(path)
    schedule = manifest.schedule
    found = profiling.profile_pipeline(
        jitexport.load(path),
        point.name,
        PROMPT,
        flops=profiling.engine_flops(manifest),
        speedup=(schedule.reference_steps, schedule.predicted_speedup),
        repeats=repeats,
    )
    facts = profiling.conditions()
    full = max((e for e in found.engines if e.tokens), key=lambda e: e.tokens)
    return Row(
        **asdict(point),
        repeats=repeats,
        p10=round(found.total.p10, 5),
        median=round(found.total.median, 5),
        p90=round(found.total.p90, 5),
        denoise=round(found.phases["denoise"].median, 5),
        overhead=round(found.overhead, 5),
        predicted=round(found.speedup.predicted, 3),
        realised=round(found.speedup.realised, 3),
        ceiling_share=round(full.ceiling_share, 3),
        matmul=round(found.ceiling / 1e9, 1),
        date=facts["date"],
        cpu=cpu(),
        torch=facts["torch"],
        commit=code(),
    )


def cpu() -> str:
    """This machine's processor, by which rows of one CSV are told apart."""
    facts = profiling.conditions()
    return f"{facts['cpu']} ({facts['cpu_class']}), {facts['threads']} threads"


def code() -> str:
    """The commit that is measured, as rows have it."""
    return profiling.conditions()["commit"] or "not recorded"


def read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    kinds = {f.name: f.type for f in fields(Row)}
    with path.open(newline="") as file:
        return [Row(**{name: kinds[name](value) for name, value in line.items()}) for line in csv.DictReader(file)]


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def plot(rows: list[Row], path: Path) -> None:
    """Left: against the speed-up at batch 1, with what FLOPs promise; right: against the batch at 4x, per image."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for name in dict.fromkeys(r.point.series for r in rows):
        mine = [r for r in rows if r.point.series == name]
        one = sorted((r for r in mine if r.batch == 1), key=lambda r: r.speedup)
        line = curve(left, one, [r.speedup for r in one], [1] * len(one), name)
        if one and one[0].speedup == 1:
            promised = [one[0].median - one[0].denoise + one[0].denoise / r.predicted for r in one]
            left.plot([r.speedup for r in one], promised, ":", color=line.get_color(), linewidth=1)
        many = sorted((r for r in mine if r.speedup == 4), key=lambda r: r.batch)
        curve(right, many, [r.batch for r in many], [r.batch for r in many], name)
    left.set(xlabel="speed-up asked for (dotted: what FLOPs promise)", ylabel="s per image", title="batch 1")
    right.set(xlabel="batch", ylabel="s per image", title="4x")
    right.set_xticks(BATCHES)
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.legend()
        axis.grid(alpha=0.3)
    figure.suptitle(f"Prompt to PNG, 256 x 256: median, bars from the 10th to the 90th percentile; {rows[0].cpu}")
    figure.savefig(path, dpi=110)


def curve(axis, rows: list[Row], x: list, images: list[int], label: str):
    median = [r.median / n for r, n in zip(rows, images, strict=True)]
    below = [(r.median - r.p10) / n for r, n in zip(rows, images, strict=True)]
    above = [(r.p90 - r.median) / n for r, n in zip(rows, images, strict=True)]
    return axis.errorbar(x, median, yerr=[below, above], marker="o", markersize=4, capsize=3, label=label)[0]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--backend", action="append", default=[], choices=list(registry.BACKENDS), help="repeatable")
    arguments.add_argument("--quant", default="", choices=list(KINDS), help="run the blocks' linear layers in 8 bits")
    arguments.add_argument("--full", action="store_true", help="all batches at all speed-ups")
    arguments.add_argument("--again", action="store_true", help="replace this machine's rows of other commits")
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--seconds", type=float, default=90, help="begin no build or measurement after this time")
    arguments.add_argument("--out", type=Path, default=Path("out/latency"), help="bundles, and the CSV by default")
    arguments.add_argument("--report", type=Path, help="folder of latency.csv and latency.png")
    args = arguments.parse_args()
    folder = args.report or args.out
    rows = read(folder / "latency.csv")
    mine = [row for row in rows if row.cpu == cpu()]  # those of other machines stay, and stand for themselves
    done = {row.point for row in mine if row.commit == code() or not args.again}
    pieces = Pieces(args.seconds)
    left = [p for p in points(args.backend, args.full, args.quant) if p not in done]
    for point in list(left):
        path = args.out / "bundles" / point.name
        if not path.exists() and pieces.left > 0:
            err.print(f"building {point.name}")
            jitexport.build(
                "demo", output=path, speedup=point.speedup, backend=point.backend, dtype=point.dtype,
                batch=point.batch, quantization=point.quantization or None,
            )
        if not path.exists() or pieces.left < 0:
            break
        err.print(f"measuring {point.name}")
        rows = [row for row in rows if row.cpu != cpu() or row.point != point]
        rows.append(measure(point, path, args.repeats))
        write(folder / "latency.csv", rows)
        left.remove(point)
    if left:
        pieces.stop("bundles", [point.name for point in left])
    if not rows:
        sys.exit("nothing to measure: no backend is left")
    plot([row for row in rows if row.cpu == cpu()] or rows, folder / "latency.png")
    err.print(f"wrote {folder}/latency.csv and latency.png")


if __name__ == "__main__":
    main()
