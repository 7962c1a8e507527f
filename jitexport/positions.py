"""Rotary position tables, made once per stage from the positions of the tokens that it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Axial rotary embedding of a model: text tokens at the origin, then image tokens at their grid coordinates.

    Attributes:
        axes: head dimensions that each position axis takes; they sum to the head size. With one axis more than the
            grid has, image positions are padded with leading zeros, as FLUX does.
        theta: base of the frequencies.
        text_tokens: T, tokens in front of the image's.
    """

    axes: tuple[int, ...]
    theta: float
    text_tokens: int

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every angle: positions [B, m, d] -> two tables [B, T + m, D / 2], fp32.

        Angles are computed in fp64, as diffusers does, because fp32 loses digits at large positions.
        """
        ids = F.pad(positions.double(), (len(self.axes) - positions.shape[-1], 0, self.text_tokens, 0))
        angles = []
        for axis, size in enumerate(self.axes):
            exponent = torch.arange(0, size, 2, dtype=torch.float64, device=ids.device) / size
            angles.append(ids[..., axis, None] / self.theta**exponent)
        angle = torch.cat(angles, dim=-1)
        return angle.cos().float(), angle.sin().float()
