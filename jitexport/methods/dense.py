"""No acceleration: all tokens at every step, the ordinary Euler sampler of flow-matching pipelines."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jitexport.errors import ScheduleError
from jitexport.grid import TokenGrid, consecutive
from jitexport.methods.base import Draws, Method, Preview
from jitexport.schedule import Stage, StageSchedule, Target, check_speedup, number, timesteps, too_fast


class Dense(Method[Tensor]):
    """The state is the latents themselves, [B, N, C]."""

    name = "dense"
    presets = ("default",)
    spatial = False

    def __init__(self, grid: TokenGrid, options: dict[str, Any], patch: int = 1) -> None:
        self.grid = grid
        self.timesteps = options["timesteps"]

    @classmethod
    def options(cls, preset: str) -> dict[str, Any]:
        """The model's own noise levels; nothing else to set."""
        return {"timesteps": {"kind": "native"}}

    def schedule(self, target: Target) -> StageSchedule:
        """The given number of steps, or as many as the speed-up leaves."""
        if target.custom is None:
            check_speedup(target.asked)
            steps = int(target.reference_steps / target.asked)
            if not steps:
                raise too_fast(target.asked, target.reference_steps)
        else:
            steps = sum(target.custom.steps)
            if len(target.custom.steps) != 1 or target.custom.ratios not in (None, (1.0,)) or steps < 1:
                raise ScheduleError(
                    "the dense method runs all tokens at every step",
                    found=f"steps {target.custom.steps}, ratios {target.custom.ratios}",
                    expected="a single stage of at least one step",
                    remedy="a number of steps (--steps 12), a speed-up, or another method",
                )
        return StageSchedule(
            number([(self.grid.tokens, steps)]), timesteps(self.timesteps, steps, target.native_sigmas)
        )

    def start(self, draws: Draws, stage: Stage) -> Tensor:
        return draws.latents

    def transition(self, state: Tensor, stage: Stage, sigma: float, preview: Preview | None = None) -> Tensor:
        return state

    def tokens(self, state: Tensor) -> Tensor:
        return state

    def where(self, state: Tensor) -> Tensor:
        return consecutive(state.shape[0], self.grid.tokens, state.device)

    def step(self, state: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
        return state + (sigma_next - sigma) * velocity.float()

    def latents(self, state: Tensor) -> Tensor:
        return state

    def with_latents(self, state: Tensor, latents: Tensor) -> Tensor:
        return latents
