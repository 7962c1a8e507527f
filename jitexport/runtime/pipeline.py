"""A prebuilt bundle as a pipeline: prompts in, images out."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jitexport import machine
from jitexport.ambient import plain
from jitexport.arguments import (
    OUTPUT_TYPES,
    BuiltIn,
    check_built_in,
    check_count,
    check_tensor_inputs,
    is_tensor,
    require_finite,
    shown,
)
from jitexport.backends.base import Engine
from jitexport.calls import Call, Calls
from jitexport.console import PlainConsole, Progress
from jitexport.crowding import watch
from jitexport.errors import InputError, NumericalError
from jitexport.forks import survives_fork
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
from jitexport.sampler import EVERY_STEP, Look, OnStep, sample
from jitexport.schedule import Stage, StageSchedule
from jitexport.specs import DTYPES, EngineSpec
from jitexport.weights import SharedWeights

logger = logging.getLogger(__name__)

OutputType = Literal["pil", "np", "pt", "latent"]

#: (pipeline, step index, timestep, {"latents": ...}) -> {"latents": ...} or {}; raising ends the call.
Callback = Callable[["Pipeline", int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: PIL images, or an array [n, H, W, 3], or tensors [n, 3, H, W] or latents [n, N, C].

    Of videos: a list of frames for each, or an array [n, F, H, W, 3], or tensors [n, F, 3, H, W].
    """

    images: Any

    @property
    def frames(self) -> Any:
        """Videos, by diffusers' name for them."""
        return self.images


