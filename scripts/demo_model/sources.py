"""What makes the demo model's pictures: diffusers' own pipeline and engine bundles."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from jitexport.console import track


class Prompt(Protocol):
    """A caption, and the seed of its picture."""

    @property
    def text(self) -> str: ...

    @property
    def seed(self) -> int: ...


#: Prompts and one seed each -> pictures.
Generate = Callable[[list[str], list[int]], list[Image.Image]]


@dataclass(frozen=True)
class Source:
    """Something that makes pictures."""

    label: str
    generate: Generate
    batch: int


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def diffusers_source(folder: Path, steps: int, dtype: str, batch: int) -> Source:
    """The model's folder in diffusers' own pipeline."""
    from diffusers import FluxPipeline

    defaults = json.loads((folder / "jitexport.json").read_text(encoding="utf-8"))
    pipeline = FluxPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        settings = {**defaults, "num_inference_steps": steps}
        return pipeline(prompts, generator=generators(seeds), **settings).images

    return Source(f"diffusers, {steps} steps, {dtype}", generate, batch)


def bundle_source(path: Path) -> Source:
    """An engine bundle."""
    import jitexport

    pipeline = jitexport.load(path)

    def generate(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return pipeline(prompts, generator=generators(seeds)).images

    return Source(path.name, generate, pipeline.batch_size)


def make_pictures(source: Source, prompts: Sequence[Prompt]) -> list[Image.Image]:
    """One picture a prompt, in batches, with a progress bar."""
    pictures: list[Image.Image] = []
    starts = range(0, len(prompts), source.batch)
    for start in track(starts, source.label):
        chunk = prompts[start : start + source.batch]
        pictures += source.generate([prompt.text for prompt in chunk], [prompt.seed for prompt in chunk])
    return pictures
