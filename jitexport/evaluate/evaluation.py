"""Evaluation: the same prompts and seeds with every source, scored, with intervals over prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from jitexport.bundle.reading import read_manifest
from jitexport.errors import InputError
from jitexport.evaluate import statistics
from jitexport.evaluate.demo import DemoData
from jitexport.evaluate.metrics import MEASURES, available
from jitexport.evaluate.prompts import BUILT_IN, Prompt, PromptSet, prompt_set, read_prompts
from jitexport.evaluate.scenes import scene_prompts
from jitexport.evaluate.scoring import FeatureSpace, Picture, Scorer, Subject
from jitexport.evaluate.sources import (
    Latency,
    Source,
    bundle_source,
    bundle_sources,
    check_alike,
    full_stage,
    make_images,
    measure_latency,
    missing_images,
    reference_source,
    relabelled,
    stored_latency,
)
from jitexport.evaluate.statistics import Score
from jitexport.profile import conditions

#: Prompts of the demo model, and images timed for a latency, where nothing is said.
DEMO_PROMPTS = 24
TIMED_IMAGES = 5


class Progress(Protocol):
    """What an evaluation reports to; see `jitexport.cli.progress`."""

    def begin(self, work: float) -> None:
        """The work ahead, in TFLOPs of denoising."""

    def step(self, name: str) -> None:
        """Something begins."""

    def advance(self, work: float) -> None:
        """So much is done."""


class Silent:
    """Reports nothing."""

    def begin(self, work: float) -> None:
        """Ignored."""

    def step(self, name: str) -> None:
        """Ignored."""

    def advance(self, work: float) -> None:
        """Ignored."""


@dataclass(frozen=True)
class Row:
    """A source and its scores, by key of `jitexport.evaluate.metrics.MEASURES`.

    `values` are the single images' scores, [prompts][seeds]; measures of whole sets have none.
    """

    label: str
    method: str
    description: str
    steps: int
    tflops: float
    latency: Latency | None
    scores: dict[str, Score]
    values: dict[str, list[list[float]]]


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured; `rows[0]` is the reference.

    Attributes:
        folder: of the images, one folder a row.
        missing: measures that could not be taken: {name: what is missing, what to do}.
        conditions: date, hardware and versions; see `jitexport.profile.conditions`.
    """

    model: str
    prompts: PromptSet
    folder: Path
    rows: tuple[Row, ...]
    missing: dict[str, str]
    conditions: dict[str, Any]

    @property
    def reference(self) -> Row:
        """What the others are compared with."""
        return self.rows[0]

    @property
    def measures(self) -> list[str]:
        """Measures that some row has, in the report's order."""
        return [name for name in MEASURES if any(name in row.scores for row in self.rows)]

    def differences(self, measure: str, base: str) -> dict[str, Score]:
        """Mean difference of every other row to the row `base`, prompt by prompt, in a measure of single images.

        Prompts differ far more than sources do, so this tells sources apart where the intervals of their means overlap.
        """
        values = {row.label: np.array(row.values[measure]) for row in self.rows if measure in row.values}
        return {label: statistics.mean(v - values[base]) for label, v in values.items() if label != base}

    def against_dense(self, measure: str, *, by: Literal["latency", "tflops"]) -> dict[str, Score]:
        """Mean difference of each accelerated row to dense sampling of the same latency or the same FLOPs.

        What dense sampling would give there is interpolated, prompt by prompt, between dense rows with more and with
        fewer steps, linearly over the logarithm. Rows outside the range of the dense ones are left out.
        """

        def cost(row: Row) -> float:
            """0 where it was not measured."""
            if by == "tflops":
                return row.tflops or 0.0
            return row.latency.median if row.latency else 0.0

        rows = [row for row in self.rows if measure in row.values and cost(row)]
        dense = sorted((row for row in rows if row.method in ("dense", "reference")), key=cost)
        if len(dense) < 2:
            return {}
        places = np.log([cost(row) for row in dense])
        curve = np.array([row.values[measure] for row in dense])  # [rows, prompts, seeds]
        found = {}
        for row in rows:
            place = np.log(cost(row))
            if row in dense or not places[0] <= place <= places[-1]:
                continue
            upper = int(np.searchsorted(places, place).clip(1))
            share = (place - places[upper - 1]) / (places[upper] - places[upper - 1])
            there = (1 - share) * curve[upper - 1] + share * curve[upper]
            found[row.label] = statistics.mean(np.array(row.values[measure]) - there)
        return found

    def to_json(self) -> str:
        """All of it as JSON text."""
        plain = asdict(self) | {"folder": str(self.folder), "measures": {n: asdict(MEASURES[n]) for n in self.measures}}
        return json.dumps(plain, indent=1)


