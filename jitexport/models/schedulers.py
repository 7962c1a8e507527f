"""The noise levels of ordinary pipelines, from diffusers' own flow-matching scheduler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def flow_sigmas(
    config: Mapping[str, Any], n: int, *, mu: float | None = None, linear: bool = True
) -> tuple[float, ...]:
    """Noise levels of n steps, n + 1 values that end with 0.

    Args:
        config: of the scheduler.
        mu: shift by the resolution, for schedulers with dynamic shifting.
        linear: whether the pipeline gives the scheduler linspace(1, 1/n, n), as most do, or only n.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    sigmas = np.linspace(1.0, 1 / n, n) if linear and not config.get("use_flow_sigmas") else None
    scheduler.set_timesteps(None if sigmas is not None else n, sigmas=sigmas, mu=mu)
    return tuple(scheduler.sigmas.tolist())


def resolution_shift(config: Mapping[str, Any], tokens: int) -> float:
    """mu, linear in the number of image tokens."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (most - base) / (high - low)
    return tokens * slope + (base - slope * low)


def scheduler_shift(config: Mapping[str, Any], mu: float) -> float:
    """The shift h, sigma = h u / (1 + (h - 1) u), of a scheduler: its own, or that of mu where it is dynamic."""
    if not config.get("use_dynamic_shifting"):
        return config.get("shift", 1.0)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
