"""Attention of the stage modules: by PyTorch, by parts, or by a kernel of our own that Inductor puts into its code.

PyTorch's fused attention for CPUs runs no faster in bf16 than in fp32. By parts, its products reach the rate of bf16
products, and the softmax between them takes half as long again. The kernel (attention.h) does both at once for CPUs
with AVX-512 and bf16 instructions, and in 8 bits where a model's linear layers are quantized.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jitexport.kernels import native
from jitexport.kernels.native import by_parts


def attention(q: Tensor, k: Tensor, v: Tensor, *, int8: bool = False) -> Tensor:
    """Full attention, softmax(q k^T / sqrt(Dh)) v, over heads [B, L, H, Dh] -> [B, L, H, Dh].

    Args:
        int8: whether products may run on 8-bit numbers; only the kernel does so, with an error of about 1%.
    """
    if native.wanted(q) and q.shape[-1] % native.GROUP == 0:
        return torch.ops.jitexport.attention(q, k, v, int8)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    out = blockwise_attention(*heads) if by_parts(q) else F.scaled_dot_product_attention(*heads)
    return out.transpose(1, 2)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 256) -> Tensor:
    """Attention by plain matrix products over blocks of at most `block` queries; heads [B, H, L, Dh].

    The scores of a block stay in the cache. They are rounded to bf16: against fp32, a stage is as exact either way.
    """
    queries = q.shape[2]
    blocks = -(-queries // block)
    # Products copy operands that do not lie in memory as they need them, for every block: they are laid out once.
    q = (q * q.shape[-1] ** -0.5).contiguous()
    k, v = k.contiguous().transpose(-1, -2), v.contiguous()
    return torch.cat([softmax_product(part @ k, v) for part in q.split(-(-queries // blocks), dim=2)], dim=2)


def softmax_product(scores: Tensor, v: Tensor) -> Tensor:
    """softmax(scores [B, H, L, L']) @ v [B, H, L', Dh], divided by the sums after the product, where there is less."""
    scores = scores.float()
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    product = weights.to(v.dtype) @ v
    return (product.float() / weights.sum(dim=-1, keepdim=True)).to(v.dtype)


@torch.library.custom_op("jitexport::attention", mutates_args=(), device_types="cpu")
def attention_operator(q: Tensor, k: Tensor, v: Tensor, int8: bool) -> Tensor:
    """`attention` as one operator, for graphs; bf16 heads of a multiple of 64 channels."""
    out = blockwise_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2).contiguous()


@attention_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, int8: bool) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


CALL = """
using namespace jitexport;
const auto heads = [](const void* data) {
  return Heads{static_cast<const uint16_t*>(data), {{tokens}}, {{heads}}, {{channels}}};
};
Attention<{{kind}}, {{channels}}>::run(
    heads({{q}}), heads({{k}}), heads({{v}}), reinterpret_cast<uint16_t*>({{out}}), {{batch}}, {{scale}}, {{threads}});
"""


@native.lowers(torch.ops.jitexport.attention.default)
def lowering(q: Any, k: Any, v: Any, int8: bool) -> Any:
    """The operator for Inductor."""
    batch, tokens, heads, channels = map(int, q.get_size())
    return native.kernel_node(
        "attention.h", CALL, {"q": q, "k": k, "v": v}, q.get_size(), q.get_dtype(),
        {
            "batch": batch, "tokens": tokens, "heads": heads, "channels": channels,
            "kind": "Int8" if int8 else "BF16", "scale": channels**-0.5,
        },
    )
