"""Which temporal method, and how much of a speed-up is its part: a search on the demo model.

    python scripts/demo_model/temporal_search.py  # goes on where it was interrupted; --minutes 3 stops after a while

For each speed-up by FLOPs: fewer steps, JiT alone, and every forecast of velocities on the ordinary sampler's 50 steps
and on JiT's schedules, with more or less of the speed-up left to JiT (`spatial`: speed-up ** spatial is JiT's part; the
computed steps are what the budget pays for). Images come from the eager modules, in bf16 where the CPU computes in it;
the scores and intervals are those of `jitexport evaluate`. Results go to docs/results/temporal-search.{md,json}.
"""

import hashlib
from dataclasses import dataclass
from functools import cache

import torch
from ablations import BATCH, DTYPE
from comparison import QUALITY, against_50_steps, usual_arguments, write_results

from jitexport.building.reference import eager_pipeline
from jitexport.evaluate.report import markdown_table
from jitexport.evaluate.sources import Source, quiet
from jitexport.models.base import ModelAdapter
from jitexport.models.sources import find_source, load_adapter
from jitexport.plan import Plan, plan
from jitexport.runtime import Pipeline
from jitexport.specs import DTYPES

SPEEDUPS = (5, 10, 20)
FORECASTS = ("reuse", "taylor", "taylor:order=2", "meancache", "foca")
SHARES = (0.5, 0.65, 0.8)


@dataclass(frozen=True)
class Candidate:
    """A way to a speed-up."""

    speedup: float
    method: str
    cache: str | None = None

    @property
    def label(self) -> str:
        """As rows and image folders are called."""
        return f"{self.speedup:g}x {self.method}" + (f" {self.cache}" if self.cache else "")


def candidates() -> list[Candidate]:
    """All rows."""
    found = []
    for speedup in SPEEDUPS:
        found += [Candidate(speedup, "dense"), Candidate(speedup, "jit")]
        found += [Candidate(speedup, "dense", forecast) for forecast in FORECASTS]
        found += [Candidate(speedup, "jit", f"taylor:spatial={share}") for share in SHARES]
        found += [Candidate(speedup, "jit", forecast) for forecast in FORECASTS if forecast != "taylor"]
    return found


@cache
def model() -> ModelAdapter:
    """The demo model with weights."""
    return load_adapter(find_source("demo"), DTYPES[DTYPE])


@cache
def planned(candidate: Candidate) -> Plan:
    """Its schedule."""
    return plan(model(), speedup=candidate.speedup, method=candidate.method, cache=candidate.cache, dtype=DTYPE)


def source(candidate: Candidate) -> Source:
    """A candidate as a source of images."""
    made = planned(candidate)

    def open_pipeline() -> Pipeline:
        return quiet(
            eager_pipeline(
                model(), made.schedule, made.method, made.options, batch=BATCH, dtype=DTYPE, device=torch.device("cpu"),
                cache=made.cache,
            )
        )

    said = repr((made.schedule, made.method, made.options, made.cache and made.cache.options, DTYPE))
    tokens = " / ".join(f"{stage.steps} x {stage.tokens}" for stage in made.schedule.stages)
    return Source(
        label=candidate.label, method=f"{candidate.speedup:g}x",
        description=f"{tokens} tokens, computed {', '.join(map(str, made.schedule.computed))}",
        key=hashlib.sha256(said.encode()).hexdigest(), steps=len(made.schedule.computed), tflops=made.tflops,
        open=open_pipeline,
    )  # fmt: skip


def main() -> None:
    args = usual_arguments(__doc__, prompts=8).parse_args()
    evaluation = against_50_steps([source(c) for c in candidates()], args)
    write_results(
        args.output / "temporal-search", evaluation, title="Temporal methods and their part of a speed-up, demo model",
        table=markdown_table(evaluation, ["psnr", *QUALITY, "sharpness", "pair_right", "ssim"]),
        command=f"python scripts/demo_model/temporal_search.py --prompts {args.prompts}",
    )


if __name__ == "__main__":
    main()
