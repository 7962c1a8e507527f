"""From a model to a bundle."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jitexport import registry
from jitexport.cli.options import Cache, Device, Json, ReplaceBundle, Size, Source, Spatial, Speedup, Stages
from jitexport.cli.progress import BuildProgress
from jitexport.cli.wording import example_prompt
from jitexport.console import echo, out, quiet_libraries
from jitexport.files import nearest_folder, temporary_folder

if TYPE_CHECKING:
    from jitexport.build import BuildResult

Backend = Annotated[str, typer.Option(help=f"Engine backend: auto, {', '.join(registry.BACKENDS)}.")]
Dtype = Annotated[
    str, typer.Option(help="Of weights and engines: bf16 or fp32; auto is bf16 where the processor computes in it.")
]
Quantization = Annotated[
    str | None, typer.Option(help="8-bit linear layers: int8 or fp8; weights are quantized here.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Bundle directory; engines/MODEL-SPEEDUPx by default.")
]
CalibrationFile = Annotated[
    Path | None, typer.Option(help="The cache with the steps that `jitexport calibrate` wrote to this file.")
]
Passes = Annotated[
    int | None,
    typer.Option(
        min=1, max=2, help="A prompt and its negative prompt: 1 after the other, or 2 at once; for models that are "
        "usually guided so the faster one by default."
    ),
]  # fmt: skip
Target = Annotated[
    str | None, typer.Option(help="Build for another machine's GPU, as sm_89 (--backend tensorrt).")
]
Weights = Annotated[
    str, typer.Option(help="store copies the weights; reference points at the model's own files by digest.")
]
Jobs = Annotated[
    int | None, typer.Option(help="Processes that compile at once; by default as cores and memory allow.")
]


def build(
    source: Source = Source(),
    speedup: Speedup = 4,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    quant: Quantization = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per engine run.")] = 1,
    output: Output = None,
    spatial: Spatial = Spatial(),
    cache: Cache = None,
    calibration: CalibrationFile = None,
    stages: Stages = Stages(),
    size: Size = Size(),
    device: Device = "auto",
    passes: Passes = None,
    target: Target = None,
    weights: Weights = "store",
    jobs: Jobs = None,
    force: ReplaceBundle = False,
    as_json: Json = False,
) -> None:
    """Turn a model and a speed-up into an engine bundle."""
    custom = stages.custom()
    with temporary_folder(nearest_folder(output or Path("engines"))), BuildProgress() as progress:
        quiet_libraries()  # imports libraries, some of which look for a temporary folder at once
        from jitexport.build import build as build_bundle

        result = build_bundle(
            **asdict(source), output=output, speedup=speedup, custom=custom, **asdict(spatial), cache=cache,
            calibration=calibration, backend=backend, dtype=dtype, batch=batch, device=device, target=target,
            settings=size.settings(), replace=force, jobs=jobs, quantization=quant, passes=passes,
            weights=weights,  # type: ignore[arg-type]  # any word here: `build` refuses others
            command=["jitexport", *sys.argv[1:]], progress=progress,
        )  # fmt: skip
    if as_json:
        size_and_time = {"bytes": result.manifest.size, "seconds": round(result.seconds, 1)}
        echo(json.dumps({"bundle": str(result.path), **size_and_time}))
    else:
        _print_built(result)


def _print_built(result: BuildResult) -> None:
    """What was built, and what to type next."""
    manifest = result.manifest
    errors = [e.relative_error for e in manifest.engines if e.relative_error is not None]
    checked = f"relative error of the engines at most {max(errors):.1g}" if errors else "engines not run here"
    out.print(
        f"built {result.path}: {len(manifest.engines)} engines, {manifest.size / 1e6:.1f} MB, "
        f"{result.seconds:.0f} s, predicted speed-up {manifest.schedule.predicted_speedup:.2f}x, {checked}",
        soft_wrap=True,
    )
    out.print(
        f'next: jitexport generate {shlex.quote(str(result.path))} "{example_prompt(manifest)}" '
        f"-o {'image.png' if manifest.geometry.frames is None else 'video.mp4'}",
        soft_wrap=True,
    )
