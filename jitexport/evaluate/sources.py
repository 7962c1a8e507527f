"""Where images come from: bundles, and the reference that they are compared with."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from jitexport import registry
from jitexport.backends.base import Engine
from jitexport.bundle.manifest import Manifest
from jitexport.bundle.reading import read_manifest
from jitexport.errors import InputError, needed
from jitexport.evaluate.prompts import PromptSet
from jitexport.models.base import ModelAdapter
from jitexport.profile import conditions
from jitexport.runtime import Pipeline, load
from jitexport.sampler import EVERY_STEP
from jitexport.schedule import Stage, StageSchedule
from jitexport.specs import DTYPES

#: The PNG text field that says what an image was made from, so that a run that was interrupted can go on.
MARK = "jitexport"


@dataclass(frozen=True)
class Source:
    """Something that makes images.

    Attributes:
        label: unique in an evaluation; also the name of its image folder.
        method: sources of one method share a colour.
        description: one line for the report.
        key: changes when the images would: images and timings of another key are made again.
        steps: transformer evaluations of an image.
        tflops: of all steps of an image.
        open: makes the pipeline.
    """

    label: str
    method: str
    description: str
    key: str
    steps: int
    tflops: float
    open: Callable[[], Pipeline]


# --- bundles ----------------------------------------------------------------------------------------------------------


def bundle_source(path: Path, label: str | None = None) -> Source:
    """A bundle; its name is its folder's by default.

    Raises:
        BundleError: no bundle there.
        InputError: a bundle that makes videos.
    """
    manifest = read_manifest(path)
    if manifest.geometry.frames is not None:
        raise InputError(
            f"{path} makes videos, and these scores are of images", found=f"{manifest.geometry.frames} frames",
            expected="a bundle that makes images",
        )
    schedule = manifest.schedule
    stages = " / ".join(f"{s.steps} steps x {s.tokens}" for s in schedule.stages)
    forecasts = "" if manifest.cache is None else f", cache {manifest.cache.name}"
    return Source(
        label=label or path.resolve().name,
        method=manifest.method.name if manifest.cache is None else f"{manifest.method.name} {manifest.cache.name}",
        description=f"{manifest.method.name}, preset {manifest.method.preset}{forecasts}, {manifest.backend} "
        f"{manifest.precision}: {stages} tokens",
        key=bundle_key(manifest),
        steps=len(schedule.schedule().computed),
        tflops=schedule.tflops,
        open=lambda: quiet(load(path)),
    )


def bundle_key(manifest: Manifest) -> str:
    """A digest of everything in a manifest that images depend on: a bundle that is built again keeps its images."""
    fields = {"jitexport_version", "model", "geometry", "method", "schedule", "backend", "dtype", "batch", "weights"}
    said = manifest.model_dump(mode="json", include=fields)
    if manifest.cache is not None:
        said["cache"] = {"name": manifest.cache.name, "options": manifest.cache.options}
    golden = {e.golden for e in manifest.engines}
    said["files"] = sorted((f.path, f.sha256) for f in manifest.files if f.path not in golden)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def bundle_sources(paths: Sequence[Path]) -> list[Source]:
    """Bundles with labels that tell them apart, which takes more of their paths where folders have the same name."""
    resolved = [path.resolve() for path in paths]
    for depth in range(1, max((len(p.parts) for p in resolved), default=0) + 1):
        labels = ["-".join(part for part in p.parts[-depth:] if part != p.anchor) for p in resolved]
        if len(set(labels)) == len(labels):
            return [bundle_source(path, label) for path, label in zip(paths, labels, strict=True)]
    raise InputError("a bundle is given twice", found=", ".join(map(str, paths)))


def quiet(pipe: Pipeline) -> Pipeline:
    """The pipeline without its own progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_alike(manifests: dict[str, Manifest]) -> None:
    """Refuse bundles whose images cannot be compared prompt by prompt.

    Raises:
        InputError: another model, other weights, another image size or text length.
    """
    facts = {
        label: {
            "model": f"{m.model.name} ({m.model.config_digest[:8]})",
            "image size": f"{m.geometry.height} x {m.geometry.width}",
            "text length": m.geometry.text_tokens,
        }
        for label, m in manifests.items()
    }
    first, *others = facts
    for other in others:
        if differing := [name for name, value in facts[first].items() if facts[other][name] != value]:
            raise InputError(
                "these bundles cannot be compared: another " + " and another ".join(differing),
                found=f"{other}: {', '.join(str(facts[other][n]) for n in differing)}",
                expected=f"as {first}: {', '.join(str(facts[first][n]) for n in differing)}",
            )
    by_dtype: dict[str, tuple[str, dict[str, str]]] = {}
    for label, m in manifests.items():
        digests = {f.path: f.sha256 for f in m.files}
        stored = {w.path: digests[w.path] for w in m.weights}
        named, known = by_dtype.setdefault(m.dtype, (label, stored))
        if differing := [path for path in stored.keys() & known.keys() if stored[path] != known[path]]:
            raise InputError(
                "these bundles cannot be compared: their models have other weights",
                found=f"{label}: another {', '.join(sorted(differing))} than {named}",
                remedy="build both from the same checkpoint",
            )


