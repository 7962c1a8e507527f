"""TeaCache (arXiv 2411.19108): while the transformer's input has changed little, what its blocks added is added again.

The indicator is what the first block sees of the image, normalised and modulated for the step. Its relative change from
step to step, mean |new - old| / mean |old|, goes through a polynomial that was fitted to how much the output changes,
and adds up; while the sum is below a threshold the step is skipped, else it is computed and the sum starts anew. First
and last step are computed.

That is a decision by data, for which a loop would have to wait at every step. A bundle has a fixed list of computed
steps instead: `jitexport calibrate` runs `DecidingTeaCache` over prompts and writes down what it decides, and a build
takes the steps that most images compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from jitexport.arguments import is_number
from jitexport.errors import InputError, ScheduleError
from jitexport.methods.temporal.base import Cache, CacheOptions, LastValue, Price, ResidualForecast, Run
from jitexport.schedule import COMPUTED, StageSchedule, Step

#: Published polynomials by family, highest power first: TeaCache's for FLUX.1; vLLM-Omni's, from ComfyUI, for
#: Qwen-Image; LightX2V's for HunyuanVideo-1.5 at 480p.
COEFFICIENTS: dict[str, tuple[float, ...]] = {
    "FluxPipeline": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "QwenImagePipeline": (-450.0, 280.0, -45.0, 3.2, -0.02),
    "HunyuanVideo15Pipeline": (-29719.0924, 22283.4983, -4374.1836, 339.340251, -10.1365855, 0.129101768),
}


@dataclass(frozen=True)
class TeaCacheOptions(CacheOptions):
    """Settings of `TeaCache`.

    Attributes:
        threshold: of the summed change; on FLUX.1-dev .25 to .8 in its authors' code, .99 in RALU's comparison.
        coefficients: of the polynomial, highest power first; empty for the family's published one.
    """

    threshold: float = 0.6
    coefficients: tuple[float, ...] = ()

    def meaningful(self) -> dict[str, bool]:
        return super().meaningful() | {"threshold": is_number(self.threshold) and self.threshold > 0}


class TeaCache(LastValue, ResidualForecast):
    """The last computed residual again, at steps that were found by calibration."""

    name = "teacache"
    settings_class = TeaCacheOptions
    settings: TeaCacheOptions

    def solve(self, schedule: StageSchedule, price: Price, budget: float) -> StageSchedule | None:
        """Which steps TeaCache computes is no matter of a budget.

        Raises:
            ScheduleError: always.
        """
        raise ScheduleError(
            "teacache decides by what a model does", found="no list of computed steps",
            expected="a calibration, steps by hand, or an interval",
            remedy="jitexport calibrate, then --calibration FILE; or --cache teacache:computed=0+1+5+9, or taylorseer",
        )

    def coefficients_for(self, family: str) -> tuple[float, ...]:
        """The polynomial for a model.

        Raises:
            InputError: none was given, and none is published for its family.
        """
        found = self.settings.coefficients or COEFFICIENTS.get(family)
        if not found:
            raise InputError(
                "no TeaCache polynomial is known for this family", found=family, expected=", ".join(COEFFICIENTS),
                remedy="give one: --cache teacache:coefficients=1+0",
            )
        return tuple(found)


class Watch(NamedTuple):
    """What `DecidingTeaCache` remembers: the last indicator, the summed change, and the last computed residual."""

    indicator: Tensor
    change: float
    residual: Tensor


class DecidingTeaCache(Cache[Watch]):
    """TeaCache as published: it decides at every step while it runs, by one image or the mean of a batch.

    For schedules of which all steps are computed, and engines `stage`, `skip` and `indicator`.

    Args:
        threshold, coefficients: see `TeaCacheOptions`.
        decided: told the number of every step and whether it is computed.
    """

    name = "teacache"
    features = "residual"

    def __init__(
        self, threshold: float, coefficients: Sequence[float], decided: Callable[[int, bool], None] = lambda *_: None
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.coefficients = tuple(coefficients)
        self.decided = decided

    def rescaled(self, change: float) -> float:
        """The polynomial's value (Horner)."""
        total = 0.0
        for coefficient in self.coefficients:
            total = total * change + coefficient
        return total

    def velocity(self, run: Run, tokens: Tensor, step: Step, history: Watch | None) -> tuple[Tensor, Watch]:
        seen = run("indicator", tokens, step.index)[0].float()
        change = 0.0
        if history is not None:
            relative = (seen - history.indicator).abs().mean() / history.indicator.abs().mean()
            change = history.change + self.rescaled(float(relative))
        computed = history is None or step.sigma_next == 0 or change >= self.threshold
        self.decided(step.index, computed)
        if history is not None and not computed:
            u = run("skip", tokens, step.index, history.residual)[0]
            return u, Watch(seen, change, history.residual)
        u, residual = run(COMPUTED, tokens, step.index)
        return u, Watch(seen, 0.0, residual.float())
