"""An evaluation as pictures and pages: curves, contact sheets, a Markdown table, and one HTML file of all of it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont

from jitexport.errors import needed
from jitexport.evaluate.evaluation import Evaluation, Row
from jitexport.evaluate.metrics import MEASURES
from jitexport.evaluate.statistics import Score
from jitexport.files import write_file

#: Colours by method, the same in every chart and table; others take the spare ones in turn.
COLOURS = {"reference": "#2b2f36", "dense": "#8a9099", "jit": "#1f6feb"}
SPARE = ("#e8710a", "#188038", "#a142f4", "#d01884", "#129eaf", "#7a5c00")

#: Measures of the curves, the first of them that were taken.
CURVES = (
    "right", "objects", "demo_psnr", "clip_score", "image_reward", "psnr", "lpips", "vae_distance", "sharpness", "ssim",
)  # fmt: skip
MOST_CURVES = 4
#: Measures that say of an image that it is not what was asked for.
RIGHT = ("pair_right", "right")

SHEET_PROMPTS = 12
THUMBNAIL = 144  # pixels


def write_report(
    evaluation: Evaluation,
    path: Path,
    *,
    title: str = "Quality and speed",
    prompts: int = SHEET_PROMPTS,
    size: int = THUMBNAIL,
    notes: Sequence[str] = (),
) -> Path:
    """Write one HTML file with everything in it, images included.

    Args:
        prompts: rows of the contact sheet, worst cases first.
        size: longest side of its images, in pixels.
        notes: paragraphs under the title.
    """
    page = Environment(
        loader=PackageLoader("jitexport.evaluate", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html")  # fmt: skip
    html = page.render(
        title=title,
        notes=notes,
        evaluation=evaluation,
        measures={name: MEASURES[name] for name in evaluation.measures},
        unmeasured={MEASURES[name].title: reason for name, reason in evaluation.missing.items()},
        colours=colours(evaluation.rows),
        best=best(evaluation),
        cell=cell,
        half_width=half_width,
        conditions={k: v for k, v in evaluation.conditions.items() if v is not None},
        curves=data_uri(curves(evaluation), "image/png"),
        sheet=contact_sheet(evaluation, prompts, size),
        size=size,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, html.encode())
    return path


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as a data: address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each method."""
    methods = dict.fromkeys(row.method for row in rows)
    spare = iter(SPARE * len(methods))
    return {method: COLOURS.get(method) or next(spare) for method in methods}


def cell(name: str, score: Score | None) -> str:
    """A score's value as text."""
    if score is None:
        return ""
    measure = MEASURES[name]
    if measure.share:
        return f"{score.value:.1%}" if 0 < score.value < 1 else f"{score.value:.0%}"
    return f"{score.value:.{measure.digits}f}"


def half_width(name: str, score: Score | None) -> str:
    """Half of a score's interval as text; empty where there is none."""
    if score is None or score.low is None or score.high is None:
        return ""
    half = (score.high - score.low) / 2
    return f"±{100 * half:.0f} pts" if MEASURES[name].share else f"±{half:.2g}"


def interval(name: str, score: Score) -> str:
    """The limits of a score's interval as text; empty where there is none."""
    if score.low is None or score.high is None:
        return ""
    measure = MEASURES[name]
    return " to ".join(f"{v:.0%}" if measure.share else f"{v:.{measure.digits}f}" for v in (score.low, score.high))


