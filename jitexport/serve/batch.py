"""One batch: a call of the pipeline, watched step by step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from jitexport.runtime import Pipeline
from jitexport.serve import pictures
from jitexport.serve.errors import of_failure
from jitexport.serve.jobs import Event, Failed, Finished, Job, Partial, Step
from jitexport.serve.metrics import Metrics

logger = logging.getLogger(__name__)


class Abandoned(Exception):
    """Nobody waits for a batch any more."""


@dataclass(eq=False)
class Waiting:
    """A job in the queue or in a batch.

    Attributes:
        emit: tells its events; from any thread.
        arrived: by `time.monotonic`.
        gone: nobody waits for it any more.
        partials: previews that were sent.
    """

    job: Job
    emit: Callable[[Event], None]
    arrived: float = field(default_factory=time.monotonic)
    gone: bool = False
    partials: int = 0


class Batch:
    """Images that are made in one call.

    Args:
        encoders: one thread, so that the events of an image keep their order; pictures are encoded there, while the
            next batch computes.
    """

    def __init__(self, members: Sequence[Waiting], pipe: Pipeline, metrics: Metrics, encoders: Executor) -> None:
        self.members = members
        self.pipe = pipe
        self.metrics = metrics
        self._encoders = encoders
        self._previews = [pictures.preview_steps(pipe.schedule, w.job.partial_images) for w in members]
        self._since = time.monotonic()
        self._marks: list[float] = []

    def run(self) -> None:
        """Make the images and tell them.

        Raises:
            Abandoned: nobody waits for any of them.
            JitExportError: the call failed; nothing final was told.
        """
        jobs = [w.job for w in self.members]
        first = jobs[0]
        self._since = time.monotonic()
        # Without a callback the loop may run as one CUDA graph, which no one can look into.
        watched = self.pipe.graph is None or any(j.steps or j.partial_images for j in jobs)
        images = self.pipe(
            [j.prompt for j in jobs],
            negative_prompt=None if first.negative_prompt is None else [j.negative_prompt or "" for j in jobs],
            guidance_scale=first.guidance_scale,
            true_cfg_scale=first.true_cfg_scale,
            generator=[torch.Generator().manual_seed(j.seed) for j in jobs],
            callback_on_step_end=self._look if watched else None,
            callback_on_step_end_tensor_inputs=self._wanted(jobs),
        ).images
        done = time.monotonic()
        for phase, seconds in self._phases(done).items():
            self.metrics.seconds.labels(first.bundle, phase).observe(seconds)
        self.metrics.fill.labels(first.bundle).observe(len(jobs) / self.pipe.batch_size)
        for waiting, image in zip(self.members, images, strict=True):
            self._encoders.submit(self._finish, waiting, image, done)

    @staticmethod
    def _wanted(jobs: Sequence[Job]) -> list[str]:
        return ["clean"] * any(j.partial_images for j in jobs) + ["places"] * any(j.steps for j in jobs)

    def _phases(self, done: float) -> dict[str, float]:
        marks = [self._since, *(self._marks or [done]), done]
        return {"first_step": marks[1] - marks[0], "steps": marks[-2] - marks[1], "decode": marks[-1] - marks[-2]}

    def _look(self, pipe: Pipeline, step: int, timestep: float, tensors: dict[str, Tensor]) -> None:
        """After every step: go on only for somebody, and tell those who want to know."""
        self._marks.append(time.monotonic())
        if all(w.gone for w in self.members):
            raise Abandoned
        grid = pipe.geometry.grid
        if "places" in tensors:
            digits = pictures.detail(tensors["places"], grid)
            for waiting, detail in zip(self.members, digits, strict=False):
                if waiting.job.steps:
                    rows, columns = grid.shape
                    tokens, action = tensors["places"].shape[1], pipe.schedule.action(step)
                    shape = (rows, columns)
                    waiting.emit(Step(step + 1, pipe.schedule.nfe, action, tokens, grid.tokens, shape, detail))
        wanting = [i for i, w in enumerate(self.members) if not w.gone and step in self._previews[i]]
        if not wanting:
            return
        shown = pipe.to_images(pipe.decode(tensors["clean"]), "pil")
        for i in wanting:
            index = list(self._previews[i]).index(step)
            self._encoders.submit(self._preview, self.members[i], index, shown[i])

    def _preview(self, waiting: Waiting, index: int, image: Image.Image) -> None:
        if index == waiting.partials and not waiting.gone:  # not again, where a batch is tried once more
            waiting.partials += 1
            waiting.emit(Partial(index, pictures.encode(image, waiting.job.format, waiting.job.compression)))

    def _finish(self, waiting: Waiting, image: Image.Image, done: float) -> None:
        job = waiting.job
        if waiting.gone:
            self.metrics.abandoned.labels(job.bundle).inc()
            return
        try:
            data = pictures.encode(image, job.format, job.compression)
            tokens, warnings = _read(self.pipe, job)
            encoded = time.monotonic() - done
            seconds = {"queue": self._since - waiting.arrived, **self._phases(done), "encode": encoded}
            for phase in ("queue", "encode"):
                self.metrics.seconds.labels(job.bundle, phase).observe(seconds[phase])
            self.metrics.images.labels(job.bundle).inc()
            waiting.emit(
                Finished(data, seconds, len(self.members), tokens, self.pipe.geometry.grid.tokens, tuple(warnings))
            )
        except Exception as error:  # this image's own: the others have theirs
            logger.exception("an image of %s was made, and could not be encoded", job.bundle)
            waiting.emit(Failed(of_failure(error)))


def _read(pipe: Pipeline, job: Job) -> tuple[int, list[str]]:
    """Tokens of the prompt, of the reader that takes most of it, and what was cut off."""
    encoded = [reader.encode([job.prompt]) for reader in pipe.readers]
    longest = max((int(e.mask.sum()) for e in encoded), default=0)
    if encoded and all(e.cut for e in encoded):
        return longest, [f"the prompt was cut to {longest} tokens"]
    return longest, []
