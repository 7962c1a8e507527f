"""Region-adaptive latent upsampling (RALU, arXiv 2507.08422, CVPR 2026).

Three stages: half the resolution, a quarter of the tokens; the cells with the strongest edges enlarged, four tokens for
one; everything at full resolution. Enlarging leaves correlated noise behind. So each change adds noise that makes it
white again and moves time back to where that much noise belongs, and the noise levels of all stages are chosen so that
together they are spread like the model's own (noise-timestep matching, section 4.2).

The paper's time t runs from noise to data, so sigma = 1 - t. Equation numbers are the paper's and its supplement's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jitexport.edges import beside, latent_edges, picture_edges, strongest_cells
from jitexport.errors import InputError, ScheduleError
from jitexport.grid import TokenGrid, consecutive, gather_tokens, scatter_tokens
from jitexport.matching import match_timesteps, matched_sigmas, renoising
from jitexport.methods.base import Draws, Method, Preview
from jitexport.resample import KERNELS, Resampler
from jitexport.schedule import (
    CustomSchedule,
    Stage,
    StageSchedule,
    Target,
    number,
    split_steps,
    stage_cost,
    too_fast,
)

# --- settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A schedule as the paper gives it: steps and end of each stage, share r of the cells enlarged early, h and c.

    Without h and c, which are not printed for models of four steps, noise levels are matched to the model's own.
    """

    steps: tuple[int, int, int]
    ends: tuple[float, float, float]
    ratio: float
    h: tuple[float, float, float] | None = None
    c: float | None = None


# Models of four steps (B.3; r is not printed): 1.34 times FLUX.1-schnell's speed, 1.31 times SD3.5-large-turbo's.
_FOUR_STEPS = {1.3: Setting((1, 1, 2), (0.3, 0.45, 1.0), 0.3)}

#: Published settings, by the model's family and the ordinary pipeline's steps, then by the speed-up that they are named
#: after. FLUX and SD3: Table S1 (FLUX's 4x and all digits: the released code, which has r = .3 and .1 for 4x and 7x).
PUBLISHED: dict[tuple[str, int], dict[float, Setting]] = {
    ("FluxPipeline", 50): {
        4.0: Setting((5, 6, 7), (0.3, 0.45, 1.0), 0.3, (5.019, 2.589, 2.226), 6.317**-2),
        5.0: Setting((4, 5, 6), (0.3, 0.45, 1.0), 0.2, (5.115, 2.642, 2.254), 7.522**-2),
        7.0: Setting((2, 3, 5), (0.2, 0.3, 1.0), 0.2, (8.141, 2.856, 2.193), 6.261**-2),
    },
    ("StableDiffusion3Pipeline", 28): {
        2.0: Setting((5, 6, 9), (0.2, 0.3, 1.0), 0.3, (6.21, 2.23, 1.97), 0.0586),
        3.0: Setting((3, 3, 6), (0.25, 0.3, 1.0), 0.2, (6.40, 2.60, 2.23), 0.0255),
    },
    ("FluxPipeline", 4): _FOUR_STEPS,
    ("StableDiffusion3Pipeline", 4): _FOUR_STEPS,
}

# Between them: speed-up; shares of the steps after which the first two stages end; times at which they do; r.
# 2x is the setting of Stable Diffusion 3.
_KNOTS = (
    (1.0, 0.25, 0.55, 0.20, 0.30, 0.3),
    (2.0, 0.25, 0.55, 0.20, 0.30, 0.3),
    (4.0, 5 / 18, 11 / 18, 0.30, 0.45, 0.3),
    (5.0, 4 / 15, 9 / 15, 0.30, 0.45, 0.2),
    (7.0, 0.20, 0.50, 0.20, 0.30, 0.2),
    (10.0, 0.20, 0.50, 0.20, 0.30, 0.2),
)

# More of the cells than this in a solved schedule: the middle stage would be hardly cheaper than the last.
_MOST_CELLS = 0.6


def published_for(target: Target) -> dict[float, Setting]:
    """The published settings of a model, by speed-up."""
    return PUBLISHED.get((target.family, target.reference_steps), {})


