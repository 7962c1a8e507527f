"""Values at some tokens of a grid, spread to all of it: the nearest one's, blurred (JiT, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from jitexport.grid import TokenGrid, gather_tokens, scatter_tokens


def nearest_anchor(grid: TokenGrid, anchors: Tensor, at_once: int = 2**20) -> Tensor:
    """Position in the anchor list of the anchor nearest to each token, Euclidean on the grid (Algorithm 2, step 1).

    Ties go to the lowest position in the list, as in the released code. Takes N (H + W) operations instead of the N m
    of all distances: on a grid, the minimum over all anchors can be taken one axis after the other.

    Args:
        anchors: token indices, [B, m].
        at_once: keys treated at once, which bounds memory.

    Returns:
        [B, N], int64, values in 0 .. m - 1.
    """
    batch, m = anchors.shape
    device = anchors.device
    if m == grid.tokens:
        return anchors.argsort(dim=1)  # each token is its own anchor
    # The key of token p and anchor j is |p - a_j|^2 m + j: the smallest one has the smallest distance, and among equal
    # ones the lowest j. Squared distances are sums over axes, so min_j key = min_row (row distance + min_column (...)).
    far = m * (1 + sum((n - 1) ** 2 for n in grid.shape))  # more than any key
    dtype = torch.int32 if 2 * far < 2**31 else torch.int64  # whole numbers: exact
    order = torch.arange(m, device=device, dtype=dtype).expand(batch, -1)
    key = torch.full((batch, grid.tokens), far, device=device, dtype=dtype).scatter_(1, anchors, order)
    key = grid.unflatten(key)  # [B, *shape]
    rows_at_once = max(1, at_once // key.numel())
    for axis, n in enumerate(grid.shape, start=1):
        place = torch.arange(n, device=device, dtype=dtype)
        distance = (place[:, None] - place).square() * m  # [to, from]
        key = key.movedim(axis, 1).unsqueeze(1)  # [B, 1, from, ...]
        distance = distance.reshape(1, n, n, *[1] * (key.dim() - 3))
        nearest = [(key + part).amin(2) for part in distance.split(rows_at_once, dim=1)]
        key = torch.cat(nearest, dim=1).movedim(1, axis)
    return (key % m).reshape(batch, grid.tokens).long()


def reflect(index: Tensor, n: int) -> Tensor:
    """Index into 0 .. n - 1 of positions outside it, mirrored at the border without repeating it."""
    if n == 1:
        return torch.zeros_like(index)
    period = 2 * (n - 1)
    index = index.abs() % period
    return torch.minimum(index, period - index)


@cache
def blur_matrix(n: int, sigma: float, radius: int, device: torch.device | str | None = None) -> Tensor:
    """Gaussian blur along an axis of n tokens with reflect padding, as a matrix: [n, n], rows sum to 1, fp32.

    Made on the device that uses it: a copy to a GPU could not be recorded in a CUDA graph.
    """
    offsets = torch.arange(-radius, radius + 1, device=device)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weights /= weights.sum()
    place = torch.arange(n, device=device)
    source = reflect(place[:, None] + offsets, n)  # [n, 2 * radius + 1]
    return torch.where(source[:, :, None] == place, weights[:, None], 0.0).sum(1).float()


@cache
def mean_matrix(n: int, window: int, device: torch.device | str | None = None) -> Tensor:
    """Mean over a window along an axis with zero padding that is counted, as a matrix: [n, n], fp32."""
    place = torch.arange(n, device=device)
    return ((place[:, None] - place).abs() <= window // 2).float() / window


def separable(grid: TokenGrid, matrices: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """Apply one matrix along each axis of the grid: y [B, N, C] -> [B, N, C]."""
    before, _, after = y.shape
    after *= grid.tokens
    field = y
    for matrix, n in zip(matrices, grid.shape, strict=True):
        after //= n
        field = matrix @ (field.reshape(n, after) if before == 1 else field.reshape(before, n, after))
        before *= n
    return field.reshape(y.shape)


@dataclass(frozen=True)
class Lifter:
    """The operator u -> S u + I(u) for one set of anchors: eq. 16 for velocities, Phi for clean tokens.

    The nearest-anchor map and the blur weights do not change within a stage, so they are computed once.

    Attributes:
        anchors: active token indices, [B, m].
        nearest: `nearest_anchor` of them, [B, N].
        blur: one `blur_matrix` per grid axis.
        whole: whether the anchors are all tokens in their own order, and there is nothing to do.
    """

    grid: TokenGrid
    anchors: Tensor
    nearest: Tensor
    blur: tuple[Tensor, ...]
    whole: bool = False

    def active(self, y: Tensor) -> Tensor:
        """The anchors' tokens of y [B, N, C], as [B, m, C]."""
        return y if self.whole else gather_tokens(y, self.anchors)

    def __call__(self, u: Tensor) -> Tensor:
        """u [B, m, C] -> [B, N, C]; the values at anchors are u's own bits (Algorithm 2, step 3)."""
        if self.whole:
            return u
        if u.shape[1] == self.grid.tokens:  # in another order: nothing is interpolated
            return scatter_tokens(u, self.anchors, u)
        blurred = separable(self.grid, self.blur, gather_tokens(u, self.nearest))
        return scatter_tokens(blurred, self.anchors, u)
