"""Planning: from a speed-up, or a custom schedule, to stages, noise levels and predicted cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from jitexport import registry
from jitexport.errors import ScheduleError
from jitexport.flops import StepCost, meta_adapter, preview_cost, step_costs
from jitexport.methods.base import Method
from jitexport.methods.temporal.base import Cache, parse_cache
from jitexport.models.base import ModelAdapter
from jitexport.schedule import COMPUTED, CustomSchedule, StageSchedule, Target, check_speedup, given_speedup, too_fast

logger = logging.getLogger(__name__)

__all__ = ["CustomSchedule", "Plan", "parse_custom", "plan"]

#: Models with no more steps than this were distilled from models with many, by which papers measure them as well.
DISTILLED_STEPS = 8


@dataclass(frozen=True)
class EngineRun:
    """Stages in a row that share an engine.

    Attributes:
        index, tokens: of these stages.
        actions: of their steps.
        step_tflops: of a computed step.
        tflops: of all their steps.
        sigmas: the noise levels that they go from and to.
    """

    index: int
    tokens: int
    actions: tuple[str, ...]
    step_tflops: float
    tflops: float
    sigmas: tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """A schedule for a model, and what it is predicted to cost.

    Attributes:
        speedup: as asked for; None for a custom schedule.
        costs: FLOPs of a step of one image by its tokens, with as many passes as `passes`, for each action that the
            schedule's steps may have.
        passes: of a step, with the model's usual guidance: 2 where a negative prompt has one of its own.
        preview: FLOPs of the picture that the method looks at between stages, 0 where it does not. There is one,
            however many passes a step has.
        method, preset, options: of the spatial acceleration method.
        cache: the temporal method; None for none.
    """

    schedule: StageSchedule
    costs: Mapping[str, StepCost]
    passes: int
    preview: float
    grid_tokens: int
    reference_steps: int
    speedup: float | None
    method: str
    preset: str
    options: dict[str, Any]
    cache: Cache[Any] | None = None

    @property
    def cost(self) -> StepCost:
        """FLOPs of a computed step of one image by its tokens."""
        return self.costs[COMPUTED]

    @property
    def tflops(self) -> float:
        """TFLOPs of all steps of one image, and of the preview where there is one."""
        return (schedule_cost(self.schedule, self.costs) + self.preview) / 1e12

    @property
    def reference_tflops(self) -> float:
        """TFLOPs of the ordinary pipeline's steps."""
        return self.reference_steps * self.cost(self.grid_tokens) / 1e12

    @property
    def predicted_speedup(self) -> float:
        """Reference FLOPs over the schedule's."""
        return self.over(self.reference_steps)

    def over(self, steps: int) -> float:
        """The speed-up over so many steps at all tokens, such as those of a model before it was distilled."""
        return steps * self.cost(self.grid_tokens) / 1e12 / self.tflops

    def runs(self) -> list[EngineRun]:
        """The schedule's stages in order, those in a row on one engine together."""
        runs = []
        for index, group in groupby(self.schedule, key=lambda pair: pair[0].index):
            stages, steps_of_stages = zip(*group, strict=True)
            steps = [step for steps in steps_of_stages for step in steps]
            tokens, actions = stages[0].tokens, tuple(step.action for step in steps)
            tflops = sum(self.costs[action](tokens) for action in actions) / 1e12
            ends = steps[0].sigma, steps[-1].sigma_next
            runs.append(EngineRun(index, tokens, actions, self.cost(tokens) / 1e12, tflops, ends))
        return runs


def schedule_cost(schedule: StageSchedule, costs: Mapping[str, StepCost]) -> float:
    """FLOPs of all steps of one image."""
    return sum(costs[step.action](stage.tokens) for stage, steps in schedule for step in steps)


