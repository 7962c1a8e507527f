"""ToCa (arXiv 2410.05317): what blocks add is cached token by token, and a step refreshes the tokens that matter.

Attention's results are those of the last computed step. MLPs run for a tenth of the tokens, which are chosen anew in
every block by a score and by how long they have not been chosen. Published: 3 computed steps, then one of every 5 on
FLUX.1-dev (40 steps), of every 3 on Stable Diffusion 3 (RALU's supplement), a tenth of the tokens.

Published scores are sums of attention maps, for which attention would have to run without a fused kernel. Ours are the
norms of values, as the code for FLUX.1 can be told to take (`v-norm`); its authors later found tokens chosen by chance
no worse (DuCa, arXiv 2412.18911).

The state is two tensors of the image's and the text's size for every block: 3.2 GB in bf16 on FLUX.1-dev at 1024 x 1024
pixels, and during a step that refreshes 1.6 GB more. It is kept in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jitexport.arguments import is_number
from jitexport.methods.temporal.base import Cache, CacheOptions, Run, share
from jitexport.schedule import COMPUTED, StageSchedule, Step

#: Steps from one computed step to the next by which staleness is measured where `every` does not say.
USUAL_INTERVAL = 5


@dataclass(frozen=True)
class ToCaOptions(CacheOptions):
    """Settings of `ToCa`.

    Attributes:
        fresh: share of the tokens that are refreshed, on average over blocks.
        staleness: what is added to the score of a token that was not refreshed for as many steps as lie between
            computed ones.
    """

    warmup: int = 3
    fresh: float = 0.1
    staleness: float = 0.25

    def meaningful(self) -> dict[str, bool]:
        return super().meaningful() | {
            "fresh": share(self.fresh) and self.fresh > 0,
            "staleness": is_number(self.staleness) and self.staleness >= 0,
        }


class Kept(NamedTuple):
    """What is remembered of each token in each block: see `jitexport.models.tokens`.

    Attributes:
        attention, updates, scores: as engines hand them on.
        ages: steps for which a token was not refreshed, [R, S], fp32.
    """

    attention: Tensor
    updates: Tensor
    scores: Tensor
    ages: Tensor


class ToCa(Cache[Kept]):
    """Attention of the last computed step, and its MLPs but for a few tokens. A stage's state is its own."""

    name = "toca"
    settings_class = ToCaOptions
    settings: ToCaOptions

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.features = f"tokens:{self.settings.fresh:g}"

    def action(self, schedule: StageSchedule, step: int) -> str:
        return "refresh"

    def velocity(self, run: Run, tokens: Tensor, step: Step, history: Kept | None) -> tuple[Tensor, Kept]:
        if step.action == COMPUTED:
            u, attention, updates, scores = run(COMPUTED, tokens, step.index)
            return u, Kept(attention, updates, scores, torch.zeros_like(scores))
        assert history is not None  # a stage's first step is computed
        attention, updates, scores, ages = history
        due = scores + ages * (self.settings.staleness / (self.settings.every or USUAL_INTERVAL))
        u, updates, fresh = run(step.action, tokens, step.index, attention, updates, due)
        return u, Kept(attention, updates, scores, (ages + 1) * (1 - fresh))
