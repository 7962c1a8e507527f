"""A pipeline, phase by phase and step by step."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jitexport.backends.base import Engine
from jitexport.png import encode_all
from jitexport.profile.measure import Timing, now
from jitexport.runtime import Pipeline
from jitexport.sampler import Look
from jitexport.schedule import FORECAST, Stage, Step

if TYPE_CHECKING:
    from jitexport.bundle.manifest import Manifest


@dataclass(frozen=True)
class Span:
    """A stretch of one image's time.

    Attributes:
        phase: text, condition, draw, the name of a stage's engine (a run of it), transition, preview (an engine that a
            transition runs), step, decode or image.
        start, end: seconds since the image began.
        step: of the denoising loop; None outside it.
    """

    phase: str
    start: float
    end: float
    step: int | None = None

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


@dataclass(frozen=True)
class StepTiming:
    """One step of the denoising loop: its engine, and what the loop does around it: Euler step, transition.

    `stage` is the engine's name, "forecast" where the step runs none.
    """

    step: int
    stage: str
    sigma: float
    engine: Timing
    loop: Timing


@dataclass(frozen=True)
class EngineTiming:
    """Runs of one engine.

    Attributes:
        runs: of it for one batch of images.
        tokens: that a stage's engine takes; None for the others.
        run: seconds of one run.
        flops: of one run, counted on meta tensors; None where the model's code is not installed.
        flops_per_second: achieved, from the median.
        ceiling_share: of the machine's own matrix products in the same dtype.
    """

    name: str
    runs: int
    tokens: int | None
    run: Timing
    flops: float | None
    flops_per_second: float | None
    ceiling_share: float | None


@dataclass(frozen=True)
class Speedup:
    """Of denoising over the reference steps at all tokens, run by the bundle's own full engine.

    Attributes:
        predicted: from FLOPs.
        realised: reference steps x seconds of one run of the full stage / seconds of denoising.
    """

    predicted: float
    realised: float

    @property
    def share(self) -> float:
        """Realised over predicted."""
        return self.realised / self.predicted


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the first way another one is: taken within a round, then over rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, first: Sequence[float], mine: Sequence[float]) -> Ratio:
        """From the seconds of both, round by round."""
        ratios = [a / b for a, b in zip(first, mine, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True)
class Profile:
    """One way of making an image.

    Attributes:
        total: prompt to PNG bytes, of `batch` images.
        seconds: the same, round by round.
        ratio: to the way that was measured first in every round; 1 for that one itself.
        phases: seconds of each phase of `Span`, and of denoise: draw, stages, transitions and steps together.
        overhead: share of denoising that is not its engines.
        products: FLOP/s of this machine's matrix products in the engines' dtype, before and after the rounds.
        ceiling: the largest of these.
        peak_memory: bytes, of the process and of the GPU.
        timeline: the image whose total is the median.
    """

    label: str
    batch: int
    repeats: int
    total: Timing
    seconds: list[float]
    ratio: Ratio
    phases: dict[str, Timing] = field(default_factory=dict)
    engines: list[EngineTiming] = field(default_factory=list)
    steps: list[StepTiming] = field(default_factory=list)
    overhead: float | None = None
    speedup: Speedup | None = None
    products: list[float] = field(default_factory=list)
    ceiling: float | None = None
    peak_memory: dict[str, int | None] = field(default_factory=dict)
    timeline: list[Span] = field(default_factory=list)


class Recorder:
    """A pipeline whose engines and steps leave spans behind. It shares everything else with the original."""

    def __init__(self, pipe: Pipeline) -> None:
        self.device = pipe.device
        self.schedule = pipe.schedule
        self.runs: list[Span] = []
        self.step_ends: list[float] = []
        self.passes = 1
        self.pipe = copy.copy(pipe)
        self.pipe.engines = {name: _Recorded(engine, self) for name, engine in pipe.engines.items()}

    def image(self, prompt: str, seed: int) -> list[Span]:
        """Make one batch of images, up to PNG bytes; its spans in order, a transition before each stage's steps."""
        pipe, batch = self.pipe, self.pipe.batch_size
        self.runs, self.step_ends = [], []
        begin = now(self.device)
        condition, guided = pipe.prepare([prompt] * batch)
        self.passes = 1 if guided is None or pipe.passes == 2 else 2
        encoded = now(self.device)
        draws = pipe.draw([torch.Generator().manual_seed(seed + i) for i in range(batch)])
        draws = draws.each(lambda t: t.to(self.device))
        drawn = now(self.device)
        latents = pipe.denoise(condition, draws, self._on_step, guided=guided)
        denoised = now(self.device)
        pictures = pipe.decode(latents)
        decoded = now(self.device)
        encode_all(pipe.to_images(pictures, "pil"))
        end = now(self.device)

        spans = [
            *self._encoding(begin, encoded),
            Span("draw", encoded, drawn),
            *self._loop([run for run in self.runs if drawn <= run.start < denoised], drawn),
            Span("decode", denoised, decoded),
            Span("image", decoded, end),
        ]
        return [replace(s, start=s.start - begin, end=s.end - begin) for s in spans]

    def _encoding(self, begin: float, end: float) -> Iterator[Span]:
        """Spans of the text and condition engines, of each pass, and of what lies before and behind them."""
        runs = [run for run in self.runs if run.start < end]
        for i, run in enumerate(runs, start=1):
            until = run.end if i < len(runs) else end
            yield Span(run.phase, begin, until)
            begin = until

    def _on_step(self, step: int, sigma: float, look: Look) -> None:
        self.step_ends.append(now(self.device))

    def _loop(self, runs: Sequence[Span], begin: float) -> list[Span]:
        """Spans of the loop: what lies before a stage's first engine run is its transition, the rest are steps."""
        spans = []
        for stage, steps in self.schedule:
            before = "transition"
            for step in steps:
                end = self.step_ends[step.index]
                for run in [r for r in runs if begin <= r.start < end]:
                    spans += [Span(before, begin, run.start, step.index), replace(run, step=step.index)]
                    before, begin = "step" if run.phase == step_engine(step, stage) else before, run.end
                spans.append(Span(before, begin, end, step.index))
                before, begin = "step", end
        return spans


