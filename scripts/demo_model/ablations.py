"""The JiT papers' ablations on the demo model.

    python scripts/demo_model/ablations.py  # goes on where it was interrupted; --minutes 3 stops after a while

Without the spatial approximation, without ITA, without the DMF target (main paper, Table 3); 2, 3 and 4 stages (C.1);
aggressive, default and conservative ratios (C.2); uniform against Beta timesteps (B.4). Each with the exact micro-flow
of the text or the relaxed one of the released code, everything else as the preset `paper` has it, at 18 steps. Then
the way from there to the preset `default`, at 4x and 7x.
Images come from the eager modules, in bf16 where the CPU computes in it; the scores and intervals are those of
`jitexport evaluate`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
from comparison import QUALITY, against_50_steps, signed, usual_arguments, write_results
from torch import Tensor

from jitexport.building.reference import eager_pipeline
from jitexport.choice import choose
from jitexport.evaluate import Evaluation, write_report
from jitexport.evaluate.metrics import MEASURES
from jitexport.evaluate.report import markdown_table
from jitexport.evaluate.sources import Source, quiet
from jitexport.evaluate.statistics import Score
from jitexport.flops import meta_adapter, step_cost
from jitexport.grid import scatter_tokens
from jitexport.methods.jit import JiT, JiTState, activate
from jitexport.models.base import ModelAdapter
from jitexport.models.sources import find_source, load_adapter
from jitexport.runtime import Pipeline
from jitexport.schedule import CustomSchedule, StageSchedule, Target, stage_cost
from jitexport.specs import DTYPES

DTYPE, BATCH = choose("cpu", "eager").dtype, 4
STEPS, RATIOS = (7, 4, 7), (0.35, 0.62, 1.0)  # 4x of Table 4
BETA = {"kind": "beta", "alpha": 1.4, "beta": 0.42}


class StillTokens(JiT):
    """Without the spatial approximation: Pi_k = S_k, tokens that are not active do not move, and ITA sees that."""

    def lifted(self, state: JiTState, u: Tensor) -> Tensor:
        return scatter_tokens(torch.zeros_like(state.start), state.lift.anchors, u)


class RandomActivation(JiT):
    """Without ITA: new tokens are drawn at random; a channel of the image's noise field is the draw."""

    def activate(self, state: JiTState, prior: Tensor, m: int) -> tuple[Tensor, Tensor]:
        return activate(state.lift.anchors, state.noise[..., 0], m)


@dataclass(frozen=True)
class Variant:
    """A row of the ablations: what differs from the preset `paper` at 4x, or another preset as a whole."""

    label: str
    table: str
    description: str
    method: type[JiT] = JiT
    microflow: str = "exact"
    relax_steps: int = 3
    steps: tuple[int, ...] = STEPS
    ratios: tuple[float, ...] = RATIOS
    timesteps: tuple[tuple[str, object], ...] = tuple(BETA.items())
    noise: str = "fresh"
    importance: str = "velocity"
    least_blur: float | None = None
    preset: str | None = None

    @property
    def options(self) -> dict[str, object]:
        """As `JiT` takes them."""
        if self.preset is not None:
            return JiT.options(self.preset)
        return JiT.options("paper") | {
            "timesteps": dict(self.timesteps), "microflow": self.microflow, "relax_steps": self.relax_steps,
            "noise": self.noise, "importance": self.importance,
            "blur_sigma_range": None if self.least_blur is None else (self.least_blur, 10.0),
        }  # fmt: skip


PARTS, STAGES, SHARES, TIMES, DEFAULT = "parts", "stages", "ratios", "timesteps", "default"
SEVEN = {"steps": (4, 3, 4), "ratios": (0.32, 0.6, 1.0)}  # 7x of Table 4
NATIVE, UNIFORM = (("kind", "native"),), (("kind", "uniform"),)
EVEN = {2: ((9, 9), (0.5, 1.0)), 4: ((4, 5, 4, 5), (0.25, 0.5, 0.75, 1.0))}


