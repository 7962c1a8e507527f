"""Guidance: how a model is told to keep to its prompt, and what becomes of two predictions where it takes two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """What a model's ordinary pipeline does for guidance.

    Attributes:
        distilled: usual value of the guidance that the model takes as an input; None where it takes none.
        true: usual scale of true classifier-free guidance, whose second pass sees the negative prompt; 1 is none. None
            where the model is not to be guided so.
        argument: what diffusers' call names that scale.
        negative: the negative prompt where a caller gives none; None: without one there is no second pass.
        rescaled: whether the combination keeps each token's length, as Qwen-Image's does.
    """

    distilled: float | None = None
    true: float | None = None
    argument: Literal["guidance_scale", "true_cfg_scale"] = "true_cfg_scale"
    negative: str | None = None
    rescaled: bool = False

    @property
    def scale(self) -> float | None:
        """Usual value of the call's `guidance_scale`; None where the model has none."""
        return self.true if self.argument == "guidance_scale" else self.distilled

    @property
    def passes(self) -> int:
        """Passes of a step as the ordinary pipeline is usually run, where nobody gives a negative prompt."""
        return 2 if self.true is not None and self.true > 1 and self.negative is not None else 1

    def combine(self, positive: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        """The velocity of classifier-free guidance, negative + scale * (positive - negative).

        It is linear in the tokens, or token by token, so active tokens are combined before anything is lifted, and all
        that a method makes of velocities it makes of the combined one.

        Args:
            positive, negative: velocities with the prompt and with the negative prompt, [B, m, C].
            scale: of each image, [B], fp32.

        Returns:
            [B, m, C], fp32.
        """
        positive, negative = positive.float(), negative.float()
        combined = negative + scale[:, None, None] * (positive - negative)
        if not self.rescaled:
            return combined
        length = combined.norm(dim=-1, keepdim=True)
        return combined * (positive.norm(dim=-1, keepdim=True) / length.clamp_min(1e-20))
