"""The stage loop: engines, lifters and transitions strung together. It reads like the equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jitexport.grid import pack
from jitexport.methods.base import Draws, Method, Preview
from jitexport.methods.temporal.base import Cache, EveryStep, Run
from jitexport.schedule import Stage, StageSchedule

EVERY_STEP = EveryStep()

@dataclass(frozen=True)
class Look:
    """What there is to see of a step; each is computed when it is asked for.

    Attributes:
        latents: behind the step, [B, N, C].
        clean: the clean latents that it predicts, [B, N, C].
        places: which of the method's places ran, [B, m].
    """

    latents: Callable[[], Tensor]
    clean: Callable[[], Tensor]
    places: Callable[[], Tensor]


#: (step index, noise level reached, what there is to see) -> latents to go on with, or None
OnStep = Callable[[int, float, Look], Tensor | None]


def draw(
    method: Method[Any],
    schedule: StageSchedule,
    latent_shape: Sequence[int],
    patch: int,
    generators: Sequence[torch.Generator],
) -> Draws:
    """Everything random for one batch, image by image from its own generator, so that an image needs no neighbours.

    The first draw is the initial noise in diffusers' shape and order, so one seed starts both at the same latents.

    Args:
        latent_shape: (C, H, W) of one image's latents before packing.
        patch: side of a token's patch in latent pixels.
        generators: one per image; they may be the same object, which then continues from image to image.
    """
    fields = method.noise_fields(schedule)

    def field(generator: torch.Generator) -> Tensor:
        noise = torch.randn((1, *latent_shape), generator=generator, device=generator.device, dtype=torch.float32)
        return pack(noise, patch)

    latents, noise, anchors = [], [], []
    for generator in generators:
        latents.append(field(generator))
        noise += [torch.cat([field(generator) for _ in range(fields)], dim=1)] if fields else []
        drawn = method.draw_anchors(schedule, generator)
        anchors += [] if drawn is None else [drawn]
    return Draws(
        latents=torch.cat(latents),
        noise=torch.cat(noise) if noise else None,
        anchors=torch.stack(anchors) if anchors else None,
    )


def sample(
    method: Method[Any],
    schedule: StageSchedule,
    draws: Draws,
    begin_stage: Callable[[Stage, Tensor], Run],
    on_step: OnStep | None = None,
    preview: Preview | None = None,
    stop: Callable[[], bool] = lambda: False,
    cache: Cache[Any] = EVERY_STEP,
) -> Tensor:
    """Integrate from noise to data through all stages; returns the clean latents [B, N, C], fp32.

    Args:
        begin_stage: given a stage and which of the method's places its tokens are at [B, m], returns what runs the
            stage's engines.
        on_step: called after every step; an exception it raises ends the loop.
        preview: decodes latents of half the sides, for methods that look at pictures between stages.
        stop: asked before every step; where it says so, the steps that are left are skipped.
        cache: the temporal method that placed the schedule's actions.
    """
    state, history = None, cache.begin()
    for stage, steps in schedule:
        if state is None:
            state = method.start(draws, stage)
        elif stop():
            break
        else:
            before, state = state, method.transition(state, stage, steps[0].sigma, preview)
            history = cache.carried(history, method.carry(before, state))
        run = begin_stage(stage, method.where(state))
        for step in steps:
            if stop():
                break
            u, history = cache.velocity(run, method.tokens(state), step, history)
            before, state = state, method.step(state, u, step.sigma, step.sigma_next)
            if on_step is not None:
                predicted = partial(method.predicted, before, u, step.sigma)
                look = Look(partial(method.latents, state), predicted, partial(method.where, before))
                changed = on_step(step.index, step.sigma_next, look)
                if changed is not None:
                    state = method.with_latents(state, changed)
    return method.latents(state)
