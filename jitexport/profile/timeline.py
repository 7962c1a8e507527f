"""A profile as a picture that shows at a glance where an image's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jitexport.errors import needed
from jitexport.profile.phases import Profile

STAGE_COLOURS = ("#9ecae1", "#4292c6", "#08519c", "#08306b")  # coarse to fine
COLOURS = {
    "text": "#bcbddc",
    "condition": "#807dba",
    "draw": "#fdd0a2",
    "transition": "#e6550d",
    "preview": "#a63603",
    "step": "#fd8d3c",
    "decode": "#41ab5d",
    "image": "#a1d99b",
}


def draw_timeline(profiles: Sequence[Profile], conditions: dict[str, Any], path: Path) -> None:
    """Write a PNG: the median image on a time axis, its steps against the machine's ceiling, and all totals.

    Args:
        profiles: the last one has a timeline; the others are compared with it.
        conditions: as of `measure.conditions`, for the foot of the picture.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    with needed("drawing a timeline needs matplotlib", "eval"):
        from matplotlib.figure import Figure
        from matplotlib.text import Text
    main = profiles[-1]
    rows = _rows(main)
    heights = [0.42 * len(rows) + 0.6, 2.6] + ([0.42 * len(profiles) + 0.6] if len(profiles) > 1 else [])
    figure = Figure(figsize=(11, sum(heights) + 0.9), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights)
    _gantt(axes[0], main, rows)
    _steps(axes[1], main)
    if len(profiles) > 1:
        _totals(axes[2], profiles)
    facts = ", ".join(f"{k} {v}" for k, v in conditions.items() if v is not None)
    figure.supxlabel(facts, fontsize=8, color="#555555")
    for text in figure.findobj(Text):  # names with two dollar signs are no formulas
        text.set_parse_math(False)
    figure.savefig(path, dpi=120)


def _colours(profile: Profile) -> dict[str, str]:
    """A colour for each phase: stages from light (few tokens) to dark."""
    stages = [e.name for e in profile.engines if e.tokens is not None]
    shades = STAGE_COLOURS[-len(stages) :] if len(stages) <= 2 else STAGE_COLOURS
    return COLOURS | {name: shades[min(i, len(shades) - 1)] for i, name in enumerate(stages)}


def _rows(profile: Profile) -> list[tuple[str, list[str]]]:
    """Rows of the time axis: a label and the phases in it."""
    stages = [e for e in profile.engines if e.tokens is not None]
    return [
        ("text, condition, draw", ["text", "condition", "draw"]),
        *((f"{e.name}: {e.tokens} tokens", [e.name]) for e in stages),
        ("loop: steps, transitions", ["step", "transition", "preview"]),
        ("decode", ["decode"]),
        ("image, PNG", ["image"]),
    ]


def _gantt(axis: Any, profile: Profile, rows: Sequence[tuple[str, list[str]]]) -> None:
    colours = _colours(profile)
    end = profile.timeline[-1].end * 1e3
    for y, (_, phases) in enumerate(rows):
        spans = [s for s in profile.timeline if s.phase in phases]
        gap = end / 1000 if any(s.phase not in COLOURS for s in spans) else 0  # between the steps of a stage
        bars = [(s.start * 1e3, max(s.seconds * 1e3 - gap, end / 700)) for s in spans]
        axis.broken_barh(bars, (y - 0.36, 0.72), facecolors=[colours[s.phase] for s in spans])
        took = sum(s.seconds for s in spans) * 1e3
        axis.text(end * 1.01, y, f"{took:.1f} ms  {took / end:.1%}", va="center", fontsize=9)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, end * 1.18)
    axis.set_xticks([t for t in axis.get_xticks() if 0 <= t <= end])
    axis.set_xlabel("ms since the prompt came in")
    _plain(axis)
    axis.set_title(
        f"{profile.label}: {profile.total.median * 1e3:.0f} ms from prompt to PNG, "
        f"{profile.overhead:.2%} of denoising outside the engines",
        loc="left",
        fontsize=11,
    )


def _steps(axis: Any, profile: Profile) -> None:
    """Bars of each step: engine, the loop on top of it, and what the engine would take at the ceiling."""
    colours = _colours(profile)
    engines = {e.name: e for e in profile.engines}
    steps = [s.step for s in profile.steps]
    engine = [s.engine.median * 1e3 for s in profile.steps]
    axis.bar(steps, engine, color=[colours[s.stage] for s in profile.steps], width=0.8)
    axis.bar(steps, [s.loop.median * 1e3 for s in profile.steps], bottom=engine, color=COLOURS["step"], width=0.8)
    for stage, run in groupby(profile.steps, key=lambda s: s.stage):
        e = engines[stage]
        inside = [s.step for s in run]
        label = f"{e.tokens} tokens\n{e.run.median * 1e3:.1f} ms"
        if e.flops_per_second is not None and e.ceiling_share is not None:
            floor = e.run.median * e.ceiling_share * 1e3
            axis.hlines(floor, inside[0] - 0.45, inside[-1] + 0.45, color="#cb181d", linestyle="--", linewidth=1.5)
            label += f"\n{e.flops_per_second / 1e9:.0f} GFLOP/s\n{e.ceiling_share:.0%} of ceiling"
        axis.text(inside[0] - 0.4, max(engine) * 1.06, label, fontsize=8.5, va="bottom")
    axis.set_xticks(steps)
    axis.set_xlim(-0.7, len(steps) - 0.3)
    axis.set_ylim(0, max(engine) * 1.6)
    axis.set_xlabel("step of the denoising loop")
    axis.set_ylabel("ms a step")
    _plain(axis)
    title = "Steps: engine, and in orange the loop around it"
    if profile.ceiling is not None and any(e.ceiling_share is not None for e in profile.engines):
        title += f"; dashed: the engine at the ceiling, {profile.ceiling / 1e9:.0f} GFLOP/s"
    axis.set_title(title, loc="left", fontsize=11)


def _totals(axis: Any, profiles: Sequence[Profile]) -> None:
    for y, profile in enumerate(profiles):
        total = profile.total
        colour = "#08519c" if profile is profiles[-1] else "#bdbdbd"
        axis.barh(y, total.median, color=colour, height=0.7)
        axis.plot([total.median, total.p90], [y, y], color="black", linewidth=1.2)
        axis.text(total.p90, y, f"  {total.median:.3f} s, {profile.ratio.median:.2f}x", va="center", fontsize=9)
    axis.set_yticks(range(len(profiles)), [p.label for p in profiles], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, max(p.total.p90 for p in profiles) * 1.15)
    axis.set_xlabel("s from prompt to PNG, median; line: to the 90th percentile")
    _plain(axis)


def _plain(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
