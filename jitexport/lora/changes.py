"""Changes of one weight: what each kind of adapter adds to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jitexport.errors import InputError


class Change(ABC):
    """What an adapter adds to a weight."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the weight it belongs to."""

    @abstractmethod
    def delta(self, weight: Tensor, scale: float) -> Tensor:
        """The change of a weight at a scale, fp32 on the weight's device.

        Args:
            weight: without any adapter, fp32.
            scale: strength that the user asked for.
        """

    def take(self, rows: Tensor) -> Change:
        """The change of some rows of the weight, int64 [m], as a weight of their own."""
        return Rows(self, rows)


@dataclass(frozen=True)
class LowRank(Change):
    """factor * up @ down, with up [out, r] and down [r, in]."""

    down: Tensor
    up: Tensor
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    def delta(self, weight: Tensor, scale: float) -> Tensor:
        return (scale * self.factor) * (_fp32(self.up, weight) @ _fp32(self.down, weight))

    def take(self, rows: Tensor) -> Change:
        return LowRank(self.down, self.up[rows], self.factor)


@dataclass(frozen=True)
class Hadamard(Change):
    """LoHa: factor * (a1 @ b1) * (a2 @ b2), with a [out, r] and b [r, in]."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.a1.shape[0], self.b1.shape[1]

    def delta(self, weight: Tensor, scale: float) -> Tensor:
        a1, b1, a2, b2 = (_fp32(t, weight) for t in (self.a1, self.b1, self.a2, self.b2))
        return (scale * self.factor) * (a1 @ b1) * (a2 @ b2)

    def take(self, rows: Tensor) -> Change:
        return Hadamard(self.a1[rows], self.b1, self.a2[rows], self.b2, self.factor)


@dataclass(frozen=True)
class Kronecker(Change):
    """LoKr: factor * kron(w1, w2), each a matrix or a pair whose product it is."""

    w1: Sequence[Tensor]
    w2: Sequence[Tensor]
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.w1[0].shape[0] * self.w2[0].shape[0], self.w1[-1].shape[1] * self.w2[-1].shape[1]
        return rows, columns

    def delta(self, weight: Tensor, scale: float) -> Tensor:
        w1, w2 = (_product([_fp32(t, weight) for t in parts]) for parts in (self.w1, self.w2))
        return (scale * self.factor) * torch.kron(w1, w2)


@dataclass(frozen=True)
class Difference(Change):
    """factor * value: a difference of the whole weight, of a bias [out] or of a norm's weight."""

    value: Tensor
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def delta(self, weight: Tensor, scale: float) -> Tensor:
        return (scale * self.factor) * _fp32(self.value, weight)

    def take(self, rows: Tensor) -> Change:
        return Difference(self.value[rows], self.factor)


@dataclass(frozen=True)
class Decomposed(Change):
    """DoRA: m * V / ||V|| - W with V = W + the inner change, a norm and a magnitude for each row or each column.

    The scale acts on the inner change and the norm is that of the merged weight, as in PEFT.

    Attributes:
        magnitude: m, [out] or, `by_column`, [in].
    """

    inner: Change
    magnitude: Tensor
    by_column: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def delta(self, weight: Tensor, scale: float) -> Tensor:
        merged = weight + self.inner.delta(weight, scale)
        norm = torch.linalg.vector_norm(merged, dim=0 if self.by_column else 1, keepdim=True)
        norm = torch.where(norm.isfinite(), norm, torch.nan)  # an overflow would pass as a weight of zeros
        magnitude = _fp32(self.magnitude, weight)
        return merged * (magnitude[None] if self.by_column else magnitude[:, None]) / norm - weight

    def take(self, rows: Tensor) -> Change:
        """Of columns, all rows in any order only: their norm needs all of them.

        Raises:
            InputError: some rows of a change with a magnitude for each column.
        """
        if self.by_column:
            if len(rows) != self.shape[0]:
                raise InputError(
                    "DoRA over the columns of a fused layer cannot be split", found=f"{len(rows)} of its rows",
                    expected="a magnitude for each output",
                )
            return Decomposed(self.inner.take(rows), self.magnitude, True)
        return Decomposed(self.inner.take(rows), self.magnitude[rows])


@dataclass(frozen=True)
class Rows(Change):
    """Some rows of a change that does not depend on the weight."""

    inner: Change
    rows: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), *self.inner.shape[1:]

    def delta(self, weight: Tensor, scale: float) -> Tensor:
        return self.inner.delta(weight, scale)[self.rows.to(weight.device)]

    def take(self, rows: Tensor) -> Change:
        return Rows(self.inner, self.rows[rows])


def _fp32(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, torch.float32)


def _product(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] @ parts[1]
