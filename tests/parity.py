"""Comparing what we make with what diffusers makes."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_same(found: Tensor, expected: Tensor, dtype: str) -> None:
    """fp32: to 1e-5 everywhere. bf16, which keeps 8 bits: 2% of the whole."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if dtype == "fp32":
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    else:
        assert (found.float() - expected.float()).norm() <= 0.02 * expected.float().norm()


def seeded(*seeds: int) -> list[torch.Generator]:
    """A generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
