"""Train the demo model: a small text-to-image pipeline of FLUX.1's architecture, saved as a diffusers folder.

    python scripts/demo_model/train.py train
    python scripts/demo_model/train.py sheet  --out sheet.png
    python scripts/demo_model/train.py export --out FOLDER
    python scripts/demo_model/train.py weights --out FILE

`train` starts from a diffusers folder (`--init`): its autoencoder is used as it is, its transformer and text encoders
are trained on, or trained from nothing with `--from-scratch`. It writes a checkpoint to `--work` every few minutes and
goes on from it when called again, after an interruption or on another day, as if nothing had been between: what a step
draws depends on the seed and on how far the run is, so a run that was killed has the same losses as one that was not.
`--hours` ends this call, not the run. `sheet` draws pictures with the averaged weights of the last checkpoint, and
`export` writes these in half precision; `weights` writes a small file of them for another run's `--weights`.

The run has three stages, whose lengths are numbers of pictures (STAGES in `training.py`; `--scale` multiplies them):

1. subsets: of a picture the transformer sees a set of tokens at their true positions, with the loss on them only, as
   the method this package exists for runs it, or, one batch in seven, all tokens of a square: details are learned
   faster from neighbours. Noise levels are high: there it is decided what a picture shows;
2. grids: half of the batches with all 32 x 32 tokens, the others with subsets of the sizes of JiT's stages;
3. guidance: the guidance input learns what classifier-free guidance does. A frozen copy of the model is the teacher;
   the target is its velocity without a caption plus the guidance times the difference that the caption makes. Until
   then the input is always NEUTRAL, one caption in ten is empty, and the model can be sampled with true guidance.

What that takes. On two cores with AVX2 alone: 4.5 to 5.8 pictures a second with subsets (2026-11-27), 1.4 whole ones
(2026-11-25, with 6,144 tokens a step). Scenes are made and encoded as the run goes, each used a few times with other
noise and another caption, which costs about a tenth of the time. A process beside it that wants the same cores takes up
to nine tenths of the speed away, since threads wait for each other: give each its own cores.
glibc gives large blocks back to the system at each step unless told otherwise;
`MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592` saves a third of the time on whole
grids (Xeon with AMX, 2026-11-27).

Steps are small on a CPU (3,072 tokens), since the number of steps decides there: after three minutes of training the
bundled model on scenes, the loss at noise 0.7 was 0.260 with 6,144 tokens a step, 0.252 with 3,072, 0.243 with 1,536
(at 0.95: 0.444, 0.426, 0.446); Muon for the blocks' matrices in place of AdamW, whose steps take half a second longer,
gave 0.269 with 6,144 (AVX2, 2026-11-27).

Squares of 16 x 16 tokens: nine minutes of training the bundled model gave losses of 0.190, 0.175, 0.210, 0.277 and
0.417 at noise 0.3, 0.5, 0.7, 0.85 and 0.95 with nine batches in ten on squares and the others on subsets of that size,
0.213, 0.194, 0.229, 0.288 and 0.393 on subsets alone (3,492 and 2,614 pictures, AVX2, 2026-11-28): only where the whole
is decided, subsets are better, and later stages have those.

A line of `WORK/losses.jsonl` for every evaluation holds the averaged weights' loss on scenes that are never trained
on, at fixed noise levels and with fixed noise. The running loss says little: it depends on the levels drawn.

`--minutes` measures a run by time in place of pictures, whatever the device's speed: each stage has its share of the
time, which begins with the first step and includes evaluations and checkpoints but not the last ones and the sheets.
A shard of scenes that is used up stays in use until the next one is there; the log counts the steps that did so. Such
a run can go on from its checkpoint, but two of them differ.

`--device cuda` uses bfloat16 and batches of 32,768 tokens, and scenes are drawn ahead by `--workers` processes. A step
never waits for the device. On an H100 beside tests and a compiler (2026-11-28, torch 2.11): about 10 steps a second, or
1,200 pictures by squares and subsets, 500 mostly whole, 380 with the teacher. The first two stages, 170 seconds, took
the bundled model's losses from 0.264, 0.343, 0.545, 0.666 and 0.764, by noise level as above, to 0.112, 0.094, 0.104,
0.125 and 0.215. `--compile` had made no step after 70 seconds there.

`scenes.safetensors` beside this script is what a run has learnt that started from there, for the next one to start from
(`--weights`). It is no model to ship yet. What the H100's run taught was measured on scenes of one, two and three
objects and five textures, by kind (velocity loss at noise 0.3, 0.5, 0.7, 0.85 and 0.95, 8 scenes each, whole captions):

    one object, plain       0.080 0.050 0.042 0.049 0.119      two objects, plain     0.098 0.079 0.091 0.126 0.294
    one object, stripes     0.136 0.106 0.099 0.104 0.158      three objects, plain   0.120 0.100 0.121 0.183 0.332
    one object, confetti    0.159 0.142 0.190 0.229 0.288

An object alone came out right, two were mixtures of both, textures at random phases were left out or came out as blots.
So training draws one object, plain or shaded; two and three, which scenes, captions and scores know, wait for a GPU.
86 minutes of one object on two cores with AVX2 (2026-11-28, 16,022, 2,737 and 907 pictures, `--learning-rate 4e-4`,
stripes and dots among the textures still, which it did not learn either) took losses on scenes of trained combinations
from 0.113, 0.089, 0.084, 0.104 and 0.177 to 0.113, 0.083, 0.074, 0.084 and 0.143 at three quarters of the time, 0.115,
0.085, 0.079, 0.094 and 0.145 after the guidance stage. They fell as the learning rate did: at half of the time nothing
seemed to be learnt. Looked at (16 captions, 50 steps): eleven of eleven named objects are there, "an animal" is, four
times "something", any of 24 objects, is a mixture, and no caption says that now.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from data import load_objects
from export import write_folder
from networks import Models, save_weights, starting_models
from pictures import GUIDANCE, SHEET_PROMPTS, draw_pictures, save_sheet
from training import Training, log, scaled
from velocity import PerSamplePositions, rotary_tables

from jitexport.models.sources import DEMO_FOLDER

WORK = Path.home() / ".cache" / "jitexport" / "demo-training"
LOG_SECONDS = 10


def train(args: argparse.Namespace) -> None:
    """Train, or go on training, for at most `--hours`."""
    torch.set_flush_denormal(True)  # AdamW's second moments become denormal, which is many times slower on a CPU
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # see `velocity.rms_norm`
    spare = max(1, (os.cpu_count() or 1) - 4)  # cores that the training itself leaves
    training = Training(
        first_models(args),
        load_objects(args.data),
        args.work,
        stages=scaled(args.scale),
        seed=args.seed,
        peak=args.learning_rate,
        minutes=args.minutes,
        device=args.device,
        workers=args.workers if args.workers is not None else (spare if args.device == "cuda" else 0),
        compiled=args.compile,
    )
    try:
        run_training(training, args)
    finally:
        training.make_shard.close()


def run_training(training: Training, args: argparse.Namespace) -> None:
    """Steps, and what is to be done between them, until the run is over or `--hours` are."""
    progress = training.progress
    log(f"{training.elapsed:.1%} done, {progress.steps} steps, bf16 {'on' if training.bf16 else 'off'}")
    training.prepare()
    if progress.steps == 0:
        training.log_evaluation(training.stages[0])
    log("the first shard is there")
    began, before, share_before = time.monotonic(), progress.seconds, training.elapsed
    saved = evaluated = sampled = logged = began
    logged_steps, logged_pictures = progress.steps, sum(progress.pictures)
    while (number := training.stage) < len(training.stages):
        stage = training.stages[number]
        training.step()
        now = time.monotonic()
        progress.seconds = before + now - began
        over = training.stage != number
        ended = now - began > 3600 * args.hours or training.stage == len(training.stages)
        if over or ended or now - logged > LOG_SECONDS:
            means = ", ".join(f"{kind} {value:.4f}" for kind, value in training.read_losses().items())
            left = (1 - training.elapsed) / max(training.elapsed - share_before, 1e-9) * (now - began) / 60
            log(
                f"{stage.name}: step {progress.steps}, pictures {progress.pictures}, loss {means}, "
                f"{(progress.steps - logged_steps) / (now - logged):.2f} steps/s, "
                f"{(sum(progress.pictures) - logged_pictures) / (now - logged):.1f} pictures/s, "
                f"{training.late} steps with late data, {training.elapsed:.2%} done, {left:.1f} minutes to go"
            )
            logged, logged_steps, logged_pictures = now, progress.steps, sum(progress.pictures)
        if over or ended or now - saved > 60 * args.checkpoint_minutes:
            training.save()
            saved = time.monotonic()
        if over or ended or now - evaluated > 60 * args.evaluation_minutes:
            training.log_evaluation(stage)
            evaluated = time.monotonic()
        if ended or now - sampled > 60 * args.sample_minutes:
            training.draw_samples(stage)
            sampled = time.monotonic()
        if ended:
            break
    log(f"stopped: {json.dumps(asdict(progress))}")


def first_models(args: argparse.Namespace) -> Models:
    """The networks of `--init`, with the weights of `--weights` if it is given."""
    return starting_models(args.init, args.from_scratch, args.weights)


def checkpoint_models(args: argparse.Namespace) -> Models:
    """The same, with the averaged weights of the checkpoint in `--work` if there is one."""
    models, checkpoint = first_models(args), args.work / "checkpoint.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        models.trained.load_state_dict(state["average"])
        log(f"weights of {checkpoint}: {json.dumps(state['progress'])}")
    return models


def sheet(args: argparse.Namespace) -> None:
    """Draw pictures with the averaged weights of the last checkpoint."""
    models = checkpoint_models(args)
    models.trained.eval().requires_grad_(False)
    models.transformer.set_attn_processor(PerSamplePositions())
    tables = tuple(table.float() for table in rotary_tables(models.transformer))
    prompts = args.prompt or SHEET_PROMPTS
    pictures = draw_pictures(models, tables, prompts, args.steps, args.guidance, args.distilled)
    save_sheet(pictures, args.out)


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights of the last checkpoint, and what describes them, to `args.out`."""
    write_folder(checkpoint_models(args), args.out, args.data)


