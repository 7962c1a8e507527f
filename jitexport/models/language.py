"""Decoder-only language models as text encoders: Qwen2.5-VL's and Qwen3's, of transformers, run at a fixed length.

Image models read the states between a language model's layers. The functions below run transformers' own weights under
their own names, without caches, without control flow that depends on data, and no further than the last layer that is
read. They are plain operators, which every backend exports.

States are numbered as transformers numbers `hidden_states`: 0 is the embedding, k the sum after k layers, and the last
one (-1) is what the final norm makes of the sum after all layers.

- Qwen-Image reads state -1 of Qwen2_5_VLForConditionalGeneration, at valid tokens;
- HunyuanVideo-1.5 reads state -3 of Qwen2_5_VLTextModel;
- FLUX.2-klein reads states 9, 18 and 27 of Qwen3ForCausalLM, at padding too.

Positions count from 0 at the first token of a row, padding or not, as in transformers. On prompts without pictures
Qwen2.5-VL's three position axes are equal, and its rotary embedding is the ordinary one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jitexport.errors import UnsupportedModelError
from jitexport.models.layers import Part

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Classes of transformers, and where each has its decoder (the part with `embed_tokens`, `layers` and `norm`).
DECODERS = {
    "Qwen2_5_VLForConditionalGeneration": "model.language_model",
    "Qwen2_5_VLTextModel": "",
    "Qwen3ForCausalLM": "model",
    "Qwen3Model": "",
}


def decoder_of(model: Part) -> Part:
    """The decoder of a language model of transformers.

    Raises:
        UnsupportedModelError: a model whose layers are not the ones of `decoder_layer`.
    """
    if (name := type(model).__name__) not in DECODERS:
        raise UnsupportedModelError("not a known language model", found=name, expected=", ".join(DECODERS))
    decoder = model.get_submodule(DECODERS[name])
    config = decoder.config
    for key, found, expected in (
        ("hidden_act", {config.hidden_act}, "silu"),
        ("rope_type", {config.rope_parameters["rope_type"]}, "default"),
        ("layer_types", set(config.layer_types), "full_attention"),
    ):
        if found != {expected}:
            raise UnsupportedModelError(
                f"{name} with a {key} that is not supported", found=", ".join(sorted(map(str, found))),
                expected=expected,
            )
    return decoder


def numbered(config: PreTrainedConfig, states: Sequence[int]) -> list[int]:
    """Numbers of states, negative ones counted from the end, as numbers from 0 to the model's number of layers.

    Raises:
        UnsupportedModelError: a state beyond the model's layers.
    """
    depth = config.num_hidden_layers
    if wrong := [k for k in states if not -depth - 1 <= k <= depth]:
        raise UnsupportedModelError(
            "the language model has fewer layers than the image model reads", found=f"{depth} layers",
            expected=f"states {', '.join(map(str, wrong))}",
        )
    return [k % (depth + 1) for k in states]


def keep_what_is_read(model: Part, states: Sequence[int]) -> Part:
    """Take everything that `hidden_states` does not run for these states out of a model, in place.

    What goes: later layers, a final norm that is not reached, the head, the part for pictures. The rest keeps its
    names. transformers' own forward does not work afterwards. Doing it twice changes nothing.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: see `decoder_of` and `numbered`.
    """
    decoder = decoder_of(model)
    needed = max(numbers := numbered(decoder.config, states))
    del decoder.layers[needed:]
    for layer in decoder.layers:
        layer.self_attn.layer_idx = None  # only transformers' caches need it; without it, all layers are of one make

    part = model
    for name in filter(None, DECODERS[type(model).__name__].split(".")):
        drop_all_but(part, {name})
        part = part.get_submodule(name)
    reached = {"norm"} if decoder.config.num_hidden_layers in numbers else set()
    drop_all_but(decoder, {"embed_tokens", "layers"} | reached)
    return model


def drop_all_but(module: Part, kept: set[str]) -> None:
    """Take a module's submodules out, in place, but for those of these names."""
    for name, _ in list(module.named_children()):
        if name not in kept:
            setattr(module, name, None)


