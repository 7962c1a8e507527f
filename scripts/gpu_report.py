"""What a GPU does with FLUX.1-dev: ceilings, the ordinary pipeline, and this package's engines, in one command.

    python scripts/gpu_report.py            # at most 9 minutes; run again for the parts that it had no time for
    python scripts/gpu_report.py --config shallow --only ours-4x-graph --out out/build     # engines alone, in a minute

The transformer has FLUX.1-dev's configuration and random bf16 weights made on the device (11.9 billion parameters, 24
GB), at 1024 x 1024 with 512 text tokens: no checkpoint, no network. Random weights take as long as trained ones.

Our engines are AOTInductor's, of regions: one library for each kind of block and number of tokens, whatever the depth.
They are kept in --engines and are not compiled again, so that a shallow model of the same width builds them for the
deep one. Each is compared with the eager module.

Needs torch 2.11 or newer, numpy, scipy, pillow, rich, safetensors, tokenizers, pydantic and transformers, and
diffusers, whose wheel is pure Python (with importlib_metadata). Not torchao.

Every part has an estimate and is left out, with the reason, when less than that is left. Results are kept in --out
after each part, and a part that has one is not run again.
"""

import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench.gpu import ATTENTION, MODELS, Bench, attention_by, has_fp8
from bench.harness import MORE_TO_DO, Pieces, facts, parser, write

from jitexport.console import err

SPEEDUPS = {"dense": 1.0, "4x": 4.0, "7x": 7.0}
OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class Part:
    """Something to measure. `seconds` is what it takes on an H100 with engines that are compiled, generously."""

    name: str
    what: str
    seconds: float
    run: Callable[[Bench], dict[str, Any]]


def parts(device: torch.device) -> Iterator[Part]:
    """All parts, the most telling ones first."""
    yield Part("ceilings", "matrix products and copies", 15, Bench.ceilings)
    for number, graphs in enumerate((True, False) if device.type == "cuda" else (False,)):
        for name in ("4x", "7x", "dense"):
            # The first one makes the weights too; those without a graph have their engines by then.
            seconds = 25 if number else 90 if name == "4x" else 45
            with_graph = ", CUDA graph" if graphs else ""
            run = partial(Bench.ours, speedup=SPEEDUPS[name], graphs=graphs)
            yield Part(f"ours-{name}{'-graph' if graphs else ''}", f"jitexport {name}{with_graph}", seconds, run)
    yield Part("diffusers-eager", "diffusers, 50 steps, eager", 35, partial(Bench.diffusers, compiled=False))
    yield Part("diffusers-compiled", "diffusers, 50 steps, compiled", 70, partial(Bench.diffusers, compiled=True))
    if has_fp8(device):
        for name, speedup in reversed(SPEEDUPS.items()):  # last: the weights are fp8 from here on
            run = partial(Bench.ours, speedup=speedup, graphs=True, fp8=True)
            yield Part(f"ours-{name}-fp8-graph", f"jitexport {name}, fp8, CUDA graph", 90, run)


