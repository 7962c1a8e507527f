"""Where the time of an image goes, and how it compares with running the same model otherwise.

Everything that is compared is measured in one process, after warm-up, as medians over repeats.
"""

from __future__ import annotations

import copy
import io
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from jitexport.backends.base import Engine
from jitexport.bundle.manifest import Manifest
from jitexport.errors import InputError
from jitexport.runtime import Pipeline


class TimedEngine:
    """An engine that notes the seconds of every run."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.spec = engine.spec
        self.seconds: list[float] = []

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        with Stopwatch(self.engine.device, self.seconds):
            return self.engine(*inputs)


class Stopwatch:
    """Context manager that appends elapsed seconds to a list, after the device has finished."""

    def __init__(self, device: torch.device, sink: list[float]) -> None:
        self.device = device
        self.sink = sink

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> Stopwatch:
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.sink.append(self._now() - self._start)


@dataclass(frozen=True)
class Timing:
    """Seconds over repeats: median and 90th percentile."""

    median: float
    p90: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """From single measurements."""
        ordered = sorted(seconds)
        return cls(statistics.median(ordered), ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))])


@dataclass(frozen=True)
class StageTiming:
    """A stage's steps: seconds of one step, and what they amount to in floating-point operations per second."""

    name: str
    tokens: int
    steps: int
    step: Timing
    gflops_per_second: float


@dataclass(frozen=True)
class Profile:
    """One way of making an image.

    Attributes:
        total: prompt to PNG bytes, of `batch` images.
        phases: seconds by phase: text, condition, stages, loop (lifts, transitions, Euler steps, position tables:
            denoising without its engines), decode, png.
        overhead: share of the loop in denoising.
    """

    label: str
    batch: int
    total: Timing
    phases: dict[str, Timing] = field(default_factory=dict)
    stages: list[StageTiming] = field(default_factory=list)
    overhead: float | None = None


def png(image: Image.Image) -> bytes:
    """An image as PNG bytes."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def profile_pipeline(
    pipe: Pipeline, label: str, step_flops: dict[str, float], prompt: str, *, repeats: int, warmup: int = 1
) -> Profile:
    """Time every phase of a pipeline.

    Args:
        step_flops: FLOPs of one image's step, by stage name.
        repeats, warmup: images measured, and images before them that are not.
    """
    timed = copy.copy(pipe)
    timed.engines = {name: TimedEngine(engine) for name, engine in pipe.engines.items()}
    prompts = [prompt] * pipe.batch_size
    samples: dict[str, list[float]] = {}
    stage_steps: dict[str, list[float]] = {s.name: [] for s in pipe.schedule.stages}

    @torch.inference_mode()
    def once(seed: int) -> dict[str, float]:
        for engine in timed.engines.values():
            engine.seconds.clear()
        spans: dict[str, list[float]] = {"encode": [], "denoise": [], "decode": [], "png": [], "total": []}
        generators = [torch.Generator().manual_seed(seed + i) for i in range(pipe.batch_size)]
        with Stopwatch(pipe.device, spans["total"]):
            with Stopwatch(pipe.device, spans["encode"]):
                condition = timed.encode(prompts, pipe.defaults.guidance_scale)
            with Stopwatch(pipe.device, spans["denoise"]):
                latents = timed.denoise(condition, timed.draw(generators))
            with Stopwatch(pipe.device, spans["decode"]):
                images = timed.to_images(timed.decode(latents), "pil")
            with Stopwatch(pipe.device, spans["png"]):
                for image in images:
                    png(image)
        text = sum(timed.engines["text"].seconds)
        stages = {s.name: sum(timed.engines[s.name].seconds) for s in pipe.schedule.stages}
        return {
            "text": text,
            "condition": spans["encode"][0] - text,
            **stages,
            "loop": spans["denoise"][0] - sum(stages.values()),
            "decode": spans["decode"][0],
            "png": spans["png"][0],
            "total": spans["total"][0],
            "denoise": spans["denoise"][0],
        }

    for i in range(warmup + repeats):
        measured = once(i)
        if i >= warmup:
            for name, value in measured.items():
                samples.setdefault(name, []).append(value)
            for name, steps in stage_steps.items():
                steps.extend(timed.engines[name].seconds)

    overhead = statistics.median(a / b for a, b in zip(samples["loop"], samples["denoise"], strict=True))
    return Profile(
        label=label,
        batch=pipe.batch_size,
        total=Timing.of(samples.pop("total")),
        phases={name: Timing.of(values) for name, values in samples.items()},
        stages=[
            StageTiming(
                s.name,
                s.tokens,
                s.steps,
                Timing.of(stage_steps[s.name]),
                pipe.batch_size * step_flops[s.name] / statistics.median(stage_steps[s.name]) / 1e9,
            )
            for s in pipe.schedule.stages
        ],
        overhead=overhead,
    )


def profile_call(call: Callable[[int], Sequence[Image.Image]], label: str, *, repeats: int, warmup: int = 1) -> Profile:
    """Time a function from a seed to images as a whole, PNG encoding included."""
    seconds: list[float] = []
    count = 0
    for i in range(warmup + repeats):
        start = time.perf_counter()
        images = call(i)
        for image in images:
            png(image)
        if i >= warmup:
            seconds.append(time.perf_counter() - start)
        count = len(images)
    return Profile(label, count, Timing.of(seconds))


def diffusers_profile(manifest: Manifest, prompt: str, *, steps: int, repeats: int) -> Profile:
    """The model's own diffusers pipeline, eager, fp32, at the bundle's image size.

    Raises:
        InputError: the bundle's model is not at hand.
    """
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model_folder(manifest), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    geometry, defaults = manifest.geometry, manifest.defaults

    def call(seed: int) -> Sequence[Image.Image]:
        return pipe(
            [prompt] * manifest.batch,
            height=geometry.height,
            width=geometry.width,
            num_inference_steps=steps,
            max_sequence_length=geometry.text_tokens,
            guidance_scale=defaults.guidance_scale or 0.0,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(manifest.batch)],
        ).images

    return profile_call(call, f"diffusers, {steps} steps, eager fp32", repeats=repeats)


def eager_profile(manifest: Manifest, prompt: str, *, dtype: str, repeats: int) -> Profile:
    """The bundle's own schedule and stage modules, not compiled."""
    from jitexport.build import eager_pipeline
    from jitexport.models.sources import ModelSource, load_adapter
    from jitexport.specs import DTYPES

    source = ModelSource(manifest.model.name, folder=model_folder(manifest))
    adapter = load_adapter(source, DTYPES[dtype], manifest.model.settings)
    pipe = eager_pipeline(
        adapter,
        manifest.schedule.schedule(),
        manifest.method.name,
        manifest.method.options,
        batch=manifest.batch,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    return profile_pipeline(
        pipe, f"{manifest.method.name}, eager {dtype}", step_flops(manifest), prompt, repeats=repeats
    )


def model_folder(manifest: Manifest) -> Path:
    """The diffusers folder that a bundle was built from.

    Raises:
        InputError: it is not on this machine.
    """
    from jitexport.models.sources import download, find_source

    source = find_source(manifest.model.source)
    folder = source.folder or download(source)
    if not folder.is_dir():
        raise InputError("the bundle's model is not at hand", found=manifest.model.source)
    return folder


def step_flops(manifest: Manifest) -> dict[str, float]:
    """FLOPs of one image's step, by stage name."""
    return {f"stage{s.index}": s.step_tflops * 1e12 for s in manifest.schedule.stages}


def conditions() -> dict[str, Any]:
    """Date, hardware and versions, to stand beside every figure."""
    return {
        "date": date.today().isoformat(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
