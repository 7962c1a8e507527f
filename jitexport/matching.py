"""Noise-timestep matching (RALU, arXiv 2507.08422, section 4.2): noise levels of stages that put noise back.

The paper's time t runs from noise to data, so sigma = 1 - t. Equation numbers are the paper's and its supplement's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jitexport.schedule import spaced_sigmas


def shifted_cdf(t: Any, h: float) -> Any:
    """F_h: the share of timesteps before t, for a schedule shifted by h; its derivative is eq. 8."""
    return h * t / (1 + (h - 1) * t)


def restart(e: float, c: float) -> float:
    """Time s that follows an enlargement at time e (eq. S7)."""
    return e / ((1 - e) / math.sqrt(c) + e)


def divergence(h: Sequence[float], c: float, steps: Sequence[int], ends: Sequence[float], own: float) -> float:
    """Jensen-Shannon divergence of the timesteps P from the target P_target (eq. 9, 10 and S12), in nats.

    Exact for histograms of 1000 bins, so it is a smooth function of c as well, which moves the stages' borders.

    Args:
        h: shift of each stage.
        c: how much noise each enlargement adds, in (0, 1/4].
        steps: of each stage.
        ends: e_k, time at which each stage ends; the last is 1.
        own: shift of the model's own schedule, h_ori.
    """
    edges = np.linspace(0, 1, 1001)

    def mass(s: float, e: float, shift: float) -> np.ndarray:  # of eq. 9 in each bin
        cdf = shifted_cdf(edges.clip(s, e), shift)
        return np.diff(cdf) / (cdf[-1] - cdf[0])

    starts = [0.0, *(restart(e, c) for e in ends[:-1])]
    actual = sum(n * mass(*span) for n, *span in zip(steps, starts, ends, h, strict=True)) / sum(steps)
    again = list(zip(starts[1:], ends[:-1], strict=True))  # where time is passed twice
    target = mass(0, 1, own) + sum((e - s) * mass(s, e, own) for s, e in again)
    target /= 1 + sum(e - s for s, e in again)
    middle = (actual + target) / 2

    def relative_entropy(p: Any) -> float:
        return float(np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / middle), 0)))

    return (relative_entropy(actual) + relative_entropy(target)) / 2


#: Limits of c: below, an enlargement would put so much noise back that the stages before it were in vain; above, its
#: noise would have no covariance. Published are 0.0177 to 0.0586.
LEAST_C, MOST_C = 0.01, 0.25


def match_timesteps(steps: Sequence[int], ends: Sequence[float], own: float) -> tuple[tuple[float, ...], float]:
    """Shifts h of the stages and c that minimise the divergence (eq. S12), c within its limits.

    The divergence hardly depends on c, and has several shallow minima in it: the search starts from several.
    """
    from scipy.optimize import minimize  # for planning only; not needed to run a bundle

    def objective(x: np.ndarray) -> float:
        return divergence(np.exp(x[:-1]), math.exp(x[-1]), steps, ends, own)

    bounds = [(math.log(0.01), math.log(100))] * len(ends) + [(math.log(LEAST_C), math.log(MOST_C))]
    settings = {"maxiter": 2000, "xatol": 1e-5, "fatol": 1e-12}
    starts = [np.log([own * 1.7, *(own * 0.9 for _ in ends[1:]), c]) for c in (0.012, 0.02, 0.04, 0.1)]
    found = [minimize(objective, x, method="Nelder-Mead", bounds=bounds, options=settings) for x in starts]
    *h, c = np.exp(min(found, key=lambda result: result.fun).x).tolist()
    return tuple(h), c


def matched_sigmas(
    steps: Sequence[int], ends: Sequence[float], h: Sequence[float], c: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Noise levels that all steps start from, followed by 0, and those that the stages reach.

    Within a stage, steps are even in time before the shift h of the stage.
    """
    starts = [0.0, *(restart(e, c) for e in ends[:-1])]
    sigmas: list[float] = []
    for n, s, e, shift in zip(steps, starts, ends, h, strict=True):
        sigmas += spaced_sigmas(1 - s, 1 - e, n, shift)[:-1]
    return (*sigmas, 0.0), tuple(1 - e for e in ends)


def renoising(reached: float, sigma: float) -> tuple[float, float, float]:
    """a, b and c of an enlargement at noise level `reached` after which time goes on at `sigma` (eq. S3, S5, S6).

    The enlarged latents are scaled by a, and noise N(0, I - c Sigma) by b is added.
    """
    a, b = (1 - sigma) / (1 - reached), sigma
    return a, b, (a * reached / b) ** 2
