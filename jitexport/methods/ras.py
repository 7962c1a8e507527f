"""Region-adaptive sampling (RAS, arXiv 2502.10389).

After a few dense steps only some tokens run, and the others move on with the velocity that they had. Dense steps in
between keep the error from growing. Tokens that run are those whose last velocity spreads least over the channels, as
the released code has it, and those that have waited long.

Tokens that run attend to each other and to the text. In the released code they also attend to the keys and values that
the others left in every block. These are left out here: they would have to pass through the engines, 2 x blocks x
(N + T) x D values for an image, 3.2 GB in bf16 on FLUX.1-dev. On the demo model that costs quality: if all keys and
values were fresh at every sparse step, which is more than reuse could give, 41 dB to 50 dense steps, not 33.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jitexport.errors import InputError, ScheduleError
from jitexport.grid import TokenGrid, consecutive, gather_tokens, scatter_tokens
from jitexport.methods.base import Draws, Method, Preview
from jitexport.schedule import Stage, StageSchedule, Target, number, stage_cost, timesteps, too_fast

#: Published shares of the tokens in sparse steps (RALU's supplement, B.2.1, for Stable Diffusion 3).
SPEEDUPS, RATIOS = (2.0, 3.0), (0.32, 0.05)


def dense_steps(n: int, warmup: int, every: int) -> tuple[bool, ...]:
    """Which of n steps run all tokens: the first `warmup`, one after every `every` others, and the last."""
    return tuple(i < warmup or (i - warmup) % (every + 1) == every or i == n - 1 for i in range(n))


def spread(velocity: Tensor, patch: int) -> Tensor:
    """Deviation of a velocity [B, N, C] over the latent channels, mean over a token's pixels, [B, N]."""
    return velocity.unflatten(2, (-1, patch**2)).std(2).mean(-1)


@dataclass(frozen=True)
class RASOptions:
    """Settings of `RAS`.

    Attributes:
        timesteps: {"kind": "native"}, or another of `jitexport.schedule.timesteps`.
        ratio: share of the tokens that run in a sparse step, where a schedule is solved for; what is left of its
            budget raises it. None for the published ones: .32 for 2x, .05 for 3x.
        warmup: dense steps at the start.
        every: sparse steps between two dense ones.
        running: "low" runs the tokens whose velocity spreads least over the channels, "high" the others.
        patience: logarithm of the weight that a token gains with each step that it waits.

    Raises:
        InputError: a value that has no meaning.
    """

    timesteps: dict[str, Any]
    ratio: float | None = None
    warmup: int = 4
    every: int = 5
    running: Literal["low", "high"] = "low"
    patience: float = 0.1

    def __post_init__(self) -> None:
        checks = {
            "ratio": self.ratio is None or 0 < self.ratio < 1,
            "warmup": self.warmup >= 1,
            "every": self.every >= 1,
            "running": self.running in ("low", "high"),
            "patience": self.patience >= 0,
        }
        if wrong := [name for name, fine in checks.items() if not fine]:
            raise InputError("RAS option without a meaning", found=", ".join(f"{n}={getattr(self, n)}" for n in wrong))


_DEFAULT = RASOptions(timesteps={"kind": "native"})

# Few tokens and many steps rather than the other way round: 32.7 dB to 50 dense steps with the published ratio of .05,
# 30.5 dB with .32, on 4 prompts of the demo model at 5x.
PRESETS = {
    "default": _DEFAULT,
}


@dataclass(frozen=True)
class RASState:
    """The image between two steps.

    Attributes:
        y: all tokens, [B, N, C], fp32.
        running: indices of the tokens that run, [B, m]; None for all.
        velocity: the last velocity of each token, [B, N, C]; None before the first step.
        waited: steps since each token ran, [B, N], fp32.
    """

    y: Tensor
    waited: Tensor
    running: Tensor | None = None
    velocity: Tensor | None = None


