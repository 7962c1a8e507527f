"""Pictures from the demo model while it is trained, without diffusers' pipeline, and sheets of them."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from data import IMAGE_SIZE
from diffusers import FluxPipeline
from networks import GRID, SHIFT, Models, shifted
from PIL import Image
from velocity import Batch, all_positions, empty_ids, guided_velocity, prompt_ids, velocity

GUIDANCE = 2.5  # what the pipeline is used with

SHEET_PROMPTS = (
    *("fox on a blue background", "hamburger on a plain yellow background", "something to eat", "an animal"),
    *("owl on a shaded green background", "sailboat", "a fruit", "rocket on a white background"),
    *("a fruit on a red background", "a vehicle on a pink background", "cat face on a shaded purple background"),
    "a flower on a shaded green background",
)


@torch.no_grad()
def draw_pictures(
    models: Models,
    tables: tuple[torch.Tensor, torch.Tensor],
    prompts: Sequence[str],
    steps: int = 25,
    guidance: float = GUIDANCE,
    distilled: bool = False,
) -> list[Image.Image]:
    """Pictures of prompts, by true guidance or with `distilled` through the input."""
    device = tables[0].device
    t5_ids, clip_ids = prompt_ids(models, prompts, device)
    empty, scale = empty_ids(models, device), torch.full((len(prompts),), guidance, device=device)
    noise = [torch.randn(GRID**2, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(len(prompts))]
    latents = torch.stack(noise).to(device)
    active = all_positions(device).expand(len(prompts), -1)
    levels = shifted(torch.linspace(1, 0, steps + 1), SHIFT)
    for level, following in pairwise(levels.tolist()):
        sigma = torch.full((len(prompts),), level, device=device)
        batch = Batch(latents, latents, sigma, active, t5_ids, clip_ids)
        predicted = (
            velocity(models, tables, batch, scale)
            if distilled
            else guided_velocity(models, tables, batch, scale, empty)
        )
        latents = latents + (following - level) * predicted
    vae = models.vae
    unpacked = FluxPipeline._unpack_latents(latents, IMAGE_SIZE, IMAGE_SIZE, 4) / vae.config.scaling_factor
    decoded = vae.decode(unpacked + vae.config.shift_factor).sample  # [B, 3, H, W]
    bytes_ = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in bytes_]


def save_sheet(pictures: Sequence[Image.Image], path: Path, columns: int = 4) -> None:
    """Pictures side by side in a PNG file."""
    side = pictures[0].width
    sheet = Image.new("RGB", (columns * side, math.ceil(len(pictures) / columns) * side))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * side, index // columns * side))
    sheet.save(path)
