"""Shapes and dtypes of an engine's inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int64": torch.int64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype ("fp32", "bf16" or "int64") of an engine's input or output.

    `per_step`: of what stages read, whether its first axis is the schedule's steps, of which each gets its own row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    per_step: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class EngineSpec:
    """What an engine takes and gives, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
