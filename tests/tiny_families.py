"""A tiny random pipeline of every family, in diffusers' own format: what saves each, by the model's name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests import tiny, tiny_flux2_klein, tiny_hunyuan_video15, tiny_qwen_image, tiny_sd3

SAVE: dict[str, Callable[[Path], Path]] = {
    "FLUX.1": partial(tiny.save_flux, guidance=True),
    "FLUX.1-4-steps": partial(tiny.save_flux, guidance=False),
    "SD3.5": partial(tiny_sd3.save_sd3, medium35=True),
    "SD3": partial(tiny_sd3.save_sd3, medium35=False),
    "Qwen-Image": tiny_qwen_image.save,
    "FLUX.2-klein": tiny_flux2_klein.save_klein,
    "HunyuanVideo-1.5": tiny_hunyuan_video15.save_hunyuan_video15,
}

#: One model of each family, by the pipeline class that its folder names.
FAMILIES = {
    "FluxPipeline": SAVE["FLUX.1"],
    "HunyuanVideo15Pipeline": SAVE["HunyuanVideo-1.5"],
    "QwenImagePipeline": SAVE["Qwen-Image"],
    "StableDiffusion3Pipeline": SAVE["SD3.5"],
    "Flux2KleinPipeline": SAVE["FLUX.2-klein"],
}