# --- the reference ----------------------------------------------------------------------------------------------------


def described_model(manifest: Manifest) -> ModelAdapter:
    """The bundle's model without weights, on the meta device.

    Raises:
        MissingDependencyError: the model's code is not installed.
    """
    with needed("evaluating needs the model's own code", "eval"):
        family = manifest.model.adapter()
    return family.from_configs(manifest.model.configs, manifest.model.settings, DTYPES[manifest.dtype])


def full_stage(manifest: Manifest) -> str | None:
    """Name of the bundle's engine that runs all tokens, if there is one."""
    tokens = manifest.geometry.tokens
    return next((f"stage{s.index}" for s in manifest.schedule.stages if s.tokens == tokens), None)


def reference_source(path: Path, steps: int) -> Source:
    """The ordinary sampler on a bundle's own engines: all tokens, the model's own noise levels.

    It needs no build and no other weights, because a bundle has an engine for all tokens, and the condition engine
    treats noise levels one by one: it is run as many times as the steps take.

    Raises:
        InputError: the bundle has no engine for all tokens.
    """
    manifest = read_manifest(path)
    stage = full_stage(manifest)
    if stage is None:
        raise InputError(
            f"{path} has no engine for all tokens to make the reference with",
            found=", ".join(f"stage{s.index}: {s.tokens} tokens" for s in manifest.schedule.stages),
            remedy="give a dense bundle: `jitexport build --speedup 1 -o REF`, then --reference REF",
        )
    sigmas = described_model(manifest).native_sigmas(steps)
    if manifest.constants:
        raise InputError(
            f"{path} has what depends on the noise levels built in",
            found=", ".join(c.name for c in manifest.constants),
            remedy="give a dense bundle: `jitexport build --speedup 1 -o REF`, then --reference REF",
        )
    schedule = manifest.schedule
    return Source(
        label=f"reference-{steps}",
        method="reference",
        description=f"all tokens, {steps} steps, {manifest.backend} {manifest.precision}, engines of {path.name}",
        key=f"{bundle_key(manifest)} reference {steps}",
        steps=steps,
        tflops=schedule.reference_tflops / schedule.reference_steps * steps,
        open=lambda: dense_pipeline(quiet(load(path)), stage, sigmas),
    )


def dense_pipeline(pipe: Pipeline, stage: str, sigmas: tuple[float, ...]) -> Pipeline:
    """A pipeline's engines as the ordinary sampler with other noise levels; `stage` is its engine for all tokens."""
    dense = copy.copy(pipe)
    dense.schedule = StageSchedule((Stage(0, pipe.geometry.grid.tokens, len(sigmas) - 1),), sigmas)
    method = registry.method("dense")
    dense.method = method(pipe.geometry.grid, method.options("default"))
    dense.cache = EVERY_STEP
    dense.engines = {
        "text": pipe.engines["text"],
        "condition": RepeatedCondition(pipe.engines["condition"]),
        "stage0": pipe.engines[stage],
        "decode": pipe.engines["decode"],
    }
    return dense


