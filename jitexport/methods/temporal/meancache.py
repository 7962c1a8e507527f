"""Forecasts of the mean velocity over a step, with its derivative along the path (MeanCache, ICLR 2026).

An Euler step wants the mean velocity over its interval, not the one at its start. Over the last k steps the mean is
known, as they moved the image by it; with the velocity at their beginning it gives the derivative of the mean along the
path (a Jacobian-vector product that no network computes), by which the last velocity is moved on:

    jvp = (v(first of the k) - mean) / (length of the k steps),   v = v(last) - jvp * (length of the step)

as the published code has it. k = 1 takes the last velocity again. On velocities that are linear in the noise level jvp
is exact: minus half the slope.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jitexport.methods.temporal.base import CacheOptions, VelocityForecast, whole
from jitexport.schedule import Step


@dataclass(frozen=True)
class MeanCacheOptions(CacheOptions):
    """Settings of `MeanCache`.

    Attributes:
        window: k, the number of steps that the mean is taken over, fewer at the beginning. Published: 2 to 5 behind the
            first computed steps and at the end, 1 between.
    """

    window: int = 3

    def meaningful(self) -> dict[str, bool]:
        return super().meaningful() | {"window": whole(self.window, 1, 8)}


class MeanCache(VelocityForecast):
    """The last velocity, moved by the derivative of the mean one."""

    name = "meancache"
    settings_class = MeanCacheOptions
    settings: MeanCacheOptions
    computed_kept = 1

    @property
    def recent_kept(self) -> int:
        """Steps that the mean is taken over."""
        return self.settings.window

    def weights(self, past: Sequence[Step], step: Step) -> list[float]:
        """Of the steps of the window."""
        first = max(0, len(past) - self.settings.window)
        lengths = [s.sigma_next - s.sigma for s in past[first:]]
        length = sum(lengths)
        moved = (step.sigma_next - step.sigma) / length
        weights = [0.0] * first + [moved * own / length for own in lengths]
        weights[first] -= moved
        weights[-1] += 1.0
        return weights
