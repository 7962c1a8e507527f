"""Everything random of a call: drawn from its generators, or its caller's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jitexport.arguments import check_generators, is_tensor, require_finite
from jitexport.errors import InputError
from jitexport.grid import pack
from jitexport.methods.base import Draws, Method
from jitexport.models.base import ModelGeometry
from jitexport.sampler import draw
from jitexport.schedule import StageSchedule


@dataclass(frozen=True)
class Drawing:
    """What is drawn for images of a method, a schedule and a size."""

    method: Method[Any]
    schedule: StageSchedule
    geometry: ModelGeometry

    def draw(self, generators: Sequence[torch.Generator]) -> Draws:
        """Everything random, for one image per generator."""
        return draw(self.method, self.schedule, *self.geometry.drawn, generators)

    def given(
        self,
        n: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
        noise: Tensor | None,
        anchors: Tensor | None,
    ) -> Draws:
        """Random tensors of n images, the caller's own where given.

        Raises:
            InputError: tensors that do not fit, or that this method does not draw.
        """
        if generator is None:
            generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "big"))
        drawn = self.draw(check_generators(generator, n))
        for name, given, used in (("noise", noise, drawn.noise), ("anchors", anchors, drawn.anchors)):
            if given is not None and used is None:
                raise InputError(f"this bundle's method and schedule draw no {name}", remedy=f"leave {name} out")
        fields = self.method.noise_fields(self.schedule)
        return Draws(
            drawn.latents if latents is None else self._packed("latents", latents, n),
            drawn.noise if noise is None else self._packed("noise", noise, n, fields),
            drawn.anchors if anchors is None or drawn.anchors is None
            else self._anchors(anchors, n, drawn.anchors.shape[1]),
        )

    def _packed(self, name: str, value: Tensor, n: int, fields: int = 1) -> Tensor:
        geometry = self.geometry
        packed = (n, fields * geometry.grid.tokens, geometry.channels)
        if not is_tensor(value):
            raise InputError(f"{name} do not fit", found=type(value).__name__, expected="a tensor")
        drawn, patch = geometry.drawn
        if tuple(value.shape) == (n, *drawn):
            value = pack(value, patch)
        if tuple(value.shape) != packed or not value.is_floating_point():
            raise InputError(
                f"{name} do not fit", found=f"{tuple(value.shape)}, {value.dtype}",
                expected=f"floating-point {packed} or {(n, *drawn)}",
            )
        require_finite(name, value.float())
        return value.detach().float()

    def _anchors(self, anchors: Tensor, n: int, m: int) -> Tensor:
        tokens = self.geometry.grid.tokens
        if not is_tensor(anchors):
            raise InputError("anchors do not fit", found=type(anchors).__name__, expected="a tensor")
        fits = tuple(anchors.shape) == (n, m) and anchors.dtype == torch.int64
        if not fits or anchors.min() < 0 or anchors.max() >= tokens or any(len(set(a.tolist())) != m for a in anchors):
            raise InputError(
                "anchors do not fit", found=f"{tuple(anchors.shape)}, {anchors.dtype}",
                expected=f"int64 {(n, m)} of different indices from 0 to {tokens - 1} in each row",
            )
        return anchors