def run_parts(bench: Bench, chosen: list[Part], report: dict[str, Any], folder: Path, pieces: Pieces) -> None:
    """Run what is missing and there is time for, writing the report after each."""
    report["skipped"] = {}
    for part in chosen:
        if part.name in report["parts"]:
            continue
        if pieces.left < part.seconds:
            report["skipped"][part.name] = f"needs about {part.seconds:.0f} s, {max(pieces.left, 0):.0f} s were left"
            err.print(f"{part.name}: left out, {report['skipped'][part.name]}")
        else:
            err.print(f"{part.name}: {part.what}")
            start = time.monotonic()
            try:
                found = part.run(bench)
            except Exception as error:  # one part that does not run here must not cost the others
                traceback.print_exc()
                lines = str(error).splitlines()
                found = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
            took = time.monotonic() - start
            report["parts"][part.name] = {"what": part.what, **found, "took": round(took, 1)}
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
        write(folder, "gpu", report, markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    known, found = report["conditions"], report["parts"]
    device = known["gpu"] or known["cpu"]
    lines = [f"# {report['model']} on {device}", "", f"{report['size']}. {report['rule']}", ""]
    ceilings = found.get("ceilings", {})
    if "bf16_tflops" in ceilings:
        lines += ["| ceiling | |", "|---|---|", f"| bf16 matrix product | {ceilings['bf16_tflops']:.4g} TFLOP/s |"]
        if "fp8_tflops" in ceilings:
            lines += [f"| fp8 matrix product, a scale per row | {ceilings['fp8_tflops']:.4g} TFLOP/s |"]
        for kind in ATTENTION:
            if rate := ceilings.get(f"attention_{kind}_tflops"):
                lines += [f"| attention, PyTorch's {kind} kernel | {rate:.4g} TFLOP/s |"]
        lines += [f"| copy, read and written | {ceilings['copy_tbs']:.4g} TB/s |", ""]
    header = ("denoising", "median s", "p90 s", "times faster", "TFLOP/s", "of ceiling", "around engines", "peak GB")
    lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    base = next((found[n]["median"] for n in ("diffusers-eager", "ours-dense") if "median" in found.get(n, {})), None)
    for name, part in found.items():
        if "median" not in part:
            continue
        faster = f"{base / part['median']:.2f}" if base else ""
        rate = share = around = ""
        if "tflops" in part:
            rate, around = f"{part['tflops']:.4g}", f"{part['around_engines']:.1%}"
            ceiling = ceilings.get("fp8_tflops" if "fp8" in name else "bf16_tflops")
            share = f"{part['tflops'] / ceiling:.0%}" if ceiling else ""
        peak = f"{part['peak_gb']:.1f}" if "peak_gb" in part else ""
        what = part["what"] + (f" ({part['graphs']})" if part.get("graphs") not in (None, "loop") else "")
        cells = (what, f"{part['median']:.4g}", f"{part['p90']:.4g}", faster, rate, share, around, peak)
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"- {p['what']}: {p['error']}" for p in found.values() if "error" in p]
    skipped = [f"- {name}: {why}" for name, why in report["skipped"].items()]
    lines += ["", "Did not run:", "", *failed, *skipped] if failed or skipped else []
    lines += ["", *(f"- {k}: {v}" for k, v in known.items() if v is not None), ""]
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--config", choices=("flux", "shallow", "tiny"), default="flux")
    arguments.add_argument("--engine", choices=("aoti", "blocks", "eager"), default="aoti", help="blocks: compiled")
    arguments.add_argument("--attention", choices=tuple(ATTENTION), default="default", help="PyTorch's kernel for it")
    arguments.add_argument("--engines", type=Path, default=Path("out/gpu-engines"), help="folder of compiled engines")
    arguments.add_argument("--seconds", type=float, default=540, help="of all parts together")
    arguments.add_argument("--repeats", type=int, default=5, help="of each loop, after one that is not counted")
    arguments.add_argument("--only", action="append", default=[], metavar="PART", help="repeatable")
    arguments.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of gpu.json and gpu.md")
    args = arguments.parse_args()
    pieces = Pieces(args.seconds)
    if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        arguments.error(f"torch {torch.__version__} is too old: {'.'.join(map(str, OLDEST_TORCH))} or newer is needed")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        arguments.error("no CUDA device is visible to torch; --device cpu --config tiny shows that the script runs")
    every = list(parts(device))
    if unknown := set(args.only) - {p.name for p in every}:
        arguments.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in every)}")

    bench = Bench(args.config, device, args.engine, args.repeats, args.engines)
    settings = bench.source.settings
    known = facts("diffusers", "transformers") | {
        "system": platform.platform(), "engines": args.engine, "attention": args.attention, "cuda": torch.version.cuda,
    }
    size = f"{settings['height']} x {settings['width']}, {settings['max_sequence_length']} text tokens"
    report: dict[str, Any] = {"parts": {}}
    if (args.out / "gpu.json").is_file():
        report = json.loads((args.out / "gpu.json").read_text())
        kept = {k: report["conditions"][k] for k in ("gpu", "cpu", "torch", "engines", "attention")}
        if kept != {k: known[k] for k in kept} or report["size"] != size:
            arguments.error(f"{args.out} has results of another machine or setting ({kept}): choose another --out")
    report |= {
        "model": f"{MODELS[args.config]}, random bf16 weights",
        "size": size,
        "rule": f"Batch 1, denoising only, median of {args.repeats} loops after one (diffusers: {args.repeats // 2}).",
        "conditions": known,
    }
    with attention_by(args.attention):
        run_parts(bench, [p for p in every if not args.only or p.name in args.only], report, args.out, pieces)
    print((args.out / "gpu.md").read_text())
    sys.exit(MORE_TO_DO if report["skipped"] else 0)


if __name__ == "__main__":
    main()
