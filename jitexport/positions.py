"""Rotary position tables: made once for all places that tokens can be at, gathered for the tokens of a stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

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
        axis, period = _periods(self.axes, self.theta, ids.device)
        angle = ids.index_select(-1, axis) / period
        return angle.cos().float(), angle.sin().float()

    def gather(self, tables: tuple[Tensor, Tensor], where: Tensor) -> tuple[Tensor, Tensor]:
        """`tables` of the places at `where` [B, m], from those of all places [1, T + P, D / 2]."""
        rows = F.pad(where + self.text_tokens, (self.text_tokens, 0))  # the text's rows are all the same
        cos, sin = (table[0].index_select(0, rows.flatten()).unflatten(0, rows.shape) for table in tables)
        return cos, sin


@cache
def _periods(axes: tuple[int, ...], theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every pair of a head's dimensions, the axis it takes and the position in it at which its angle is 1."""
    axis = [torch.full((size // 2,), i, device=device) for i, size in enumerate(axes)]
    period = [theta ** (torch.arange(0, size, 2, dtype=torch.float64, device=device) / size) for size in axes]
    return torch.cat(axis), torch.cat(period)
