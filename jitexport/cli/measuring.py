"""What a bundle is worth: where the time goes, and the quality of its images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jitexport.cli.options import Json
from jitexport.cli.progress import EvaluationProgress
from jitexport.cli.wording import count, example_prompt, tera
from jitexport.console import Table, echo, err, out, quiet_libraries
from jitexport.files import check_writable, write_file

if TYPE_CHECKING:
    from jitexport.evaluate import Evaluation
    from jitexport.profile import Profile, Timing


def profile(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE", help="Bundles of one model, size and batch.")],
    against: Annotated[
        str, typer.Option(help="Also measure these, comma-separated: diffusers, compile, few-step, eager.")
    ] = "",
    prompt: Annotated[str | None, typer.Option(help="Prompt to measure with.")] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds measured, after one that is not; each has an image of everything.")
    ] = 5,
    timeline: Annotated[
        Path | None, typer.Option(help="Draw where the time goes into this PNG; of several bundles, in the last.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace of one image into this JSON; of the last bundle.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure where the time of an image goes, and compare with the ordinary pipeline and other bundles, in turns."""
    files = [path for path in (timeline, trace) if path is not None]
    for path in files:
        check_writable(path)

    from jitexport import profile as profiling
    from jitexport.bundle.reading import read_manifest

    peers = profiling.parse_peers(against)
    quiet_libraries()
    prompt = prompt or example_prompt(read_manifest(bundles[0]))
    with err.status("opening bundles") as status:
        profiles = profiling.profile_bundles(
            bundles, prompt, repeats=repeats, peers=peers, trace=trace, status=status.update
        )
    conditions = profiling.conditions()
    if timeline is not None:
        from jitexport.profile.timeline import draw_timeline

        draw_timeline(profiles, conditions, timeline)
    if as_json:
        names = [str(path) for path in bundles]
        report = {"conditions": conditions, "bundle": names[0], "bundles": names}
        echo(json.dumps(report | {"profiles": [asdict(p) for p in profiles]}))
    else:
        if len(profiles) > 1:
            out.print(_totals(profiles))
        for one in profiles[-len(bundles) :]:
            _print_profile(one)
        err.print(", ".join(f"{k} {v}" for k, v in conditions.items() if v is not None), soft_wrap=True)
    for path in files:
        err.print(f"wrote {path}", soft_wrap=True)


def _print_profile(one: Profile) -> None:
    """A bundle's phases, engines and steps."""
    for table in (_phases(one), _engines(one), _steps(one)):
        out.print(table)
    assert one.ceiling is not None and one.speedup is not None  # of every bundle that was measured
    before, after = (f"{rate / 1e9:.0f}" for rate in one.products)
    out.print(
        f"ceiling: {one.ceiling / 1e9:.0f} GFLOP/s, the best large matrix product in this run; "
        f"{before} before the images, {after} after",
        soft_wrap=True,
    )
    out.print(f"the loop around the engines takes {one.overhead:.2%} of denoising")
    out.print(
        f"denoising speed-up {one.speedup.realised:.2f}x over the reference steps on the full stage's engine, "
        f"{one.speedup.predicted:.2f}x predicted: {one.speedup.share:.0%} realised",
        soft_wrap=True,
    )
    memory = {"process": "of memory in the process", "gpu": "on the GPU"}
    found = {text: one.peak_memory.get(k) for k, text in memory.items()}
    if peaks := [f"{peak / 1e6:.0f} MB {text}" for text, peak in found.items() if peak]:
        out.print(f"at most {', '.join(peaks)}")


def _milliseconds(timing: Timing) -> tuple[str, str]:
    return f"{timing.median * 1e3:.1f}", f"{timing.p90 * 1e3:.1f}"


def _totals(profiles: Sequence[Profile]) -> Table:
    title = f"{count(profiles[0].repeats, 'round')}; times faster: within a round, median over rounds"
    table = Table("prompt to PNG", "median s", "p90 s", "times faster", "least to most", title=title)
    for p in profiles:
        faster = (f"{p.ratio.median:.2f}", f"{p.ratio.least:.2f} to {p.ratio.most:.2f}")
        table.add_row(p.label, f"{p.total.median:.3f}", f"{p.total.p90:.3f}", *faster)
    return table