class RepeatedCondition(Engine):
    """A condition engine, which takes a fixed number of noise levels, run as often as longer lists need."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.spec = engine.spec
        self.place = [s.name for s in engine.spec.inputs].index("sigmas")
        self.size = engine.spec.inputs[self.place].shape[0]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """As the engine, for any number of noise levels."""
        sigmas = inputs[self.place]
        parts: list[list[Tensor]] = [[] for _ in self.spec.outputs]
        for some in sigmas.split(self.size):
            padded = torch.cat([some, some[-1:].expand(self.size - len(some))])
            outputs = self.engine(*inputs[: self.place], padded, *inputs[self.place + 1 :])
            for found, spec, value in zip(parts, self.spec.outputs, outputs, strict=True):
                found.append(value[: len(some)].clone() if spec.per_step else value)
        joined = zip(parts, self.spec.outputs, strict=True)
        return tuple(torch.cat(found) if spec.per_step else found[-1] for found, spec in joined)


# --- images and timings -----------------------------------------------------------------------------------------------


def missing_images(source: Source, prompts: PromptSet, folder: Path) -> list[tuple[str, int, Path]]:
    """(prompt, seed, file) of the images that are not there yet, or that another source made."""
    return [
        (text, seed, folder / path)
        for text, seed, path in prompts
        if _marked(folder / path) != {"source": source.key, "prompt": text, "seed": seed}
    ]


def _marked(path: Path) -> Any:
    with suppress(OSError, ValueError, KeyError), Image.open(path) as image:
        return json.loads(image.text[MARK])  # type: ignore[attr-defined]  # of PNGs
    return None


def make_images(
    pipe: Pipeline, source: Source, missing: Sequence[tuple[str, int, Path]]
) -> Iterator[int]:
    """Make and store images, a batch of the pipeline's at a time; yields how many each batch made."""
    for start in range(0, len(missing), pipe.batch_size):
        chunk = missing[start : start + pipe.batch_size]
        images = pipe([text for text, _, _ in chunk], generator=generators(seed for _, seed, _ in chunk)).images
        for image, (text, seed, path) in zip(images, chunk, strict=True):
            mark = PngInfo()
            mark.add_text(MARK, json.dumps({"source": source.key, "prompt": text, "seed": seed}))
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{os.getpid()}.part")
            image.save(unfinished, format="PNG", pnginfo=mark)
            unfinished.replace(path)
        yield len(chunk)


def generators(seeds: Iterator[int]) -> list[torch.Generator]:
    """One generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@dataclass(frozen=True)
class Latency:
    """Seconds of an image, prompt to picture: median and 90th percentile of `images` after one that is not counted.

    `conditions` are those under which they were taken: see `jitexport.profile.conditions`.
    """

    median: float
    p90: float
    images: int
    conditions: dict[str, Any]


def stored_latency(source: Source, file: Path) -> Latency | None:
    """A latency that was measured before, of the same source."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored.pop("source") == source.key:
            return Latency(**stored)
    return None


def measure_latency(pipe: Pipeline, source: Source, prompts: PromptSet, file: Path, images: int) -> Latency:
    """Time `images` images of the first prompts, batch by batch, and store the result in `file`."""
    jobs = [(text, seed) for text, seed, _ in prompts]
    batch = pipe.batch_size
    seconds = []
    for i in range(-(-images // batch) + 1):
        chunk = [jobs[(i * batch + j) % len(jobs)] for j in range(batch)]
        start = time.perf_counter()
        pipe([text for text, _ in chunk], generator=generators(seed for _, seed in chunk))
        seconds.append((time.perf_counter() - start) / batch)
    seconds = sorted(seconds[1:])  # the first one warms up
    p90 = seconds[round(0.9 * (len(seconds) - 1))]
    latency = Latency(statistics.median(seconds), p90, len(seconds) * batch, conditions())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"source": source.key, **vars(latency)}, indent=1), encoding="utf-8")
    return latency


def relabelled(source: Source, label: str) -> Source:
    """The source under another name."""
    return replace(source, label=label)
