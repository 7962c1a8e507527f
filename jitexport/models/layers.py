"""Pieces that the stage modules of several families are made of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from jitexport.kernels.attention import Stream
from jitexport.kernels.linear import linear
from jitexport.quant import QuantizedLinear


def modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise x [B, L, D], then scale and shift by vectors [B, D] (adaLN)."""
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update for x [B, L, D] and a vector [B, D]."""
    return (x + gate[:, None] * update).to(x.dtype)


def stream(x: Tensor, layers: Sequence[nn.Module], norms: Sequence[nn.RMSNorm], head_dim: int) -> Stream:
    """Queries, keys and values of tokens x [B, L, D], by projections and norms in this order."""
    heads = (run_linear(layer, x).unflatten(-1, (-1, head_dim)) for layer in layers)
    return Stream(*heads, *(norm.weight for norm in norms))


def runs_in_int8(layer: nn.Module) -> bool:
    """Whether a block's attention may run in 8 bits as well: where its linear layers do."""
    return isinstance(layer, QuantizedLinear) and layer.kind == "int8"


def run_linear(layer: nn.Module, *parts: Tensor, gelu: bool = False, wide: bool = False) -> Tensor:
    """A linear layer, quantized or not: see `jitexport.kernels.linear.linear`."""
    return linear(parts, layer.weight, layer.bias, getattr(layer, "weight_scale", None), gelu=gelu, wide=wide)


def feed_forward(ff: nn.Module, x: Tensor) -> Tensor:
    """diffusers' `FeedForward` with its tanh GELU, [B, L, D] -> [B, L, D]."""
    return run_linear(ff.net[2], run_linear(ff.net[0].proj, x, gelu=True), wide=True)