class _Recorded(Engine):
    """An engine that leaves a span at every run."""

    def __init__(self, engine: Engine, recorder: Recorder) -> None:
        self._engine = engine
        self._recorder = recorder
        self.spec = engine.spec
        self.device = engine.device

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        start = now(self.device)
        outputs = self._engine(*inputs)
        self._recorder.runs.append(Span(self.spec.name, start, now(self.device)))
        return outputs


def step_engine(step: Step, stage: Stage) -> str:
    """Name of the engine that a step runs; "forecast" for none."""
    return FORECAST if step.action == FORECAST else stage.engine(step.action)


def call_seconds(pipe: Pipeline, prompt: str, seed: int) -> float:
    """Seconds of one ordinary call for a full batch, up to PNG bytes."""
    begin = now(pipe.device)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(pipe.batch_size)]
    encode_all(pipe([prompt] * pipe.batch_size, generator=generators).images)
    return now(pipe.device) - begin


def engine_flops(manifest: Manifest) -> dict[str, float]:
    """FLOPs of one run of each engine, by name, counted on meta tensors; empty where the model's code is missing."""
    from jitexport.errors import MissingDependencyError
    from jitexport.flops import count_flops
    from jitexport.quant import unquantized
    from jitexport.specs import DTYPES

    model = manifest.model
    try:
        adapter = model.adapter().from_configs(model.configs, unquantized(model.settings), DTYPES[manifest.dtype])
    except (ImportError, MissingDependencyError):
        return {}
    return {e.name: count_flops(adapter.module(e.name), e.spec()) for e in manifest.engines}


@torch.inference_mode()
def chrome_trace(pipe: Pipeline, prompt: str, path: Path) -> None:
    """Write a trace of one call, after one that is not traced, for chrome://tracing or Perfetto.

    Every operator and kernel that PyTorch sees is in it; an AOTInductor engine is one block, named after the engine.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    class Named(Engine):
        def __init__(self, engine: Engine) -> None:
            self.engine = engine
            self.spec = engine.spec

        def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
            with record_function(f"engine {self.spec.name}"):
                return self.engine(*inputs)

    named = copy.copy(pipe)
    named.engines = {name: Named(engine) for name, engine in pipe.engines.items()}
    call_seconds(named, prompt, 0)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if pipe.device.type == "cuda" else [])
    with profile(activities=activities) as recorded:
        call_seconds(named, prompt, 1)
    recorded.export_chrome_trace(str(path))
