"""The decode engines: autoencoders of diffusers, which make pictures or videos of tokens.

They run diffusers' own weights under their own names. A family takes the one of its autoencoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jitexport.grid import TokenGrid, unpack
from jitexport.models.layers import Part


def in_unit_range(picture: Tensor) -> Tensor:
    """What decoders make, from -1 to 1 -> [0, 1], fp32."""
    return (picture.float() / 2 + 0.5).clamp(0, 1)


class Decode(nn.Module):
    """An autoencoder, and the grid of tokens that it takes, of `patch` x `patch` latent pixels each."""

    def __init__(self, vae: Part, grid: TokenGrid, patch: int) -> None:
        super().__init__()
        self.vae: Part = vae
        self.grid = grid
        self.patch = patch


class PackedDecode(Decode):
    """Packed latents [B, N, C], fp32 -> pictures [B, 3, H, W] in [0, 1], fp32."""

    def forward(self, tokens: Tensor) -> Tensor:
        config = self.vae.config
        latents = unpack(tokens, self.grid, self.patch) / config.scaling_factor + (config.shift_factor or 0.0)
        picture = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return in_unit_range(picture)


# --- FLUX.2 ----------------------------------------------------------------------------------------------------------


class KleinDecode(Decode):
    """Tokens [B, N, C], fp32 -> pictures [B, 3, H, W] in [0, 1], fp32."""

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.vae.bn
        deviation = (seen.running_var.float() + self.vae.config.batch_norm_eps).sqrt()
        latents = unpack(tokens * deviation + seen.running_mean.float(), self.grid, self.patch)
        picture = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return in_unit_range(picture)


# --- Qwen-Image ------------------------------------------------------------------------------------------------------


class QwenImageDecode(Decode):
    """Packed latents [B, N, C], fp32 -> pictures [B, 3, H, W] in [0, 1], fp32.

    The decoder of `AutoencoderKLQwenImage` for one frame, whose channels are [B, C, H, W] here.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        config, decoder = self.vae.config, self.vae.decoder
        # Channel by channel with plain numbers: a tensor made here would be a weight that no bundle has.
        channels = unpack(tokens, self.grid, self.patch).unbind(1)
        spread = zip(channels, config.latents_std, config.latents_mean, strict=True)
        latents = torch.stack([x * std + mean for x, std, mean in spread], dim=1).to(decoder.conv_in.weight.dtype)
        x = convolve(decoder.conv_in, convolve(self.vae.post_quant_conv, latents))
        first, *others = decoder.mid_block.resnets
        x = residual(first, x)
        for attn, block in zip(decoder.mid_block.attentions, others, strict=True):
            x = residual(block, attend(attn, x))
        for up in decoder.up_blocks:
            for block in up.resnets:
                x = residual(block, x)
            for upsampler in up.upsamplers or ():
                x = upsampler.resample[1](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        picture = convolve(decoder.conv_out, F.silu(normalise(decoder.norm_out, x)))
        return in_unit_range(picture)


def convolve(layer: Part, x: Tensor) -> Tensor:
    """A causal convolution of a first frame x [B, C, H, W]: zeros are before it, so only its own slice counts."""
    weight = layer.weight[:, :, -1]
    return F.conv2d(x, weight, layer.bias, padding=[size // 2 for size in weight.shape[2:]])


def normalise(norm: Part, x: Tensor) -> Tensor:
    """The autoencoder's RMS norm, over the channels of x [B, C, H, W]."""
    return F.normalize(x.float(), dim=1).to(x.dtype) * norm.scale * norm.gamma.flatten()[:, None, None]


def residual(block: Part, x: Tensor) -> Tensor:
    """Two convolutions beside a shortcut, [B, C, H, W] -> [B, C', H, W]."""
    h = convolve(block.conv1, F.silu(normalise(block.norm1, x)))
    h = convolve(block.conv2, F.silu(normalise(block.norm2, h)))
    return h + (convolve(block.conv_shortcut, x) if isinstance(block.conv_shortcut, nn.Conv3d) else x)


def attend(block: Part, x: Tensor) -> Tensor:
    """Attention of one head between the pixels of x [B, C, H, W]."""
    heads = block.to_qkv(normalise(block.norm, x)).flatten(2).transpose(1, 2)[:, None]  # [B, 1, H W, 3 C]
    a = F.scaled_dot_product_attention(*heads.chunk(3, dim=-1))
    return x + block.proj(a[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


# --- HunyuanVideo-1.5 ------------------------------------------------------------------------------------------------


def frame_causal_attention(block: Part, x: Tensor) -> Tensor:
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
    """Tokens [B, T * H * W, C], or latents of a tile [B, C, T, h, w] -> frames [B, 3, 4 T - 3, 16 h, 16 w] in [0, 1].

    fp32. The decoder's layers are diffusers' own but for its attention.
    """

    def __init__(self, vae: Part, grid: TokenGrid | None = None) -> None:
        super().__init__()
        self.vae: Part = vae
        self.grid = grid

    def forward(self, latents: Tensor) -> Tensor:
        decoder = self.vae.decoder
        if self.grid is not None:
            latents = unpack(latents, self.grid, 1)
        latents = (latents / self.vae.config.scaling_factor).to(decoder.conv_in.conv.weight.dtype)
        x = decoder.conv_in(latents) + latents.repeat_interleave(decoder.repeat, dim=1)
        first, *resnets = decoder.mid_block.resnets
        x = first(x)
        for block, resnet in zip(decoder.mid_block.attentions, resnets, strict=True):
            x = resnet(frame_causal_attention(block, x))
        for block in decoder.up_blocks:
            x = block(x)
        return in_unit_range(decoder.conv_out(F.silu(decoder.norm_out(x))))
