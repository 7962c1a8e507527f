"""Stages for a speed-up: the published ones, and solved ones between and beyond them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jitexport.schedule import Stage, check_speedup, make_stages, split_steps, stage_cost, too_fast

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


def solve_stages(
    speedup: float, grid_tokens: int, cost: Callable[[int], float], reference_steps: int
) -> tuple[Stage, ...]:
    """The stages that make denoising `speedup` times cheaper than `reference_steps` steps at all tokens.

    At 4 and 7 over 50 reference steps these are the published schedules. Elsewhere: token ratios are interpolated
    between the published ones, as many steps are taken as the budget pays for, and what is left of the budget buys
    tokens, so that the result is at least as fast as asked for and as little faster as possible.

    Args:
        speedup: 1 to 20.
        grid_tokens: N, tokens of the full grid.
        cost: FLOPs of one step at a token count.
        reference_steps: steps of the ordinary pipeline.

    Raises:
        ScheduleError: the speed-up is out of range, or one step already costs more than the budget.
    """
    check_speedup(speedup)
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
    raise too_fast(speedup, reference_steps)