class RAS(Method[RASState]):
    """Some tokens run, the others keep their velocity.

    Every sparse step is a stage of its own, because each has tokens of its own; all share one engine.

    Raises:
        InputError: options that are not RAS's.
    """

    name = "ras"
    presets = tuple(PRESETS)

    def __init__(self, grid: TokenGrid, options: dict[str, Any], patch: int = 1) -> None:
        self.grid = grid
        self.patch = patch
        try:
            self.settings = RASOptions(**options)
        except TypeError as error:
            raise InputError("unknown RAS option", found=str(error), expected=list(asdict(_DEFAULT))) from None

    @classmethod
    def options(cls, preset: str) -> dict[str, Any]:
        """The settings of `default`."""
        if preset not in PRESETS:
            raise InputError("unknown RAS preset", found=preset, expected=f"one of: {', '.join(PRESETS)}")
        return asdict(PRESETS[preset])

    def schedule(self, target: Target) -> StageSchedule:
        """As many steps as the speed-up leaves, dense and sparse ones as set.

        By hand: a number of steps, and the ratio of the sparse ones (--steps 28 --ratios 0.32); or runs of steps at
        ratios, of which the last is 1 (--steps 4,8,1,8,1 --ratios 1,0.3,1,0.3,1).
        """
        n, custom = self.grid.tokens, target.custom
        if custom is None:
            counts = self._solve(target)
        elif len(custom.steps) == 1 and (custom.ratios is None or len(custom.ratios) == 1):
            ratio = custom.ratios[0] if custom.ratios else self.settings.ratio or RATIOS[0]
            counts = self._counts(custom.steps[0], self._share(ratio)) if custom.steps[0] > 0 else []
        elif custom.ratios is not None and len(custom.steps) == len(custom.ratios):
            counts = [self._share(r) for k, r in zip(custom.steps, custom.ratios, strict=True) for _ in range(k)]
        else:
            counts = []
        if not counts or counts[-1] != n or counts[0] != n:
            raise ScheduleError(
                "RAS begins and ends with a dense step",
                found=f"steps {custom.steps}, ratios {custom.ratios}" if custom else counts,
                expected="for example --steps 28 --ratios 0.32, or --steps 4,8,1,8,1 --ratios 1,0.3,1,0.3,1",
            )
        runs: list[tuple[int, int]] = []
        for m in counts:
            if m == n and runs and runs[-1][0] == n:
                runs[-1] = (n, runs[-1][1] + 1)
            else:
                runs.append((m, 1))
        return StageSchedule(number(runs), timesteps(self.settings.timesteps, len(counts), target.native_sigmas))

    def _share(self, ratio: float) -> int:
        if not 0 < ratio <= 1:
            raise ScheduleError("the share of the tokens that run must be in (0, 1]", found=ratio)
        return max(1, int(self.grid.tokens * ratio))

    def _counts(self, nfe: int, m: int) -> list[int]:
        """Tokens of each step."""
        dense = dense_steps(nfe, self.settings.warmup, self.settings.every)
        return [self.grid.tokens if d else m for d in dense]

    def _solve(self, target: Target) -> list[int]:
        """The most steps that the budget pays for at the set ratio; what is left of it raises the ratio."""
        n, budget = self.grid.tokens, target.budget(self.grid.tokens)

        def spent(counts: Sequence[int]) -> float:
            return stage_cost(number((m, 1) for m in counts), target.cost)

        ratio = self.settings.ratio or float(np.interp(target.asked, SPEEDUPS, RATIOS))
        least = self._share(ratio)
        for nfe in range(target.reference_steps, 0, -1):
            if spent(self._counts(nfe, least)) <= budget:
                low, high = least, n
                while high - low > 1:  # cost grows with the tokens
                    middle = (low + high) // 2
                    low, high = (middle, high) if spent(self._counts(nfe, middle)) <= budget else (low, middle)
                return self._counts(nfe, low)
        raise too_fast(target.asked, target.reference_steps)

    def start(self, draws: Draws, stage: Stage) -> RASState:
        latents = draws.latents
        return RASState(latents, torch.zeros(latents.shape[:2], dtype=torch.float32, device=latents.device))

    def transition(self, state: RASState, stage: Stage, sigma: float, preview: Preview | None = None) -> RASState:
        """Choose the tokens that run in the step to come."""
        if stage.tokens == self.grid.tokens:
            return replace(state, running=None)
        low = self.settings.running == "low"
        patience = torch.exp((-1 if low else 1) * self.settings.patience * state.waited)
        assert state.velocity is not None  # the first step is dense
        order = (spread(state.velocity, self.patch) * patience).argsort(dim=1, descending=not low, stable=True)
        return replace(state, running=order[:, : stage.tokens].sort(dim=1).values)

    def tokens(self, state: RASState) -> Tensor:
        return state.y if state.running is None else gather_tokens(state.y, state.running)

    def where(self, state: RASState) -> Tensor:
        if state.running is not None:
            return state.running
        return consecutive(state.y.shape[0], self.grid.tokens, state.y.device)

    def step(self, state: RASState, velocity: Tensor, sigma: float, sigma_next: float) -> RASState:
        """Euler with the new velocity where there is one, and the last one elsewhere."""
        u = velocity.float()
        waited = torch.zeros_like(state.waited)
        if state.running is not None:
            assert state.velocity is not None  # the first step is dense
            u = scatter_tokens(state.velocity, state.running, u)
            waited = (state.waited + 1).scatter(1, state.running, 0.0)
        return replace(state, y=state.y + (sigma_next - sigma) * u, velocity=u, waited=waited)

    def latents(self, state: RASState) -> Tensor:
        return state.y

    def with_latents(self, state: RASState, latents: Tensor) -> RASState:
        return replace(state, y=latents)
