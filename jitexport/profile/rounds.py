"""Ways of making images, measured in turns: one image of each in every round.

On a machine whose speed changes from minute to minute, what is measured minutes apart cannot be compared. What is
compared here is what one round has of each way.
"""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from PIL import Image

from jitexport.png import encode_all
from jitexport.profile.measure import PeakMemory, Timing, matmul_rate, now, turns
from jitexport.profile.phases import (
    EngineTiming,
    Profile,
    Ratio,
    Recorder,
    Span,
    Speedup,
    StepTiming,
    call_seconds,
    step_engine,
)
from jitexport.runtime import Pipeline


class Way(ABC):
    """A way of making a batch of images.

    Attributes:
        label: what a report calls it.
        seconds: from prompt to PNG bytes, of each batch that counts.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.seconds: list[float] = []

    @abstractmethod
    def run(self, seed: int, *, counted: bool) -> None:
        """Make the images of a seed, and keep what was measured if it counts."""

    @abstractmethod
    def profile(self, ratio: Ratio) -> Profile:
        """What was measured; at least one batch counted."""


class CallWay(Way):
    """A function from a seed to images, timed as a whole, PNG encoding included."""

    def __init__(self, call: Callable[[int], Sequence[Image.Image]], label: str, device: torch.device) -> None:
        super().__init__(label)
        self.call = call
        self.device = device
        self.batch = 0

    def run(self, seed: int, *, counted: bool) -> None:
        start = now(self.device)
        images = self.call(seed)
        encode_all(images)
        self.batch = len(images)
        if counted:
            self.seconds.append(now(self.device) - start)

    def profile(self, ratio: Ratio) -> Profile:
        return Profile(self.label, self.batch, len(self.seconds), Timing.of(self.seconds), self.seconds, ratio)


class PipelineWay(Way):
    """A pipeline, timed phase by phase.

    On a GPU the device is waited for at every span, so phases add up to more than a call takes; the total is that of
    calls of their own.

    Args:
        flops: of one run of each engine, by name.
        speedup: the ordinary pipeline's steps, and the speed-up over them that FLOPs predict.
    """

    def __init__(
        self, pipe: Pipeline, label: str, prompt: str, *, flops: Mapping[str, float] | None = None,
        speedup: tuple[int, float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(label)
        self.pipe, self.prompt, self.flops, self.speedup = pipe, prompt, flops or {}, speedup
        self.recorder = Recorder(pipe)
        self.images: list[list[Span]] = []
        self.products = [self._products()]
        self.stages = {stage.engine(action): stage for action, stage in pipe.schedule.runs}
        #: Engines that the loop runs.
        self.inner = [*self.stages, "preview"] if "preview" in pipe.engines else [*self.stages]

    def _products(self) -> float:
        with self.pipe.on_threads():
            return matmul_rate(self.pipe.dtype, self.pipe.device)

    @torch.inference_mode()
    def run(self, seed: int, *, counted: bool) -> None:
        with self.pipe.on_threads():
            spans = self.recorder.image(self.prompt, seed)
            on_cpu = self.pipe.device.type == "cpu"
            total = spans[-1].end if on_cpu else call_seconds(self.pipe, self.prompt, seed)
        if counted:
            self.images.append(spans)
            self.seconds.append(total)

    def profile(self, ratio: Ratio) -> Profile:
        self.products.append(self._products())
        names = ["text", "condition", "draw", *self.inner, "transition", "step", "decode", "image"]
        sums = [{name: sum(s.seconds for s in spans if s.phase == name) for name in names} for spans in self.images]
        for one in sums:
            one["denoise"] = sum(one[name] for name in ("draw", *self.inner, "transition", "step"))
        phases = {name: Timing.of([one[name] for one in sums]) for name in (*names, "denoise")}
        engines = self._engines()
        return Profile(
            label=self.label,
            batch=self.pipe.batch_size,
            repeats=len(self.seconds),
            total=Timing.of(self.seconds),
            seconds=self.seconds,
            ratio=ratio,
            phases=phases,
            engines=engines,
            steps=self._steps(),
            overhead=statistics.median(1 - sum(one[name] for name in self.inner) / one["denoise"] for one in sums),
            speedup=self._speedup(engines, phases["denoise"].median),
            products=self.products,
            ceiling=max(self.products),
            timeline=self.images[self.seconds.index(statistics.median_low(self.seconds))],
        )

    def _engines(self) -> list[EngineTiming]:
        runs: dict[str, list[float]] = {}
        for spans in self.images:
            for span in spans:
                runs.setdefault(span.phase, []).append(span.seconds)
        found = []
        for name in ("text", "condition", *self.inner, "decode"):
            timing, flops = Timing.of(runs[name]), self.flops.get(name)
            tokens = self.stages[name].tokens if name in self.stages else None
            rate = None if flops is None else flops / timing.median
            share = None if rate is None else rate / max(self.products)
            found.append(EngineTiming(name, len(runs[name]) // len(self.images), tokens, timing, flops, rate, share))
        return found

    def _steps(self) -> list[StepTiming]:
        """Engine and loop seconds of each step over all images; a stage's first step has its transition in the loop."""
        found = []
        for stage, steps in self.pipe.schedule:
            for step in steps:
                name = step_engine(step, stage)
                inside = [[s for s in spans if s.step == step.index] for spans in self.images]
                engine = [sum(s.seconds for s in spans if s.phase == name) for spans in inside]
                loop = [sum(s.seconds for s in spans if s.phase != name) for spans in inside]
                found.append(StepTiming(step.index, name, step.sigma, Timing.of(engine), Timing.of(loop)))
        return found

    def _speedup(self, engines: Sequence[EngineTiming], denoise: float) -> Speedup | None:
        if self.speedup is None:
            return None
        steps, predicted = self.speedup
        full = self.pipe.schedule.engines[-1].name
        run = next(e.run.median for e in engines if e.name == full)
        # A step of the ordinary pipeline is guided as this one is, in as many passes.
        return Speedup(predicted, steps * self.recorder.passes * run / denoise)


def profile_ways(
    ways: Sequence[Way], *, repeats: int, warmup: int = 1, status: Callable[[str], None] = lambda text: None
) -> list[Profile]:
    """Measure ways in turns, one batch of each in every round; ratios are to the first of them.

    Args:
        repeats, warmup: rounds measured, and rounds before them that are not.
        status: told what is being done.
    """
    for number, way, counted in turns(ways, repeats, warmup):
        status(f"round {number + 1} of {warmup + repeats}: {way.label}")
        way.run(number, counted=counted)
    return [way.profile(Ratio.of(ways[0].seconds, way.seconds)) for way in ways]


def profile_pipeline(
    pipe: Pipeline, label: str, prompt: str, *, flops: Mapping[str, float] | None = None,
    speedup: tuple[int, float] | None = None, repeats: int, warmup: int = 1,
) -> Profile:  # fmt: skip
    """One pipeline alone, phase by phase, with the most memory that it had: see `PipelineWay` and `profile_ways`."""
    way = PipelineWay(pipe, label, prompt, flops=flops, speedup=speedup)
    memory = PeakMemory(pipe.device)
    [profile] = profile_ways([way], repeats=repeats, warmup=warmup)
    return replace(profile, peak_memory=memory.peak())
