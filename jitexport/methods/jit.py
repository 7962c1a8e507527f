"""Just-in-Time spatial acceleration (JiT, arXiv 2603.10744, CVPR 2026).

Early steps run the transformer on a few anchor tokens. The lifter moves the other tokens with an interpolated velocity
(SAG-ODE, eq. 11 and 17). Between stages the tokens where the velocity varies most become active (importance-guided
token activation, ITA) and are set onto the structure that the anchors predict (deterministic micro-flow, DMF).

Noise levels are sigma = 1 - t, velocities point from data to noise, as diffusers has it. Equation and section numbers
are the paper's and its supplement's. Where the released code differs from the text, a preset has its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from jitexport.errors import InputError
from jitexport.grid import TokenGrid, consecutive, gather_tokens, scatter_tokens
from jitexport.lifting import Lifter, blur_matrix, mean_matrix, nearest_anchor, separable
from jitexport.methods.base import Draws, Method, Preview
from jitexport.schedule import (
    BETA_PAPER,
    BETA_RELEASED,
    Stage,
    StageSchedule,
    Target,
    make_stages,
    timesteps,
)
from jitexport.solving import solve_stages

# --- first anchors (B.1) ---------------------------------------------------------------------------------------------


def structural_mask(grid: TokenGrid) -> Tensor:
    """Tokens at even row and even column and all border tokens of each frame (B.1), bool [N]."""
    row, column = grid.coordinates()[:, -2:].unbind(-1)
    height, width = grid.shape[-2:]
    border = (row == 0) | (row == height - 1) | (column == 0) | (column == width - 1)
    return ((row % 2 == 0) & (column % 2 == 0)) | border


def first_anchors(grid: TokenGrid, m: int, generator: torch.Generator) -> Tensor:
    """Indices of exactly m anchors: the structural tokens, then random fill or random drop (B.1). [m], ascending."""
    keys = torch.rand(grid.tokens, generator=generator, device=generator.device, dtype=torch.float32)
    keys += structural_mask(grid).to(keys)  # structural tokens come first, each group in random order
    return keys.argsort(descending=True, stable=True)[:m].sort().values


# --- importance-guided token activation ------------------------------------------------------------------------------


def importance(grid: TokenGrid, mean: tuple[Tensor, ...], u: Tensor) -> Tensor:
    """I = E_W[u * u] - E_W[u] * E_W[u], the local variance of a lifted velocity, averaged over channels.

    Args:
        mean: one `mean_matrix` per grid axis: the window W.
        u: [B, N, C].

    Returns:
        [B, N].
    """
    return (separable(grid, mean, u * u) - separable(grid, mean, u).square()).mean(-1)


def activate(anchors: Tensor, importance: Tensor, m: int, *, ascending: bool = True) -> tuple[Tensor, Tensor]:
    """Add the inactive tokens of largest importance until m are active; equal importance: lowest index first.

    Args:
        anchors: active indices, [B, m_k].
        importance: [B, N].
        ascending: the order of all; else new ones stand behind the others, the most important first.

    Returns:
        All active indices, [B, m], and the new ones, [B, m - m_k].
    """
    score = importance.scatter(1, anchors, -math.inf)
    new = score.argsort(dim=1, descending=True, stable=True)[:, : m - anchors.shape[1]]
    active = torch.cat([anchors, new], dim=1)
    return active.sort(dim=1).values if ascending else active, new


# --- deterministic micro-flow ----------------------------------------------------------------------------------------


def microflow_target(prior: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """y* = T Phi(y_hat(1)) + (1 - T) eps with T = 1 - sigma: the prior [B, n, C], noised to where the others are."""
    return (1 - sigma) * prior + sigma * noise


def microflow(y: Tensor, target: Tensor, weight: float) -> Tensor:
    """Solution of dy/dt = (y* - y) / (T - t) after the share `weight` of the interval that ends at T (DMF).

    The solution is a straight line from y to y*; weight = 1 reaches the target.
    """
    return (1 - weight) * y + weight * target


# --- the method ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JiTOptions:
    """Settings of `JiT`.

    Attributes:
        timesteps: {"kind": "beta", "alpha", "beta"} or {"kind": "native"} for the model's own noise levels.
        microflow: "exact" puts new tokens on the target (w = 1); "relaxed" goes 1 / relax_steps of the way.
        relax_steps: steps of the relaxed micro-flow, of which the released code takes one.
        blur_scale: Gaussian sigma in units of the anchor gap rho^(-1/2).
        blur_sigma_range: limits of the Gaussian sigma, in tokens; None for none.
        window: width of the importance window W, in tokens, odd.
        noise: eps of the micro-flow, "fresh" or the image's own "initial" noise. Dense sampling would have a new token
            on the straight line from its initial noise to its clean value; with fresh noise it joins another image.
        importance: what ITA takes the local variance of, the lifted "velocity" (the paper's) or the lifted "clean"
            prediction, which has no noise in it.
        order: of the anchors, "ascending" or that of their "activation". A token that is equally near to several takes
            the value of the first of them.

    Raises:
        InputError: a value that has no meaning.
    """

    timesteps: dict[str, Any]
    microflow: Literal["exact", "relaxed"] = "exact"
    relax_steps: int = 3
    blur_scale: float = 0.4
    blur_sigma_range: tuple[float, float] | None = None
    window: int = 3
    noise: Literal["fresh", "initial"] = "fresh"
    importance: Literal["velocity", "clean"] = "velocity"
    order: Literal["ascending", "activation"] = "ascending"

    def __post_init__(self) -> None:
        low, high = self.blur_sigma_range or (0.0, math.inf)
        checks = {
            "microflow": self.microflow in ("exact", "relaxed"),
            "relax_steps": self.relax_steps >= 1,
            "blur_scale": self.blur_scale > 0,
            "blur_sigma_range": 0 <= low <= high,
            "window": self.window >= 1 and self.window % 2 == 1,
            "noise": self.noise in ("fresh", "initial"),
            "importance": self.importance in ("velocity", "clean"),
            "order": self.order in ("ascending", "activation"),
        }
        if wrong := [name for name, fine in checks.items() if not fine]:
            raise InputError("JiT option without a meaning", found=", ".join(f"{n}={getattr(self, n)}" for n in wrong))

    @property
    def microflow_weight(self) -> float:
        """Share w of the way to the target that a new token goes."""
        return 1.0 if self.microflow == "exact" else 1.0 / self.relax_steps


def _beta(parameters: tuple[float, float]) -> dict[str, Any]:
    return {"kind": "beta", "alpha": parameters[0], "beta": parameters[1]}


_PAPER = JiTOptions(timesteps=_beta(BETA_PAPER))
_RELEASED = replace(
    _PAPER, timesteps=_beta(BETA_RELEASED), microflow="relaxed", blur_sigma_range=(1.0, 10.0), order="activation"
)

# A new token gets the noise that dense sampling would have there, what it is worth is judged without noise, and the
# clean prediction is blurred as the released code does. On the demo model at 4x and 7x, images are 9 to 11 dB closer to
# those of 50 dense steps than with the paper's values, and no further from the pictures it was trained on
# (docs/results/ablations.md).
_DEFAULT = replace(_PAPER, noise="initial", importance="clean", blur_sigma_range=(1.0, 10.0))

PRESETS = {
    "default": _DEFAULT,
    "paper": _PAPER,
    "released": _RELEASED,
}


@dataclass(frozen=True)
class JiTState:
    """The image between two steps.

    Lifting is linear: what the steps of a stage lift, one after the other, is the lift of all that the anchors have
    moved. So only the anchors take part in a step, and the other tokens are computed when they are asked for.

    Attributes:
        start: all tokens at the start of the stage, [B, N, C], fp32.
        active: the anchors' tokens now, [B, m, C], fp32.
        noise: eps of the micro-flow, [B, N, C].
        lift: the lifter of the current anchors.
        last: the anchors' tokens before the stage's last step and their velocity in it, [B, m, C] each, and its noise
            level; None before the first.
    """

    start: Tensor
    active: Tensor
    noise: Tensor
    lift: Lifter
    last: tuple[Tensor, Tensor, float] | None = None

    @property
    def velocity(self) -> Tensor:
        """u of the anchors in the stage's last step, [B, m, C]; not before the first."""
        assert self.last is not None
        return self.last[1]

    @property
    def clean(self) -> Tensor:
        """y_hat(1) = y - sigma * u of the anchors in the stage's last step, [B, m, C]; not before the first."""
        assert self.last is not None
        y, u, sigma = self.last
        return y - sigma * u


class JiT(Method[JiTState]):
    """Just-in-Time: nested anchor sets, lifted velocities, activation by local variance, micro-flow.

    Raises:
        InputError: options that are not JiT's.
    """

    name = "jit"
    presets = tuple(PRESETS)

    def __init__(self, grid: TokenGrid, options: dict[str, Any], patch: int = 1) -> None:
        self.grid = grid
        try:
            self.settings = JiTOptions(**options)
        except TypeError as error:
            raise InputError("unknown JiT option", found=str(error), expected=list(asdict(_PAPER))) from None

    @classmethod
    def options(cls, preset: str) -> dict[str, Any]:
        """The settings of `default`, `paper` (the text's values) or `released` (the published code's)."""
        if preset not in PRESETS:
            raise InputError("unknown JiT preset", found=preset, expected=f"one of: {', '.join(PRESETS)}")
        return asdict(PRESETS[preset])

    def schedule(self, target: Target) -> StageSchedule:
        """The published schedules (Table 4) for 4 and 7 over 50 steps, solved ones elsewhere."""
        n, custom = self.grid.tokens, target.custom
        if custom is not None:
            stages = make_stages(n, custom.steps, custom.ratios or (1.0,))
        else:
            stages = solve_stages(target.asked, n, target.cost, target.reference_steps)
        nfe = sum(s.steps for s in stages)
        return StageSchedule(stages, timesteps(self.settings.timesteps, nfe, target.native_sigmas))

    def noise_fields(self, schedule: StageSchedule) -> int:
        """One, for the micro-flow, where tokens are left out and it does not take the initial noise."""
        return int(self.settings.noise == "fresh" and schedule.stages[0].tokens < self.grid.tokens)

    def draw_anchors(self, schedule: StageSchedule, generator: torch.Generator) -> Tensor | None:
        m = schedule.stages[0].tokens
        return first_anchors(self.grid, m, generator) if m < self.grid.tokens else None

    def blur_radius(self, rho: float) -> tuple[float, int]:
        """Gaussian sigma and kernel radius, in tokens, at active share rho (Algorithm 2, steps 10-11)."""
        low, high = self.settings.blur_sigma_range or (0.0, math.inf)
        sigma = min(max(self.settings.blur_scale * rho**-0.5, low), high)
        return sigma, math.ceil(3 * sigma)

    def lifter(self, anchors: Tensor, *, ascending: bool = False) -> Lifter:
        """The lifter of a set of anchors [B, m]; `ascending` if they are known to be in this order."""
        if ascending and anchors.shape[1] == self.grid.tokens:
            return Lifter(self.grid, anchors, nearest=anchors, blur=(), whole=True)
        sigma, radius = self.blur_radius(anchors.shape[1] / self.grid.tokens)
        blur = tuple(blur_matrix(n, sigma, radius, anchors.device) for n in self.grid.shape)
        return Lifter(self.grid, anchors, nearest_anchor(self.grid, anchors), blur)

    def start(self, draws: Draws, stage: Stage) -> JiTState:
        batch, anchors = draws.latents.shape[0], draws.anchors
        every = anchors is None  # a schedule without sparse stages
        if anchors is None:
            anchors = consecutive(batch, self.grid.tokens, draws.latents.device)
        noise = draws.noise if draws.noise is not None else draws.latents
        return self.begin(draws.latents, noise, self.lifter(anchors, ascending=every))

    def begin(self, y: Tensor, noise: Tensor, lift: Lifter) -> JiTState:
        """The state at the start of a stage, of all tokens y [B, N, C]."""
        return JiTState(y, lift.active(y), noise, lift)

    def transition(
        self, state: JiTState, stage: Stage, sigma: float, preview: Preview | None = None
    ) -> JiTState:
        """ITA, then DMF for the tokens that it activates, at the noise level of the step about to run."""
        prior = state.lift(state.clean)  # Phi, with the anchors that predicted it
        target = microflow_target(prior, state.noise, sigma)
        weight = self.settings.microflow_weight
        if stage.tokens == self.grid.tokens:  # nothing to choose: all but the active tokens move
            moved = target if weight == 1 else microflow(self.latents(state), target, weight)
            y = scatter_tokens(moved, state.lift.anchors, state.active)
            anchors = consecutive(len(y), stage.tokens, y.device)
        else:
            y = self.latents(state)
            anchors, new = self.activate(state, prior, stage.tokens)
            moved = microflow(gather_tokens(y, new), gather_tokens(target, new), weight)
            y = scatter_tokens(y, new, moved)
        whole = stage.tokens == self.grid.tokens
        return self.begin(y, state.noise, self.lifter(anchors, ascending=whole or self.settings.order == "ascending"))

    def carry(self, before: JiTState, after: JiTState) -> Callable[[Tensor], Tensor]:
        """Anchors keep what is known of them, and new ones get it lifted, as their velocities were (eq. 16)."""

        def carried(value: Tensor) -> Tensor:  # rows behind the batch's are a second pass's
            rows = before.lift.anchors.shape[0]
            return torch.cat([after.lift.active(before.lift(part)) for part in value.split(rows)])

        return carried

    def activate(self, state: JiTState, prior: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """ITA: all m anchors of the next stage, and those that are new.

        Args:
            prior: the lifted clean prediction, [B, N, C].
        """
        signal = self.lifted(state, state.velocity) if self.settings.importance == "velocity" else prior
        mean = tuple(mean_matrix(n, self.settings.window, signal.device) for n in self.grid.shape)
        ascending = self.settings.order == "ascending"
        return activate(state.lift.anchors, importance(self.grid, mean, signal), m, ascending=ascending)

    def tokens(self, state: JiTState) -> Tensor:
        return state.active

    def where(self, state: JiTState) -> Tensor:
        return state.lift.anchors

    def step(self, state: JiTState, velocity: Tensor, sigma: float, sigma_next: float) -> JiTState:
        """SAG-ODE (eq. 17) with an Euler step, of the anchors."""
        u = velocity.float()
        return replace(state, active=state.active + (sigma_next - sigma) * u, last=(state.active, u, sigma))

    def predicted(self, state: JiTState, velocity: Tensor, sigma: float) -> Tensor:
        """Phi of what the anchors predict: the others' noise is theirs until they run, and no part of a picture."""
        return state.lift(state.active - sigma * velocity.float())

    def lifted(self, state: JiTState, u: Tensor) -> Tensor:
        """Velocity or displacement of all tokens, [B, N, C], for that of the anchors [B, m, C] (eq. 16)."""
        return state.lift(u)

    def latents(self, state: JiTState) -> Tensor:
        if state.lift.whole:
            return state.active
        moved = self.lifted(state, state.active - state.lift.active(state.start))
        return scatter_tokens(state.start + moved, state.lift.anchors, state.active)

    def with_latents(self, state: JiTState, latents: Tensor) -> JiTState:
        return replace(state, start=latents, active=state.lift.active(latents))
