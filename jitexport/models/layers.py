"""Pieces that the stage modules of several families are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from jitexport.kernels.attention import Stream, attention
from jitexport.kernels.linear import linear
from jitexport.quant import QuantizedLinear

if TYPE_CHECKING:
    from jitexport.models.tokens import Memo, Refresh

#: A module of diffusers or transformers, or a part of one. Their classes declare hardly any attributes, and
#: `nn.Module` says of each that it is a tensor or a module, which is wrong of `attn.heads` and `norm.eps`.
Part = Any


def modulate(norm: Part, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise x [B, L, D], then scale and shift by vectors [B, D] (adaLN)."""
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def modulated(norm: Part, modulation: Tensor, x: Tensor) -> Tensor:
    """What a block's first layer sees of x [B, L, D], by modulation [B or 1, n D] that begins with shift and scale."""
    shift, scale, *_ = modulation.split(x.shape[-1], dim=-1)
    return modulate(norm, x, shift, scale)


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update for x [B, L, D] and a vector [B, D]."""
    return (x + gate[:, None] * update).to(x.dtype)


def stream(x: Tensor, layers: Sequence[Part], norms: Sequence[Part], head_dim: int) -> Stream:
    """Queries, keys and values of tokens x [B, L, D], by projections and norms in this order."""
    heads = (run_linear(layer, x).unflatten(-1, (-1, head_dim)) for layer in layers)
    return Stream(*heads, *(norm.weight for norm in norms))


def runs_in_int8(layer: Part) -> bool:
    """Whether a block's attention may run in 8 bits as well: where its linear layers do."""
    return isinstance(layer, QuantizedLinear) and layer.kind == "int8"


def run_linear(layer: Part, *parts: Tensor, gelu: bool = False, wide: bool = False) -> Tensor:
    """A linear layer, quantized or not: see `jitexport.kernels.linear.linear`."""
    return linear(parts, layer.weight, layer.bias, getattr(layer, "weight_scale", None), gelu=gelu, wide=wide)


def feed_forward(ff: Part, x: Tensor) -> Tensor:
    """diffusers' `FeedForward` with its tanh GELU, [B, L, D] -> [B, L, D]."""
    return run_linear(ff.net[2], run_linear(ff.net[0].proj, x, gelu=True), wide=True)


def time_embedding(embed: Part, embedder: Part, levels: Tensor) -> Tensor:
    """Noise levels, or guidance, [S] by a module's sines and an embedder's two layers -> [S, D].

    Angles of up to 1000 radians are made in fp32 whatever the model's dtype.
    """
    return embedder(embed(levels.float() * 1000).to(embedder.linear_1.weight.dtype))


def last_layer(model: Part, x: Tensor, modulation: Tensor) -> Tensor:
    """A transformer's output norm and projection of image tokens x [B, m, D]; modulation [B, 2 D]."""
    scale, shift = modulation.chunk(2, dim=-1)
    return model.proj_out(modulate(model.norm_out.norm, x, shift, scale))


class Side(NamedTuple):
    """What a joint block has for one of its streams.

    Attributes:
        norm, mlp_norm: before attention and before the MLP.
        projections: of queries, keys and values.
        qk_norms: of queries and keys.
        out: behind attention.
        mlp: the feed-forward module.
    """

    norm: Part
    projections: Sequence[Part]
    qk_norms: Sequence[Part]
    out: Part
    mlp_norm: Part
    mlp: Part


def image_side(attn: Part, norm: Part, mlp_norm: Part, mlp: Part) -> Side:
    """The image's or video's, by diffusers' names in a joint attention."""
    return Side(norm, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), attn.to_out[0], mlp_norm, mlp)


def text_side(attn: Part, norm: Part, mlp_norm: Part, mlp: Part) -> Side:
    """The text's."""
    projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    return Side(norm, projections, (attn.norm_added_q, attn.norm_added_k), attn.to_add_out, mlp_norm, mlp)


def joint_block(
    attn: Part,
    sides: Sequence[Side],
    tokens: Sequence[Tensor],
    modulation: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None = None,
    *,
    mlp: Callable[[Any, Tensor], Tensor] = feed_forward,
    memo: Memo | None = None,
) -> list[Tensor]:
    """Attention over all streams together, then an MLP of each, with weights of its own (MM-DiT).

    Args:
        sides, tokens, modulation: of the streams in the order of attention; tokens [B, L, D], modulation
            [B or 1, 6 D]: shift, scale and gate of attention, then of the MLP.
        cos, sin, mask: see `attention`.
        mlp: runs a side's feed-forward module.
        memo: see `jitexport.models.tokens`.

    Returns:
        The streams after the block.
    """
    head_dim = attn.to_q.weight.shape[0] // attn.heads
    vectors = [part.chunk(6, dim=-1) for part in modulation]
    if memo is not None and not memo.attends:
        return [refreshed_side(memo, *side, mlp) for side in zip(sides, tokens, vectors, strict=True)]
    streams = [
        stream(modulate(side.norm, x, shift, scale), side.projections, side.qk_norms, head_dim)
        for side, x, (shift, scale, *_) in zip(sides, tokens, vectors, strict=True)
    ]
    a = attention(streams, cos, sin, eps=attn.norm_q.eps, int8=runs_in_int8(attn.to_q), mask=mask).flatten(2)
    if memo is not None:
        memo.score(streams)
    after = []
    parts = a.split([x.shape[1] for x in tokens], dim=1)
    for side, x, part, (_, _, gate, shift, scale, mlp_gate) in zip(sides, tokens, parts, vectors, strict=True):
        found = run_linear(side.out, part, wide=True)
        x = gated(x, gate, found)
        update = mlp(side.mlp, modulate(side.mlp_norm, x, shift, scale))
        if memo is not None:
            memo.keep(update, found)
        after.append(gated(x, mlp_gate, update))
    return after


def refreshed_side(
    memo: Refresh, side: Side, x: Tensor, vectors: Sequence[Tensor], mlp: Callable[[Any, Tensor], Tensor]
) -> Tensor:
    """A stream x [B, L, D] after a joint block whose attention is cached, and of whose MLP a part is."""
    _, _, gate, shift, scale, mlp_gate = vectors
    x = gated(x, gate, memo.attention(x))
    return memo.refreshed(x, mlp_gate, lambda x: mlp(side.mlp, modulate(side.mlp_norm, x, shift, scale)))


class TransformerPart(nn.Module):
    """Base of engines that are parts of a transformer, with its weights under their own names."""

    def __init__(self, transformer: Part) -> None:
        super().__init__()
        self.transformer: Part = transformer
