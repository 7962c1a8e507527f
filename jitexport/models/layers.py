"""Pieces that the stage modules of several families are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from jitexport.grid import TokenGrid, unpack
from jitexport.kernels.attention import Stream
from jitexport.kernels.linear import linear
from jitexport.quant import QuantizedLinear

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


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


class PackedDecode(nn.Module):
    """Packed latents [B, N, C], fp32 -> pictures [B, 3, H, W] in [0, 1], fp32."""

    def __init__(self, vae: AutoencoderKL, grid: TokenGrid, patch: int) -> None:
        super().__init__()
        self.vae = vae
        self.grid = grid
        self.patch = patch

    def forward(self, tokens: Tensor) -> Tensor:
        config = self.vae.config
        latents = unpack(tokens, self.grid, self.patch) / config.scaling_factor + (config.shift_factor or 0.0)
        picture = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (picture.float() / 2 + 0.5).clamp(0, 1)
