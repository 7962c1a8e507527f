"""Forecasts by a polynomial through the last computed velocities (TaylorSeer's "lite" form, arXiv 2503.06923).

In the noise level: schedules are not uniform, and a velocity that is a polynomial of it is forecast exactly.
`variable="step"` counts steps instead, as the published code and diffusers do; up to order 1 that is the same formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jitexport.methods.temporal.base import (
    CacheOptions,
    Forecast,
    LastValue,
    VelocityForecast,
    polynomial_weights,
    whole,
)
from jitexport.schedule import Step


@dataclass(frozen=True)
class TaylorOptions(CacheOptions):
    """Settings of forecasts by a polynomial.

    Attributes:
        order: of the polynomial; lower while fewer values are known. 0 takes the last one again.
        variable: "sigma" or "step".
    """

    order: int = 1
    variable: Literal["sigma", "step"] = "sigma"

    def meaningful(self) -> dict[str, bool]:
        return super().meaningful() | {
            "order": whole(self.order, 0, 4),
            "variable": self.variable in ("sigma", "step"),
        }


class Polynomial(Forecast):
    """The polynomial of an order through as many computed values."""

    settings_class = TaylorOptions
    settings: TaylorOptions

    @property
    def computed_kept(self) -> int:
        """Values that the polynomial goes through."""
        return self.settings.order + 1

    @property
    def most_amplified(self) -> float:
        """In steps, as published: without a limit."""
        return math.inf if self.settings.variable == "step" else super().most_amplified

    def weights(self, past: Sequence[Step], step: Step) -> list[float]:
        """Of the values at computed steps in that at another one."""
        if self.settings.variable == "step":
            return polynomial_weights([float(s.index) for s in past], float(step.index))
        return polynomial_weights([s.sigma for s in past], step.sigma)


class Taylor(Polynomial, VelocityForecast):
    """The polynomial of an order through as many computed velocities."""

    name = "taylor"


class Reuse(LastValue, VelocityForecast):
    """The last computed velocity again: the polynomial of order 0."""

    name = "reuse"