@dataclass(frozen=True)
class RALUOptions:
    """Settings of `RALU`.

    Attributes:
        timesteps: {"kind": "matched", "shift": the model's own shift; None to take it from its noise levels}.
        published: take h and c of the published settings as they are printed, where the schedule is one of them.
        region: where edges are looked for: "canny" in the decoded picture, "gradient" in the latents.
        threshold: edge strength from which a cell is enlarged early; None for the strongest alone. An engine has a
            fixed number of tokens. So of more such cells the strongest are taken, and where there are fewer, those
            beside them take the free places.
        ratio: share r of the cells that are enlarged early; None for the published ones. A threshold wants room for
            pictures with many edges.
        kernel: interpolation of the enlargement, one of `jitexport.resample.KERNELS`. Noise is correlated for nearest
            neighbours, and white, with the same signal-to-noise ratio, for the others (C.1).
        unit: what is enlarged: "pixel" of the latents, or "token", each channel on its own (released code).
        positions: of coarse tokens: "coarse" counts cells, as a smaller picture would (the paper, on FLUX.1-dev);
            "corner" and "centre" are places in the full grid. Which one a model takes, its training decides.
        kept: noise of the tokens that are not enlarged at a change: "matched" brings them to the same noise level,
            "unit" adds as much as the enlarged ones get (released code).

    Raises:
        InputError: a value that has no meaning.
    """

    timesteps: dict[str, Any]
    published: bool = False
    region: Literal["canny", "gradient"] = "canny"
    threshold: float | None = None
    ratio: float | None = None
    kernel: str = "nearest"
    unit: Literal["pixel", "token"] = "pixel"
    positions: Literal["coarse", "corner", "centre"] = "centre"
    kept: Literal["matched", "unit"] = "matched"

    def __post_init__(self) -> None:
        shift = self.timesteps.get("shift")
        checks = {
            "timesteps": self.timesteps.get("kind") == "matched" and (shift is None or shift > 0),
            "region": self.region in ("canny", "gradient"),
            "threshold": self.threshold is None or self.threshold > 0,
            "ratio": self.ratio is None or 0 < self.ratio < 1,
            "kernel": self.kernel in KERNELS,
            "unit": self.unit in ("pixel", "token"),
            "positions": self.positions in ("coarse", "corner", "centre"),
            "kept": self.kept in ("matched", "unit"),
        }
        if wrong := [name for name, fine in checks.items() if not fine]:
            raise InputError(
                "RALU option without a meaning", found=", ".join(f"{n}={getattr(self, n)}" for n in wrong)
            )


# The paper's method, but positions that the demo model takes, and pixels enlarged as pixels, not tokens as tokens: on
# 4 prompts at 5x the first is worth 2.2 dB (to 50 dense steps), the second 0.2 dB.
_DEFAULT = RALUOptions(timesteps={"kind": "matched", "shift": None})
_PAPER = replace(
    _DEFAULT, timesteps={"kind": "matched", "shift": 3.0}, published=True, unit="token", positions="coarse"
)

PRESETS = {
    "default": _DEFAULT,
    "paper": _PAPER,
    "released": replace(_PAPER, kept="unit"),
    "gradient": replace(_DEFAULT, region="gradient"),
    # Room for mean and deviation of the cells that the paper's adaptive ratio takes: r = .25 +- .12, from Table S4.
    "adaptive": replace(_DEFAULT, threshold=0.05, ratio=0.37),
    # Other interpolations (Table S5).
    "bilinear": replace(_DEFAULT, kernel="bilinear"),
    "bicubic": replace(_DEFAULT, kernel="bicubic"),
    "lanczos": replace(_DEFAULT, kernel="lanczos"),
}


# --- the method ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RALUState:
    """The image between two steps.

    Attributes:
        x: the tokens, [B, m, C], fp32: the cells that are kept, then four for each one enlarged early; at full
            resolution all tokens in the order of the grid.
        noise: fields for both changes, [B, 2 N, C].
        sigma: noise level.
        cells: those enlarged early, [B, k], and the others, [B, N / 4 - k]. None before the first change.
        full: whether the last stage has begun.
        clean: x_hat(1) of all tokens at the last step, [B, m, C]; None before the first.
    """

    x: Tensor
    noise: Tensor
    sigma: float = 1.0
    cells: tuple[Tensor, Tensor] | None = None
    full: bool = False
    clean: Tensor | None = None