class Pipeline(ChangingWeights):
    """Engines, a method and a schedule as a diffusers-like text-to-image pipeline.

    A call keeps no state on the pipeline, so calls from several threads do not disturb each other.

    Attributes:
        engines: by name: text, condition, stage<k>, decode, preview where the method looks at pictures between stages,
            and those of the cheaper actions of a temporal method; each for exactly `batch_size` images.
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
        method: Method,
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
        self._show_progress = _is_terminal(sys.stderr)
        self.graph = self.loop_graph(CUDARecorder(device)) if cuda_graphs and device.type == "cuda" else None

    @property
    def method(self) -> Method:
        """What chooses the tokens of every step; another one may be put in its place."""
        return self._method

    @method.setter
    def method(self, method: Method) -> None:
        self._method = method
        self._tables = self.geometry.positions.tables(method.places(self.device))

    def set_progress_bar_config(self, *, disable: bool) -> None:
        """Switch the progress bar on stderr off or on; it is on by default on a terminal."""
        self._show_progress = not disable

    def on_threads(self) -> AbstractContextManager[None]:
        """What a call runs inside: torch computes on this pipeline's number of threads, and afterwards as before."""
        if self.device.type != "cpu":
            return nullcontext()
        return machine.threads(self.threads or machine.default_threads())

    # --- the phases of a call ---

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
        fixed = self.geometry.positions.gather(self._tables, where) | condition.static

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
        if on_step is None and self.at_once(guided):
            return self.graph(by_name(condition, draws, guided))

        def begin_stage(stage: Stage, where: Tensor) -> Run:
            negative = None if guided is None else guided.negative
            inputs = self.stage_inputs(where, condition, negative)
            second = None if negative is None or self.passes == 2 else self.stage_inputs(where, negative)

            def run(action: str, tokens: Tensor, step: int, *beside: Tensor) -> Sequence[Tensor]:
                engine = self.engines[stage.engine(action)]
                twice = guided is not None and step in guided.steps
                if second is not None and twice:
                    first_rows, second_rows = zip(*(t.chunk(2) for t in beside), strict=True) if beside else ((), ())
                    u, *kept = engine(*inputs(engine.spec, tokens, step, *first_rows))
                    v, *others = engine(*second(engine.spec, tokens, step, *second_rows))
                    kept = [torch.cat(pair) for pair in zip(kept, others, strict=True)]
                else:
                    u, *kept = engine(*inputs(engine.spec, tokens, step, *beside))
                    u, v = u.chunk(2) if self.passes == 2 else (u, None)
                u = self.defaults.guidance.combine(u, v, guided.scale) if twice else u
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
            pipe.engines = plain.engines | stages
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

    @staticmethod
    def to_images(images: Tensor, output_type: OutputType) -> Any:
        """Pictures [n, 3, H, W] in [0, 1], or videos [n, 3, F, H, W], or latents, in the form asked for."""
        video = images.dim() == 5
        if output_type in ("pt", "latent"):
            return images.movedim(1, 2) if video else images
        array = images.movedim(1, -1).float().cpu().numpy()
        if output_type == "np":
            return array
        pictures = (array * 255).round().astype(np.uint8)
        if video:
            return [[Image.fromarray(frame) for frame in frames] for frames in pictures]
        return [Image.fromarray(a) for a in pictures]

    # --- the call ---

    @survives_fork
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        noise: Tensor | None = None,
        anchors: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        **further: Any,
    ) -> PipelineOutput | tuple[Any]:
        """Make images.

        Args:
            prompt: one or several.
            prompt_2, prompt_3: others for the second and the third text encoder.
            negative_prompt, negative_prompt_2, negative_prompt_3: what the second pass of classifier-free guidance
                reads, one for all images or one for each prompt.
            num_images_per_prompt: images of each prompt, next to each other in the result.
            guidance_scale: of guidance-distilled models, or of classifier-free guidance, whichever the model's own
                pipeline means by it; the model's usual value by default.
            true_cfg_scale: of classifier-free guidance, for models whose pipeline names it so; it takes a negative
                prompt. Up to 1 there is no second pass.
            guidance_interval: the shares of the steps from and up to which there is a second pass.
            generator: one per image, or one that goes on from image to image; a fresh seed for each call by default.
                All randomness comes from here: the image of a seed is the same whatever runs beside it.
            latents: initial noise instead of drawn one, packed [n, N, C] or [n, C, H, W].
            noise: noise for later, likewise: of the micro-flow (JiT), or of each change of resolution, one field after
                the other, [n, F * N, C] (RALU, Bottleneck).
            anchors: first active tokens (JiT), [n, m], int64.
            output_type: "pil", "np" ([n, H, W, 3]), "pt" ([n, 3, H, W]) or "latent" (packed, [n, N, C]).
            return_dict: False returns (images,).
            callback_on_step_end: called after every step of every chunk as callback(pipeline, step, timestep,
                {"latents": packed latents [B, N, C]}); may return {"latents": others}; raising ends the call, and
                setting `pipeline._interrupt` skips the steps that are left of it. diffusers' callback objects work.
            callback_on_step_end_tensor_inputs: what the callback is given: "latents"; to look at, also "prompt_embeds",
                "clean" (the clean latents that the step predicts, [B, N, C], which `decode` makes pictures of) and
                "places" (which of `method.places()` ran, [B, m]).
            further: what the text encoders give instead of prompts, by diffusers' names (prompt_embeds [n, T, E],
                pooled_prompt_embeds [n, P], ..., and with `negative_` in front), and the other arguments of diffusers'
                call (height, num_inference_steps, max_sequence_length, ...): the bundle's own values or the ones that
                say nothing.

        Raises:
            InputError: an argument that does not fit the bundle.
            NumericalError: an image that would not be finite numbers.
        """
        self._check_process()
        if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
            raise InputError("unknown output_type", found=shown(output_type), expected="pil, np, pt or latent")
        if not isinstance(return_dict, bool | np.bool_):
            raise InputError("return_dict must be True or False", found=shown(return_dict))
        terms = self.terms
        embeddings = {name: further.pop(name, None) for name in terms.embedding_arguments()}
        check_built_in(further, self._built_in())
        names = check_tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        request = terms.request(
            [prompt, prompt_2, prompt_3], [negative_prompt, negative_prompt_2, negative_prompt_3], embeddings,
            guidance_scale, true_cfg_scale, guidance_interval, per_prompt,
        )
        call = Call(guidance_scale=request.distilled if request.negative is None else request.scale)
        held = self.weights.reading() if self.weights is not None else nullcontext()
        with held, self.on_threads(), plain(inference=True), self._calls.one(call):
            draws = self.drawing.given(request.texts.count, generator, latents, noise, anchors)
            results = self._chunks(call, request, draws, output_type, callback_on_step_end, names)
        with plain():  # ordinary tensors go out
            images = self.to_images(torch.cat(results), output_type)
        return PipelineOutput(images) if return_dict else (images,)

    def _chunks(
        self,
        call: Call,
        request: Request,
        draws: tuple[Tensor | None, ...],
        output_type: OutputType,
        callback: Callback | None,
        names: Sequence[str],
    ) -> list[Tensor]:
        """The images of a call, or its latents, `batch_size` at a time; the last chunk repeats its last image."""
        results, size, texts = [], self.batch_size, request.texts
        console = PlainConsole(stderr=True)  # of this call's own: a console has one bar at a time
        show = self._show_progress and _is_open(sys.stderr)
        with Progress(console=console, transient=True, disable=not show) as progress:
            task = progress.add_task("denoising", total=-(-texts.count // size) * self.schedule.nfe)
            if self.device.type == "cpu":
                watch.begin()
            for start in range(0, texts.count, size):
                count = min(size, texts.count - start)
                rows = [start + min(i, count - 1) for i in range(size)]
                chunk = Draws(*(None if t is None else t[rows].to(self.device) for t in draws))
                embeddings = texts.embeddings(self, rows)
                condition = self.condition(embeddings, request.distilled)
                guided = self._guided(request, rows)

                def on_step(i: int, sigma: float, look: Look) -> Tensor | None:
                    progress.advance(task)
                    watch.look()
                    if callback is None:
                        return None
                    return self._callback(callback, names, i, look, embeddings)  # noqa: B023 - called at once

                at_once = self.at_once(guided) and callback is None and not call.interrupted
                healthy: dict[int, Tensor] | None = None if at_once else {}
                y = self.denoise(
                    condition, chunk, None if at_once else on_step, lambda: call.interrupted, healthy, guided
                )
                progress.advance(task, self.schedule.nfe if at_once else 0)
                pictures = y if output_type == "latent" else self.decode(y)
                if not all(torch.stack([t.isfinite().all() for t in (y, pictures)]).tolist()):  # waits once a chunk
                    raise self._not_finite(embeddings, condition, chunk, healthy, y, guided)
                results.append(pictures[:count])
        return results

    def _not_finite(
        self,
        embeddings: Sequence[Tensor],
        condition: Condition,
        draws: Draws,
        healthy: dict[int, Tensor] | None,
        latents: Tensor,
        guided: Guided | None,
    ) -> NumericalError:
        """Where the numbers of a chunk ceased to be finite. A graph's steps are run once more, one after the other."""

        def fine(*tensors: Tensor) -> bool:
            return all(bool(t.isfinite().all()) for t in tensors)

        conditions = [condition] if guided is None else [condition, guided.negative]
        if healthy is None:
            healthy = {}
            self.denoise(condition, draws, lambda *_: None, healthy=healthy, guided=guided)
        first = next((step for step, fine_there in healthy.items() if not fine_there), None)
        if not fine(*embeddings):
            where = "engine text"
        elif not all(fine(*c.per_step.values(), *c.static.values()) for c in conditions):
            where = "engine condition"
        elif first is not None:
            stage = next(stage for stage, steps in self.schedule if first in [step.index for step in steps])
            where = f"engine {stage.engine(self.schedule.action(first))} at step {first + 1} of {self.schedule.nfe}"
        elif not fine(latents):
            where = f"the sampler, after {len(healthy)} steps with finite velocities"
        else:
            where = "engine decode"
        return NumericalError(
            "an image would hold NaN or infinite numbers", found=f"first in {where}, {self.dtype}",
            remedy="usual values of guidance_scale, latents and adapter scales; fp32 where it happens with those too",
        )

    def _callback(
        self,
        callback: Callback,
        names: Sequence[str],
        step: int,
        look: Look,
        embeddings: Sequence[Tensor],
    ) -> Tensor | None:
        """Run a callback outside of inference mode, on tensors that it may keep; the latents that it asks for."""
        y = look.latents()
        watched = {name: getattr(look, name)() for name in ("clean", "places") if name in names}
        with plain():
            given = {"latents": y.clone()} | {name: value.clone() for name, value in watched.items()}
            if "prompt_embeds" in names:
                given["prompt_embeds"] = self._named_embeddings(embeddings)["prompt_embeds"].clone()
            version = given["latents"]._version
            mine = {name: given[name] for name in names}
            answer = callback(self, step, self.schedule.sigmas[step] * 1000, dict(mine))
            if answer is not None and not isinstance(answer, Mapping):
                raise InputError("a callback returns a table of tensors, or None", found=type(answer).__name__)
            answer = answer or {}
            if "prompt_embeds" in mine:
                self._same_embeddings(answer.get("prompt_embeds", mine["prompt_embeds"]), embeddings)
            changed = answer.get("latents")
            if changed is None and given["latents"]._version == version:
                return None
            changed = given["latents"] if changed is None else changed  # written to in place
            if not is_tensor(changed) or changed.shape != y.shape:
                raise InputError(
                    "the callback returned latents of another shape",
                    found=tuple(changed.shape) if is_tensor(changed) else type(changed).__name__,
                    expected=tuple(y.shape),
                )
            require_finite("the callback's latents", changed.float())
        return changed.to(y)

    def _same_embeddings(self, given: Tensor, embeddings: Sequence[Tensor]) -> None:
        own = self._named_embeddings(embeddings)["prompt_embeds"]
        if not is_tensor(given) or given.shape != own.shape or not torch.equal(given.to(own), own):
            raise InputError(
                "the callback returned other prompt_embeds, but what depends on them is computed before the loop",
                remedy="return the latents only",
            )

    def _named_embeddings(self, embeddings: Sequence[Tensor]) -> dict[str, Tensor]:
        return {s.name: t for s, t in zip(self.engines["text"].spec.outputs, embeddings, strict=True)}

    # What diffusers' callbacks and guides ask of a pipeline.

    @property
    def _interrupt(self) -> bool:
        return self._calls.interrupted

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._calls.interrupt(bool(value))

    @property
    def interrupt(self) -> bool:
        """Whether this thread's call is interrupted: see `callback_on_step_end`."""
        return self._calls.interrupted

    @property
    def num_timesteps(self) -> int:
        """Steps of a call."""
        return self.schedule.nfe

    _num_timesteps = num_timesteps

    @property
    def guidance_scale(self) -> float | None:
        """That of this thread's call; the model's usual one outside of calls."""
        call = self._calls.current
        return self.defaults.guidance.scale if call is None else call.guidance_scale

    # --- its arguments ---

    @property
    def terms(self) -> Terms:
        """What a call may ask for."""
        outputs = self.engines["text"].spec.outputs
        return Terms(self.defaults.guidance, outputs, len(self.readers), self.schedule.nfe, self.device)

    @property
    def drawing(self) -> Drawing:
        """What is random in a call."""
        return Drawing(self.method, self.schedule, self.geometry)

    def _built_in(self) -> BuiltIn:
        geometry, schedule = self.geometry, self.schedule
        return BuiltIn(
            geometry.height, geometry.width, schedule.nfe, schedule.sigmas[:-1], self.defaults.max_sequence_length,
            geometry.frames,
        )

    def prepare(self, prompts: Sequence[str]) -> tuple[Condition, Guided | None]:
        """What the loop reads for exactly `batch_size` prompts, with the model's usual guidance."""
        none = [None, None]
        request = self.terms.request([list(prompts), *none], [None, *none], {}, None, None, (0.0, 1.0), 1)
        rows = range(self.batch_size)
        return self.condition(request.texts.embeddings(self, rows), request.distilled), self._guided(request, rows)

    def _guided(self, request: Request, rows: Sequence[int]) -> Guided | None:
        """Guidance of a chunk of images."""
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


def _is_terminal(stream: object) -> bool:
    """Whether a progress bar makes sense there: services have stderr closed, gone, or replaced by something small."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError):
        return False


def _is_open(stream: object) -> bool:
    return hasattr(stream, "write") and not getattr(stream, "closed", False)
