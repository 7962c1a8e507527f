"""Means and distances with 95% confidence intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

CONFIDENCE = 0.95
Z = 1.96  # half of CONFIDENCE's width, in standard deviations
RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """A value and its 95% interval; the limits are None where one prompt says nothing about others."""

    value: float
    low: float | None = None
    high: float | None = None


def mean(values: np.ndarray) -> Score:
    """Mean over prompts by the percentile bootstrap.

    Prompts are what is resampled: images of one prompt with several seeds are not independent, and count as their mean.

    Args:
        values: [prompts, seeds].
    """
    each = values.mean(axis=1)
    if len(each) < 2 or np.ptp(each) == 0:
        return Score(float(each.mean()))
    interval = bootstrap(
        (each,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=0
    ).confidence_interval
    return Score(float(each.mean()), float(interval.low), float(interval.high))


def share(values: np.ndarray) -> Score:
    """Mean of zeros and ones by Wilson's interval, which is also right where all are equal; values [prompts, seeds]."""
    return Score(float(values.mean()), *wilson(values.mean() * len(values), len(values)))


def wilson(hits: float, total: int) -> tuple[float, float]:
    """Wilson's interval for a share."""
    fraction = hits / total
    centre = fraction + Z * Z / (2 * total)
    spread = Z * math.sqrt(fraction * (1 - fraction) / total + Z * Z / (4 * total * total))
    scale = 1 + Z * Z / total
    return (centre - spread) / scale, (centre + spread) / scale


def distance(
    a: np.ndarray, b: np.ndarray, measure: Callable[[np.ndarray, np.ndarray], float], resamples: int = 100
) -> Score:
    """A distance between two sets of features of the same prompts, [prompts, seeds, d] each.

    Resampling with replacement makes sets look further apart than they are, so the bootstrap serves for the spread
    only: the interval is the value plus and minus 1.96 of its standard deviations.
    """
    value = measure(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))
    if len(a) < 3:
        return Score(value)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(resamples):
        rows = rng.integers(0, len(a), len(a))
        drawn.append(measure(a[rows].reshape(-1, a.shape[-1]), b[rows].reshape(-1, b.shape[-1])))
    spread = Z * float(np.std(drawn))
    return Score(value, max(0.0, value - spread), value + spread)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, [n, d] and [m, d].

    |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A B)^(1/2). With A = R_a^T R_a and B likewise, the last trace is the sum of
    the singular values of R_a R_b^T, which is small and well-behaved also where n < d.
    """
    offset = float(np.square(a.mean(0) - b.mean(0)).sum())
    centred: list[np.ndarray] = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    roots: list[Any] = [np.linalg.qr(x, "r") for x in centred]
    traces = sum(float(np.square(r).sum()) for r in roots)
    return max(0.0, offset + traces - 2 * float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()))