def hidden_states(
    model: Part,
    ids: Tensor,
    mask: Tensor,
    states: Sequence[int],
    layer: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """States of a language model of transformers, whole or with no more than `keep_what_is_read` leaves.

    Args:
        ids: token ids [B, L], int64.
        mask: 1 for a token, 0 for padding, [B, L], int64. Padding is not attended to. In front of all tokens, where
            there is nothing else to attend to, its states are finite and mean nothing.
        states: numbers as above.
        layer: what runs as `decoder_layer`; a module with regions gives its own.

    Returns:
        For each number the state [B, L, D].

    Raises:
        UnsupportedModelError: see `decoder_of` and `numbered`; or a layer that has been taken out.
    """
    decoder = decoder_of(model)
    numbers = numbered(decoder.config, states)
    if max(numbers) > len(decoder.layers):
        raise UnsupportedModelError(
            "layers that are read have been taken out of the language model", found=f"{len(decoder.layers)} layers",
            expected=f"{max(numbers)} layers",
        )
    x = decoder.embed_tokens(ids)
    cos, sin = rotary_tables(decoder, ids)
    bias = attention_bias(mask, x.dtype)
    found = [x]
    for block in decoder.layers[: max(numbers)]:
        x = (layer or decoder_layer)(block, x, cos, sin, bias)
        found.append(x)
    if decoder.config.num_hidden_layers in numbers:
        found[-1] = rms_norm(decoder.norm, x)
    return tuple(found[k] for k in numbers)


def rotary_tables(decoder: Part, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, Dh / 2], fp32, of the angles at positions 0 to L - 1."""
    channels = decoder.layers[0].self_attn.head_dim
    theta = decoder.config.rope_parameters["rope_theta"]
    powers = torch.arange(0, channels, 2, dtype=torch.float32, device=ids.device) / channels
    positions = torch.arange(ids.shape[1], dtype=torch.float32, device=ids.device)
    angles = positions[:, None] * (1.0 / theta**powers)
    return angles.cos(), angles.sin()


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores, [B, 1, L, L] from [B, L]: 0 for tokens up to the query's own, hugely negative elsewhere.

    Half of the lowest number: no sum with a score is infinite, so that a row of nothing else still has a softmax.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    allowed = (positions <= positions[:, None]) & mask[:, None, None].bool()
    return torch.where(allowed, 0.0, torch.finfo(dtype).min / 2).to(dtype)


def decoder_layer(layer: Part, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
    """One layer, [B, L, D] -> [B, L, D]: attention, then SwiGLU, each on the normed state and added to it."""
    x = x + self_attention(layer.self_attn, rms_norm(layer.input_layernorm, x), cos, sin, bias)
    mlp, h = layer.mlp, rms_norm(layer.post_attention_layernorm, x)
    return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


def self_attention(attn: Part, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
    """Attention of x [B, L, D] to itself, several heads of queries to one head of keys and values."""
    q, k, v = (
        project(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)  # [B, L, H Dh] -> [B, H, L, Dh]
        for project in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    if hasattr(attn, "q_norm"):  # Qwen3's; of each head
        q, k = rms_norm(attn.q_norm, q), rms_norm(attn.k_norm, k)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k, v = (repeat_heads(heads, q.shape[1]) for heads in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attn.o_proj(out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, L, Dh] by angles [L, Dh / 2], in fp32; channel i makes a pair with channel i + Dh / 2."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, H, L, Dh] -> [B, heads, L, Dh], each head several times in a row.

    Not by attention's `enable_gqa`: PyTorch's fused kernels for CUDA take it or a mask, says transformers, which
    repeats heads likewise (`use_gqa_in_sdpa`).
    """
    return x[:, :, None].expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)


def rms_norm(norm: Part, x: Tensor) -> Tensor:
    """A norm of transformers over the last dimension of x."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


class LanguageText(nn.Module):
    """Base of text engines on a language model: the model as `text_encoder`, its layers as regions.

    A family's subclass has a `forward` that takes ids [B, L] and a mask [B, L] and makes its embeddings of `states`.
    """

    #: Functions of repeated blocks, which a backend may compile once for all blocks.
    regions = ("decoder_layer",)
    decoder_layer = staticmethod(decoder_layer)

    def __init__(self, text_encoder: Part) -> None:
        super().__init__()
        self.text_encoder: Part = text_encoder

    def states(self, ids: Tensor, mask: Tensor, states: Sequence[int]) -> tuple[Tensor, ...]:
        """See `hidden_states`."""
        return hidden_states(self.text_encoder, ids, mask, states, self.decoder_layer)