class RALU(Method[RALUState]):
    """Half resolution, edges early, full resolution.

    Raises:
        InputError: options that are not RALU's, or a grid with frames.
        ScheduleError: a grid with an odd side.
    """

    name = "ralu"
    presets = tuple(PRESETS)

    def __init__(self, grid: TokenGrid, options: dict[str, Any], patch: int = 1) -> None:
        self.grid = grid
        try:
            self.settings = RALUOptions(**options)
        except TypeError as error:
            raise InputError("unknown RALU option", found=str(error), expected=list(asdict(_PAPER))) from None
        self.resampler = Resampler(grid, patch if self.settings.unit == "pixel" else 1, self.settings.kernel)
        self.coarse = self.resampler.coarse
        self.previews = self.settings.region == "canny"

    @classmethod
    def options(cls, preset: str) -> dict[str, Any]:
        """The settings of `default`, `paper`, `released` (the published code), or one named after its change."""
        if preset not in PRESETS:
            raise InputError("unknown RALU preset", found=preset, expected=f"one of: {', '.join(PRESETS)}")
        return asdict(PRESETS[preset])

    # --- schedules ---

    def tokens_at(self, ratio: float) -> int:
        """Tokens of the middle stage: four for each cell enlarged early, one for each other."""
        return self.coarse.tokens + 3 * int(self.coarse.tokens * ratio)

    def schedule(self, target: Target) -> StageSchedule:
        """The published settings for the model where there are any, solved ones elsewhere, noise levels matched.

        By hand: the steps of the three stages, and, where wanted, token ratios 0.25, the middle stage's, and 1.
        """
        if target.custom is not None:
            steps, tokens, ends = self._custom(target.custom)
        elif published := published_for(target).get(target.asked):
            ratio = published.ratio if self.settings.ratio is None else self.settings.ratio
            steps, ends, tokens = published.steps, published.ends, self.tokens_at(ratio)
        else:
            steps, tokens, ends = self._solve(target)
        h, c = self._matched(steps, ends, target)
        sigmas, reached = matched_sigmas(steps, ends, h, c)
        counts = (self.coarse.tokens, tokens, self.grid.tokens)
        return StageSchedule(number(zip(counts, steps, strict=True)), sigmas, reached)

    def _matched(
        self, steps: Sequence[int], ends: Sequence[float], target: Target
    ) -> tuple[tuple[float, ...], float]:
        own = self.settings.timesteps["shift"]
        for setting in published_for(target).values():
            if self.settings.published and (setting.steps, setting.ends) == (tuple(steps), tuple(ends)):
                if setting.h is not None and setting.c is not None:
                    return setting.h, setting.c
                own = None
        return match_timesteps(steps, ends, target.own_shift(sum(steps)) if own is None else own)

    def _custom(self, custom: CustomSchedule) -> tuple[tuple[int, ...], int, tuple[float, ...]]:
        steps, ratios = custom.steps, custom.ratios
        if len(steps) != 3 or any(n < 1 for n in steps):
            raise ScheduleError(
                "RALU has three stages of at least one step", found=steps, expected="for example --steps 4,5,6"
            )
        if ratios is None:
            ratio = self.settings.ratio or 0.2
            return steps, self.tokens_at(ratio), (0.3, 0.45, 1.0)
        if len(ratios) != 3 or ratios[0] != 0.25 or ratios[2] != 1 or not 0.25 < ratios[1] < 1:
            raise ScheduleError(
                "RALU runs a quarter of the tokens, then more, then all", found=ratios,
                expected="for example --ratios 0.25,0.4,1",
            )
        return steps, self.tokens_at((4 * ratios[1] - 1) / 3), (0.3, 0.45, 1.0)

    def _solve(self, target: Target) -> tuple[tuple[int, ...], int, tuple[float, ...]]:
        """As many steps as the budget pays for; what is left adds coarse steps, then enlarges more cells early."""
        budget = target.budget(self.grid.tokens) - (target.preview if self.previews else 0.0)
        knots = np.array(_KNOTS)
        one, two, e1, e2, ratio = (float(np.interp(target.asked, knots[:, 0], k)) for k in knots.T[1:])
        least = int(self.coarse.tokens * (self.settings.ratio or ratio))

        def cost(steps: Sequence[int], cells: int) -> float:
            counts = (self.coarse.tokens, self.coarse.tokens + 3 * cells, self.grid.tokens)
            return stage_cost(number(zip(counts, steps, strict=True)), target.cost)

        for nfe in range(target.reference_steps, 2, -1):
            first, second = (max(1, n) for n in split_steps(nfe, (one, two, 1.0))[:2])
            steps = (first, second, nfe - first - second)
            if cost(steps, least) > budget:
                continue
            extra = int((budget - cost(steps, least)) // target.cost(self.coarse.tokens))
            steps = (steps[0] + min(extra, target.reference_steps - nfe), *steps[1:])
            most = max(least, int(self.coarse.tokens * _MOST_CELLS))
            cells = max((k for k in range(least, most + 1) if cost(steps, k) <= budget), default=least)
            return steps, self.coarse.tokens + 3 * cells, (e1, e2, 1.0)
        raise too_fast(target.asked, target.reference_steps, fewest=3)

    def noise_fields(self, schedule: StageSchedule) -> int:
        """One for each change of resolution."""
        return 2

    # --- sampling ---

    def start(self, draws: Draws, stage: Stage) -> RALUState:
        assert draws.noise is not None  # see `noise_fields`
        return RALUState(self.resampler.pick(draws.latents), draws.noise)

    def transition(
        self, state: RALUState, stage: Stage, sigma: float, preview: Preview | None = None
    ) -> RALUState:
        """Enlarge the cells with the strongest edges, later all others, and add the noise of the earlier time."""
        first, second = state.noise.chunk(2, dim=1)
        if state.cells is None:
            assert state.clean is not None  # no stage is without steps
            k = (stage.tokens - self.coarse.tokens) // 3
            early, kept = strongest_cells(self.edges(state.clean, preview), k)
            old, cells = gather_tokens(state.x, kept), early
            old_noise = gather_tokens(self.resampler.pick(first), kept)
            noise, low = first, state.x
        else:
            early, kept = state.cells
            old, cells = state.x[:, kept.shape[1] :], kept
            old_noise = gather_tokens(second, self.fine(early))
            noise, low = second, self.low(state)

        a, b, c = renoising(state.sigma, sigma)
        new = a * gather_tokens(self.resampler.up(low), self.fine(cells))
        if self.settings.kernel == "nearest":
            new = new + b * gather_tokens(self.resampler.correlated(noise, c), self.fine(cells))
        else:  # as much noise in all, without its correlation
            added = b * math.sqrt(max(0.0, 1 - c * self.resampler.variance))
            new = new + added * gather_tokens(noise, self.fine(cells))
        old = a * old + b * (math.sqrt(max(0.0, 1 - c)) if self.settings.kept == "matched" else 1.0) * old_noise

        if state.cells is None:
            return replace(state, x=torch.cat([old, new], dim=1), sigma=sigma, cells=(early, kept), clean=None)
        x = torch.empty_like(second)
        x = scatter_tokens(scatter_tokens(x, self.fine(early), old), self.fine(kept), new)
        return replace(state, x=x, sigma=sigma, full=True, clean=None)

    def edges(self, clean: Tensor, preview: Preview | None) -> Tensor:
        """Edge strength of each cell, [B, N / 4], from the predicted clean latents of the first stage (Table S3)."""
        shape = (self.coarse.shape[0], self.coarse.shape[1])
        if self.settings.region == "gradient":
            strength = latent_edges(clean, shape)
        else:
            assert preview is not None  # see `previews`
            strength = picture_edges(preview(clean), shape)
        return strength if self.settings.threshold is None else beside(strength, shape, self.settings.threshold)

    def fine(self, cells: Tensor) -> Tensor:
        """Tokens of cells [B, k] in the full grid, [B, 4 k]."""
        return self.resampler.cells(cells.device)[cells].flatten(1)

    def low(self, state: RALUState) -> Tensor:
        """The image at half the resolution, [B, N / 4, C]; enlarged cells by the mean of their pixels."""
        if state.cells is None:
            return state.x
        early, kept = state.cells
        rest = kept.shape[1]
        x = state.x.new_zeros(state.x.shape[0], self.grid.tokens, state.x.shape[2])
        low = self.resampler.down(scatter_tokens(x, self.fine(early), state.x[:, rest:]))
        return scatter_tokens(low, kept, state.x[:, :rest])

    def tokens(self, state: RALUState) -> Tensor:
        return state.x

    def places(self, device: torch.device | str | None = None) -> Tensor:
        """The full grid's; then the cells' and the grid's while cells run, in the unit of the `positions` option."""
        scale, offset = {"coarse": (1.0, 0.0), "corner": (2.0, 0.0), "centre": (2.0, 0.5)}[self.settings.positions]
        full, cells = self.grid.coordinates(device), self.coarse.coordinates(device)
        return torch.cat([full, cells * scale + offset, full * (scale / 2)])

    def where(self, state: RALUState) -> Tensor:
        n, cells = self.grid.tokens, self.coarse.tokens
        if state.cells is not None and not state.full:
            early, kept = state.cells
            return torch.cat([n + kept, n + cells + self.fine(early)], dim=1)
        batch, tokens, _ = state.x.shape
        return consecutive(batch, tokens, state.x.device, first=0 if state.full else n)

    def step(self, state: RALUState, velocity: Tensor, sigma: float, sigma_next: float) -> RALUState:
        u = velocity.float()
        return replace(state, x=state.x + (sigma_next - sigma) * u, sigma=sigma_next, clean=state.x - sigma * u)

    def latents(self, state: RALUState) -> Tensor:
        if state.full:
            return state.x
        latents = self.resampler.nearest.up(self.low(state))
        if state.cells is None:
            return latents
        early, kept = state.cells
        return scatter_tokens(latents, self.fine(early), state.x[:, kept.shape[1] :])

    def with_latents(self, state: RALUState, latents: Tensor) -> RALUState:
        if state.full:
            return replace(state, x=latents)
        low = self.resampler.down(latents)
        if state.cells is None:
            return replace(state, x=low)
        early, kept = state.cells
        fine = gather_tokens(latents, self.fine(early))
        return replace(state, x=torch.cat([gather_tokens(low, kept), fine], dim=1))
