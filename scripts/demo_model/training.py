"""A run of the demo model's training: its stages, its steps, its checkpoints and what it is judged by."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path

import torch
from networks import GRID, SHIFT, Models, averaged_copy
from pictures import SHEET_PROMPTS, draw_pictures, save_sheet
from PIL import Image
from shards import Artist, Shard, ShardMaker, encode_shard, padding_tokenizer
from torch import nn
from velocity import (
    NEUTRAL,
    TRAINED_SHIFT,
    WINDOW,
    Batch,
    PerSamplePositions,
    all_positions,
    draw_batch,
    empty_ids,
    guided_velocity,
    rotary_tables,
    velocity,
)

TOKENS = GRID * GRID  # of a picture
MOST_GUIDANCE = 5.0
EMPTY_CAPTIONS = 0.1
EVALUATION_SEED = 10**6
EVALUATED_SCENES = 16  # of either kind
EVALUATED_AT_ONCE = 16
EVALUATED_SIGMAS = (0.3, 0.5, 0.7, 0.85, 0.95)


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        pictures: how many it trains on, before `--scale`.
        time: its share of the time of a run with `--minutes`.
        whole: share of batches that see all tokens of their pictures.
        windows: share of the others that see a square of them.
        ratios: sizes of the subsets that the rest see, as shares of all tokens.
        uses: how often a scene is used.
        shift: of its noise levels, see `draw_sigma`.
        distil: whether the target comes from the teacher.
    """

    name: str
    pictures: int
    time: float
    whole: float = 1.0
    windows: float = 0.0
    ratios: tuple[float, ...] = ()
    uses: int = 4
    shift: float = TRAINED_SHIFT
    distil: bool = False

    @property
    def work(self) -> float:
        """Tokens that the stage runs through the transformer; the teacher's two forward passes are two thirds more."""
        subset = sum(self.ratios) / len(self.ratios) if self.ratios else 0.0
        part = self.windows * WINDOW**2 / TOKENS + (1 - self.windows) * subset
        share = self.whole + (1 - self.whole) * part
        return self.pictures * TOKENS * share * (5 / 3 if self.distil else 1)


JIT_RATIOS = (0.32, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.62, 0.65)
STAGES = (
    Stage(
        "subsets", 60_000, 0.5, whole=0.05, windows=0.15, ratios=(0.1, 0.15, 0.2, 0.25, 0.3), uses=6, shift=5 * SHIFT
    ),
    Stage("grids", 16_000, 0.33, whole=0.5, ratios=JIT_RATIOS),
    Stage("guidance", 6_000, 0.17, whole=0.5, ratios=JIT_RATIOS, distil=True),
)


@dataclass(frozen=True)
class Sizes:
    """What differs between devices: tokens a step, scenes that are made at a time, pictures the encoder takes."""

    tokens: int
    shard: int
    encoded: int


SIZES = {"cpu": Sizes(3072, 384, 8), "cuda": Sizes(32768, 2048, 32)}


def scaled(scale: float) -> list[Stage]:
    """STAGES, with their pictures multiplied."""
    return [replace(stage, pictures=round(stage.pictures * scale)) for stage in STAGES]


@dataclass
class Progress:
    """What a run has done so far; kept in its checkpoints."""

    seconds: float = 0.0  # in which processes of the run were alive
    steps: int = 0
    pictures: list[int] = field(default_factory=list)  # by stage
    loss: dict[str, float] = field(default_factory=dict)  # running mean by kind of step


def log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def learning_rate(peak: float, elapsed: float, steps: int) -> float:
    """Warm-up over the first 100 steps, then a straight line down to a hundredth of the peak."""
    return peak * min(1.0, (steps + 1) / 100) * max(0.01, 1.0 - elapsed)