def variants() -> list[Variant]:
    """All rows: with the exact micro-flow, and what takes parts of the method away with the relaxed one too."""
    rows = [
        Variant("no DMF target", PARTS, "new tokens stay where the lifted velocity left them (w = 0)",
                microflow="relaxed", relax_steps=10**9),
        Variant("aggressive, exact", SHARES, "20/50/100%", ratios=(0.2, 0.5, 1.0)),
        Variant("conservative, exact", SHARES, "50/75/100%", ratios=(0.5, 0.75, 1.0)),
        Variant("uniform times, exact", TIMES, "sigma = 1, ..., 1/18, 0", timesteps=UNIFORM),
        Variant("native times, exact", TIMES, "the model's own: uniform, shifted by 2", timesteps=NATIVE),
        Variant("2 stages, exact", STAGES, "9/9 steps at 50/100%", steps=EVEN[2][0], ratios=EVEN[2][1]),
        Variant("4 stages, exact", STAGES, "4/5/4/5 steps at 25/50/75/100%", steps=EVEN[4][0], ratios=EVEN[4][1]),
    ]  # fmt: skip
    for flow in ("relaxed", "exact"):
        rows += [
            Variant(f"full, {flow}", PARTS, "all parts, 7/4/7 steps at 35/62/100%, Beta(1.4, 0.42)", microflow=flow),
            Variant(f"no approximation, {flow}", PARTS, "Pi_k = S_k: inactive tokens stand still", StillTokens, flow),
            Variant(f"no ITA, {flow}", PARTS, "new tokens at random", RandomActivation, flow),
        ]
    own, clean = {"noise": "initial"}, {"noise": "initial", "importance": "clean"}
    for name, speed in (("4x", {}), ("7x", SEVEN)):
        said, dense = f"at {name}: initial noise", {"steps": (sum(speed.get("steps", STEPS)),), "ratios": (1.0,)}
        rows += [
            Variant(f"initial noise, {name}", DEFAULT, said, **own, **speed),
            Variant(f"initial noise, relaxed, {name}", DEFAULT, said, microflow="relaxed", **own, **speed),
            Variant(f"initial noise, native times, {name}", DEFAULT, said, timesteps=NATIVE, **own, **speed),
            Variant(f"and ITA on clean, {name}", DEFAULT, f"{said}, ITA on the clean prediction", **clean, **speed),
            Variant(f"and blur, {name}", DEFAULT, "the preset `default`: and a blur of at least 1 token",
                    least_blur=1.0, **clean, **speed),
            Variant(f"released, {name}", DEFAULT, "the preset `released`: relaxed, Beta(1.4, 0.425), that blur, tokens "
                    "in the order in which they came", microflow="relaxed", preset="released", **speed),
            Variant(f"all tokens, {name}", DEFAULT, "as many steps at the same noise levels", **dense),
        ]  # fmt: skip
    rows += [Variant(f"full, {flow}, 7x", DEFAULT, "the preset `paper` at 7x", microflow=flow, **SEVEN)
             for flow in ("exact", "relaxed")]  # fmt: skip
    order = (PARTS, STAGES, SHARES, TIMES, DEFAULT)
    return sorted(rows, key=lambda v: order.index(v.table))


@cache
def model() -> tuple[ModelAdapter, Callable[[int], float]]:
    """The demo model with weights, and FLOPs of a step by tokens."""
    adapter = load_adapter(find_source("demo"), DTYPES[DTYPE])
    return adapter, step_cost(meta_adapter(adapter, DTYPE), DTYPE)


def schedule_of(variant: Variant) -> tuple[JiT, StageSchedule]:
    adapter, cost = model()
    method = variant.method(adapter.geometry.grid, variant.options)
    target = Target(None, CustomSchedule(variant.steps, variant.ratios), cost, 50, adapter.native_sigmas)
    return method, method.schedule(target)


def source(variant: Variant) -> Source:
    """A variant as a source of images."""
    method, schedule = schedule_of(variant)
    _, cost = model()

    def open_pipeline() -> Pipeline:
        adapter, _ = model()
        pipe = eager_pipeline(
            adapter, schedule, "jit", variant.options, batch=BATCH, dtype=DTYPE, device=torch.device("cpu")
        )
        pipe.method = method
        return quiet(pipe)

    said = repr((replace(variant, label="", table="", description=""), schedule.sigmas, DTYPE))
    return Source(
        label=variant.label, method=variant.table, description=variant.description,
        key=hashlib.sha256(said.encode()).hexdigest(), steps=schedule.nfe,
        tflops=stage_cost(schedule.stages, cost) / 1e12, open=open_pipeline,
    )  # fmt: skip


def differences(evaluation: Evaluation, measure: str) -> dict[str, Score]:
    """Mean difference of each row to `full` of the same micro-flow and speed-up, prompt by prompt."""
    bases = {v.label: v for v in variants() if v.label.startswith("full")}
    found = {}
    for variant in variants():
        if variant.label in bases:
            continue
        steps = 11 if sum(variant.steps) == 11 else 18
        flow = "relaxed" if variant.microflow == "relaxed" and variant.relax_steps == 3 else "exact"
        [base] = [name for name, v in bases.items() if v.microflow == flow and sum(v.steps) == steps]
        found[variant.label] = evaluation.differences(measure, base)[variant.label]
    return found


def main() -> None:
    args = usual_arguments(__doc__, prompts=24).parse_args()
    evaluation = against_50_steps([source(v) for v in variants()], args)
    judged = next(m for m in QUALITY if m in evaluation.measures)
    quality, likeness = (differences(evaluation, m) for m in (judged, "psnr"))
    lines = [f"| | {MEASURES[judged].title} | {MEASURES['psnr'].title} |", "|---|---|---|"]
    lines += [f"| {label} | {signed(quality[label])} | {signed(likeness[label])} |" for label in quality]
    measures = [*QUALITY, "sharpness", "pair_right", "psnr", "ssim", "vae_distance"]
    write_results(
        args.output / "ablations",
        evaluation,
        title="JiT's parts, stages, ratios and timesteps on the demo model",
        table=markdown_table(evaluation, measures)
        + "\nChange against `full` of the same micro-flow and speed-up, prompt by prompt:\n\n"
        + "\n".join(lines) + "\n",
        command=f"python scripts/demo_model/ablations.py --prompts {args.prompts}",
        extra={f"change of {judged}": {label: asdict(score) for label, score in quality.items()}},
    )  # fmt: skip
    print(write_report(evaluation, args.folder / "ablations.html", title="JiT's ablations"))


if __name__ == "__main__":
    main()
