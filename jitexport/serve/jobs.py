"""One image to make, and what is told of it while it is made. All of it can travel between processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jitexport.serve.errors import ApiError

Format = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class Job:
    """One image.

    Attributes:
        bundle: name of a served bundle.
        seed: all its randomness.
        guidance_scale, true_cfg_scale, negative_prompt: as the pipeline's call takes them.
        lora: name of a served adapter; None for none.
        partial_images: previews wanted, at most.
        steps: whether every step is told.
        format, compression: of pictures; 0 to 100, of jpeg and webp.
    """

    bundle: str
    prompt: str
    seed: int
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    partial_images: int = 0
    steps: bool = False
    format: Format = "png"
    compression: int = 100

    @property
    def together(self) -> tuple[object, ...]:
        """Jobs that agree in this may share a batch: weights and guidance are a call's, all else is an image's."""
        return (
            self.bundle, self.lora, self.lora_scale, self.guidance_scale, self.true_cfg_scale,
            self.negative_prompt is None,
        )  # fmt: skip


@dataclass(frozen=True)
class Accepted:
    """The queue has taken the request."""


@dataclass(frozen=True)
class Step:
    """A step has run.

    Attributes:
        step, steps: its number, from 1, and how many there are.
        action: "stage" where the stage's engine ran, else what a temporal method did instead, as "forecast".
        tokens, of: how many the step moves by their own velocities, of how many.
        grid: rows and columns of tokens.
        detail: for each token of the grid, row by row, a digit: 0 did not run, 1 ran, 2 ran as a part of a larger one.
    """

    step: int
    steps: int
    action: str
    tokens: int
    of: int
    grid: tuple[int, int]
    detail: str


@dataclass(frozen=True)
class Partial:
    """A preview: the clean image that a step predicts, encoded."""

    index: int
    data: bytes


@dataclass(frozen=True)
class Finished:
    """An image, encoded.

    Attributes:
        seconds: by phase.
        batch: images that were made with it, itself included.
        text_tokens, image_tokens: of the prompt and of the image.
        warnings: what the caller should know.
    """

    data: bytes
    seconds: Mapping[str, float]
    batch: int
    text_tokens: int
    image_tokens: int
    warnings: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Failed:
    """No image."""

    error: ApiError


Event = Accepted | Step | Partial | Finished | Failed
