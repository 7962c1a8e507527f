"""Stage schedules: how many steps run at how many tokens, and at which noise levels.

A stage is a run of steps on one set of tokens; stages of as many tokens share an engine. Noise levels are diffusers'
sigmas: 1 is noise, 0 is data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from jitexport.errors import ScheduleError

#: Fractions of the steps after which the coarse and the medium stage of a three-stage schedule end (released code).
STAGE_ENDS = (0.4, 0.65, 1.0)

#: Beta distribution of the timesteps: the paper's text (B.4) and its released presets.
BETA_PAPER = (1.4, 0.42)
BETA_RELEASED = (1.4, 0.425)


@dataclass(frozen=True)
class Stage:
    """Steps that run on one set of tokens.

    Attributes:
        index: 0 for all tokens, 1 for the next smaller count, and so on. Stages of as many tokens share an index,
            and with it an engine, wherever they stand in the schedule.
        tokens: that the transformer sees.
        steps: transformer evaluations.
    """

    index: int
    tokens: int
    steps: int

    @property
    def name(self) -> str:
        """Name of the stage's engine."""
        return self.engine(COMPUTED)

    def engine(self, action: str) -> str:
        """Name of the engine that an action of a step runs."""
        return f"{action}{self.index}"


#: What gives a step its velocity: an evaluation of the whole transformer, or a forecast outside of any engine. Other
#: actions are engines of a temporal method: see `jitexport.methods.temporal.base`.
COMPUTED, FORECAST = "stage", "forecast"


class Step(NamedTuple):
    """An Euler step: its number in the schedule, the noise levels that it goes from and to, and its action."""

    index: int  # type: ignore[assignment]  # a number here, of a tuple a method
    sigma: float
    sigma_next: float
    action: str = COMPUTED


@dataclass(frozen=True)
class StageSchedule:
    """Stages in the order in which they run, and the noise levels of their steps.

    Iterating gives each stage with its steps.

    Attributes:
        stages: the last one has all tokens of the grid.
        sigmas: noise level that each of the NFE steps starts from, and the last one that is reached, 0.
        ends: noise level that each stage reaches, for methods that put noise back between stages; empty where each
            stage reaches the one that the next starts from.
        actions: of each step; empty where all are computed. A stage begins with a computed step, because a forecast
            needs a past on its tokens, and the last step is computed, because nothing mends it afterwards.

    Raises:
        ScheduleError: an empty stage, indices that do not rank the token counts, or noise levels or actions that do not
            fit.
    """

    stages: tuple[Stage, ...]
    sigmas: tuple[float, ...]
    ends: tuple[float, ...] = ()
    actions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages or any(s.steps < 1 or s.tokens < 1 for s in self.stages):
            raise ScheduleError("every stage needs at least one step and one token", found=self.stages)
        if self.stages != number([(s.tokens, s.steps) for s in self.stages]):
            raise ScheduleError(
                "stage indices must rank the token counts", found=[(s.index, s.tokens) for s in self.stages],
                expected="0 for the most tokens, 1 for the next count, and so on",
            )
        if self.stages[-1].index != 0:
            raise ScheduleError("the last stage must have all tokens", found=[s.tokens for s in self.stages])
        if len(self.sigmas) != self.nfe + 1 or self.sigmas[-1] != 0:
            raise ScheduleError(
                "noise levels do not fit the stages", found=self.sigmas,
                expected=f"{self.nfe + 1} values of which the last is 0",
            )
        if self.ends and (len(self.ends) != len(self.stages) or self.ends[-1] != 0):
            raise ScheduleError(
                "noise levels at the ends of the stages do not fit", found=self.ends,
                expected=f"{len(self.stages)} values of which the last is 0, or none",
            )
        if len({id(s) for s in self.stages}) < len(self.stages):  # `steps_of` tells stages apart by identity
            object.__setattr__(self, "stages", number([(s.tokens, s.steps) for s in self.stages]))
        if self.actions:
            self._check_actions()
        reached = math.inf
        for stage, steps in self:
            if not all(step.sigma > step.sigma_next for step in steps):  # false with NaN
                raise ScheduleError(
                    "noise levels do not fit the stages", found=(*(s.sigma for s in steps), steps[-1].sigma_next),
                    expected=f"strictly decreasing values within a stage, here {stage.name}",
                )
            if reached < math.inf and steps[0].sigma < reached:
                raise ScheduleError(
                    "noise levels do not fit the stages", found=f"{reached}, then {steps[0].sigma} in {stage.name}",
                    expected="a stage that starts at the noise level that the last one reached, or above it",
                )
            reached = steps[-1].sigma_next

    def _check_actions(self) -> None:
        if len(self.actions) != self.nfe:
            raise ScheduleError("actions do not fit the stages", found=self.actions, expected=f"{self.nfe} of them")
        if wrong := [i + 1 for i in self.mandatory if self.action(i) != COMPUTED]:
            raise ScheduleError(
                "a step that must be computed is not", found=f"steps {wrong} of {self.nfe}",
                expected="computed: the first step of every stage, and the last step",
            )

    def __iter__(self) -> Iterator[tuple[Stage, tuple[Step, ...]]]:
        for k, stage in enumerate(self.stages):
            numbers = self.steps_of(stage)
            levels = list(self.sigmas[numbers.start : numbers.stop + 1])
            if self.ends:
                levels[-1] = self.ends[k]
            pairs = zip(numbers, pairwise(levels), strict=True)
            yield stage, tuple(Step(i, a, b, self.action(i)) for i, (a, b) in pairs)

    def action(self, step: int) -> str:
        """What gives a step its velocity."""
        return self.actions[step] if self.actions else COMPUTED

    @property
    def nfe(self) -> int:
        """Number of steps: transformer evaluations, where no temporal method forecasts some."""
        return sum(s.steps for s in self.stages)

    @property
    def computed(self) -> tuple[int, ...]:
        """Numbers of the steps that evaluate the whole transformer."""
        return tuple(i for i in range(self.nfe) if self.action(i) == COMPUTED)

    @property
    def mandatory(self) -> tuple[int, ...]:
        """Numbers of the steps that are computed in any case."""
        return tuple(sorted({*(self.steps_of(stage).start for stage in self.stages), self.nfe - 1}))

    @property
    def runs(self) -> tuple[tuple[str, Stage], ...]:
        """Each action that is an engine with each of the `engines` that it runs at."""
        used = {(step.action, stage.index) for stage, steps in self for step in steps}
        actions = [COMPUTED, *sorted({action for action, _ in used} - {COMPUTED, FORECAST})]
        return tuple((a, s) for a in actions for s in self.engines if (a, s.index) in used)

    @property
    def engines(self) -> tuple[Stage, ...]:
        """One stage for each token count, coarse to fine: those that need an engine of their own."""
        return tuple(sorted({s.index: s for s in reversed(self.stages)}.values(), key=lambda s: -s.index))

    def steps_of(self, stage: Stage) -> range:
        """Numbers of the steps of one of this schedule's stages, which is found by identity: equal ones may recur."""
        first = 0
        for other in self.stages:
            if other is stage:
                return range(first, first + stage.steps)
            first += other.steps
        raise ScheduleError("not a stage of this schedule", found=stage, expected="one of its `stages`")