def weights(args: argparse.Namespace) -> None:
    """Write the averaged weights of the last checkpoint alone, for another run to start from."""
    save_weights(checkpoint_models(args), args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)

    def add_verb(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=run.__doc__)
        verb.set_defaults(run=run)
        verb.add_argument("--init", type=Path, default=DEMO_FOLDER, help="diffusers folder to start from")
        verb.add_argument("--from-scratch", action="store_true", help="take only the autoencoder from --init")
        verb.add_argument("--weights", type=Path, help="file of weights that replace those of --init")
        verb.add_argument("--data", type=Path, default=WORK / "pictures", help="folder for the npm packages")
        verb.add_argument("--work", type=Path, default=WORK, help="folder of checkpoint, losses and sample sheets")
        return verb

    verb = add_verb("train", train)
    verb.add_argument("--hours", type=float, default=math.inf, help="end this call after so many hours")
    length = verb.add_mutually_exclusive_group()
    length.add_argument("--scale", type=float, default=1.0, help="multiplies the pictures of all stages")
    length.add_argument("--minutes", type=float, help="what all stages together take, by time and not by pictures")
    verb.add_argument("--device", default="cpu", help="cpu, or cuda")
    verb.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate")
    verb.add_argument("--compile", action="store_true", help="compile the blocks")
    verb.add_argument("--workers", type=int, help="processes that make scenes ahead; for cuda all cores but 4, else 0")
    verb.add_argument("--checkpoint-minutes", type=float, default=5)
    verb.add_argument("--evaluation-minutes", type=float, default=30)
    verb.add_argument("--sample-minutes", type=float, default=60)
    verb.add_argument("--seed", type=int, default=0)

    verb = add_verb("sheet", sheet)
    verb.add_argument("--out", type=Path, required=True, help="PNG file to write")
    verb.add_argument("--prompt", action="append", help="repeat for several; pictures to watch the run by without it")
    verb.add_argument("--steps", type=int, default=25)
    verb.add_argument("--guidance", type=float, default=GUIDANCE)
    verb.add_argument("--distilled", action="store_true", help="guide through the model's input: after the last stage")

    verb = add_verb("export", export)
    verb.add_argument("--out", type=Path, required=True, help="diffusers folder to write")

    verb = add_verb("weights", weights)
    verb.add_argument("--out", type=Path, required=True, help="safetensors file to write")

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
