"""Forecasts in the manner of an ODE solver: predict, then correct (FoCa, arXiv 2508.16211).

The velocity is followed from step to step like a state. Its slope is taken twice: between the last two steps, forecast
or not, and between the last two computed ones; Heun's rule goes from the last computed velocity along their mean. So
forecasts in a row stay smooth, and the anchor keeps them from drifting for a few steps. Over k in a row an error of the
local slope grows as k! / 2^k; so from the fourth on the slope between computed steps is taken alone (50 steps of the
demo model with one of seven computed would come to nothing else). In the noise level; the published code and others
count steps, and take steps between two computed ones for one.
"""

from __future__ import annotations

from collections.abc import Sequence

from jitexport.methods.temporal.base import VelocityForecast
from jitexport.schedule import COMPUTED, Step

#: Forecasts in a row that read the local slope.
SMOOTHED = 3


class FoCa(VelocityForecast):
    """Heun's rule from the last computed velocity."""

    name = "foca"
    computed_kept = 2
    recent_kept = SMOOTHED + 1

    def weights(self, past: Sequence[Step], step: Step) -> list[float]:
        """Of the anchor and of both slopes; the anchor alone while fewer than two steps are computed."""
        weights = [0.0] * len(past)
        computed = [i for i, s in enumerate(past) if s.action == COMPUTED]
        anchor = computed[-1]
        weights[anchor] = 1.0
        if len(computed) > 1:
            ahead = (step.sigma - past[anchor].sigma) / 2
            last = len(past) - 1
            local = (last, last - 1) if last - anchor < SMOOTHED else (anchor, computed[-2])
            for later, earlier in ((anchor, computed[-2]), local):
                slope = ahead / (past[later].sigma - past[earlier].sigma)
                weights[later] += slope
                weights[earlier] -= slope
        return weights
