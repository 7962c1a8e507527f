"""A model's own modules as a pipeline, the reference of every backend, and what its engines are tried with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from jitexport import registry
from jitexport.backends.base import Engine
from jitexport.backends.eager import as_engine
from jitexport.methods.temporal.base import Cache
from jitexport.models.base import ModelAdapter
from jitexport.models.stages import TAKES
from jitexport.profile.measure import shortest
from jitexport.runtime import Pipeline
from jitexport.schedule import StageSchedule
from jitexport.specs import DTYPES, EngineSpec

PROBE_PROMPT = "a red apple on a white background"


def eager_pipeline(
    adapter: ModelAdapter,
    schedule: StageSchedule,
    method: str,
    options: dict[str, Any],
    *,
    batch: int,
    dtype: str,
    device: torch.device,
    passes: int = 1,
    cache: Cache[Any] | None = None,
    further: Sequence[str] = (),
) -> Pipeline:
    """The adapter's modules as a pipeline, without compiling anything: the reference for every backend.

    Args:
        further: actions that stages have engines for beside those that the schedule's steps have.
    """
    chosen = registry.method(method)(adapter.geometry.grid, options, adapter.geometry.patch)
    specs = adapter.specs(schedule, batch, dtype, preview=chosen.previews, passes=passes, further=further)
    for component in adapter.components.values():
        component.to(device)
    return Pipeline(
        engines={s.name: Engine(s, as_engine(adapter.module(s.name)), device) for s in specs},
        method=chosen,
        schedule=schedule,
        geometry=adapter.geometry,
        defaults=adapter.defaults,
        readers=[tokenizer.reader() for tokenizer in adapter.tokenizers()],
        batch_size=batch,
        passes=passes,
        cache=cache,
        constants={name: t.to(device) for name, t in adapter.constants(noise_levels(schedule)).items()},
        dtype=DTYPES[dtype],
        device=device,
    )


def faster_passes(one: Pipeline, both: Pipeline) -> tuple[Pipeline, str]:
    """Whether one run of all tokens at twice the batch is faster than two, measured on the modules before compiling.

    Args:
        one, both: eager pipelines whose stages run one pass, and both at once.

    Returns:
        The faster one, and why.
    """
    *_, stage = one.schedule.engines
    tokens = torch.randn((one.batch_size, stage.tokens, one.geometry.channels), device=one.device)
    where = torch.arange(stage.tokens, device=one.device).expand(one.batch_size, -1)
    embeddings = one.engines["text"](*probe_ids(one))
    condition = one.condition(embeddings, one.defaults.guidance.distilled)
    seconds = []
    for pipeline in (one, both):
        run = pipeline.engines[stage.name]
        inputs = pipeline.stage_inputs(where, condition)(run.spec, tokens, 0)
        seconds.append(shortest(lambda: run(*inputs), one.device, 1.0))  # noqa: B023 - called at once
    twice, at_once = 2e3 * seconds[0], 1e3 * seconds[1]
    reason = f"two passes take {twice:.3g} ms one after the other and {at_once:.3g} ms at once, before compiling"
    return (one if twice <= at_once else both), reason


def noise_levels(schedule: StageSchedule) -> Tensor:
    """The noise levels that a schedule's steps start from, [S], fp32."""
    return torch.tensor(schedule.sigmas[:-1], dtype=torch.float32)


def probe_ids(pipeline: Pipeline) -> list[Tensor]:
    """What the text engine takes for the probe."""
    return pipeline.tokenize([PROBE_PROMPT] * pipeline.batch_size, warn=False)


def probe_inputs(pipeline: Pipeline) -> Iterator[tuple[EngineSpec, list[Tensor]]]:
    """Inputs for every engine of a pipeline as a call would give them: a real prompt, unit-variance tokens."""
    generator = torch.Generator().manual_seed(0)
    batch, device = pipeline.batch_size, pipeline.device
    geometry = pipeline.geometry

    def noise(tokens: int) -> Tensor:
        return torch.randn((batch, tokens, geometry.channels), generator=generator).to(device)

    def ready(name: str, values: Sequence[Tensor]) -> tuple[EngineSpec, list[Tensor]]:
        return pipeline.engines[name].spec, [v.clone() for v in values]

    ids = probe_ids(pipeline)
    yield ready("text", ids)
    embeddings, guidance = pipeline.engines["text"](*ids), pipeline.defaults.guidance.distilled
    yield ready("condition", pipeline.condition_inputs(embeddings, guidance))
    condition = pipeline.condition(embeddings, guidance)
    for action, stage in pipeline.schedule.runs:
        where = torch.arange(stage.tokens, device=device).expand(batch, -1)
        step = pipeline.schedule.steps_of(stage)[0]
        spec = pipeline.engines[stage.engine(action)].spec
        inputs = pipeline.stage_inputs(where, condition)
        beside = [
            torch.randn(s.shape, generator=generator).to(device, DTYPES[s.dtype])
            for s in spec.inputs if s.name in TAKES.get(action, ())
        ]
        yield ready(spec.name, inputs(spec, noise(stage.tokens), step, *beside))
    if "preview" in pipeline.engines:
        yield ready("preview", [noise(geometry.grid.halved().tokens)])
    latents = torch.randn(pipeline.engines["decode"].spec.inputs[0].shape, generator=generator)
    yield ready("decode", [latents.to(device)])
