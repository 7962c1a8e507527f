"""The phases of a call: token ids, embeddings, condition, draws, the loop, pictures."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from jitexport import machine
from jitexport.arguments import shown
from jitexport.backends.base import Engine
from jitexport.calls import Calls
from jitexport.errors import InputError
from jitexport.graphs import CUDARecorder, LoopGraph, Recorder
from jitexport.grid import unpack
from jitexport.methods.base import Draws, Method
from jitexport.methods.temporal.base import Cache, Run
from jitexport.models.base import ModelDefaults, ModelGeometry
from jitexport.models.naming import Naming
from jitexport.prompting import Reader
from jitexport.runtime.changing import ChangingWeights, ReadCheckpoint
from jitexport.runtime.conditions import Condition, Guided, by_name, from_names
from jitexport.runtime.draws import Drawing
from jitexport.runtime.request import Request, Terms
from jitexport.sampler import EVERY_STEP, OnStep, sample
from jitexport.schedule import Stage, StageSchedule
from jitexport.specs import DTYPES, EngineSpec
from jitexport.weights import SharedWeights

logger = logging.getLogger(__name__)


class Phases(ChangingWeights):
    """Engines, a method and a schedule, and what a call does with them, phase by phase.

    No phase keeps anything here, so calls from several threads do not disturb each other.

    Attributes:
        engines: by name: text, condition, `stage<k>`, decode, preview where the method looks at pictures between
            stages, and those of the cheaper actions of a temporal method; each for exactly `batch_size` images.
        batch_size: images per engine run; longer lists are run in chunks, the last one padded.
        passes: 2 where a stage engine runs a prompt and its negative prompt at once, at twice the batch.
        cache: the temporal method that placed the schedule's actions.
        constants: what stages read of each step that depends on nothing but its noise level, [S, ...], by name.
        weights: what the engines read, and can be changed between calls; None where they hold copies of their own.
        graph: the denoising loop as a CUDA graph, used where no callback looks at its steps; None without.
        threads: of a call's computations on a CPU; None for torch's own setting, but no more than the processors that
            the process may use.
    """

    def __init__(
        self,
        *,
        engines: dict[str, Engine],
        method: Method[Any],
        schedule: StageSchedule,
        geometry: ModelGeometry,
        defaults: ModelDefaults,
        readers: Sequence[Reader],
        batch_size: int,
        passes: int = 1,
        cache: Cache[Any] | None = None,
        constants: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype,
        device: torch.device,
        weights: SharedWeights | None = None,
        read_checkpoint: ReadCheckpoint | None = None,
        naming: Naming | None = None,
        cuda_graphs: bool = True,
        threads: int | None = None,
        forkable: bool = True,
    ) -> None:
        super().__init__(weights, naming, read_checkpoint, forkable=forkable and device.type == "cpu")
        self.engines = engines
        self.schedule = schedule
        self.geometry = geometry
        self.defaults = defaults
        self.readers = list(readers)
        self.batch_size = batch_size
        self.passes = passes
        self.cache = cache or EVERY_STEP
        self.constants = dict(constants or {})
        self.dtype = dtype
        self.device = device
        self.method = method
        self.threads = threads
        self._calls = Calls()
        self.graph = self.loop_graph(CUDARecorder(device)) if cuda_graphs and device.type == "cuda" else None

    @property
    def method(self) -> Method[Any]:
        """What chooses the tokens of every step; another one may be put in its place."""
        return self._method

    @method.setter
    def method(self, method: Method[Any]) -> None:
        self._method = method
        self._tables = self.geometry.positions.tables(method.places(self.device))

    def on_threads(self) -> AbstractContextManager[None]:
        """What a call runs inside: torch computes on this pipeline's number of threads, and afterwards as before."""
        if self.device.type != "cpu":
            return nullcontext()
        return machine.threads(self.threads or machine.default_threads())

    def tokenize(self, prompts: Sequence[str], *others: Sequence[str], warn: bool = True) -> list[Tensor]:
        """What the text engine takes: token ids of each tokenizer, [B, L], and its mask where it has one.

        A prompt that is too long is cut, with a warning in the log.

        Args:
            prompts: for the first tokenizer.
            others: for those after it, in order; those that have none read what the first one reads.
            warn: False for prompts that nobody wrote.
        """
        inputs = []
        cut: dict[str, list[str]] = {}
        for i, reader in enumerate(self.readers):
            encoded = reader.encode([prompts, *others][i] if i <= len(others) else prompts)
            for prompt in dict.fromkeys(encoded.cut):
                cut.setdefault(prompt, []).append(str(reader.tokenizer.length))
            inputs += [encoded.ids, encoded.mask] if reader.tokenizer.mask else [encoded.ids]
        if warn:
            self._warn_of_cuts(cut)
        return [t.to(self.device) for t in inputs]

    def _warn_of_cuts(self, cut: Mapping[str, Sequence[str]]) -> None:
        """Once for a prompt in a call, and of a long one its beginning."""
        seen = call.cut if (call := self._calls.current) else set()
        for prompt in cut.keys() - seen:
            lengths = " and ".join(cut[prompt])
            logger.warning("prompt of %d characters cut to %s tokens: %s", len(prompt), lengths, shown(prompt))
            seen.add(prompt)

    def draw(self, generators: Sequence[torch.Generator]) -> Draws:
        """Everything random, for one image per generator."""
        return self.drawing.draw(generators)

    def condition(self, embeddings: Sequence[Tensor], guidance_scale: float | None) -> Condition:
        """What the loop reads but does not change, from the text engine's outputs."""
        engine = self.engines["condition"]
        return Condition.of(engine.spec, engine(*self.condition_inputs(embeddings, guidance_scale)))

    def condition_inputs(self, embeddings: Sequence[Tensor], guidance_scale: float | None) -> list[Tensor]:
        """What the condition engine takes, in its order, from the text engine's outputs."""
        available = {s.name: value for s, value in zip(self.engines["text"].spec.outputs, embeddings, strict=True)}
        available["sigmas"] = torch.tensor(self.schedule.sigmas[:-1], dtype=torch.float32, device=self.device)
        if guidance_scale is not None:
            available["guidance"] = torch.full(
                (self.batch_size,), float(guidance_scale), dtype=torch.float32, device=self.device
            )
        return [available[spec.name] for spec in self.engines["condition"].spec.inputs]

    def stage_inputs(
        self, where: Tensor, condition: Condition, negative: Condition | None = None
    ) -> Callable[..., list[Tensor]]:
        """What a stage's engines take: a function of an engine's specification, tokens [B, m, C], the number of a step,
        and what a temporal method gives beside.

        Args:
            where: which of the method's places the tokens are at, [B, m].
            negative: of the second pass, for engines that run both passes at once; without one, both are the first.
        """
        if self.passes == 2:
            condition, where = condition.beside(negative or condition), where.repeat(2, 1)
        fixed = {**self.geometry.positions.gather(self._tables, where), **condition.static}

        def inputs(spec: EngineSpec, tokens: Tensor, step: int, *beside: Tensor) -> list[Tensor]:
            tokens = tokens.to(self.dtype)
            own = {name: value[step] for name, value in (*condition.per_step.items(), *self.constants.items())}
            values = {**fixed, **own, "tokens": tokens if self.passes == 1 else tokens.repeat(2, 1, 1)}
            first = len(spec.inputs) - len(beside)
            named = [values[s.name] for s in spec.inputs[:first]]
            return [*named, *(t.to(DTYPES[s.dtype]) for s, t in zip(spec.inputs[first:], beside, strict=True))]

        return inputs

    def denoise(
        self,
        condition: Condition,
        draws: Draws,
        on_step: OnStep | None = None,
        stop: Callable[[], bool] = lambda: False,
        healthy: dict[int, Tensor] | None = None,
        guided: Guided | None = None,
    ) -> Tensor:
        """The stage loop: clean latents [B, N, C], fp32. As one CUDA graph where `at_once` says so and no `on_step`.

        Args:
            on_step, stop: see `sampler.sample`.
            healthy: is given a truth value for each step that runs an engine, on the device: whether its velocity is
                finite.
            guided: classifier-free guidance.
        """
        if self.graph is not None and on_step is None and self.at_once(guided):
            return self.graph(by_name(condition, draws, guided))

        def begin_stage(stage: Stage, where: Tensor) -> Run:
            negative = None if guided is None else guided.negative
            inputs = self.stage_inputs(where, condition, negative)
            second = None if negative is None or self.passes == 2 else self.stage_inputs(where, negative)

            def run(action: str, tokens: Tensor, step: int, *beside: Tensor) -> Sequence[Tensor]:
                engine = self.engines[stage.engine(action)]
                scale = guided.scale if guided is not None and step in guided.steps else None
                v: Tensor | None = None
                if second is not None and scale is not None:
                    first_rows, second_rows = zip(*(t.chunk(2) for t in beside), strict=True) if beside else ((), ())
                    u, *kept = engine(*inputs(engine.spec, tokens, step, *first_rows))
                    v, *others = engine(*second(engine.spec, tokens, step, *second_rows))
                    kept = [torch.cat(pair) for pair in zip(kept, others, strict=True)]
                else:
                    u, *kept = engine(*inputs(engine.spec, tokens, step, *beside))
                    if self.passes == 2:
                        u, v = u.chunk(2)
                u = u if v is None or scale is None else self.defaults.guidance.combine(u, v, scale)
                if healthy is not None:
                    healthy[step] = u.isfinite().all()
                return [u, *kept]

            return run

        return sample(self.method, self.schedule, draws, begin_stage, on_step, self.preview, stop, self.cache)

    def at_once(self, guided: Guided | None) -> bool:
        """Whether the loop runs as a graph: where there is one, and all steps have a second pass or none has."""
        return self.graph is not None and (guided is None or len(guided.steps) == self.schedule.nfe)

    def preview(self, latents: Tensor) -> Tensor:
        """Latents of half the sides [B, N / 4, C] -> pictures [B, 3, H / 2, W / 2] in [0, 1], fp32."""
        return self.engines["preview"](latents)[0]

    def loop_graph(self, recorder: Recorder) -> LoopGraph:
        """The stage loop, to be recorded at its first call and replayed at all others."""
        plain = copy.copy(self)  # not this pipeline, which would hold itself and its graph's memory
        plain.graph = None

        def loop(inputs: Mapping[str, Tensor], stages: Mapping[str, Engine]) -> Tensor:
            pipe = copy.copy(plain)
            pipe.engines = {**plain.engines, **stages}
            condition, draws, guided = from_names(inputs, self.schedule.nfe)
            return pipe.denoise(condition, draws, guided=guided)

        names = (stage.engine(action) for action, stage in self.schedule.runs)
        return LoopGraph(loop, {name: self.engines[name] for name in names}, recorder)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, N, C] -> pictures [B, 3, H, W], or videos [B, 3, F, H, W], in [0, 1], fp32."""
        engine, geometry = self.engines["decode"], self.geometry
        if geometry.tiles is None:
            return engine(latents)[0]
        return geometry.tiles.decode(unpack(latents, geometry.grid, geometry.patch), lambda tile: engine(tile)[0])

    @property
    def terms(self) -> Terms:
        """What a call may ask for."""
        outputs = self.engines["text"].spec.outputs
        return Terms(self.defaults.guidance, outputs, len(self.readers), self.schedule.nfe, self.device)

    @property
    def drawing(self) -> Drawing:
        """What is random in a call."""
        return Drawing(self.method, self.schedule, self.geometry)

    def prepare(self, prompts: Sequence[str]) -> tuple[Condition, Guided | None]:
        """What the loop reads for exactly `batch_size` prompts, with the model's usual guidance."""
        none = [None, None]
        request = self.terms.request([list(prompts), *none], [None, *none], {}, None, None, (0.0, 1.0), 1)
        rows = range(self.batch_size)
        return self.condition(request.texts.embeddings(self, rows), request.distilled), self.guided(request, rows)

    def guided(self, request: Request, rows: Sequence[int]) -> Guided | None:
        """Classifier-free guidance of a chunk of images; None where the call has none.

        Raises:
            InputError: the temporal method does not take such guidance.
        """
        if request.negative is None or not request.steps:
            return None
        if self.cache.features is not None and len(request.steps) != self.schedule.nfe:
            raise InputError(
                "guidance_interval leaves steps without a second pass, of which the cache would know nothing",
                found=f"{len(request.steps)} of {self.schedule.nfe} steps, cache {self.cache.name}",
                expected="a second pass at all steps", remedy="leave guidance_interval out",
            )
        negative = self.condition(request.negative.embeddings(self, rows), request.distilled)
        scale = torch.full((self.batch_size,), request.scale, dtype=torch.float32, device=self.device)
        return Guided(negative, scale, request.steps)