def best(evaluation: Evaluation) -> dict[str, str]:
    """Label of the best row by measure, the reference aside."""
    found = {}
    for name in evaluation.measures:
        scored = {row.label: row.scores[name].value for row in evaluation.rows[1:] if name in row.scores}
        orders: dict[str, Callable[[float], float]] = {
            "higher": lambda v: -v, "lower": lambda v: v, "one": lambda v: abs(v - 1),
        }
        order = orders[MEASURES[name].better]
        if len(set(scored.values())) > 1:
            found[name] = min(scored, key=lambda label: order(scored[label]))
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown_table(evaluation: Evaluation, measures: Sequence[str] | None = None) -> str:
    """A row a source: steps, TFLOPs, seconds, scores with intervals; of `measures` those that were taken."""
    names = [name for name in measures or MEASURES if name in evaluation.measures]
    head = ["", "steps", "GFLOP", "seconds", "times faster", *(MEASURES[n].title for n in names)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in evaluation.rows:
        cells = [row.label, str(row.steps), f"{row.tflops * 1e3:.4g}", *_speed(row, evaluation.reference)]
        for name in names:
            score = row.scores.get(name)
            limits = interval(name, score) if score else ""
            cells.append(cell(name, score) + (f" ({limits})" if limits else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _speed(row: Row, reference: Row) -> tuple[str, str]:
    if row.latency is None:
        return "", ""
    faster = reference.latency.median / row.latency.median if reference.latency else None
    return f"{row.latency.median:.2f}", "" if faster is None else f"{faster:.1f}"


# --- curves -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    title: str
    values: dict[str, float]


def curves(evaluation: Evaluation, measures: Sequence[str] | None = None, *, dpi: int = 130) -> bytes:
    """Quality against latency and against FLOPs, a column for each measure, as PNG bytes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    with needed("charts need matplotlib", "eval"):
        from matplotlib.figure import Figure
        from matplotlib.text import Text
    rows = evaluation.rows
    taken = [n for n in CURVES if any(n in row.scores for row in rows[1:])]
    names = list(measures or taken[:MOST_CURVES])
    axes_of_x = [
        _Axis("seconds an image", {r.label: r.latency.median for r in rows if r.latency}),
        _Axis("GFLOP an image", {r.label: r.tflops * 1e3 for r in rows}),
    ]
    axes_of_x = [axis for axis in axes_of_x if axis.values]
    figure = Figure(figsize=(3.7 * max(len(names), 1), 3.3 * len(axes_of_x) + 0.4), layout="constrained", dpi=dpi)
    grid = figure.subplots(len(axes_of_x), max(len(names), 1), squeeze=False)
    palette = colours(rows)
    for line, axis in zip(grid, axes_of_x, strict=True):
        for plot, name in zip(line, names, strict=False):
            _curve(plot, rows, axis, name, palette)
    handles = [
        figure.axes[0].plot([], [], "o", color=colour, label=method)[0] for method, colour in palette.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    for text in figure.findobj(Text):  # names with two dollar signs are no formulas
        text.set_parse_math(False)
    figure.draw_without_rendering()  # where labels are is known only then
    for plot in grid.flat:
        spread_labels(plot)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor="white")
    return stream.getvalue()


#: Places of a label beside its point, in points, the best first: right and left of it, above and below.
_PLACES = [(side, -2 + up * 7 * away) for away in range(9) for up in (1, -1) for side in (5, -5)]


def spread_labels(plot: Any) -> None:
    """Move each label to the first place inside the chart where it covers no point and no other label."""
    from matplotlib.transforms import Bbox

    labels = sorted(plot.texts, key=lambda text: text.xy[1], reverse=True)
    points = plot.transData.transform([label.xy for label in labels]) if labels else []
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in points]
    for label in labels:
        for side, up in _PLACES:
            label.xyann = (side, up)
            label.set_horizontalalignment("left" if side > 0 else "right")
            box = label.get_window_extent()
            if box.x0 > plot.bbox.x0 and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def _curve(plot: Any, rows: Sequence[Row], axis: _Axis, name: str, palette: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    measure = MEASURES[name]
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        if name in row.scores and row.label in axis.values:
            by_method.setdefault(row.method, []).append(row)
    for method, group in by_method.items():
        group = sorted(group, key=lambda row: axis.values[row.label])
        x = [axis.values[row.label] for row in group]
        y = [row.scores[name].value for row in group]
        errors = [
            [0 if s.low is None else max(0, s.value - s.low) for s in (row.scores[name] for row in group)],
            [0 if s.high is None else max(0, s.high - s.value) for s in (row.scores[name] for row in group)],
        ]
        plot.errorbar(x, y, errors, fmt="none", ecolor=palette[method], alpha=0.22, linewidth=1.2)
        style = "--" if method in ("dense", "reference") else "none"
        plot.plot(x, y, marker="o", linestyle=style, linewidth=1, markersize=6, color=palette[method], alpha=0.9)
        for row, a, b in zip(group, x, y, strict=True):
            plot.annotate(
                row.label, (a, b), xytext=(5, 4), textcoords="offset points", fontsize=6.5, color=palette[method]
            )
    plot.set_xscale("log")
    plot.margins(x=0.12)
    plot.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    plot.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    plot.xaxis.set_minor_formatter(NullFormatter())
    plot.set_xlabel(axis.title + " (log)")
    arrow = {"higher": " (higher is better)", "lower": " (lower is better)", "one": " (1 is best)"}[measure.better]
    plot.set_title(measure.title + arrow, fontsize=9)
    plot.grid(alpha=0.25, which="both", linewidth=0.5)
    plot.spines[["top", "right"]].set_visible(False)


# --- contact sheets ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """An image of the contact sheet: its data, a caption, and whether it is the worst of its row, or wrong."""

    uri: str
    caption: str
    worst: bool
    wrong: bool


def worst_first(evaluation: Evaluation) -> list[int]:
    """Places of the prompts: those that some source got wrong first, then by the lowest PSNR of any source."""

    def key(i: int) -> tuple[float, float]:
        def lowest(name: str) -> float:
            values = [min(row.values[name][i]) for row in evaluation.rows[1:] if name in row.values]
            return min(values, default=1.0)

        return min(lowest(name) for name in RIGHT), lowest("psnr")

    return sorted(range(len(evaluation.prompts.prompts)), key=key)


def contact_sheet(evaluation: Evaluation, prompts: int, size: int) -> list[tuple[str, int, list[Picture]]]:
    """(prompt, seed, a picture of each source) for the first seed of each prompt, worst cases first."""
    jobs = list(evaluation.prompts)
    sheet = []
    for i in worst_first(evaluation)[:prompts]:
        text, seed, path = jobs[i * evaluation.prompts.seeds]
        psnr = [row.values["psnr"][i][0] if "psnr" in row.values else None for row in evaluation.rows]
        lowest = min((v for v in psnr if v is not None), default=None)
        pictures = []
        for row, value in zip(evaluation.rows, psnr, strict=True):
            wrong = any(row.values[name][i][0] < 1 for name in RIGHT if name in row.values)
            pictures.append(
                Picture(
                    uri=data_uri(thumbnail(evaluation.folder / row.label / path, size), "image/webp"),
                    caption="reference" if value is None else f"{value:.1f} dB",
                    worst=value is not None and value == lowest and len(evaluation.rows) > 2,
                    wrong=wrong,
                )
            )
        sheet.append((text, seed, pictures))
    return sheet


def thumbnail(path: Path, size: int) -> bytes:
    """An image file as WebP, its longest side `size` pixels at most."""
    stream = io.BytesIO()
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((size, size), Image.Resampling.LANCZOS)
        small.save(stream, format="WEBP", quality=80, method=6)
    return stream.getvalue()


def sheet_image(evaluation: Evaluation, prompts: int = 8, size: int = 112, labels: Sequence[str] = ()) -> Image.Image:
    """The contact sheet as one picture, for pages that cannot hold the report: prompts evenly spread, not the worst.

    Args:
        labels: sources to show; all by default.
    """
    rows = [row for row in evaluation.rows if not labels or row.label in labels]
    jobs = list(evaluation.prompts)[:: evaluation.prompts.seeds]
    chosen = [jobs[int(i)] for i in np.linspace(0, len(jobs) - 1, min(prompts, len(jobs)))]
    side, head, gap = 150, 30, 2
    page = Image.new("RGB", (side + (size + gap) * len(chosen), head + (size + gap) * len(rows)), "white")
    draw, small, font = ImageDraw.Draw(page), ImageFont.load_default(10), ImageFont.load_default(12)
    for column, (text, _, _) in enumerate(chosen):
        words, half = text.split(), (len(text.split()) + 1) // 2
        for line, part in enumerate((words[:half], words[half:])):
            draw.text((side + column * (size + gap), 2 + 12 * line), " ".join(part)[:24], fill="#333", font=small)
    for index, row in enumerate(rows):
        top = head + index * (size + gap)
        draw.text((4, top + size // 2 - 14), row.label, fill="black", font=font)
        if row.latency:
            draw.text((4, top + size // 2 + 2), f"{row.latency.median:.2f} s", fill="#666", font=small)
        for column, (_, _, path) in enumerate(chosen):
            with Image.open(evaluation.folder / row.label / path) as image:
                picture = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
            page.paste(picture, (side + column * (size + gap), top))
    return page
