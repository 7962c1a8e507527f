"""Which steps of a schedule are computed: by hand, at intervals, or as many as a budget pays for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from jitexport.errors import ScheduleError
from jitexport.schedule import StageSchedule


def at_steps(schedule: StageSchedule, steps: Sequence[int]) -> list[int]:
    """The given steps and those that always are computed, ascending.

    Raises:
        ScheduleError: steps that the schedule does not have.
    """
    if wrong := sorted(i for i in steps if not 0 <= i < schedule.nfe):
        raise ScheduleError(
            "computed steps that the schedule does not have", found=wrong,
            expected=f"numbers from 0 to {schedule.nfe - 1}",
        )
    return sorted({*steps, *schedule.mandatory})


def warmups(schedule: StageSchedule, warmup: int) -> list[int]:
    """The first `warmup` steps of every stage, as far as it has them."""
    return [i for stage in schedule.stages for i in schedule.steps_of(stage)[:warmup]]


def by_interval(schedule: StageSchedule, every: int, warmup: int) -> list[int]:
    """In each stage the first `warmup` steps and every `every`th from the last of them on; the last step of all."""
    at_interval = [i for stage in schedule.stages for i in schedule.steps_of(stage)[warmup - 1 :: every]]
    return sorted({*warmups(schedule, warmup), *at_interval, *schedule.mandatory})


def within(
    schedule: StageSchedule,
    warmup: int,
    budget: float,
    computing: Callable[[int, int], float],
    cheaper: Callable[[int, int], float],
) -> list[int] | None:
    """The first steps of every stage, the last step, and as many others as a budget pays for; None if it is too small.

    Others go where the most steps in a row would be forecast, evenly within a stage: a forecast is the worse the
    further it reaches.

    Args:
        computing, cheaper: cost of a step by its number and its tokens, when it is computed and when it is not.
    """
    tokens = [stage.tokens for stage in schedule.stages for _ in range(stage.steps)]
    always = {*warmups(schedule, warmup), *schedule.mandatory}
    runs = gaps(always, schedule.nfe)
    inside = [0] * len(runs)  # computed steps in each

    def chosen(counts: Sequence[int]) -> set[int]:
        return always.union(*(spread(run, k) for run, k in zip(runs, counts, strict=True)))

    def affordable(counts: Sequence[int]) -> bool:
        computed = chosen(counts)
        return budget >= sum((computing if i in computed else cheaper)(i, m) for i, m in enumerate(tokens))

    if not affordable(inside):
        return None
    growing = {k for k, run in enumerate(runs) if run}
    while growing:
        widest = max(growing, key=lambda k: ((len(runs[k]) - inside[k]) / (inside[k] + 1), -k))
        inside[widest] += 1
        if not affordable(inside):
            inside[widest] -= 1
            growing.remove(widest)
        elif inside[widest] == len(runs[widest]):
            growing.remove(widest)
    return sorted(chosen(inside))


def spread(run: range, count: int) -> list[int]:
    """`count` steps of a run that lie evenly in it."""
    return [run.start - 1 + (j * (len(run) + 1) + (count + 1) // 2) // (count + 1) for j in range(1, count + 1)]


def gaps(computed: set[int], steps: int) -> list[range]:
    """Runs of steps that are not computed, in order."""
    edges = [-1, *sorted(computed), steps]
    return [range(a + 1, b) for a, b in pairwise(edges) if b > a + 1]
