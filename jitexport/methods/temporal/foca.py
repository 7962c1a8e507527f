"""Forecasts in the manner of an ODE solver: predict, then correct (FoCa, arXiv 2508.16211).

The velocity is followed from step to step like a state. Its slope is taken twice: between the last two steps, forecast
or not, and between the last two computed ones; Heun's rule goes from the last computed velocity along their mean. So
forecasts in a row stay smooth, and the anchor keeps them from drifting for a few steps: over k in a row an error of the
local slope grows as k! / 2^k, so this is for short gaps. In the noise level; the published code and
others count steps, and take steps between two computed ones for one.
"""

from __future__ import annotations

from collections.abc import Sequence

from jitexport.methods.temporal.base import VelocityForecast
from jitexport.schedule import COMPUTED, Step


class FoCa(VelocityForecast):
    """Heun's rule from the last computed velocity."""

    name = "foca"
    computed_kept = 2
    recent_kept = 2

    def weights(self, past: Sequence[Step], step: Step) -> list[float]:
        """Of the anchor and of both slopes; the anchor alone while fewer than two steps are computed."""
        weights = [0.0] * len(past)
        computed = [i for i, s in enumerate(past) if s.action == COMPUTED]
        anchor = computed[-1]
        weights[anchor] = 1.0
        if len(computed) > 1:
            ahead = (step.sigma - past[anchor].sigma) / 2
            for later, earlier in ((anchor, computed[-2]), (len(past) - 1, len(past) - 2)):
                slope = ahead / (past[later].sigma - past[earlier].sigma)
                weights[later] += slope
                weights[earlier] -= slope
        return weights
