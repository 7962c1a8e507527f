"""No acceleration: all tokens at every step, the ordinary Euler sampler of flow-matching pipelines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jitexport.grid import TokenGrid
from jitexport.methods.base import Draws, Method
from jitexport.schedule import Stage


class Dense(Method[Tensor]):
    """The state is the latents themselves, [B, N, C]."""

    name = "dense"
    presets = ("default",)

    def __init__(self, grid: TokenGrid, options: dict[str, Any]) -> None:
        self.grid = grid

    @classmethod
    def options(cls, preset: str) -> dict[str, Any]:
        """The model's own noise levels; nothing else to set."""
        return {"timesteps": {"kind": "native"}}

    def needs(self, first: Stage) -> tuple[bool, bool]:
        return False, False

    def draw_anchors(self, first: Stage, generator: torch.Generator) -> Tensor:
        return torch.arange(self.grid.tokens, device=generator.device)

    def start(self, draws: Draws, stage: Stage) -> Tensor:
        return draws.latents

    def transition(self, state: Tensor, stage: Stage, sigma: float) -> Tensor:
        return state

    def tokens(self, state: Tensor) -> Tensor:
        return state

    def positions(self, state: Tensor) -> Tensor:
        return self.grid.coordinates(state.device).expand(state.shape[0], -1, -1)

    def step(self, state: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
        return state + (sigma_next - sigma) * velocity.float()

    def latents(self, state: Tensor) -> Tensor:
        return state

    def with_latents(self, state: Tensor, latents: Tensor) -> Tensor:
        return latents