def number(runs: Iterable[tuple[int, int]]) -> tuple[Stage, ...]:
    """Stages from pairs of token count and steps in the order in which they run."""
    runs = list(runs)
    counts = sorted({tokens for tokens, _ in runs}, reverse=True)
    return tuple(Stage(counts.index(tokens), tokens, steps) for tokens, steps in runs)


@dataclass(frozen=True)
class CustomSchedule:
    """A schedule given by hand: steps per stage in the order in which they run, and the share of the tokens of each.

    Without ratios a method takes its own; those that have none run all tokens in a single stage.
    """

    steps: tuple[int, ...]
    ratios: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Target:
    """What a method makes a schedule for.

    Attributes:
        speedup: over `reference_steps` steps at all tokens, 1 to 20; None with `custom`.
        custom: a schedule by hand, which is taken instead.
        cost: FLOPs of a step of one image at a token count, with both passes where a step has two.
        reference_steps: steps of the ordinary pipeline.
        native_sigmas: noise levels of the ordinary pipeline with n steps, n + 1 values.
        preview: FLOPs of decoding one image at half its sides.
        family: the model's, as `jitexport.registry.FAMILIES` names it, for settings that were published for it.
        shift: of the noise levels of n steps, as `spaced_sigmas` has it; by `middle_shift` where it is left out.
    """

    speedup: float | None
    custom: CustomSchedule | None
    cost: Callable[[int], float]
    reference_steps: int
    native_sigmas: Callable[[int], tuple[float, ...]]
    preview: float = 0.0
    family: str = ""
    shift: Callable[[int], float] | None = None

    @property
    def asked(self) -> float:
        """The speed-up, where there is no schedule by hand.

        Raises:
            ScheduleError: neither.
        """
        return given_speedup(self.speedup)

    def own_shift(self, n: int) -> float:
        """The shift of the model's noise levels of n steps."""
        return middle_shift(self.native_sigmas) if self.shift is None else self.shift(n)

    def budget(self, tokens: int) -> float:
        """FLOPs that the asked speed-up leaves for all steps.

        Raises:
            ScheduleError: the speed-up is out of range.
        """
        check_speedup(self.asked)
        return self.reference_steps * self.cost(tokens) / self.asked


def beta_sigmas(n: int, alpha: float, beta: float) -> tuple[float, ...]:
    """Noise levels by the inverse CDF of Beta(alpha, beta) over a uniform grid (eq. 22), n + 1 values.

    As `FlowMatchEulerDiscreteScheduler._convert_to_beta` over linspace(1, 1/n, n), followed by 0. alpha > beta puts
    more steps at high noise.
    """
    from scipy.stats import beta as beta_distribution  # the one user of scipy; not needed to run a bundle

    quantiles = beta_distribution.ppf(1 - np.linspace(0, 1, n), alpha, beta)
    return (*(1 / n + quantiles * (1 - 1 / n)).tolist(), 0.0)


