"""From a bundle to images and videos."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jitexport import interrupts
from jitexport.cli.options import Bundle, Json
from jitexport.console import echo, err

if TYPE_CHECKING:
    from jitexport.runtime import Pipeline


@dataclass(frozen=True)
class Guidance:
    """How much the prompt counts, and what counts against it."""

    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale, for models that take one.")] = None
    negative: Annotated[
        str | None, typer.Option(help="What not to draw, for classifier-free guidance.")
    ] = None
    true_cfg_scale: Annotated[
        float | None, typer.Option(min=0, help="Scale of that guidance, for models that have another one beside it.")
    ] = None

    def arguments(self, pipe: Pipeline) -> dict[str, Any]:
        """As a pipeline takes them; a scale is of the only guidance where the model has one."""
        scales = {"guidance_scale": self.guidance, "true_cfg_scale": self.true_cfg_scale}
        if self.guidance is not None and pipe.defaults.guidance.scale is None and self.true_cfg_scale is None:
            scales = {"true_cfg_scale": self.guidance}
        return {"negative_prompt": self.negative, **scales}


def generate(
    bundle: Bundle,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="PNG to write; of a video, MP4 or a folder of frames. Several are numbered."
        ),
    ] = Path("image.png"),
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**64 - 1, help="Image i has seed + i; random by default.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 1,
    guidance: Guidance = Guidance(),
    fps: Annotated[float | None, typer.Option(help="Frames a second of an MP4; 24 by default.")] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="BUNDLE may be OWNER/NAME on a hub, whose engines are native code of that owner."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make images, or videos, from a bundle."""
    from jitexport import outputs

    paths = outputs.numbered(output, num_images)
    for path in paths:
        outputs.check_place(path)
    pipe = _load(bundle, output, fps, trust)
    seed, seeds = _seeds(seed, num_images)
    started = time.perf_counter()
    images = pipe(
        prompt, num_images_per_prompt=num_images, generator=seeds,
        output_type="pil" if pipe.geometry.frames is None else "pt", **guidance.arguments(pipe),
    ).images  # fmt: skip
    for image, path in zip(images, paths, strict=True):
        outputs.write_output(path, image, fps)
    seconds = time.perf_counter() - started
    if as_json:
        echo(json.dumps({"images": [str(p) for p in paths], "seed": seed, "seconds": round(seconds, 3)}))
        return
    for path in paths:
        echo(path)
    err.print(f"{num_images} {'image' if pipe.geometry.frames is None else 'video'}(s) in {seconds:.2f} s, seed {seed}")


def _load(bundle: Path, output: Path, fps: float | None, trust: bool) -> Pipeline:
    """The bundle, whose images can be written to the output."""
    import jitexport
    from jitexport.bundle.reading import read_manifest
    from jitexport.outputs import check_output

    if not trust:  # before anything is loaded
        check_output(output, read_manifest(bundle).geometry.frames, fps)
    pipe = jitexport.load(bundle, trust=trust)
    interrupts.check()
    if trust:
        check_output(output, pipe.geometry.frames, fps)
    return pipe


def _seeds(seed: int | None, count: int) -> tuple[int, list[Any]]:
    """The first image's seed, a random one by default, and a generator for each image."""
    import torch

    if seed is None:
        seed = torch.Generator().seed() % 2**32
    return seed, [torch.Generator().manual_seed((seed + i) % 2**64) for i in range(count)]
