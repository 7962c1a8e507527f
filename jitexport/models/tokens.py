"""What a temporal method caches of every token in every block, to refresh some tokens of it (ToCa).

A block adds to each of its streams what attention found and what its MLP made of that, each times a gate. The results
before the gates, and the gates of the step at hand, are all that is needed to run a transformer again without attention
and with the MLPs of a few tokens only. Blocks write them into a `Keep` where a step is computed, and read them from a
`Refresh` where it is not.

Tensors of all blocks lie one after the other along the tokens, so an engine hands on few: [R, S, D], where S is the sum
of the lengths of all cells. Which tokens are refreshed is decided by scores that come from outside, by how many of the
highest is fixed: all shapes are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jitexport.kernels.attention import Stream
from jitexport.models.layers import gated


class Cell(NamedTuple):
    """A stream of a block.

    Attributes:
        tokens: of the stream.
        weight: share of its tokens that is refreshed, over the share on average.
        attentions: how many attentions' results the block adds to it.
    """

    tokens: Literal["image", "text", "both"]
    weight: float
    attentions: int = 1

    def length(self, tokens: int, words: int) -> int:
        """Tokens in it, where the image has `tokens` and the text `words`."""
        return {"image": tokens, "text": words, "both": tokens + words}[self.tokens]

    def fresh(self, share: float, length: int) -> int:
        """How many of its tokens are refreshed: all where the share is 1, else at least one."""
        return length if share == 1 else min(length, max(1, int(share * self.weight * length)))


def depth_weight(block: int, depth: int = 28) -> float:
    """From 1.5 for the first block of a depth down to 0.5 for the last (ToCa): early blocks pass errors on.

    The published code for FLUX.1 has 28 there, for both kinds of its blocks.
    """
    return 1.5 - block / max(1, depth - 1)


def flux_cells(doubles: int, singles: int) -> tuple[Cell, ...]:
    """Of double blocks, text before image, then of single blocks, with the published weights of both kinds."""
    return (
        *(Cell(s, 0.4 * depth_weight(i)) for i in range(doubles) for s in ("text", "image")),
        *(Cell("both", 1.6 * depth_weight(i)) for i in range(singles)),
    )


def joint_cells(depth: int, *streams: Literal["image", "text"]) -> tuple[Cell, ...]:
    """Of blocks of two streams, in the order in which their attention has them."""
    return tuple(Cell(s, depth_weight(i, depth)) for i in range(depth) for s in streams)


class Keep:
    """Collects what blocks add while they are computed, cell by cell."""

    attends: Literal[True] = True

    def __init__(self) -> None:
        self._scores: list[Tensor] = []
        self._attention: list[Tensor] = []
        self._updates: list[Tensor] = []

    def score(self, streams: Iterable[Stream]) -> None:
        """How much each token of a block's streams matters: the norm of its values, averaged over heads.

        An attention map is not had from a fused kernel. Over a stream the squares of the scores sum to 1.
        """
        self._scores += [F.normalize(s.v.float().norm(dim=-1).mean(dim=-1), dim=-1) for s in streams]

    def keep(self, update: Tensor, *attention: Tensor) -> None:
        """What a stream's MLP gives before the gate, and what attention gives, [R, L, D] each."""
        self._updates.append(update)
        self._attention += attention

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Attention's results [R, S', D], MLPs' [R, S, D], both in a dtype, and scores [R, S], fp32."""
        attention, updates = (
            torch.cat([t.to(dtype) for t in kept], dim=1) for kept in (self._attention, self._updates)
        )
        return attention, updates, torch.cat(self._scores, dim=1)


class Refresh:
    """Gives blocks what was cached, and refreshes the MLPs' results at the tokens of highest score, cell by cell.

    Args:
        attention, updates, scores: as `Keep.tensors` gives them; scores may have been changed since.
        cells: in the order in which blocks come to them.
        share: of all tokens that are refreshed.
    """

    attends: Literal[False] = False

    def __init__(
        self, attention: Tensor, updates: Tensor, scores: Tensor, *, cells: Sequence[Cell], share: float
    ) -> None:
        self._attention, self._updates, self._scores = attention, updates, scores
        self._cells, self._share = iter(cells), share
        self._read = self._begin = 0  # in the results of attention, and in those of MLPs
        self._chosen: list[Tensor] = []
        self._fresh: list[Tensor] = []

    def attention(self, x: Tensor) -> Tensor:
        """The next result of attention, for a stream x [R, L, D]."""
        begin, self._read = self._read, self._read + x.shape[1]
        return self._attention[:, begin : self._read]

    def refreshed(self, x: Tensor, gate: Tensor, update: Callable[..., Tensor], *beside: Tensor) -> Tensor:
        """x [R, L, D] + gate [R or 1, D] * what the MLP gives, cached or computed.

        Args:
            update: the MLP, of tokens of x and of the tensors beside it.
            beside: what it reads of each token but x, [R, L, ...].
        """
        cell, length = next(self._cells), x.shape[1]
        begin, self._begin = self._begin, self._begin + length
        scores, cached = (t[:, begin : self._begin] for t in (self._scores, self._updates))
        count = cell.fresh(self._share, length)
        if count == length:
            chosen = torch.arange(length, device=x.device).expand(x.shape[0], -1)
            fresh = update(x, *beside)
            after = gated(x, gate, fresh)
        else:
            chosen = scores.topk(count, dim=1, sorted=False).indices
            picked, *others = (t.gather(1, along(chosen, t)) for t in (x, *beside))
            fresh = update(picked, *others)
            after = gated(x, gate, cached).scatter(1, along(chosen, x), gated(picked, gate, fresh))
        self._chosen.append(chosen + begin)
        self._fresh.append(fresh.to(cached.dtype))
        return after

    def tensors(self) -> tuple[Tensor, Tensor]:
        """MLPs' results after the step, [R, S, D], and 1 where they were refreshed, else 0, [R, S], fp32."""
        chosen = torch.cat(self._chosen, dim=1)
        updates = self._updates.scatter(1, along(chosen, self._updates), torch.cat(self._fresh, dim=1))
        fresh = torch.zeros_like(self._scores).scatter(1, chosen, torch.ones_like(chosen, dtype=self._scores.dtype))
        return updates, fresh


#: What the functions of blocks take where one of both is at work.
Memo = Keep | Refresh


def along(chosen: Tensor, x: Tensor) -> Tensor:
    """Numbers of tokens [R, k] as `gather` and `scatter` take them for x [R, L, D]."""
    return chosen[..., None].expand(-1, -1, x.shape[-1])
