"""HunyuanVideo-1.5: text to video, in diffusers' format.

The modules below run diffusers' own weights under their own names, arranged for fixed-shape engines:

- modulation depends on the noise level alone: it is a constant of a bundle, made by `modulation`, and the 2.7 of 8.3
  billion parameters that make it are in no engine;
- the text's refiner sees the noise level: `HunyuanCondition` gives a context for every step, and its first attention,
  which comes before the noise level, runs once for all of them;
- the text has one fixed length, glyphs first; padding is masked where it is a key, and its own rows are never read, so
  that its order does not matter and the two-sided masks of diffusers are not needed;
- the parts of the transformer that see a picture (latents of a frame to begin with, SigLIP's states) are left out;
- the autoencoder's frame-causal attention runs frame by frame, each on the frames up to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jitexport.grid import TokenGrid
from jitexport.kernels.attention import Stream, attention
from jitexport.models.flux import feed_forward, gated, modulate, run_linear, runs_in_int8, stream

#: What masks add to the scores of padding: small enough for none to be left, and finite.
HIDDEN = -1e30


def time_embedding(embed: nn.Module, embedder: nn.Module, sigmas: Tensor) -> Tensor:
    """Noise levels [S] by a module's sines and two layers -> [S, D]. Angles of up to 1000 radians are made in fp32."""
    return embedder(embed(sigmas.float() * 1000).to(embedder.linear_1.weight.dtype))


# --- what does not see the video ---


def modulation_layers(transformer: nn.Module) -> list[nn.Linear]:
    """The layers that make scales, shifts and gates, in the order in which a stage takes their outputs."""
    norms = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    return [norm.linear for norm in (*norms, transformer.norm_out)]


def modulation(time_embed: nn.Module, layers: list[nn.Linear], sigmas: Tensor) -> Tensor:
    """Modulation of noise levels [S], [S, M]: of each block video's and text's (6 D each), of the last norm (2 D)."""
    emb = F.silu(time_embedding(time_embed.time_proj, time_embed.timestep_embedder, sigmas))
    return torch.cat([layer(emb) for layer in layers], dim=-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [B, T, E] over tokens whose additive mask [B, T] is 0, [B, E]."""
    counts = (mask == 0).float()[..., None]
    return ((x * counts).sum(dim=1) / counts.sum(dim=1)).to(x.dtype)


def refiner_block(block: nn.Module, x: Tensor, emb: Tensor, mask: Tensor) -> Tensor:
    """A block of the text's refiner.

    x [B, T, D] or, once it has seen the noise level, [S, B, T, D]; emb [S, B, D]; mask [B, T] -> [S, B, T, D].
    """
    attn = block.attn
    h = block.norm1(x).flatten(0, -3)
    heads = (layer(h).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
    a = attention([Stream(*heads)], mask=mask.expand(x.shape[:-1]).flatten(0, -2)).flatten(2)
    gate, gate_2 = block.norm_out.linear(emb).chunk(2, dim=-1)
    x = x + gate[:, :, None] * attn.to_out[0](a).view(x.shape)
    return x + gate_2[:, :, None] * block.ff(block.norm2(x))


class HunyuanCondition(nn.Module):
    """The text as the transformer's blocks take it, for every noise level.

    states [B, T1, E1] of the language model and glyphs [B, T2, E2] of ByT5, each followed by its additive mask, and
    sigmas [S] -> context [S, B, T2 + T1, D], mask [B, T2 + T1].
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, states: Tensor, states_mask: Tensor, glyphs: Tensor, glyphs_mask: Tensor, sigmas: Tensor
    ) -> tuple[Tensor, Tensor]:
        model = self.transformer
        refiner = model.context_embedder
        embed = refiner.time_text_embed
        pooled = embed.text_embedder(masked_mean(states, states_mask))  # [B, D]
        emb = F.silu(time_embedding(embed.time_proj, embed.timestep_embedder, sigmas)[:, None] + pooled)  # [S, B, D]
        x = refiner.proj_in(states)
        for block in refiner.token_refiner.refiner_blocks:
            x = refiner_block(block, x, emb, states_mask)
        kinds = model.cond_type_embed.weight  # of the language model's tokens, of glyphs, of a picture's
        glyphs = (model.context_embedder_2(glyphs) + kinds[1]).expand(len(sigmas), -1, -1, -1)
        return torch.cat([glyphs, x + kinds[0]], dim=2), torch.cat([glyphs_mask, states_mask], dim=1)


# --- the transformer ---


