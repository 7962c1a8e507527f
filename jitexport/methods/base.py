"""The contract between the sampling loop and a spatial acceleration method.

A method owns the state of the image being denoised. The loop asks it for the tokens that the transformer sees and for
their positions, hands it the velocity, and tells it when a stage begins. Token counts per stage are fixed, so every
tensor has a fixed shape; only index values are data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from jitexport.grid import TokenGrid
from jitexport.schedule import Stage

State = TypeVar("State")


@dataclass(frozen=True)
class Draws:
    """Everything random that one batch needs, drawn by `Method.draw` before the loop starts.

    Attributes:
        latents: initial noise, [B, N, C], fp32.
        noise: noise field for tokens that join later, [B, N, C], fp32; None where the method has no use for it.
        anchors: indices of the first active tokens, [B, m], int64; None where all tokens are active.
    """

    latents: Tensor
    noise: Tensor | None = None
    anchors: Tensor | None = None


class Method(ABC, Generic[State]):
    """A way of spending the transformer on a changing set of tokens.

    Args:
        grid: the full token grid.
        options: the method's settings, as `options()` returned them at build time.
    """

    name: str
    #: Names of the option presets, best first; see `options`.
    presets: Sequence[str]

    @abstractmethod
    def __init__(self, grid: TokenGrid, options: dict[str, Any]) -> None: ...

    @classmethod
    @abstractmethod
    def options(cls, preset: str) -> dict[str, Any]:
        """The settings of a named preset, as plain JSON values that go into a bundle's manifest.

        The key `timesteps` names the noise levels: {"kind": "beta", "alpha": ..., "beta": ...} or {"kind": "native"}.
        """

    @abstractmethod
    def needs(self, first: Stage) -> tuple[bool, bool]:
        """Whether a schedule starting with stage `first` draws a noise field, and whether it draws anchors."""

    @abstractmethod
    def draw_anchors(self, first: Stage, generator: torch.Generator) -> Tensor:
        """Indices of one image's first active tokens, [m], int64, on the generator's device."""

    @abstractmethod
    def start(self, draws: Draws, stage: Stage) -> State:
        """State before the first step."""

    @abstractmethod
    def transition(self, state: State, stage: Stage, sigma: float) -> State:
        """State at the start of a later stage, whose first step is about to run at noise level sigma."""

    @abstractmethod
    def tokens(self, state: State) -> Tensor:
        """What the transformer sees, [B, m, C]."""

    @abstractmethod
    def positions(self, state: State) -> Tensor:
        """Grid coordinates of those tokens, [B, m, 2 or 3]."""

    @abstractmethod
    def step(self, state: State, velocity: Tensor, sigma: float, sigma_next: float) -> State:
        """State after an Euler step with the transformer's velocity [B, m, C] (noise minus data), in fp32."""

    @abstractmethod
    def latents(self, state: State) -> Tensor:
        """All tokens of the full grid, [B, N, C]."""

    @abstractmethod
    def with_latents(self, state: State, latents: Tensor) -> State:
        """The state with other latents [B, N, C], as a callback may ask for."""