def uniform_sigmas(n: int) -> tuple[float, ...]:
    """1, ..., 1/n, 0: the ordinary flow-matching grid, n + 1 values."""
    return (*np.linspace(1, 1 / n, n).tolist(), 0.0)


def spaced_sigmas(first: float, last: float, n: int, shift: float) -> tuple[float, ...]:
    """Noise levels of n steps from `first` to `last`, n + 1 values, even before a shift.

    Schedules of flow-matching models are even ones shifted by sigma = h u / (1 + (h - 1) u).
    """
    begin, end = (x / (shift - (shift - 1) * x) for x in (first, last))
    inner = np.linspace(begin, end, n + 1)[1:-1]
    return (first, *(shift * inner / (1 + (shift - 1) * inner)).tolist(), last)


def middle_shift(native: Callable[[int], tuple[float, ...]]) -> float:
    """The shift of noise levels that are even ones shifted: of two steps, the middle one is h / (1 + h)."""
    middle = native(2)[1]
    return middle / (1 - middle)


def timesteps(kind: dict[str, Any], n: int, native: Callable[[int], tuple[float, ...]]) -> tuple[float, ...]:
    """Noise levels by an option: {"kind": "beta", "alpha", "beta"}, {"kind": "uniform"} or {"kind": "native"}.

    Args:
        native: the model's own noise levels for a number of steps.

    Returns:
        n + 1 values.

    Raises:
        ScheduleError: another kind.
    """
    if kind["kind"] == "beta":
        return beta_sigmas(n, kind["alpha"], kind["beta"])
    if kind["kind"] == "uniform":
        return uniform_sigmas(n)
    if kind["kind"] == "native":
        return native(n)
    raise ScheduleError("unknown timesteps", found=kind["kind"], expected="beta, uniform or native")


def split_steps(nfe: int, ends: Sequence[float] = STAGE_ENDS) -> tuple[int, ...]:
    """Steps per stage when stage i ends after int(nfe * ends[i]) steps: 18 -> (7, 4, 7), 11 -> (4, 3, 4)."""
    edges = [0, *(int(nfe * e) for e in ends[:-1]), nfe]
    return tuple(b - a for a, b in pairwise(edges))


def make_stages(grid_tokens: int, steps: Sequence[int], ratios: Sequence[float]) -> tuple[Stage, ...]:
    """Stages of int(grid_tokens * ratio) tokens each, coarse to fine.

    Stages without steps vanish, and stages whose counts coincide on a tiny grid become one.

    Raises:
        ScheduleError: unequal lengths, ratios outside (0, 1], not increasing, or not ending at 1.
    """
    if len(steps) != len(ratios) or not steps:
        raise ScheduleError("steps and ratios must have the same length", found=(tuple(steps), tuple(ratios)))
    if ratios[-1] != 1 or any(not 0 < r <= 1 for r in ratios) or any(a > b for a, b in pairwise(ratios)):
        raise ScheduleError(
            "token ratios must rise to 1", found=tuple(ratios), expected="values in (0, 1], increasing, the last one 1"
        )
    if any(s < 0 for s in steps):
        raise ScheduleError("a stage cannot have a negative number of steps", found=tuple(steps))
    merged: dict[int, int] = {}
    for n, ratio in zip(steps, ratios, strict=True):
        tokens = max(1, int(grid_tokens * ratio))
        if n:
            merged[tokens] = merged.get(tokens, 0) + n
    if grid_tokens not in merged:
        raise ScheduleError("the last stage needs at least one step", found=tuple(steps))
    return number(merged.items())


MAX_SPEEDUP = 20.0


def given_speedup(speedup: float | None) -> float:
    """A speed-up that must be there, because there is no schedule by hand.

    Raises:
        ScheduleError: it is not.
    """
    if speedup is None:
        raise ScheduleError("neither a speed-up nor a schedule by hand", found=speedup, expected="one of both")
    return speedup


def check_speedup(speedup: float) -> None:
    """Refuse speed-ups outside 1 to 20, and what is no number.

    Raises:
        ScheduleError: such a one.
    """
    if not 1 <= speedup <= MAX_SPEEDUP:
        raise ScheduleError("speed-up out of range", found=speedup, expected=f"a number from 1 to {MAX_SPEEDUP:g}")


def too_fast(speedup: float, reference_steps: int, fewest: int = 1) -> ScheduleError:
    """The error of a speed-up that no schedule of a method reaches, which takes at least so many steps."""
    return ScheduleError(
        f"a speed-up of {speedup:g} leaves less than "
        + ("one step" if fewest == 1 else f"the {fewest} steps that this method takes at least"),
        found=f"{reference_steps} reference steps",
        expected=f"a speed-up of at most {reference_steps}" if fewest == 1 else "a smaller speed-up",
        remedy="ask for a smaller speed-up" + ("" if fewest == 1 else ", or take another --method"),
    )


def stage_cost(stages: Sequence[Stage], cost: Callable[[int], float]) -> float:
    """Cost of all steps when one step at m tokens costs cost(m)."""
    return sum(s.steps * cost(s.tokens) for s in stages)
