"""TaylorSeer (arXiv 2503.06923) in its cumulative form: what all blocks together add to the image is forecast.

The published code forecasts what every attention and every MLP adds, which takes 4.3 GB on FLUX.1-dev at order 1 and
most of the time that it saves; one residual takes 50 MB, and followers found it no worse (TaylorSeer-Lite, FreqCa).
Published settings: a computed step of every 7 (5x) or 11 (7x) on FLUX.1-dev, 2 or 4 on Stable Diffusion 3; order 1; 3
steps of warm-up (RALU's supplement, B.2.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from jitexport.methods.temporal.base import ResidualForecast
from jitexport.methods.temporal.taylor import Polynomial, TaylorOptions


@dataclass(frozen=True)
class TaylorSeerOptions(TaylorOptions):
    """Settings of `TaylorSeer`, with the published warm-up."""

    warmup: int = 3


class TaylorSeer(Polynomial, ResidualForecast):
    """The polynomial of an order through as many computed residuals."""

    name = "taylorseer"
    settings_class = TaylorSeerOptions