def plan(
    adapter: ModelAdapter,
    *,
    speedup: float | None = 4.0,
    custom: CustomSchedule | None = None,
    method: str = "jit",
    preset: str | None = None,
    cache: str | None = None,
    dtype: str = "fp32",
    reference_steps: int | None = None,
) -> Plan:
    """Solve or take a schedule for a model.

    Args:
        adapter: the model, with or without weights.
        speedup: 1 to 20, over the reference steps at all tokens; 1 is the ordinary sampler. Ignored with `custom`.
            Where a cache's options say which steps are computed, it is the spatial method's alone.
        custom: a schedule instead of a speed-up.
        method, preset: spatial method and the name of its settings; its best preset by default.
        cache: temporal method with its options, as `jitexport.methods.temporal.base.parse_cache` reads them.
        dtype: of the modules that are counted; their FLOPs do not depend on it.
        reference_steps: of the ordinary pipeline; the model's usual number by default.

    Raises:
        ScheduleError: a schedule that cannot be realised.
        UnknownNameError: no such method or cache.
        InputError: options that the cache does not have.
    """
    reference_steps = reference_steps or adapter.defaults.num_inference_steps
    temporal = None if cache is None else make_cache(cache)
    if custom is not None:
        speedup = None
    else:
        speedup = given_speedup(speedup)
        check_speedup(speedup)
        if speedup == 1:
            method, preset = "dense", None
    method_class: type[Method[Any]] = registry.method(method)
    preset = preset or method_class.presets[0]
    options = own_timesteps(method_class.options(preset), adapter)
    geometry = adapter.geometry
    chosen = method_class(geometry.grid, options, geometry.patch)
    meta = meta_adapter(adapter, dtype, None if temporal is None else temporal.features)
    passes = adapter.defaults.guidance.passes
    costs = {action: cost.times(passes) for action, cost in step_costs(meta, dtype).items()}
    preview = preview_cost(meta, dtype) if chosen.previews else 0.0
    target = Target(
        speedup, custom, costs[COMPUTED], reference_steps, adapter.native_sigmas, preview, adapter.family, adapter.shift
    )
    schedule = chosen.schedule(target) if temporal is None else with_cache(chosen, temporal, target, costs)
    if custom is None and schedule.nfe == 1 < reference_steps:
        logger.warning(
            "%g times faster than %d steps leaves a single step; ask for less, as --speedup 1, or for models of four "
            "steps --method ralu --speedup 1.3", speedup, reference_steps,
        )
    return Plan(
        schedule, costs, passes, preview, geometry.grid.tokens, reference_steps, speedup, method, preset, options,
        temporal,
    )


def make_cache(text: str) -> Cache[Any]:
    """A temporal method from text: see `parse_cache`."""
    name, options = parse_cache(text)
    return registry.cache(name)(options)


#: Between the speed-up that is left to the spatial method and the one asked for, how many are tried.
_TRIED = 24


def with_cache(method: Method[Any], cache: Cache[Any], target: Target, costs: Mapping[str, StepCost]) -> StageSchedule:
    """A spatial method's schedule on which a cache has placed its actions.

    Where a speed-up is asked for and the cache's options leave the steps open, the spatial method takes its part of the
    speed-up, and the budget decides how many of its steps are computed. Where that part is too small for the steps that
    must be computed, the spatial method takes more, in the end all.

    Raises:
        ScheduleError: there is none.
    """
    if target.custom is not None or cache.placed:
        return cache.place(method.schedule(target))
    tokens = method.grid.tokens
    budget = target.budget(tokens) - (target.preview if method.previews else 0.0)
    speedup = target.asked
    least = speedup ** cache.settings.spatial if method.spatial else 1.0
    for i in range(_TRIED + 1):
        part = min(speedup, least * (speedup / least) ** (i / _TRIED))
        found = cache.solve(
            method.schedule(replace(target, speedup=part)), lambda action, m: costs[action](m), budget
        )
        if found is not None:
            return found
    raise too_fast(speedup, target.reference_steps)


def own_timesteps(options: dict[str, Any], adapter: ModelAdapter) -> dict[str, Any]:
    """A method's options for a model: Beta noise levels give way to others that its family is run on."""
    if adapter.timesteps is None or options["timesteps"]["kind"] != "beta":
        return options
    return options | {"timesteps": dict(adapter.timesteps)}


def parse_custom(steps: str, ratios: str | None) -> CustomSchedule:
    """A custom schedule from comma-separated text: steps "7,4,7" and ratios "0.35,0.62,1".

    Without ratios a method takes its own; a single number of steps means all tokens for those that have none.

    Raises:
        ScheduleError: text that is no list of numbers.
    """
    try:
        counts = tuple(int(s) for s in steps.split(","))
        shares = tuple(float(r) for r in ratios.split(",")) if ratios is not None else None
    except ValueError:
        raise ScheduleError(
            "steps and ratios must be comma-separated numbers",
            found=f"{steps!r}, {ratios!r}",
            expected="for example --steps 7,4,7 --ratios 0.35,0.62,1",
        ) from None
    return CustomSchedule(counts, shares)