def _phases(one: Profile) -> Table:
    table = Table(one.label, "median ms", "p90 ms", "share", title=f"phases, {count(one.repeats, 'image')}")
    for name, timing in one.phases.items():
        if name != "denoise":
            table.add_row(name, *_milliseconds(timing), f"{timing.median / one.total.median:.1%}")
    table.add_section()
    table.add_row("total", *_milliseconds(one.total), "")
    return table


def _engines(one: Profile) -> Table:
    table = Table("engine", "tokens", "runs", "median ms", "p90 ms", "GFLOP", "GFLOP/s", "of ceiling", title="engines")
    for e in one.engines:
        work = ("", "", "")
        if e.flops is not None and e.flops_per_second is not None:
            work = (f"{e.flops / 1e9:.2f}", f"{e.flops_per_second / 1e9:.0f}", f"{e.ceiling_share:.0%}")
        table.add_row(e.name, str(e.tokens or ""), str(e.runs), *_milliseconds(e.run), *work)
    return table


def _steps(one: Profile) -> Table:
    table = Table("step", "stage", "sigma", "engine ms", "p90 ms", "loop ms", "p90 ms", title="steps")
    for s in one.steps:
        table.add_row(str(s.step), s.stage, f"{s.sigma:.3f}", *_milliseconds(s.engine), *_milliseconds(s.loop))
    return table


def evaluate(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE", help="Bundles of one model.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="One prompt a line, or GenEval's .jsonl; captions of the demo model, or a few of ours."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take that many prompts.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Images of each prompt: 1, for GenEval 4.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Steps of the ordinary sampler, or a bundle; the model's usual steps.")
    ] = None,
    timed: Annotated[int, typer.Option(min=0, help="Images timed for each latency.")] = 5,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report, results and images; a run goes on from there.")
    ] = Path("out/evaluation"),
    as_json: Json = False,
) -> None:
    """Compare the quality and speed of bundles with the ordinary sampler's, over many prompts."""
    against: int | Path | None = None
    if reference is not None:
        against = int(reference) if reference.isdecimal() else Path(reference)
    quiet_libraries()
    from jitexport.evaluate import evaluate as run_evaluation
    from jitexport.evaluate import write_report

    with EvaluationProgress() as progress:
        result = run_evaluation(
            bundles, folder=output / "images", prompts=prompts, limit=limit, seeds=seeds, reference=against,
            timed=timed, progress=progress,
        )  # fmt: skip
    report = write_report(result, output / "report.html")
    write_file(output / "results.json", f"{result.to_json()}\n".encode())
    if as_json:
        echo(result.to_json())
        return
    out.print(_scores(result))
    for name, reason in result.missing.items():
        err.print(f"not measured: {name}: {reason}", soft_wrap=True)
    echo(report)


def _scores(result: Evaluation) -> Table:
    """A row a measure and a column a source, which fits a terminal where the other way round does not."""
    from jitexport.evaluate.metrics import MEASURES
    from jitexport.evaluate.report import cell, interval

    table = Table("", *(row.label for row in result.rows))
    first = result.reference.latency
    table.add_row("steps", *(str(row.steps) for row in result.rows))
    table.add_row("TFLOP", *(tera(row.tflops) for row in result.rows))
    if first is not None:
        table.add_row("seconds", *(f"{row.latency.median:.2f}" if row.latency else "" for row in result.rows))
        ratios = (f"{first.median / row.latency.median:.2f}" if row.latency else "" for row in result.rows)
        table.add_row("times faster", *ratios)
    for name in result.measures:
        cells = []
        for row in result.rows:
            score = row.scores.get(name)
            limits = interval(name, score) if score else ""
            cells.append(cell(name, score) + (f"\n{limits}" if limits else ""))
        table.add_row(MEASURES[name].title, *cells)
    return table