def double_block(
    block: nn.Module, video: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Joint attention of video [B, m, D] and text [B, T, D] with weights of their own; modulation [1, 12 D]."""
    shift_v, scale_v, gate_v, shift_v2, scale_v2, gate_v2, *rest = modulation.chunk(12, dim=-1)
    shift_t, scale_t, gate_t, shift_t2, scale_t2, gate_t2 = rest
    attn = block.attn
    d = attn.to_q.weight.shape[0] // attn.heads

    x = modulate(block.norm1.norm, video, shift_v, scale_v)
    c = modulate(block.norm1_context.norm, text, shift_t, scale_t)
    streams = [
        stream(x, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), d),
        stream(c, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k), d),
    ]
    a = attention(streams, cos, sin, eps=attn.norm_q.eps, int8=runs_in_int8(attn.to_q), mask=mask).flatten(2)
    x, c = a.split([video.shape[1], text.shape[1]], dim=1)

    video = gated(video, gate_v, run_linear(attn.to_out[0], x, wide=True))
    video = gated(video, gate_v2, feed_forward(block.ff, modulate(block.norm2, video, shift_v2, scale_v2)))
    text = gated(text, gate_t, run_linear(attn.to_add_out, c, wide=True))
    text = gated(text, gate_t2, feed_forward(block.ff_context, modulate(block.norm2_context, text, shift_t2, scale_t2)))
    return video, text


class HunyuanStage(nn.Module):
    """One evaluation of the transformer on the active tokens.

    tokens [B, m, C], cos and sin [B, m, Dh / 2], context [B, T, D], mask [B, T], modulation [M] -> velocity [B, m, C].
    """

    #: Functions of repeated blocks, which a backend may compile once for all blocks.
    regions = ("double_block",)
    double_block = staticmethod(double_block)

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, tokens: Tensor, cos: Tensor, sin: Tensor, context: Tensor, mask: Tensor, modulation: Tensor
    ) -> Tensor:
        model = self.transformer
        blocks, d = model.transformer_blocks, context.shape[-1]
        *parts, out = modulation[None].split([12 * d] * len(blocks) + [2 * d], dim=-1)
        mask = F.pad(mask, (tokens.shape[1], 0))

        # The other input channels are a given frame's latents and where they are; both are zero here.
        embed = model.x_embedder.proj
        video = F.linear(tokens, embed.weight.flatten(1)[:, : tokens.shape[-1]], embed.bias)
        text = context
        for block, part in zip(blocks, parts, strict=True):
            video, text = self.double_block(block, video, text, part, cos, sin, mask)
        scale, shift = out.chunk(2, dim=-1)
        return model.proj_out(modulate(model.norm_out.norm, video, shift, scale))


# --- the autoencoder ---


def frame_causal_attention(block: nn.Module, x: Tensor) -> Tensor:
    """The autoencoder's attention: pixels of a frame see those of all frames up to it. [B, C, T, H, W] -> the same.

    One product for each frame, with keys of 1 to T frames: half of what a mask over all pixels computes, and nothing
    of the mask's size in memory.
    """
    frames = x.shape[2]
    h = block.norm(x)
    # [B, C, T, H, W] -> [B, 1, T, H * W, C]
    q, k, v = (
        layer(h).flatten(3).permute(0, 2, 3, 1)[:, None].contiguous() for layer in (block.to_q, block.to_k, block.to_v)
    )
    seen = [
        F.scaled_dot_product_attention(q[:, :, t], k[:, :, : t + 1].flatten(2, 3), v[:, :, : t + 1].flatten(2, 3))
        for t in range(frames)
    ]
    a = torch.stack(seen, dim=2)[:, 0].permute(0, 3, 1, 2).reshape(x.shape)
    return block.proj_out(a) + x


class HunyuanDecode(nn.Module):
    """Video of one tile: tokens [B, T * H * W, C] -> frames [B, 3, 4 T - 3, 16 H, 16 W] in [0, 1], fp32.

    The decoder's layers are diffusers' own but for its attention. Values are not cut at 0 and 1 with `clamped=False`:
    neighbouring tiles are blended before that.
    """

    def __init__(self, vae: nn.Module, grid: TokenGrid, *, clamped: bool = True) -> None:
        super().__init__()
        self.vae = vae
        self.grid = grid
        self.clamped = clamped

    def forward(self, tokens: Tensor) -> Tensor:
        decoder = self.vae.decoder
        latents = self.grid.unflatten(tokens).permute(0, 4, 1, 2, 3) / self.vae.config.scaling_factor
        latents = latents.to(decoder.conv_in.conv.weight.dtype)
        x = decoder.conv_in(latents) + latents.repeat_interleave(decoder.repeat, dim=1)
        first, *resnets = decoder.mid_block.resnets
        x = first(x)
        for block, resnet in zip(decoder.mid_block.attentions, resnets, strict=True):
            x = resnet(frame_causal_attention(block, x))
        for block in decoder.up_blocks:
            x = block(x)
        frames = decoder.conv_out(F.silu(decoder.norm_out(x))).float() / 2 + 0.5
        return frames.clamp(0, 1) if self.clamped else frames