def evaluate(
    bundles: Sequence[Path],
    *,
    folder: Path,
    prompts: Path | None = None,
    limit: int | None = None,
    seeds: int | None = None,
    reference: int | Path | None = None,
    timed: int = TIMED_IMAGES,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare bundles of one model with the ordinary sampler.

    Args:
        bundles: folders of built bundles.
        folder: images go here, one folder a bundle, and stay; a run that was interrupted goes on from them.
        prompts: a file, see `jitexport.evaluate.prompts.read_prompts`; by default captions of the demo model, or a few
            prompts of this package's own.
        limit: number of prompts; 24 of the demo's or all by default.
        seeds: images of each prompt.
        reference: steps of the ordinary sampler, run by the engines of one of the bundles (of the most precise dtype
            among them), or a bundle; by default the model's usual steps.
        timed: images to measure the latency with; 0 for none.
        progress: told about the work.

    Raises:
        InputError: bundles that cannot be compared, or prompts that cannot be read.
        BundleError: a bundle that cannot be opened.
        MissingDependencyError: the `eval` extra is not installed.
    """
    if not bundles:
        raise InputError("nothing to evaluate", expected="at least one bundle")
    sources = bundle_sources(bundles)
    manifests = {source.label: read_manifest(path) for source, path in zip(sources, bundles, strict=True)}
    if isinstance(reference, Path):
        wanted = relabelled(bundle_source(reference), "reference")
        check_alike({"the reference": read_manifest(reference)} | manifests)
    else:
        check_alike(manifests)
        if reference is not None and reference < 1:
            raise InputError("the reference needs at least one step", found=reference)
        first = next(iter(manifests.values()))
        # Of the bundles that can run all tokens, the most precise one; of these the first.
        able = [p for p, m in zip(bundles, manifests.values(), strict=True) if full_stage(m)] or list(bundles)
        chosen = min(able, key=lambda path: read_manifest(path).dtype != "fp32")
        wanted = reference_source(chosen, reference or first.defaults.num_inference_steps)
    given = chosen_prompts(prompts, next(iter(manifests.values())).model.name, limit, seeds)
    return compare(sources, wanted, bundles[0], given, folder, timed=timed, progress=progress)


def chosen_prompts(path: Path | None, model: str, limit: int | None, seeds: int | None = None) -> PromptSet:
    """A file's prompts, or else captions of the demo model, or for other models a few of our own.

    Raises:
        InputError: a limit below 1, or a file that cannot be read.
    """
    if limit is not None and limit < 1:
        raise InputError("at least one prompt is needed", found=limit)
    if path is not None:
        return read_prompts(path, limit=limit, seeds=seeds)
    if model != "demo":
        return prompt_set("built-in prompts", list(BUILT_IN[:limit]), seeds=seeds or 1)
    return demo_prompts(limit or DEMO_PROMPTS, seeds or 1)


def demo_prompts(count: int = DEMO_PROMPTS, seeds: int = 1) -> PromptSet:
    """The demo model's captions, of held-out combinations and of trained ones in turn."""
    data = DemoData()
    chosen = scene_prompts(count) if data.scenes else data.prompts(count)
    return PromptSet(
        "demo captions", "t2i-compbench",
        tuple(Prompt(p.text, tuple(p.seed + 1000 * j for j in range(seeds))) for p in chosen),
    )  # fmt: skip


def compare(
    sources: Sequence[Source],
    reference: Source,
    bundle: Path,
    prompts: PromptSet,
    folder: Path,
    *,
    timed: int = TIMED_IMAGES,
    progress: Progress | None = None,
) -> Evaluation:
    """Make what images and timings are missing, score everything, put it together.

    Args:
        bundle: whose model the metrics may read.

    Raises:
        InputError: labels that are not unique.
    """
    progress = progress or Silent()
    every = [reference, *sources]
    if len({s.label for s in every}) < len(every):
        raise InputError("labels are not unique", found=", ".join(s.label for s in every))
    subject = Subject(bundle, read_manifest(bundle), prompts)
    generate(every, prompts, folder, timed=timed, progress=progress)

    progress.step("scores")
    scorers, features, missing = available(subject)
    values, sets = _score([s.label for s in every], prompts, folder, scorers, features)
    rows = tuple(
        Row(
            label=s.label, method=s.method, description=s.description, steps=s.steps, tflops=s.tflops,
            latency=stored_latency(s, _latency_file(folder, s)),
            scores=_summary(values[s.label], sets[s.label], None if s is reference else sets[reference.label]),
            values={name: v.tolist() for name, v in values[s.label].items()},
        )
        for s in every
    )  # fmt: skip
    return Evaluation(subject.manifest.model.name, prompts, folder, rows, missing, conditions())


def generate(
    sources: Sequence[Source], prompts: PromptSet, folder: Path, *, timed: int, progress: Progress, images: bool = True
) -> None:
    """Make the images and timings of sources that are not in the folder yet, one source at a time.

    Args:
        timed: images to time; 0 for no timings.
        images: False for timings only.
    """
    plans = []
    for source in sources:
        untimed = timed and stored_latency(source, _latency_file(folder, source)) is None
        missing = missing_images(source, prompts, folder / source.label) if images else []
        plans.append((source, missing, timed + 1 if untimed else 0))
    progress.begin(sum(source.tflops * (len(missing) + timings) for source, missing, timings in plans))
    for source, missing, timings in plans:
        prompts.write_metadata(folder / source.label)
        if not missing and not timings:
            continue
        progress.step(source.label)
        pipe = source.open()
        if timings:
            measure_latency(pipe, source, prompts, _latency_file(folder, source), timed)
            progress.advance(source.tflops * timings)
        for count in make_images(pipe, source, missing):
            progress.advance(source.tflops * count)


def _latency_file(folder: Path, source: Source) -> Path:
    return folder / source.label / "latency.json"


def _score(
    labels: Sequence[str], prompts: PromptSet, folder: Path, scorers: Sequence[Scorer], features: Sequence[FeatureSpace]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
    """By label: scores of single images, {name: [prompts, seeds]}, and features, {name: [prompts, seeds, d]}.

    Args:
        labels: of the sources, the reference first.
    """
    values: dict[str, dict[str, list[float]]] = {label: {} for label in labels}
    sets: dict[str, dict[str, list[np.ndarray]]] = {label: {} for label in labels}
    for text, _, path in prompts:
        reference = _picture(folder / labels[0] / path)
        for label in labels:
            picture = reference if label == labels[0] else _picture(folder / label / path)
            for scorer in scorers:
                if not (scorer.pairs and picture is reference):
                    for name, value in scorer(picture, reference, text).items():
                        values[label].setdefault(name, []).append(value)
            for space in features:
                sets[label].setdefault(space.name, []).append(space(picture))
    shape = (len(prompts.prompts), prompts.seeds)
    return (
        {label: {n: np.array(v).reshape(shape) for n, v in by_name.items()} for label, by_name in values.items()},
        {label: {n: np.stack(v).reshape(*shape, -1) for n, v in by_name.items()} for label, by_name in sets.items()},
    )


def _picture(path: Path) -> Picture:
    with Image.open(path) as image:
        return Picture(image)


def _summary(
    values: dict[str, np.ndarray], sets: dict[str, np.ndarray], reference: dict[str, np.ndarray] | None
) -> dict[str, Score]:
    scores = {name: (statistics.share if MEASURES[name].share else statistics.mean)(v) for name, v in values.items()}
    if reference is not None and next(iter(sets.values()), np.empty((0, 0))).size:
        for name, features in sets.items():
            if features.shape[0] * features.shape[1] > 1:
                scores[name] = statistics.distance(reference[name], features, statistics.frechet)
    return scores