def has_bf16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in single precision."""
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def save_atomically(content: dict, path: Path) -> None:
    temporary = path.with_suffix(".partial")
    torch.save(content, temporary)
    os.replace(temporary, path)


class Training:
    """A run: networks, their average, the optimizer, and how far it is.

    Attributes:
        folder: for the checkpoint, the losses and sample sheets.
        stages: as STAGES, with their pictures multiplied already.
        minutes: what the run takes, if it is measured by time and not by pictures.
        late: steps, with `minutes`, that took a shard which was used up, because the next one was not there yet.
    """

    def __init__(
        self,
        models: Models,
        sprites: dict[str, Image.Image],
        folder: Path,
        *,
        stages: Sequence[Stage] = STAGES,
        seed: int = 0,
        peak: float = 1e-3,
        minutes: float | None = None,
        device: str = "cpu",
        sizes: Sizes | None = None,
        workers: int = 0,
        compiled: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.sizes = sizes or SIZES[self.device.type]
        self.models, self.folder, self.stages, self.seed, self.peak = models, folder, tuple(stages), seed, peak
        self.minutes, self.late = minutes, 0
        self.bf16 = has_bf16(self.device)
        folder.mkdir(parents=True, exist_ok=True)
        self.artist = Artist(sprites, padding_tokenizer(models.t5_tokenizer), padding_tokenizer(models.clip_tokenizer))
        self.encode = partial(encode_shard, models.vae, self.sizes.encoded)
        self.make_shard = ShardMaker(self.artist, self.encode, seed, self.sizes.shard, workers)
        self.in_use: tuple[int, int] | None = None  # stage and number of the shard, with `minutes`
        self.drawn = 0  # pictures of it
        models.vae.requires_grad_(False).to(self.device)
        self.trained = models.trained.to(self.device).train()
        models.transformer.set_attn_processor(PerSamplePositions())
        if self.device.type == "cuda":  # sixteen words: no use for a kernel, whose way back has to know T5's bias
            for encoder in (models.t5, models.clip):
                encoder.set_attn_implementation("eager")
        self.average = averaged_copy(models)
        self.teacher: Models | None = None
        self.tables = tuple(table.float().to(self.device) for table in rotary_tables(models.transformer))
        self.empty = empty_ids(models, self.device)
        if compiled:
            torch._dynamo.config.recompile_limit = 64
            for block in (*models.transformer.transformer_blocks, *models.transformer.single_transformer_blocks):
                block.compile(dynamic=True)  # the sets of tokens have many sizes
        self.parameters = list(self.trained.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self.progress = Progress(pictures=[0] * len(self.stages))
        self.losses: dict[str, torch.Tensor] = {}  # as the progress has them, on the device: reading them waits for it
        if self.checkpoint.is_file():
            self._load()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def stage(self) -> int:
        """Number of the stage that comes next; the number of stages when the run is over."""
        if self.minutes is not None:
            ends = list(accumulate(stage.time for stage in self.stages))
            return next((i for i, end in enumerate(ends) if self.elapsed * ends[-1] < end), len(self.stages))
        done = zip(self.progress.pictures, self.stages, strict=True)
        return next((i for i, (seen, stage) in enumerate(done) if seen < stage.pictures), len(self.stages))

    @property
    def elapsed(self) -> float:
        """Share of the run's work that is done, or of its time that is over."""
        if self.minutes is not None:
            return min(1.0, self.progress.seconds / (60 * self.minutes))
        done = zip(self.progress.pictures, self.stages, strict=True)
        return sum(min(1.0, n / s.pictures) * s.work for n, s in done) / sum(s.work for s in self.stages)

    def save(self) -> None:
        """Write the checkpoint; the one before stays until it is whole."""
        self.read_losses()
        state = {
            "model": self.trained.state_dict(),
            "average": self.average.trained.state_dict(),
            "teacher": self.teacher.trained.state_dict() if self.teacher else None,
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        save_atomically(state, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.trained.load_state_dict(state["model"])
        self.average.trained.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.losses = {kind: torch.tensor(value, device=self.device) for kind, value in self.progress.loss.items()}
        if state["teacher"]:
            self.teacher = averaged_copy(self.average)
            self.teacher.trained.load_state_dict(state["teacher"])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def read_losses(self) -> dict[str, float]:
        """The running means of the losses, which the progress gets too."""
        self.progress.loss = {kind: float(value) for kind, value in self.losses.items()}
        return self.progress.loss

    def prepare(self) -> None:
        """Make the first shard. With `minutes` and workers, have the first ones of later stages made as well."""
        if self.stage < len(self.stages):
            self._shard(self.stage)
        if self.minutes is not None and self.make_shard.pool is not None:
            for number in range(self.stage + 1, len(self.stages)):
                self.make_shard.order((number, self._wanted(number)))

    def _wanted(self, number: int) -> int:
        """Number of the shard that a stage has come to, by the pictures that it has seen."""
        return self.progress.pictures[number] // (self.sizes.shard * self.stages[number].uses)

    def _shard(self, number: int) -> Shard:
        """What a stage draws from now. With `minutes`, a shard stays in use while the next one is not there yet."""
        stage = self.stages[number]
        if self.minutes is None:
            return self.make_shard((number, self._wanted(number)))
        if self.in_use is None or self.in_use[0] != number:
            self.in_use, self.drawn = (number, self._wanted(number)), 0
        elif self.drawn >= self.sizes.shard * stage.uses:
            if self.make_shard.ready((number, self.in_use[1] + 1)):
                self.in_use, self.drawn = (number, self.in_use[1] + 1), 0
            else:
                self.late += 1
        return self.make_shard(self.in_use)

    def step(self) -> torch.Tensor:
        """Train on one batch and return its loss, without waiting for the device.

        What is drawn depends on the seed and the step's number alone, unless the run is measured by time.
        """
        number, stage = self.stage, self.stages[self.stage]
        torch.manual_seed(self.seed * 1_000_003 + self.progress.steps)
        if torch.rand(()) < stage.whole:
            seen, count = "whole", TOKENS
        elif torch.rand(()) < stage.windows:
            seen, count = "window", WINDOW**2
        else:
            seen, count = "subset", int(TOKENS * stage.ratios[int(torch.randint(len(stage.ratios), ()))])
        size = max(1, self.sizes.tokens // count)
        dropped = 0.0 if stage.distil else EMPTY_CAPTIONS
        batch = draw_batch(
            self._shard(number), count, size, self.empty, dropped, window=seen == "window", shift=stage.shift
        )
        with self.autocast():
            target, guidance = self._target(batch, stage)
            loss = (velocity(self.models, self.tables, batch, guidance) - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.peak, self.elapsed, self.progress.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.steps += 1
        self.progress.pictures[number] += size
        self.drawn += size
        # The average reaches back further as the run gets longer, up to 1000 steps.
        averaged = list(self.average.trained.parameters())
        loss = loss.detach()
        kind = f"{stage.name} {seen}"
        with torch.no_grad():
            torch._foreach_lerp_(averaged, self.parameters, max(0.001, 1 / (1 + self.progress.steps / 10)))
            self.losses[kind] = self.losses.get(kind, loss).lerp(loss, 0.02)
        return loss

    def _target(self, batch: Batch, stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
        """What a step's prediction is compared with, [B, m, C], and its guidance input, [B]."""
        neutral = torch.full_like(batch.sigma, NEUTRAL)
        if not stage.distil:
            return batch.noise - batch.clean, neutral
        if self.teacher is None:
            self.teacher = averaged_copy(self.average)
        drawn = NEUTRAL + (MOST_GUIDANCE - NEUTRAL) * torch.rand_like(batch.sigma)
        guidance = torch.where(torch.rand_like(drawn) < 0.2, neutral, drawn)
        return guided_velocity(self.teacher, self.tables, batch, guidance, self.empty), guidance

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The averaged weights' loss on scenes of trained and of held-out combinations, by noise level."""
        losses = {}
        for kind, shard in self.evaluated.items():
            for sigma in EVALUATED_SIGMAS:
                torch.manual_seed(int(1000 * sigma))
                total = 0.0
                for start in range(0, len(shard.latents), EVALUATED_AT_ONCE):
                    clean = shard.latents[start : start + EVALUATED_AT_ONCE]
                    noise, level = torch.randn_like(clean), torch.full((len(clean),), sigma, device=self.device)
                    active = all_positions(self.device).expand(len(clean), -1)
                    part = slice(start, start + len(clean))
                    batch = Batch(clean, noise, level, active, shard.t5_ids[part, 0], shard.clip_ids[part, 0])
                    with self.autocast():
                        predicted = velocity(self.average, self.tables, batch, torch.full_like(level, NEUTRAL))
                    total += float((predicted - (noise - clean)).square().mean((1, 2)).sum())
                losses[f"{kind} {sigma:g}"] = round(total / len(shard.latents), 5)
        return losses

    @cached_property
    def evaluated(self) -> dict[str, Shard]:
        """Fixed scenes, by whether they hold a combination that is held out of training."""
        shards = {}
        for kind, from_held_out in (("seen", False), ("held out", True)):
            keys = [(EVALUATION_SEED, from_held_out, i) for i in range(EVALUATED_SCENES)]
            shards[kind] = self.encode([self.artist.draw(keys, 1, from_held_out)])
        return shards

    def log_evaluation(self, stage: Stage) -> None:
        """Add a line to WORK/losses.jsonl."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "steps": self.progress.steps,
            "stage": stage.name,
            "pictures": self.progress.pictures,
            "hours": round(self.progress.seconds / 3600, 3),
            "done": round(self.elapsed, 4),
            "losses": self.evaluate(),
        }
        with (self.folder / "losses.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        log(f"held-out losses: {json.dumps(line['losses'])}")

    def draw_samples(self, stage: Stage) -> None:
        """Sheets of pictures by true guidance, and by the guidance input in the stage that trains it."""
        for distilled in (False, True) if stage.distil else (False,):
            with self.autocast():
                pictures = draw_pictures(self.average, self.tables, SHEET_PROMPTS, distilled=distilled)
            name = f"sample-{self.progress.steps:06}{'-distilled' if distilled else ''}.png"
            save_sheet(pictures, self.folder / name)
