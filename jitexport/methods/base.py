"""The contract between the sampling loop and a spatial acceleration method.

A method owns the state of the image being denoised. The loop asks it for the tokens that the transformer sees and for
their places, hands it the velocity, and tells it when a stage begins. Token counts per stage are fixed, so every
tensor has a fixed shape; only index values are data. A method also makes its own schedules: which token counts run, in
which order, at which noise levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from jitexport.grid import TokenGrid
from jitexport.schedule import Stage, StageSchedule, Target

State = TypeVar("State")

#: Latents of half the grid's sides [B, N / 4, C] -> pictures [B, 3, height / 2, width / 2] in [0, 1].
Preview = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Draws:
    """Everything random that one batch needs, drawn by `Method.draw` before the loop starts.

    Attributes:
        latents: initial noise, [B, N, C], fp32.
        noise: fresh noise for later, F fields of the grid one after the other, [B, F * N, C], fp32; None if F = 0.
        anchors: indices of the first active tokens, [B, m], int64; None where all tokens are active.
    """

    latents: Tensor
    noise: Tensor | None = None
    anchors: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Draws:
        """The same with every tensor changed."""
        noise, anchors = (None if t is None else change(t) for t in (self.noise, self.anchors))
        return Draws(change(self.latents), noise, anchors)


class Method(ABC, Generic[State]):
    """A way of spending the transformer on a changing set of tokens.

    Args:
        grid: the full token grid.
        options: the method's settings, as `options()` returned them at build time.
        patch: side of a token's patch in latent pixels, for methods that change the resolution.
    """

    name: str
    grid: TokenGrid
    #: Names of the option presets, best first; see `options`.
    presets: Sequence[str]
    #: Whether fewer tokens run in some steps; else all of a speed-up that is not forecast is fewer steps.
    spatial: bool = True
    #: Whether `transition` needs pictures of half the sides, and a bundle therefore an engine `preview`.
    previews: bool = False

    @abstractmethod
    def __init__(self, grid: TokenGrid, options: dict[str, Any], patch: int = 1) -> None: ...

    @classmethod
    @abstractmethod
    def options(cls, preset: str) -> dict[str, Any]:
        """The settings of a named preset, as plain JSON values that go into a bundle's manifest.

        The key `timesteps` names the noise levels: see `jitexport.schedule.timesteps`.
        """

    @abstractmethod
    def schedule(self, target: Target) -> StageSchedule:
        """The schedule that makes denoising as much faster as asked for, or the one given by hand.

        Raises:
            ScheduleError: there is none.
        """

    def noise_fields(self, schedule: StageSchedule) -> int:
        """Number of noise fields to draw beside the initial latents."""
        return 0

    def draw_anchors(self, schedule: StageSchedule, generator: torch.Generator) -> Tensor | None:
        """Indices of one image's first active tokens, [m], int64, on the generator's device; None for all tokens."""
        return None

    @abstractmethod
    def start(self, draws: Draws, stage: Stage) -> State:
        """State before the first step."""

    @abstractmethod
    def transition(self, state: State, stage: Stage, sigma: float, preview: Preview | None = None) -> State:
        """State at the start of a later stage, whose first step is about to run at noise level sigma."""

    def carry(self, before: State, after: State) -> Callable[[Tensor], Tensor] | None:
        """How something known of a stage's tokens, [B, m, C], becomes known of those of the next one, [B, m', C].

        None where the tokens of the one have nothing to do with those of the other, as after a change of resolution.

        Args:
            before, after: the states around the transition.
        """
        return None

    @abstractmethod
    def tokens(self, state: State) -> Tensor:
        """What the transformer sees, [B, m, C]."""

    @abstractmethod
    def where(self, state: State) -> Tensor:
        """Which of the `places` those tokens are at, [B, m], int64."""

    def places(self, device: torch.device | str | None = None) -> Tensor:
        """Coordinates of all places that tokens can be at in any stage, [P, 2 or 3]: by default the full grid's.

        What depends on them alone, such as rotary tables, is computed once for all images.
        """
        return self.grid.coordinates(device)

    @abstractmethod
    def step(self, state: State, velocity: Tensor, sigma: float, sigma_next: float) -> State:
        """State after an Euler step with the transformer's velocity [B, m, C] (noise minus data), in fp32."""

    def predicted(self, state: State, velocity: Tensor, sigma: float) -> Tensor:
        """y_hat(1) = y - sigma * u of all tokens, [B, N, C], at a step's velocity: the image as it is expected."""
        return self.latents(self.step(state, velocity, sigma, 0.0))

    @abstractmethod
    def latents(self, state: State) -> Tensor:
        """All tokens of the full grid, [B, N, C]; in a stage of lower resolution, those of it, enlarged."""

    @abstractmethod
    def with_latents(self, state: State, latents: Tensor) -> State:
        """The state with other latents [B, N, C], as a callback may ask for; undoes `latents`."""
