"""What comes before a build: what the machine can run, the schedule, and what a cache decides."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jitexport.cli.options import Cache, Device, Json, Size, Source, Spatial, Speedup, Stages
from jitexport.cli.progress import images_bar
from jitexport.cli.wording import frames, tera
from jitexport.console import Table, echo, err, out, quiet_libraries
from jitexport.files import check_writable

if TYPE_CHECKING:
    from jitexport.models.base import ModelAdapter
    from jitexport.plan import Plan


def plan(
    source: Source = Source(),
    speedup: Speedup = 4,
    spatial: Spatial = Spatial(),
    cache: Cache = None,
    stages: Stages = Stages(),
    size: Size = Size(),
    as_json: Json = False,
) -> None:
    """Print the schedule for a speed-up without building: stages, steps, tokens, TFLOPs."""
    custom = stages.custom()
    quiet_libraries()
    import torch

    from jitexport.building.declaring import schedule_entry
    from jitexport.models.sources import config_adapter, find_source
    from jitexport.plan import plan as make_plan

    adapter = config_adapter(find_source(source.model, source.base), torch.float32, size.settings())
    made = make_plan(adapter, speedup=speedup, custom=custom, cache=cache, **asdict(spatial))
    if as_json:
        echo(schedule_entry(made).model_dump_json())
        return
    _print_model(source.model, adapter, made)
    out.print(_table(made))
    _print_prediction(made)


def _print_model(name: str, adapter: ModelAdapter, made: Plan) -> None:
    """What a full pass of the model is."""
    geometry, full = adapter.geometry, made.cost(made.grid_tokens) / 1e12
    guided = made.passes == 2 or (adapter.defaults.guidance.true or 0) > 1
    times = {2: ", two a step with classifier-free guidance", 1: ", two a step with a negative prompt"}
    err.print(
        f"{name}: {geometry.height} x {geometry.width} pixels, {frames(geometry)}{made.grid_tokens} image tokens, "
        f"{geometry.text_tokens} text tokens; full pass {tera(full / made.passes)} TFLOP"
        f"{times[made.passes] if guided else ''}",
        soft_wrap=True,
    )


def _table(made: Plan) -> Table:
    """A row for stages in a row on one engine."""
    from jitexport.schedule import COMPUTED

    def counted(actions: Sequence[str]) -> str:
        """Steps, and with a cache how many are computed."""
        return str(len(actions)) if made.cache is None else f"{len(actions)} ({actions.count(COMPUTED)})"

    table = Table("stage", "steps", "tokens", "share", "TFLOP/step", "TFLOP", "sigma from", "to")
    runs = made.runs()
    for run in runs:
        flops, sigmas = (tera(run.step_tflops), tera(run.tflops)), (f"{sigma:.3f}" for sigma in run.sigmas)
        share = f"{run.tokens / made.grid_tokens:.0%}"
        table.add_row(str(run.index), counted(run.actions), str(run.tokens), share, *flops, *sigmas)
    table.add_section()
    if made.preview:
        table.add_row("preview", "", "", "", "", tera(made.preview / 1e12), "", "")
    actions = [action for run in runs for action in run.actions]
    table.add_row("all", counted(actions), "", "", "", tera(made.tflops), "", "")
    return table


def _print_prediction(made: Plan) -> None:
    """What the steps that are not computed are, and the speed-up."""
    from jitexport.plan import DISTILLED_STEPS

    if made.cache is not None:
        computed = ", ".join(map(str, made.schedule.computed))
        others = f"{made.cache.name}: {_others(made)}"
        out.print(f"computed steps, in brackets: {computed}; the others: {others}", soft_wrap=True)
    distilled = f", {made.over(50):.1f}x over 50" if made.reference_steps <= DISTILLED_STEPS else ""
    out.print(
        f"predicted speed-up {made.predicted_speedup:.2f}x over {made.reference_steps} full steps "
        f"({tera(made.reference_tflops)} TFLOP){distilled}",
        soft_wrap=True,
    )


def _others(made: Plan) -> str:
    """What the steps that are not computed do, and what one of them costs at all tokens."""
    from jitexport.schedule import COMPUTED

    said = [
        f"{count} {action}, {tera(made.costs[action](made.grid_tokens) / 1e12)} TFLOP each at all tokens"
        for action, count in Counter(made.schedule.actions).items() if action != COMPUTED
    ]
    return "; ".join(said) or "none"


def calibrate(
    source: Source = Source(),
    cache: Annotated[
        str, typer.Option(help="A temporal method that decides while it runs, with options: teacache:threshold=0.6.")
    ] = "teacache",
    speedup: Speedup = 1,
    spatial: Spatial = Spatial(),
    stages: Stages = Stages(),
    size: Size = Size(),
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line, or GenEval's .jsonl; captions of the demo model, or ours.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Take that many prompts.")] = 16,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32; auto is bf16 where the processor computes in it.")] = "auto",
    device: Device = "auto",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File for what was found, for `build --calibration`.")
    ] = Path("calibration.json"),
    as_json: Json = False,
) -> None:
    """Run a cache that decides by data, uncompiled, over prompts, and write down which steps it computes."""
    check_writable(output)
    custom = stages.custom()
    quiet_libraries()
    from jitexport.calibration import calibrate_model

    with images_bar() as bar:
        task = bar.add_task("images", total=limit)
        found = calibrate_model(
            source.model, source.base, cache, prompts=prompts, limit=limit, speedup=speedup, custom=custom,
            **asdict(spatial), dtype=dtype, device=device, settings=size.settings(),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    found.write(output)
    if as_json:
        echo(json.dumps(asdict(found)))
        return
    table = Table("images", "compute these steps")
    for text, count in found.lists.items():
        table.add_row(str(count), text.replace("+", ", "))
    out.print(table)
    out.print(f"most compute {len(found.computed)} of {len(found.shares)} steps: {', '.join(map(str, found.computed))}")
    out.print(f"next: jitexport build --model {shlex.quote(source.model)} --calibration {shlex.quote(str(output))} ...")


def doctor(as_json: Json = False) -> None:
    """Show what this machine can run, and what would add more."""
    from jitexport.doctor import examine

    report = examine()
    if as_json:
        echo(json.dumps(report))
        return
    for section, rows in report.items():
        table = Table(title=section, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in rows.items():
            table.add_row(name, str(value))
        out.print(table)
