"""Planning: from a speed-up, or a custom schedule, to stages, noise levels and predicted cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jitexport import registry
from jitexport.errors import ScheduleError
from jitexport.flops import StepCost, meta_adapter, step_cost
from jitexport.methods.base import Method
from jitexport.models.base import ModelAdapter
from jitexport.schedule import (
    Stage,
    StageSchedule,
    beta_sigmas,
    make_stages,
    solve_stages,
    stage_cost,
    uniform_sigmas,
)


@dataclass(frozen=True)
class Plan:
    """A schedule for a model, and what it is predicted to cost.

    Attributes:
        speedup: as asked for; None for a custom schedule.
        cost: FLOPs of a step of one image by its tokens.
        method, preset, options: of the acceleration method.
    """

    schedule: StageSchedule
    cost: StepCost
    grid_tokens: int
    reference_steps: int
    speedup: float | None
    method: str
    preset: str
    options: dict[str, Any]

    @property
    def tflops(self) -> float:
        """TFLOPs of all steps of one image."""
        return stage_cost(self.schedule.stages, self.cost) / 1e12

    @property
    def reference_tflops(self) -> float:
        """TFLOPs of the ordinary pipeline's steps."""
        return self.reference_steps * self.cost(self.grid_tokens) / 1e12

    @property
    def predicted_speedup(self) -> float:
        """Reference FLOPs over the schedule's."""
        return self.reference_tflops / self.tflops


@dataclass(frozen=True)
class CustomSchedule:
    """A schedule given by hand: steps and token ratios per stage, coarse to fine."""

    steps: tuple[int, ...]
    ratios: tuple[float, ...]


def timesteps(adapter: ModelAdapter, options: dict[str, Any], nfe: int) -> tuple[float, ...]:
    """Noise levels that a method's options ask for, nfe + 1 values."""
    kind = options["timesteps"]["kind"]
    if kind == "beta":
        return beta_sigmas(nfe, options["timesteps"]["alpha"], options["timesteps"]["beta"])
    if kind == "uniform":
        return uniform_sigmas(nfe)
    if kind == "native":
        return adapter.native_sigmas(nfe)
    raise ScheduleError("unknown timesteps", found=kind, expected="beta, uniform or native")


def plan(
    adapter: ModelAdapter,
    *,
    speedup: float | None = 4.0,
    custom: CustomSchedule | None = None,
    method: str = "jit",
    preset: str | None = None,
    dtype: str = "bf16",
    reference_steps: int | None = None,
) -> Plan:
    """Solve or take a schedule for a model.

    Args:
        adapter: the model, with or without weights.
        speedup: 1 to 10, over the reference steps at all tokens; 1 is the ordinary sampler. Ignored with `custom`.
        custom: a schedule instead of a speed-up.
        method, preset: acceleration method and the name of its settings; its best preset by default.
        reference_steps: of the ordinary pipeline; the model's usual number by default.

    Raises:
        ScheduleError: a schedule that cannot be realised.
        UnknownNameError: no such method.
    """
    reference_steps = reference_steps or adapter.defaults.num_inference_steps
    tokens = adapter.geometry.grid.tokens
    cost = step_cost(meta_adapter(adapter, dtype), dtype)
    if custom is not None:
        stages: Sequence[Stage] = make_stages(tokens, custom.steps, custom.ratios)
        speedup = None
    else:
        stages = solve_stages(speedup, tokens, cost, reference_steps)
    if custom is None and speedup == 1:
        method, preset = "dense", None
    method_class: type[Method] = registry.method(method)
    if method == "dense" and len(stages) > 1:
        raise ScheduleError(
            "the dense method runs all tokens at every step",
            found=f"stages of {', '.join(str(s.tokens) for s in stages)} tokens",
            expected="a single stage",
            remedy="a number of steps (--steps 12), a speed-up of 1, or another method",
        )
    preset = preset or method_class.presets[0]
    options = method_class.options(preset)
    nfe = sum(s.steps for s in stages)
    schedule = StageSchedule(tuple(stages), timesteps(adapter, options, nfe))
    return Plan(schedule, cost, tokens, reference_steps, speedup, method, preset, options)


def parse_custom(steps: str, ratios: str | None) -> CustomSchedule:
    """A custom schedule from comma-separated text: steps "7,4,7" and ratios "0.35,0.62,1".

    A single number of steps needs no ratios: it means all tokens.

    Raises:
        ScheduleError: text that is no list of numbers.
    """
    try:
        counts = tuple(int(s) for s in steps.split(","))
        shares = tuple(float(r) for r in ratios.split(",")) if ratios else (1.0,)
    except ValueError:
        raise ScheduleError(
            "steps and ratios must be comma-separated numbers",
            found=f"{steps!r}, {ratios!r}",
            expected="for example --steps 7,4,7 --ratios 0.35,0.62,1",
        ) from None
    return CustomSchedule(counts, shares)
