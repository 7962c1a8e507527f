"""Stage schedules: how many steps run at how many tokens, and at which noise levels.

Stages run from coarse (few tokens) to fine (all tokens). Noise levels are diffusers' sigmas: 1 is noise, 0 is data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jitexport.errors import ScheduleError

#: Fractions of the steps after which the coarse and the medium stage of a three-stage schedule end (released code).
STAGE_ENDS = (0.4, 0.65, 1.0)

#: Beta distribution of the timesteps: the paper's text (B.4) and its released presets.
BETA_PAPER = (1.4, 0.42)
BETA_RELEASED = (1.4, 0.425)


@dataclass(frozen=True)
class Stage:
    """A run of steps at one token count; `index` counts down to 0, the stage that has all tokens."""

    index: int
    tokens: int
    steps: int

    @property
    def name(self) -> str:
        """Name of the stage's engine."""
        return f"stage{self.index}"


@dataclass(frozen=True)
class StageSchedule:
    """Stages from coarse to fine and the noise levels of their steps.

    Attributes:
        stages: token counts strictly increase; the last stage has all tokens of the grid.
        sigmas: NFE + 1 strictly decreasing noise levels; step i goes from sigmas[i] to sigmas[i + 1]; the last is 0.

    Raises:
        ScheduleError: an empty stage, token counts that do not increase, or sigmas that do not fit the steps.
    """

    stages: tuple[Stage, ...]
    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.stages or any(s.steps < 1 or s.tokens < 1 for s in self.stages):
            raise ScheduleError("every stage needs at least one step and one token", found=self.stages)
        counts = [s.tokens for s in self.stages]
        if any(a >= b for a, b in pairwise(counts)):
            raise ScheduleError(
                "stages must activate more tokens each time", found=counts, expected="strictly increasing token counts"
            )
        if [s.index for s in self.stages] != list(range(len(self.stages)))[::-1]:
            raise ScheduleError("stage indices must count down to 0", found=[s.index for s in self.stages])
        falling = all(a > b for a, b in pairwise(self.sigmas))  # false with NaN
        if len(self.sigmas) != self.nfe + 1 or not falling or self.sigmas[-1] != 0:
            raise ScheduleError(
                "noise levels do not fit the stages",
                found=self.sigmas,
                expected=f"{self.nfe + 1} strictly decreasing values that end with 0",
            )

    @property
    def nfe(self) -> int:
        """Number of transformer evaluations."""
        return sum(s.steps for s in self.stages)

    def steps_of(self, stage: Stage) -> range:
        """Indices into `sigmas` of a stage's steps."""
        first = sum(s.steps for s in self.stages if s.index > stage.index)
        return range(first, first + stage.steps)


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
    return tuple(Stage(len(merged) - 1 - i, tokens, n) for i, (tokens, n) in enumerate(merged.items()))


#: The published schedules (Table 4): NFE and token ratios by the speed-up they are named after, for 50 reference steps.
PAPER_PRESETS: dict[float, tuple[int, tuple[float, float, float]]] = {
    4.0: (18, (0.35, 0.62, 1.0)),
    7.0: (11, (0.32, 0.60, 1.0)),
}
PAPER_REFERENCE_STEPS = 50

# Token ratios between the published points: speed-up, coarse, medium. 2x is the conservative schedule of C.2.
_RATIO_KNOTS = ((1.0, 1.0, 1.0), (2.0, 0.50, 0.75), (4.0, 0.35, 0.62), (7.0, 0.32, 0.60), (10.0, 0.29, 0.58))

# Share of the tokens above which a solved stage runs all of them: leaving out a few is not worth a transition.
_DENSE = 0.97

MAX_SPEEDUP = 10.0


def stage_cost(stages: Sequence[Stage], cost: Callable[[int], float]) -> float:
    """Cost of all steps when one step at m tokens costs cost(m)."""
    return sum(s.steps * cost(s.tokens) for s in stages)


def solve_stages(
    speedup: float, grid_tokens: int, cost: Callable[[int], float], reference_steps: int
) -> tuple[Stage, ...]:
    """The stages that make denoising `speedup` times cheaper than `reference_steps` steps at all tokens.

    At 4 and 7 over 50 reference steps these are the published schedules. Elsewhere: token ratios are interpolated
    between the published ones, as many steps are taken as the budget pays for, and what is left of the budget buys
    tokens, so that the result is at least as fast as asked for and as little faster as possible.

    Args:
        speedup: 1 to 10.
        grid_tokens: N, tokens of the full grid.
        cost: FLOPs of one step at a token count.
        reference_steps: steps of the ordinary pipeline.

    Raises:
        ScheduleError: the speed-up is out of range, or one step already costs more than the budget.
    """
    if not 1 <= speedup <= MAX_SPEEDUP:
        raise ScheduleError("speed-up out of range", found=speedup, expected=f"a number from 1 to {MAX_SPEEDUP:g}")
    if speedup == 1:
        return make_stages(grid_tokens, [reference_steps], [1.0])
    if speedup in PAPER_PRESETS and reference_steps == PAPER_REFERENCE_STEPS:
        nfe, ratios = PAPER_PRESETS[speedup]
        return make_stages(grid_tokens, split_steps(nfe), ratios)

    knots = np.array(_RATIO_KNOTS)
    coarse, medium = (float(np.interp(speedup, knots[:, 0], knots[:, i])) for i in (1, 2))
    budget = reference_steps * cost(grid_tokens) / speedup

    def stages_at(nfe: int, extra: float) -> tuple[Stage, ...]:
        ratios = [r + extra * (1 - r) for r in (coarse, medium)]
        ratios = [1.0 if r > _DENSE else r for r in ratios]
        return make_stages(grid_tokens, split_steps(nfe), [*ratios, 1.0])

    for nfe in range(reference_steps, 0, -1):
        if stage_cost(stages_at(nfe, 0.0), cost) > budget:
            continue
        low, high = 0.0, 1.0  # bisection: tokens grow with `extra`, and so does the cost
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if stage_cost(stages_at(nfe, middle), cost) <= budget else (low, middle)
        return stages_at(nfe, low)
    raise ScheduleError(
        f"a speed-up of {speedup:g} leaves less than one step",
        found=f"{reference_steps} reference steps",
        expected=f"a speed-up of at most {reference_steps}",
        remedy="ask for a smaller speed-up",
    )
