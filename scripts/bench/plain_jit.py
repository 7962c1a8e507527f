"""JiT in one plain function around a diffusers pipeline, as its description reads and with nothing optimised.

A peer for `peers.py`: what somebody gets who writes the method down from the paper's text. One image at a time,
the transformer is diffusers' own and runs eagerly on the active tokens, nearest anchors are found anew at every step
from all distances, and the conditioning is computed at every step.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor


def interpolate(values: Tensor, active: Tensor, height: int, width: int) -> Tensor:
    """Values at the active tokens, [m, C] -> at all tokens, [N, C]: nearest anchor, blur, exact values (Alg. 2)."""
    points = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    nearest = torch.cdist(points, points[active]).argmin(dim=1)
    sigma = 0.4 * (len(active) / len(points)) ** -0.5
    radius = min(math.ceil(3 * sigma), height - 1, width - 1)
    x = torch.arange(-radius, radius + 1)
    weights = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (torch.outer(weights, weights) / weights.sum() ** 2).to(values.dtype)
    field = values[nearest].T.reshape(-1, 1, height, width)
    field = F.conv2d(F.pad(field, [radius] * 4, mode="reflect"), kernel[None, None]).reshape(values.shape[1], -1).T
    field = field.contiguous()
    field[active] = values
    return field


def local_variance(field: Tensor, height: int, width: int) -> Tensor:
    """E[u u] - E[u] E[u] over 3 x 3 tokens, averaged over channels: [N, C] -> [N]."""
    image = field.T.reshape(1, -1, height, width)
    mean, square = (F.avg_pool2d(x, 3, stride=1, padding=1) for x in (image, image * image))
    return (square - mean * mean).mean(dim=1).flatten()


def first_anchors(m: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Tokens at even rows and columns and on the border, filled or thinned out at random to m of them (B.1)."""
    row, column = torch.arange(height)[:, None], torch.arange(width)
    keep = ((row % 2 == 0) & (column % 2 == 0)) | (row % (height - 1) == 0) | (column % (width - 1) == 0)
    inside, outside = keep.flatten().nonzero()[:, 0], (~keep).flatten().nonzero()[:, 0]
    if len(inside) >= m:
        return inside[torch.randperm(len(inside), generator=generator)[:m]].sort().values
    filled = outside[torch.randperm(len(outside), generator=generator)[: m - len(inside)]]
    return torch.cat([inside, filled]).sort().values


@torch.no_grad()
def plain_jit(
    pipe: FluxPipeline, prompt: str, generator: torch.Generator, *, sigmas: Sequence[float],
    stages: Sequence[tuple[int, int]], height: int, width: int, max_sequence_length: int, guidance_scale: float,
    latents: Tensor | None = None, noise: Tensor | None = None, anchors: Tensor | None = None,
) -> Image.Image:  # fmt: skip
    """One image.

    Args:
        sigmas: noise levels, one more than there are steps; the last is 0.
        stages: steps and tokens of each stage, coarse to fine.
        latents, noise: [N, C]; anchors: [m]; drawn where not given.
    """
    dtype = pipe.transformer.dtype
    embeds, pooled, text_ids = pipe.encode_prompt(prompt, None, max_sequence_length=max_sequence_length)
    channels = pipe.transformer.config.in_channels // 4
    start, image_ids = pipe.prepare_latents(1, channels, height, width, torch.float32, "cpu", generator)
    rows, columns = (side // (2 * pipe.vae_scale_factor) for side in (height, width))
    y = start[0] if latents is None else latents
    noise = torch.randn(y.shape, generator=generator) if noise is None else noise
    active = first_anchors(stages[0][1], rows, columns, generator) if anchors is None else anchors
    guided = pipe.transformer.config.guidance_embeds
    guidance = torch.tensor([guidance_scale]) if guided else None

    step, velocity, clean = 0, None, None
    for steps, tokens in stages:
        if tokens > len(active):
            variance = local_variance(velocity, rows, columns)
            variance[active] = -math.inf
            new = variance.topk(tokens - len(active)).indices
            prior = interpolate(clean, active, rows, columns)
            y[new] = (1 - sigmas[step]) * prior[new] + sigmas[step] * noise[new]
            active = torch.cat([active, new]).sort().values
        for _ in range(steps):
            u = pipe.transformer(
                hidden_states=y[active][None].to(dtype),
                timestep=torch.tensor([sigmas[step]], dtype=dtype),
                guidance=guidance,
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=image_ids[active],
                return_dict=False,
            )[0][0].float()
            velocity = interpolate(u, active, rows, columns)
            clean = y[active] - sigmas[step] * u
            y = y + (sigmas[step + 1] - sigmas[step]) * velocity
            step += 1
    packed = pipe._unpack_latents(y[None], height, width, pipe.vae_scale_factor)
    packed = packed / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    decoded = pipe.vae.decode(packed.to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(decoded, output_type="pil")[0]
