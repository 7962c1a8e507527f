"""Delta-DiT (arXiv 2406.01125): half of the blocks run, and what the other half adds is taken from the last full step.

The front half draws outlines and the rear half details, so the rear half is left out in early steps and the front half
in late ones. Published settings: a computed step of every 5 on FLUX.1-dev, 2 on Stable Diffusion 3 (RALU's supplement);
where FLUX is cut, behind the double blocks, is the TaylorSeer authors' choice for their comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from jitexport.methods.temporal.base import Cache, CacheOptions, Run, share
from jitexport.schedule import COMPUTED, StageSchedule, Step

#: Deltas of the front and of the rear blocks, [R, T + m, D] and [R, m, D], fp32.
Deltas = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DeltaDiTOptions(CacheOptions):
    """Settings of `DeltaDiT`.

    Attributes:
        boundary: share of the steps up to which the rear blocks are left out; behind it, the front blocks.
    """

    boundary: float = 0.5

    def meaningful(self) -> dict[str, bool]:
        return super().meaningful() | {"boundary": share(self.boundary)}


class DeltaDiT(Cache[Deltas]):
    """Front blocks alone early, rear blocks alone late. A stage's deltas are its own: they hold its text as well."""

    name = "delta-dit"
    settings_class = DeltaDiTOptions
    settings: DeltaDiTOptions
    features = "deltas"

    def action(self, schedule: StageSchedule, step: int) -> str:
        return "front" if step < self.settings.boundary * schedule.nfe else "rear"

    def velocity(self, run: Run, tokens: Tensor, step: Step, history: Deltas | None) -> tuple[Tensor, Deltas]:
        if step.action == COMPUTED:
            u, of_front, of_rear = run(COMPUTED, tokens, step.index)
            return u, (of_front.float(), of_rear.float())
        assert history is not None  # a stage's first step is computed
        of_front, of_rear = history
        return run(step.action, tokens, step.index, of_rear if step.action == "front" else of_front)[0], history
