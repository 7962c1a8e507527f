"""Attention of the stage modules: by PyTorch, by parts, or by a kernel of our own that Inductor puts into its code.

PyTorch's fused attention for CPUs runs no faster in bf16 than in fp32. By parts, its products reach the rate of bf16
products, and the softmax between them takes half as long again. The kernel (attention.h) does both at once for CPUs
with AVX2 or AVX-512, with norms and rotation before them, and in whole numbers where a model's linear layers are
quantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jitexport.kernels import native
from jitexport.kernels.native import by_parts


class Stream(NamedTuple):
    """Tokens with projections of their own, such as the text's or the image's.

    Attributes:
        q, k, v: heads as they are projected, [B, L, H, Dh].
        q_norm, k_norm: weights [Dh] of the RMS norms of queries and keys; None for none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


def attention(
    streams: Sequence[Stream],
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    int8: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Full attention, softmax(q k^T / sqrt(Dh) + mask) v, over the tokens of all streams, one stream after the other.

    Args:
        cos, sin: of the angles [B or 1, up to the sum of L, Dh / 2] by which neighbouring channels of queries and keys
            are rotated, after the norms; fp32. Tokens after those they cover are not rotated; None for no rotation.
        eps: of the norms.
        int8: whether products may run on whole numbers, of 8 bits or of 11 (tiles.h); only the kernel does so, with an
            error of about 1%.
        mask: what is added to the scores of keys, fp32 [B or 1, sum of L]: 0 for tokens that count, a large negative
            and finite number for padding, whose keys and values must be finite too. None where all tokens count.

    Returns:
        [B, sum of L, H, Dh].
    """
    q, k, v, q_norms, k_norms = zip(*streams, strict=True)
    norms = [[norm for norm in given if norm is not None] for given in (q_norms, k_norms)]
    batch, tokens, channels = q[0].shape[0], sum(x.shape[1] for x in q), q[0].shape[-1]
    fits = channels % native.GROUP == 0 and all(len(given) in (0, len(q)) for given in norms)
    fits = fits and all(s.q.shape == s.k.shape == s.v.shape for s in streams)
    fits = fits and (cos is None or cos.shape[1] <= tokens)
    if fits and native.wanted(*q, *k, *v, *norms[0], *norms[1]):
        if cos is not None and sin is not None:
            cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
        if mask is not None:
            mask = mask.float().expand(batch, tokens)
        return torch.ops.jitexport.attention(list(q), list(k), list(v), *norms, cos, sin, mask, eps, int8)
    return by_torch(joined(streams, cos, sin, eps), mask)


def by_torch(heads: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """q, k and v [B, L, H, Dh], and mask [B or 1, L] or None -> attention, [B, L, H, Dh]."""
    q, k, v = (x.transpose(1, 2) for x in heads)
    if by_parts(q):
        return blockwise_attention(q, k, v, mask=mask).transpose(1, 2)
    bias = None if mask is None else narrowed(mask, q.dtype)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def narrowed(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in another dtype, its numbers finite there, also multiplied by log2(e), as some kernels do."""
    return mask.clamp(min=torch.finfo(dtype).min / 2).to(dtype)


def joined(
    streams: Sequence[Stream], cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of all streams as products take them, [B, sum of L, H, Dh]: normalised, joined, rotated."""

    def join(parts: Sequence[Tensor], norms: Sequence[Tensor | None]) -> Tensor:
        parts = [
            x if norm is None else F.rms_norm(x, norm.shape, norm, eps) for x, norm in zip(parts, norms, strict=True)
        ]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    queries, keys, values, q_norms, k_norms = zip(*streams, strict=True)
    q, k, v = join(queries, q_norms), join(keys, k_norms), join(values, [None] * len(values))
    return (q, k, v) if cos is None or sin is None else (rotate(q, cos, sin), rotate(k, cos, sin), v)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x [B, L, H, Dh] by angles [B, up to L, Dh / 2], in fp32; tokens after them by 0.

    The result holds the first of each pair, then the second of each: scores of queries and keys do not depend on the
    order of a head's dimensions, and compilers vectorise halves where they cannot vectorise pairs.
    """
    if (rest := x.shape[1] - cos.shape[1]) > 0:
        cos, sin = F.pad(cos, (0, 0, 0, rest), value=1.0), F.pad(sin, (0, 0, 0, rest))
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1).to(x.dtype)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 256, mask: Tensor | None = None) -> Tensor:
    """Attention by plain matrix products over blocks of at most `block` queries; heads [B, H, L, Dh], mask [B, L].

    The scores of a block stay in the cache. They are rounded to bf16: against fp32, a stage is as exact either way.
    """
    queries = q.shape[2]
    blocks = -(-queries // block)
    # Products copy operands that do not lie in memory as they need them, for every block: they are laid out once.
    q = (q * q.shape[-1] ** -0.5).contiguous()
    k, v = k.contiguous().transpose(-1, -2), v.contiguous()
    return torch.cat([softmax_product(part @ k, v, mask) for part in q.split(-(-queries // blocks), dim=2)], dim=2)


def softmax_product(scores: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(scores [B, H, L, L'] + mask [B, L']) @ v [B, H, L', Dh], divided by the sums after the product, where
    there is less."""
    scores = scores.float()
    if mask is not None:
        scores = scores + mask[:, None, None]
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    product = weights.to(v.dtype) @ v
    return (product.float() / weights.sum(dim=-1, keepdim=True)).to(v.dtype)


@torch.library.custom_op("jitexport::attention", mutates_args=(), device_types="cpu")
def attention_operator(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    q_norms: Sequence[Tensor],
    k_norms: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    eps: float,
    int8: bool,
) -> Tensor:
    """`attention` as one operator, for graphs; heads of a multiple of 64 channels; norms for all streams or []."""
    none = [None] * len(q)
    streams = [Stream(*stream) for stream in zip(q, k, v, q_norms or none, k_norms or none, strict=True)]
    return by_torch(joined(streams, cos, sin, eps), mask).contiguous()


@attention_operator.register_fake
def _(
    q: Any, k: Any, v: Any, q_norms: Any, k_norms: Any, cos: Any, sin: Any, mask: Any, eps: float, int8: bool
) -> Tensor:
    batch, _, heads, channels = q[0].shape
    return q[0].new_empty((batch, sum(x.shape[1] for x in q), heads, channels))


CALL = """
{%- macro streams(parts, norms) -%}
{ {% for data in parts -%}
{(const {{number}}*){{data}}, (const {{number}}*){{norms[loop.index0] if norms else "nullptr"}},
 {{lengths[loop.index0]}}}, {% endfor -%} }
{%- endmacro -%}
using namespace jitexport;
const Stream<{{number}}> q[] = {{streams(q, q_norms)}}, k[] = {{streams(k, k_norms)}}, v[] = {{streams(v, [])}};
Attention<{{kind}}, {{number}}, {{channels}}>{
    {{batch}}, {{tokens}}, {{heads}}, {{scale}}, {{eps}}, {{cos}}, {{sin}}, {{rotated}}, {{mask}}
}.run(q, k, v, ({{number}}*){{out}}, {{threads}});
"""


@native.lowers(torch.ops.jitexport.attention.default)
def lowering(
    q: Any, k: Any, v: Any, q_norms: Any, k_norms: Any, cos: Any, sin: Any, mask: Any, eps: float, int8: bool
) -> Any:
    """The operator for Inductor."""
    batch, _, heads, channels = map(int, q[0].get_size())
    lengths = [int(x.get_size()[1]) for x in q]
    return native.kernel_node(
        "attention.h", CALL,
        {"q": q, "k": k, "v": v, "q_norms": q_norms, "k_norms": k_norms, "cos": cos, "sin": sin, "mask": mask},
        [batch, sum(lengths), heads, channels], q[0].get_dtype(),
        {
            "batch": batch, "tokens": sum(lengths), "lengths": lengths, "heads": heads, "channels": channels,
            "number": (number := native.number_type(q[0].get_dtype())), "kind": native.kind(number, int8),
            "scale": channels**-0.5, "eps": eps, "rotated": 0 if cos is None else int(cos.get_size()[1]),
        },
    )
