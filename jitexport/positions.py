"""What stage engines read about where tokens are: made once for all places, gathered for the tokens of a stage.

Which inputs these are, and where the text stands, is a model family's choice: see `Positions`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from jitexport.specs import TensorSpec

#: Rows of all places, by the name of the stage input that they are gathered for.
Tables = dict[str, Tensor]


class Positions(ABC):
    """Stage inputs that depend on where tokens are, and on nothing else."""

    @abstractmethod
    def specs(self, batch: int, tokens: int, dtype: str) -> tuple[TensorSpec, ...]:
        """The inputs of a stage of so many tokens, in order."""

    @abstractmethod
    def tables(self, places: Tensor) -> Tables:
        """What is gathered from, for all places that tokens can be at.

        Args:
            places: [P, 2 or 3], in units of the full grid; fractions are places between its tokens.
        """

    @abstractmethod
    def gather(self, tables: Tables, where: Tensor) -> dict[str, Tensor]:
        """The inputs of a stage whose tokens are at the places `where` [B, m], an index into those of `tables`."""


@dataclass(frozen=True)
class Rotary(Positions):
    """Axial rotary embedding: inputs `cos` and `sin`, [B, T + m, D / 2] each, fp32, text in front of the image.

    A token's position has one coordinate for each of `axes`.

    Attributes:
        axes: head dimensions that each position axis takes; they sum to the head size.
        theta: base of the frequencies.
        grid_axes: the position axes that the grid's take, one each; the others are 0.
        offset: added to the grid's coordinates.
        text_tokens: T, tokens in front of the image's; 0 where text is not rotated.
        text_start, text_step: token j of the text is at text_start + j * text_step; () is the origin.
    """

    axes: tuple[int, ...]
    theta: float
    grid_axes: tuple[int, ...]
    offset: tuple[float, ...] = ()
    text_tokens: int = 0
    text_start: tuple[float, ...] = ()
    text_step: tuple[float, ...] = ()

    def specs(self, batch: int, tokens: int, dtype: str) -> tuple[TensorSpec, ...]:
        shape = (batch, self.text_tokens + tokens, sum(self.axes) // 2)
        return TensorSpec("cos", shape, "fp32"), TensorSpec("sin", shape, "fp32")

    def tables(self, places: Tensor) -> Tables:
        """Angles are computed in fp64, as diffusers does, because fp32 loses digits at large positions."""
        grid = places.double()
        if self.offset:
            grid = grid + grid.new_tensor(self.offset)
        image = grid.new_zeros(len(grid), len(self.axes))
        image[:, list(self.grid_axes)] = grid
        ids = torch.cat([self._text(grid), image])
        axis, period = _periods(self.axes, self.theta, ids.device)
        angle = ids.index_select(-1, axis) / period
        return {"cos": angle.cos().float(), "sin": angle.sin().float()}

    def _text(self, like: Tensor) -> Tensor:
        """Positions of the text's tokens, [T, axes]."""
        none = (0.0,) * len(self.axes)
        start, step = (like.new_tensor(x or none) for x in (self.text_start, self.text_step))
        return start + torch.arange(self.text_tokens, device=like.device)[:, None] * step

    def gather(self, tables: Tables, where: Tensor) -> dict[str, Tensor]:
        text = torch.arange(self.text_tokens, device=where.device).expand(len(where), -1)
        rows = torch.cat([text, where + self.text_tokens], dim=1)
        return {name: table.index_select(0, rows.flatten()).unflatten(0, rows.shape) for name, table in tables.items()}


@cache
def _periods(axes: tuple[int, ...], theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every pair of a head's dimensions, the axis it takes and the position in it at which its angle is 1."""
    axis = [torch.full((size // 2,), i, device=device) for i, size in enumerate(axes)]
    period = [theta ** (torch.arange(0, size, 2, dtype=torch.float64, device=device) / size) for size in axes]
    return torch.cat(axis), torch.cat(period)
