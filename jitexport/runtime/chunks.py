"""The images of a call, as many at a time as the engines take, and where their numbers ceased to be finite."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jitexport.calls import Call
from jitexport.console import PlainConsole, Progress
from jitexport.crowding import watch
from jitexport.errors import NumericalError
from jitexport.methods.base import Draws
from jitexport.runtime.callbacks import Watcher
from jitexport.runtime.conditions import Condition, Guided
from jitexport.runtime.phases import Phases
from jitexport.runtime.request import Request
from jitexport.sampler import Look


@dataclass(frozen=True)
class Chunk:
    """What exactly `batch_size` images are made of."""

    embeddings: Sequence[Tensor]
    condition: Condition
    draws: Draws
    guided: Guided | None

    @classmethod
    def of(cls, pipe: Phases, request: Request, draws: Draws, rows: Sequence[int]) -> Chunk:
        """Those rows of a call."""
        drawn = draws.each(lambda t: t[rows].to(pipe.device))
        embeddings = request.texts.embeddings(pipe, rows)
        return cls(embeddings, pipe.condition(embeddings, request.distilled), drawn, pipe.guided(request, rows))


def make(
    pipe: Phases, call: Call, request: Request, draws: Draws, watcher: Watcher | None, *,
    latents_only: bool, show_progress: bool | None,
) -> list[Tensor]:
    """The images of a call, or its latents, `batch_size` at a time; the last chunk repeats its last image.

    Args:
        show_progress: on stderr, unless that is closed; None where it is a terminal.

    Raises:
        InputError: guidance that the pipeline's cache does not take, or an answer of the watcher's.
        NumericalError: an image that would not be finite numbers.
    """
    results, size, count = [], pipe.batch_size, request.texts.count
    console = PlainConsole(stderr=True)  # of this call's own: a console has one bar at a time
    show = _is_terminal(sys.stderr) if show_progress is None else show_progress and _is_open(sys.stderr)
    with Progress(console=console, transient=True, disable=not show) as progress:
        task = progress.add_task("denoising", total=-(-count // size) * pipe.schedule.nfe)
        if pipe.device.type == "cpu":
            watch.begin()
        for start in range(0, count, size):
            wanted = min(size, count - start)
            rows = [start + min(i, wanted - 1) for i in range(size)]
            chunk = Chunk.of(pipe, request, draws, rows)
            pictures = _run(pipe, call, chunk, watcher, latents_only, lambda steps: progress.advance(task, steps))
            results.append(pictures[:wanted])
    return results


def _run(
    pipe: Phases, call: Call, chunk: Chunk, watcher: Watcher | None, latents_only: bool,
    advance: Callable[[int], None],
) -> Tensor:
    """The images of a chunk, or its latents."""

    def on_step(i: int, sigma: float, look: Look) -> Tensor | None:
        advance(1)
        watch.look()
        return None if watcher is None else watcher.after(i, look, chunk.embeddings)

    at_once = pipe.at_once(chunk.guided) and watcher is None and not call.interrupted
    healthy: dict[int, Tensor] | None = None if at_once else {}
    y = pipe.denoise(
        chunk.condition, chunk.draws, None if at_once else on_step, lambda: call.interrupted, healthy, chunk.guided
    )
    advance(pipe.schedule.nfe if at_once else 0)
    pictures = y if latents_only else pipe.decode(y)
    if not all(torch.stack([t.isfinite().all() for t in (y, pictures)]).tolist()):  # waits once a chunk
        raise NumericalError(
            "an image would hold NaN or infinite numbers",
            found=f"first in {_first_not_finite(pipe, chunk, healthy, y)}, {pipe.dtype}",
            remedy="usual values of guidance_scale, latents and adapter scales; fp32 where it happens with those too",
        )
    return pictures


def _first_not_finite(pipe: Phases, chunk: Chunk, healthy: dict[int, Tensor] | None, latents: Tensor) -> str:
    """Where the numbers of a chunk ceased to be finite. A graph's steps are run once more, one after the other."""

    def fine(*tensors: Tensor) -> bool:
        return all(bool(t.isfinite().all()) for t in tensors)

    conditions = [chunk.condition] if chunk.guided is None else [chunk.condition, chunk.guided.negative]
    if healthy is None:
        healthy = {}
        pipe.denoise(chunk.condition, chunk.draws, lambda *_: None, healthy=healthy, guided=chunk.guided)
    first = next((step for step, fine_there in healthy.items() if not fine_there), None)
    if not fine(*chunk.embeddings):
        return "engine text"
    if not all(fine(*c.per_step.values(), *c.static.values()) for c in conditions):
        return "engine condition"
    if first is not None:
        schedule = pipe.schedule
        stage = next(stage for stage, steps in schedule if first in [step.index for step in steps])
        return f"engine {stage.engine(schedule.action(first))} at step {first + 1} of {schedule.nfe}"
    return "engine decode" if fine(latents) else f"the sampler, after {len(healthy)} steps with finite velocities"


def _is_open(stream: object) -> bool:
    return hasattr(stream, "write") and not getattr(stream, "closed", False)


def _is_terminal(stream: object) -> bool:
    """Whether a progress bar makes sense there: services have stderr closed, gone, or replaced by something small."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]  # see what is caught
    except (AttributeError, ValueError, OSError):
        return False
