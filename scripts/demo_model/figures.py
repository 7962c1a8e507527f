"""The README's figure of how it works, from a real image of a built bundle.

    python scripts/demo_model/figures.py engines/demo-4x --output docs/images/how-it-works.png

Top: the tokens that each stage runs. Bottom: the image that the model predicts at the end of that stage.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import jitexport
from jitexport.methods.jit import JiT, JiTState
from jitexport.schedule import Stage

ACTIVE, NEW, IDLE = (0.16, 0.38, 0.66), (0.95, 0.55, 0.15), (0.92, 0.93, 0.95)


class Recorder(JiT):
    """JiT that keeps the anchors of every stage and the lifted clean prediction of every step."""

    def __init__(self, original: JiT) -> None:
        self.__dict__.update(original.__dict__)
        self.anchors: list[torch.Tensor] = []
        self.predictions: list[torch.Tensor] = []

    def start(self, draws, stage: Stage) -> JiTState:
        state = super().start(draws, stage)
        self.anchors.append(state.lift.anchors)
        return state

    def transition(self, state: JiTState, stage: Stage, sigma: float, preview: object = None) -> JiTState:
        state = super().transition(state, stage, sigma)
        self.anchors.append(state.lift.anchors)
        return state

    def step(self, state: JiTState, velocity: torch.Tensor, sigma: float, sigma_next: float) -> JiTState:
        state = super().step(state, velocity, sigma, sigma_next)
        self.predictions.append(state.lift(state.clean))
        return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", default="hamburger on a blue background")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/images/how-it-works.png"))
    args = parser.parse_args()

    pipe = jitexport.load(args.bundle)
    pipe.method = recorder = Recorder(pipe.method)
    pipe(args.prompt, generator=torch.Generator().manual_seed(args.seed))

    stages, grid = pipe.schedule.stages, pipe.geometry.grid
    figure, axes = plt.subplots(2, len(stages), figsize=(3.3 * len(stages), 6.6), layout="constrained")
    known = torch.zeros(grid.tokens, dtype=torch.bool)
    for column, (stage, anchors) in enumerate(zip(stages, recorder.anchors, strict=True)):
        colours = torch.tensor(IDLE).expand(grid.tokens, 3).clone()
        colours[anchors[0]] = torch.tensor(NEW if column else ACTIVE)
        colours[known] = torch.tensor(ACTIVE)
        known[anchors[0]] = True
        top, bottom = axes[:, column]
        top.imshow(colours.view(*grid.shape, 3))
        top.set_title(f"{stage.name}: {stage.steps} steps, {stage.tokens} tokens ({stage.tokens / grid.tokens:.0%})")
        last = pipe.schedule.steps_of(stage)[-1]
        with torch.inference_mode():
            picture = pipe.to_images(pipe.decode(recorder.predictions[last]), "np")[0]
        bottom.imshow(picture)
        sigma = pipe.schedule.sigmas[last]
        bottom.set_title(f"predicted image at $\\sigma$ = {sigma:.2f}" if column < len(stages) - 1 else "image")
        for axis in (top, bottom):
            axis.set_xticks([])
            axis.set_yticks([])
    axes[0, 0].set_ylabel("tokens that run (orange: new)")
    axes[1, 0].set_ylabel(f"“{args.prompt}”")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
