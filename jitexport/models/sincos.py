"""Positions as sines and cosines that are added to the tokens, and how a checkpoint's table of them is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from jitexport.errors import UnsupportedModelError
from jitexport.positions import Positions, Tables
from jitexport.specs import TensorSpec

LONGEST = 10000.0  # wavelengths rise from 2 pi to this, times 2 pi

#: A table may be stored in bf16, whose numbers below 1 are this close to each other.
TABLE_TOLERANCE = 4e-3


@cache
def _frequencies(width: int, device: torch.device | None) -> Tensor:
    """Of the D / 4 waves of an axis, fp64, fast to slow."""
    waves = torch.arange(width // 4, dtype=torch.float64, device=device)
    return LONGEST ** (-4 * waves / width)


@dataclass(frozen=True)
class SinCos(Positions):
    """Places as vectors that are added to the tokens: an input `positions` [B, m, D], fp32.

    They are sines and cosines of the column, then those of the row.

    The coordinate of place p on an axis is first + step * p.

    Attributes:
        width: D, channels of the transformer.
        first: coordinates of the grid's first token, row and column.
        step: between neighbouring tokens.
    """

    width: int
    first: tuple[float, float]
    step: float

    def specs(self, batch: int, tokens: int, dtype: str) -> tuple[TensorSpec, ...]:
        return (TensorSpec("positions", (batch, tokens, self.width), "fp32"),)

    def tables(self, places: Tensor) -> Tables:
        """Coordinates are rounded to fp32 and angles are not, as in diffusers."""
        first = torch.tensor(self.first, dtype=torch.float64, device=places.device)
        row, column = (first + self.step * places.double()).float().double().unbind(-1)
        frequencies = _frequencies(self.width, places.device)
        angles = [torch.outer(axis, frequencies) for axis in (column, row)]
        return {"positions": torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=-1).float()}

    def gather(self, tables: Tables, where: Tensor) -> dict[str, Tensor]:
        table = tables["positions"]
        return {"positions": table.index_select(0, where.flatten()).unflatten(0, where.shape)}


def published_table(width: int, size: int, base: int) -> SinCos:
    """The table that diffusers makes: `size` rows and columns, coordinates from 0 to `base`."""
    return SinCos(width, (0.0, 0.0), base / size)


def cropped(table: SinCos, size: int, grid: Sequence[int]) -> SinCos:
    """The middle of a table of `size` x `size` places, as diffusers crops it for a grid of tokens."""
    row, column = (first + table.step * ((size - n) // 2) for first, n in zip(table.first, grid, strict=True))
    return SinCos(table.width, (row, column), table.step)


def read_table(values: Tensor, size: int, expected: SinCos) -> SinCos:
    """What a checkpoint's table [1, size^2, D] is made by: `expected`, or one of other coordinates.

    Raises:
        UnsupportedModelError: it is not made by sines and cosines of evenly spaced coordinates.
    """
    rows = values.detach().reshape(size, size, -1)
    if _agrees(rows, expected):
        return expected
    (column, step), (row, _) = (_line(_coordinates(x)) for x in (rows[0].chunk(2, -1)[0], rows[:, 0].chunk(2, -1)[1]))
    found = SinCos(expected.width, (row, column), step)
    simple = SinCos(expected.width, (_simple(row), _simple(column)), _simple(step))  # without what rounding has added
    for table in (simple, found):
        if _agrees(rows, table):
            return table
    raise UnsupportedModelError(
        "the transformer's table of positions follows no rule that is known",
        found=f"pos_embed.pos_embed {list(values.shape)}",
        expected="sines and cosines of evenly spaced coordinates, from which places between them are computed",
    )


def _agrees(rows: Tensor, table: SinCos) -> bool:
    """Whether rows [S, S, D] are a table's, up to rounding. Row by row: SD3.5-medium's table has 226 million values."""
    size = rows.shape[0]
    line = torch.arange(size, device=rows.device)
    return all(
        (row.float() - table.tables(torch.stack([torch.full_like(line, i), line], -1))["positions"]).abs().max()
        <= TABLE_TOLERANCE
        for i, row in enumerate(rows)
    )


def _coordinates(vectors: Tensor) -> Tensor:
    """The coordinates whose sines and cosines are vectors [n, D / 2]: [n], fp64.

    From the slow waves, which are unambiguous, to the fast ones, which are exact.
    """
    sine, cosine = vectors.double().chunk(2, dim=-1)
    angles, frequencies = torch.atan2(sine, cosine), _frequencies(2 * vectors.shape[-1], vectors.device)
    x = torch.zeros_like(angles[:, 0])
    for angle, frequency in zip(angles.T.flip(0), frequencies.flip(0), strict=True):
        x = x + (torch.remainder(angle - x * frequency + math.pi, 2 * math.pi) - math.pi) / frequency
    return x


def _line(x: Tensor) -> tuple[float, float]:
    """Start and step of the even spacing that is closest to x [n]."""
    n = torch.arange(len(x), dtype=x.dtype, device=x.device)
    n = n - n.mean()
    step = float((n * x).sum() / (n * n).sum())
    return float(x.mean()) + step * float(n[0]), step


def _simple(x: float) -> float:
    """A fraction of small numbers close to x."""
    return float(Fraction(x).limit_denominator(64))
