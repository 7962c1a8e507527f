"""Bottleneck Sampling (arXiv 2503.18940): high, low, then high resolution again.

The first steps at full resolution lay out the picture, those in the middle run at half of it, a quarter of the tokens,
and the last ones bring the details. At each change the predicted clean latents are resized and given fresh noise (noise
reintroduction), and each stage spaces its steps by a shift of its own (schedule re-shifting).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from jitexport.errors import InputError, ScheduleError
from jitexport.grid import TokenGrid, consecutive
from jitexport.methods.base import Draws, Method, Preview
from jitexport.resample import KERNELS, Resampler
from jitexport.schedule import (
    Stage,
    StageSchedule,
    Target,
    number,
    spaced_sigmas,
    split_steps,
    stage_cost,
    too_fast,
    uniform_sigmas,
)
from jitexport.solving import PAPER_REFERENCE_STEPS

#: Steps of the stages for FLUX, as RALU's supplement gives them (B.2.1), by the speed-up that they are named after.
PUBLISHED = {5.0: (4, 12, 5), 7.0: (3, 8, 4)}

# Shares of the steps after which the first two stages end: those of the published 5x.
_ENDS = (4 / 21, 16 / 21, 1.0)


def noisier(sigma: float, times: float) -> float:
    """The noise level at which the ratio of noise to signal is `times` as large."""
    return times * sigma / (1 + (times - 1) * sigma)


@dataclass(frozen=True)
class BottleneckOptions:
    """Settings of `Bottleneck`.

    Attributes:
        timesteps: {"kind": "reshifted", "shift": the model's own shift; None to take it from its noise levels, "low":
            shift of the low stage, over that}.
        renoise: how many times larger the ratio of noise to signal is after each change than it was before: of going
            down, and of going up. Enlarged pixels count four times, so 2 for going up leaves as much to be seen as
            before; more lets the last stage redo more.
        kernel: interpolation of going up, one of `jitexport.resample.KERNELS`.
        positions: of coarse tokens: "coarse" counts cells, as a smaller picture would; "corner" and "centre" are places
            in the full grid. Which one a model takes, its training decides.
        published: take the published steps for the speed-ups that they are named after; else they are solved for.

    Raises:
        InputError: a value that has no meaning.
    """

    timesteps: dict[str, Any]
    renoise: tuple[float, float] = (1.0, 4.0)
    kernel: str = "nearest"
    positions: Literal["coarse", "corner", "centre"] = "centre"
    published: bool = False

    def __post_init__(self) -> None:
        shift, low = self.timesteps.get("shift"), self.timesteps.get("low", 0)
        checks = {
            "timesteps": self.timesteps.get("kind") == "reshifted" and (shift is None or shift > 0) and low > 0,
            "renoise": len(self.renoise) == 2 and all(r >= 1 for r in self.renoise),
            "kernel": self.kernel in KERNELS,
            "positions": self.positions in ("coarse", "corner", "centre"),
        }
        if wrong := [name for name, fine in checks.items() if not fine]:
            raise InputError(
                "Bottleneck option without a meaning", found=", ".join(f"{n}={getattr(self, n)}" for n in wrong)
            )


# Going up with 1, 2, 4 and 8 times the ratio of noise to signal: 22.5, 23.8, 25.2 and 26.0 dB to 50 dense steps, on 4
# prompts of the demo model at 5x. With 8 the last stage starts at sigma = 0.86, and little of the low one is left.
_DEFAULT = BottleneckOptions(timesteps={"kind": "reshifted", "shift": None, "low": 1.0})

PRESETS = {
    "default": _DEFAULT,
    "paper": replace(_DEFAULT, published=True, positions="coarse"),
}


@dataclass(frozen=True)
class BottleneckState:
    """The image between two steps.

    Attributes:
        x: the tokens, [B, N, C] or [B, N / 4, C], fp32, in the order of their grid.
        noise: fields of the changes to come, [B, F * N, C].
        clean: the predicted clean latents of the last step, like x; None before the first.
    """

    x: Tensor
    noise: Tensor
    clean: Tensor | None = None


class Bottleneck(Method[BottleneckState]):
    """High, low, high resolution.

    Raises:
        InputError: options that are not Bottleneck Sampling's, or a grid with frames.
        ScheduleError: a grid with an odd side.
    """

    name = "bottleneck"
    presets = tuple(PRESETS)

    def __init__(self, grid: TokenGrid, options: dict[str, Any], patch: int = 1) -> None:
        self.grid = grid
        try:
            self.settings = BottleneckOptions(**options)
        except TypeError as error:
            raise InputError("unknown Bottleneck option", found=str(error), expected=list(asdict(_DEFAULT))) from None
        self.resampler = Resampler(grid, patch, self.settings.kernel)
        self.coarse = self.resampler.coarse

    @classmethod
    def options(cls, preset: str) -> dict[str, Any]:
        """The settings of `default`, or of `paper`: its steps, whatever they cost."""
        if preset not in PRESETS:
            raise InputError("unknown Bottleneck preset", found=preset, expected=f"one of: {', '.join(PRESETS)}")
        return asdict(PRESETS[preset])

    def schedule(self, target: Target) -> StageSchedule:
        """Steps in the proportions of the published 5x, as many as the speed-up leaves.

        By hand: the steps of the three stages.
        """
        speedup, usual = target.speedup, target.reference_steps == PAPER_REFERENCE_STEPS
        counts = (self.grid.tokens, self.coarse.tokens, self.grid.tokens)
        if target.custom is not None:
            steps = target.custom.steps
            if len(steps) != 3 or any(n < 1 for n in steps) or target.custom.ratios not in (None, (1.0, 0.25, 1.0)):
                raise ScheduleError(
                    "Bottleneck Sampling has three stages of at least one step: all tokens, a quarter, all",
                    found=f"steps {steps}, ratios {target.custom.ratios}",
                    expected="for example --steps 4,12,5, with no ratios or 1,0.25,1",
                )
        elif self.settings.published and usual and speedup in PUBLISHED:
            steps = PUBLISHED[speedup]
        else:
            steps = self._solve(target, counts)
        sigmas, ends = self._sigmas(steps, target)
        return StageSchedule(number(zip(counts, steps, strict=True)), sigmas, ends)

    def _solve(self, target: Target, counts: Sequence[int]) -> tuple[int, ...]:
        budget = target.budget(self.grid.tokens)
        coarse = target.cost(self.coarse.tokens)
        for nfe in range(target.reference_steps, 2, -1):
            first, second = (max(1, n) for n in split_steps(nfe, _ENDS)[:2])
            steps = (first, second, nfe - first - second)
            spent = stage_cost(number(zip(counts, steps, strict=True)), target.cost)
            if steps[2] >= 1 and spent <= budget:  # what is left buys coarse steps
                return first, second + min(int((budget - spent) // coarse), target.reference_steps - nfe), steps[2]
        raise too_fast(target.asked, target.reference_steps, fewest=3)

    def _sigmas(self, steps: Sequence[int], target: Target) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The levels at which the stages end are those of one schedule over all steps; noise is added to them."""
        shift = self.settings.timesteps["shift"] or target.own_shift(sum(steps))
        whole = [noisier(u, shift) for u in uniform_sigmas(sum(steps))]
        reached = (whole[steps[0]], whole[steps[0] + steps[1]], 0.0)
        starts = (1.0, *(noisier(s, times) for s, times in zip(reached, self.settings.renoise, strict=False)))
        shifts = (shift, shift * self.settings.timesteps["low"], shift)
        sigmas: list[float] = []
        for span in zip(starts, reached, steps, shifts, strict=True):
            sigmas += spaced_sigmas(*span)[:-1]
        return (*sigmas, 0.0), reached

    def noise_fields(self, schedule: StageSchedule) -> int:
        """One for each change of resolution."""
        return len(schedule.stages) - 1

    def start(self, draws: Draws, stage: Stage) -> BottleneckState:
        assert draws.noise is not None  # see `noise_fields`
        return BottleneckState(draws.latents, draws.noise)

    def transition(
        self, state: BottleneckState, stage: Stage, sigma: float, preview: Preview | None = None
    ) -> BottleneckState:
        """Resize the predicted clean latents, and add fresh noise to the level of the step about to run."""
        n = self.grid.tokens
        assert state.clean is not None  # no stage is without steps
        noise, later = state.noise[:, :n], state.noise[:, n:]
        if stage.tokens < n:
            clean, noise = self.resampler.down(state.clean), self.resampler.pick(noise)
        else:
            clean = self.resampler.up(state.clean)
        return BottleneckState((1 - sigma) * clean + sigma * noise, later)

    def is_low(self, x: Tensor) -> bool:
        """Whether tokens [B, m, C] are those of half the resolution."""
        return x.shape[1] < self.grid.tokens

    def tokens(self, state: BottleneckState) -> Tensor:
        return state.x

    def places(self, device: torch.device | str | None = None) -> Tensor:
        """The full grid's, then those of half the resolution, in units of cells or of the grid (`positions` option)."""
        scale, offset = {"coarse": (1.0, 0.0), "corner": (2.0, 0.0), "centre": (2.0, 0.5)}[self.settings.positions]
        return torch.cat([self.grid.coordinates(device), self.coarse.coordinates(device) * scale + offset])

    def where(self, state: BottleneckState) -> Tensor:
        batch, tokens, _ = state.x.shape
        first = self.grid.tokens if self.is_low(state.x) else 0
        return consecutive(batch, tokens, state.x.device, first)

    def step(self, state: BottleneckState, velocity: Tensor, sigma: float, sigma_next: float) -> BottleneckState:
        u = velocity.float()
        return replace(state, x=state.x + (sigma_next - sigma) * u, clean=state.x - sigma * u)

    def latents(self, state: BottleneckState) -> Tensor:
        return self.resampler.nearest.up(state.x) if self.is_low(state.x) else state.x

    def with_latents(self, state: BottleneckState, latents: Tensor) -> BottleneckState:
        return replace(state, x=self.resampler.down(latents) if self.is_low(state.x) else latents)
