"""A prebuilt bundle as a pipeline: prompts in, images out. No compiling, no model code.

Importing this module imports torch and little else; in particular neither torch.export nor diffusers.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jitexport import causes, machine, registry
from jitexport.ambient import plain
from jitexport.arguments import (
    OUTPUT_TYPES,
    BuiltIn,
    check_built_in,
    check_count,
    check_generators,
    check_number,
    check_path,
    check_prompts,
    check_tensor_inputs,
    is_number,
    is_tensor,
    require_finite,
    shown,
)
from jitexport.backends.base import Engine
from jitexport.calls import Call, Calls
from jitexport.console import PlainConsole, Progress
from jitexport.crowding import watch
from jitexport.errors import (
    BackendError,
    BackendUnavailableError,
    InputError,
    JitExportError,
    ManifestError,
    MissingDependencyError,
    NumericalError,
)
from jitexport.files import imports_that_ask_for_a_temporary_folder
from jitexport.forks import survives_fork
from jitexport.graphs import CUDARecorder, LoopGraph, Recorder
from jitexport.grid import pack, unpack
from jitexport.lora import Change, read_lora
from jitexport.methods.base import Draws, Method
from jitexport.models.base import ModelAdapter, ModelDefaults, ModelGeometry
from jitexport.models.naming import Naming
from jitexport.prompting import Tokenizer
from jitexport.quant import kind_of, quantize
from jitexport.sampler import OnStep, Velocity, draw, sample
from jitexport.schedule import Stage, StageSchedule
from jitexport.specs import DTYPES, EngineSpec
from jitexport.weights import SharedWeights

if TYPE_CHECKING:  # a pipeline can be made of engines alone; bundles are read in `load`
    from jitexport.bundle import EngineBundle
    from jitexport.bundle.manifest import EngineEntry
    from jitexport.bundle.reading import Verify

logger = logging.getLogger(__name__)

#: What the names of a bundle's constants begin with, among its tensors.
CONSTANTS = "constants"

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


@dataclass(frozen=True)
class Condition:
    """What the stage engines read beside tokens and positions, by the names of their inputs.

    Attributes:
        per_step: a value for every step, [S, B, ...] each.
        static: what all steps share, [B, ...] each.
    """

    per_step: Mapping[str, Tensor]
    static: Mapping[str, Tensor]

    @classmethod
    def of(cls, spec: EngineSpec, outputs: Sequence[Tensor]) -> Condition:
        """From what a condition engine gave."""
        given = list(zip(spec.outputs, outputs, strict=True))
        return cls(*({s.name: v for s, v in given if s.per_step == wanted} for wanted in (True, False)))

    def beside(self, other: Condition) -> Condition:
        """Both as that of one batch, of this one's images and then of the other's."""

        def joined(dim: int, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.cat([a[name], b[name]], dim=dim) for name in a}

        return Condition(joined(1, self.per_step, other.per_step), joined(0, self.static, other.static))


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance of a batch: see `jitexport.guidance`.

    Attributes:
        negative: what the second pass reads.
        scale: of each image, [B], fp32.
        steps: those that have a second pass.
    """

    negative: Condition
    scale: Tensor
    steps: range


@dataclass(frozen=True)
class _Texts:
    """What n images show: a list of prompts for each text encoder, or the encoders' outputs [n, ...]."""

    count: int
    prompts: Sequence[Sequence[str]] = ()
    given: Sequence[Tensor] | None = None

    def embeddings(self, pipe: Pipeline, rows: Sequence[int]) -> Sequence[Tensor]:
        """The text engine's outputs for a chunk of images."""
        if self.given is not None:
            return [t[list(rows)] for t in self.given]
        return pipe.engines["text"](*pipe.tokenize(*([prompts[i] for i in rows] for prompts in self.prompts)))


@dataclass(frozen=True)
class _Request:
    """What a call asks for, checked.

    Attributes:
        texts, negative: of the images, and of their second pass; None for none.
        distilled: the guidance that is an input.
        scale, steps: of the second pass.
    """

    texts: _Texts
    negative: _Texts | None
    distilled: float | None
    scale: float
    steps: range


class Pipeline:
    """Engines, a method and a schedule as a diffusers-like text-to-image pipeline.

    A call keeps no state on the pipeline, so calls from several threads do not disturb each other.

    Attributes:
        engines: by name: text, condition, stage<k>, decode, and preview where the method looks at pictures between
            stages; each for exactly `batch_size` images.
        batch_size: images per engine run; longer lists are run in chunks, the last one padded.
        passes: 2 where a stage engine runs a prompt and its negative prompt at once, at twice the batch.
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
        tokenizers: Sequence[Tokenizer],
        batch_size: int,
        passes: int = 1,
        constants: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype,
        device: torch.device,
        weights: SharedWeights | None = None,
        read_checkpoint: Callable[[Path, Path | None], Mapping[str, Tensor]] | None = None,
        naming: Naming | None = None,
        cuda_graphs: bool = True,
        threads: int | None = None,
        forkable: bool = True,
    ) -> None:
        self.engines = engines
        self.schedule = schedule
        self.geometry = geometry
        self.defaults = defaults
        self.readers = [tokenizer.reader() for tokenizer in tokenizers]
        self.batch_size = batch_size
        self.passes = passes
        self.constants = dict(constants or {})
        self.dtype = dtype
        self.device = device
        self.method = method
        self.weights = weights
        self._read_checkpoint = read_checkpoint
        self.threads = threads
        self._naming = naming
        self._adapters: list[tuple[dict[str, Change], float]] = []  # changed in place: copies of a pipeline share it
        self._calls = Calls()
        self._show_progress = _is_terminal(sys.stderr)
        self._process = os.getpid()
        self._forkable = forkable and device.type == "cpu"
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

    # --- weights that change ---

    @survives_fork
    def load_lora(self, adapter: str | Path | Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Merge an adapter into the weights, beside those already merged; no engine is built again.

        Waits for running calls to end. The originals of the weights that it touches are kept in memory. Where it fails,
        nothing has changed.

        Args:
            adapter: a safetensors file, a folder with one, or a state dict of tensors or NumPy arrays, in one of the
                formats of docs/compatibility.md.
            scale: strength of the adapter.

        Raises:
            InputError: the adapter does not fit the model, or this backend's engines hold copies of the weights.
            ModelNotFoundError: the file cannot be read.
        """
        weights = self._changeable()
        scale = check_number("scale", scale)
        if self._naming is None:
            raise InputError("this pipeline has no bundle, and no names to read adapters by")
        with plain():
            changes = read_lora(adapter, self._naming, {n: tuple(t.shape) for n, t in weights.tensors.items()})
            with weights.changing():
                adapters = [*self._adapters, (changes, scale)]
                for name in changes:
                    for changed, value in self._merged(name, adapters).items():
                        weights.set(changed, value)
                self._adapters[:] = adapters

    @survives_fork
    def unload_lora(self) -> None:
        """Take all adapters out again: the weights are what they were, bit by bit."""
        weights = self._changeable()
        with weights.changing():
            weights.restore()
            self._adapters.clear()

    @survives_fork
    def load_checkpoint(self, path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> None:
        """Replace the weights by those of another checkpoint of the same model; adapters are taken out.

        Every tensor comes from the new checkpoint, and all that engines have built in must be the same: the
        configurations of all components, tokenizers and scheduler. Where it fails, nothing has changed.

        Args:
            path: the pipeline's folder in diffusers' format, or a transformer in one file. Reading it needs the
                `build` extra.
            base: for one file, the folder that everything else comes from.

        Raises:
            InputError: another architecture, weights that are not finite, or engines that hold copies of the weights.
            ModelError: it cannot be read.
        """
        weights = self._changeable()
        if self._read_checkpoint is None:
            raise InputError("this pipeline has no bundle to read checkpoints for")
        with plain():
            values = self._read_checkpoint(
                check_path("the checkpoint", path), None if base is None else check_path("base", base)
            )
            weights.check({name: tuple(value.shape) for name, value in values.items()}, every=True)
            for name, value in values.items():
                if value.is_floating_point():
                    require_finite(
                        f"the checkpoint's weights {name}", value.float(), "use another copy: this one is damaged"
                    )
            with weights.changing():
                weights.replace(values)
                self._adapters.clear()

    def _check_process(self) -> None:
        """Refuse to run in a forked process what would wait there for threads or a device of the other process.

        Raises:
            BackendError: the pipeline was loaded in another process, and its engines do not survive a fork.
        """
        if os.getpid() != self._process and not self._forkable:
            raise BackendError(
                "this pipeline was loaded before the process was forked", found=f"engines on {self.device} whose "
                "threads or device belong to the other process", expected="a pipeline of this process",
                remedy="call jitexport.load in each worker, after the fork; or start workers with `spawn`",
            )

    def _changeable(self) -> SharedWeights:
        self._check_process()
        if self.weights is None:
            raise InputError(
                "this bundle's engines hold copies of the weights, which cannot be changed",
                remedy="build with a backend that shares weights (eager, inductor, aoti, onnx), "
                "or build from the changed model",
            )
        return self.weights

    def _merged(self, name: str, adapters: Sequence[tuple[Mapping[str, Change], float]]) -> dict[str, Tensor]:
        """W + the sum of all adapters' changes, from the original and rounded once (quantized weights: again).

        Returns:
            What to write, by name: the weight, and where it is quantized its scales.

        Raises:
            InputError: the sum is not finite.
        """
        scales, target = f"{name}_scale", self.weights.tensors[name]
        quantized = scales in self.weights.tensors
        base = self.weights.original(name).float()
        if quantized:
            base = base * self.weights.original(scales)[:, None]
        merged = base
        for changes, scale in adapters:
            if name in changes:
                merged = merged + changes[name].delta(base, scale)
        values = {name: merged.to(target.dtype)}
        if quantized:
            rows, factors = quantize(merged, kind_of(target))
            values = {name: rows, scales: factors[:, 0]}
        if not all(bool(v.isfinite().all()) for v in (merged, *values.values()) if v.element_size() > 1):
            raise InputError(
                f"the adapter would make {name} infinite or NaN", remedy="a smaller scale, or an adapter of this model"
            )
        return values

    # --- the phases of a call ---

    def tokenize(self, prompts: Sequence[str], *others: Sequence[str]) -> list[Tensor]:
        """What the text engine takes: token ids of each tokenizer, [B, L], and its mask where it has one.

        A prompt that is too long is cut, with a warning in the log.

        Args:
            prompts: for the first tokenizer.
            others: for those after it, in order; those that have none read what the first one reads.
        """
        inputs = []
        cut: dict[str, list[str]] = {}
        for i, reader in enumerate(self.readers):
            encoded = reader.encode([prompts, *others][i] if i <= len(others) else prompts)
            for prompt in dict.fromkeys(encoded.cut):
                cut.setdefault(prompt, []).append(str(reader.tokenizer.length))
            inputs += [encoded.ids, encoded.mask] if reader.tokenizer.mask else [encoded.ids]
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
        return draw(self.method, self.schedule, *self.geometry.drawn, generators)

    def encode(self, prompts: Sequence[str], guidance_scale: float | None) -> Condition:
        """Text and condition engines: everything that the loop reads but does not change.

        Args:
            prompts: exactly `batch_size` of them.
        """
        return self.condition(self.engines["text"](*self.tokenize(prompts)), guidance_scale)

    def condition(self, embeddings: Sequence[Tensor], guidance_scale: float | None) -> Condition:
        """What the loop reads, from the text engine's outputs."""
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
        self, stage: Stage, where: Tensor, condition: Condition, negative: Condition | None = None
    ) -> Callable[[Tensor, int], list[Tensor]]:
        """What a stage's engine takes, as a function of tokens [B, m, C] and the number of a step.

        Args:
            where: which of the method's places the tokens are at, [B, m].
            negative: of the second pass, for engines that run both passes at once; without one, both are the first.
        """
        if self.passes == 2:
            condition, where = condition.beside(negative or condition), where.repeat(2, 1)
        spec = self.engines[stage.name].spec
        fixed = self.geometry.positions.gather(self._tables, where) | condition.static

        def inputs(tokens: Tensor, step: int) -> list[Tensor]:
            tokens = tokens.to(self.dtype)
            own = {name: value[step] for name, value in (*condition.per_step.items(), *self.constants.items())}
            values = {**fixed, **own, "tokens": tokens if self.passes == 1 else tokens.repeat(2, 1, 1)}
            return [values[s.name] for s in spec.inputs]

        return inputs

    def denoise(
        self,
        condition: Condition,
        draws: Draws,
        on_step: OnStep | None = None,
        stop: Callable[[], bool] = lambda: False,
        healthy: list[Tensor] | None = None,
        guided: Guided | None = None,
    ) -> Tensor:
        """The stage loop: clean latents [B, N, C], fp32. As one CUDA graph where `at_once` says so and no `on_step`.

        Args:
            on_step, stop: see `sampler.sample`.
            healthy: is given a truth value for each step, on the device: whether its velocity is finite.
            guided: classifier-free guidance.
        """
        if on_step is None and self.at_once(guided):
            return self.graph(_by_name(condition, draws, guided))

        def begin_stage(stage: Stage, where: Tensor) -> Velocity:
            engine = self.engines[stage.name]
            negative = None if guided is None else guided.negative
            inputs = self.stage_inputs(stage, where, condition, negative)
            second = None if negative is None or self.passes == 2 else self.stage_inputs(stage, where, negative)

            def velocity(tokens: Tensor, step: int) -> Tensor:
                u = engine(*inputs(tokens, step))[0]
                if self.passes == 2:
                    u, v = u.chunk(2)
                if guided is not None and step in guided.steps:
                    v = v if second is None else engine(*second(tokens, step))[0]
                    u = self.defaults.guidance.combine(u, v, guided.scale)
                if healthy is not None:
                    healthy.append(u.isfinite().all())
                return u

            return velocity

        return sample(self.method, self.schedule, draws, begin_stage, on_step, self.preview, stop)

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
            condition, draws, guided = _from_names(inputs, self.schedule.nfe)
            return pipe.denoise(condition, draws, guided=guided)

        return LoopGraph(loop, {s.name: self.engines[s.name] for s in self.schedule.stages}, recorder)

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
            callback_on_step_end_tensor_inputs: what the callback is given: "latents", "prompt_embeds" or both.
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
        embeddings = {name: further.pop(name, None) for name in self._embedding_arguments()}
        check_built_in(further, self._built_in())
        names = check_tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        request = self._request(
            [prompt, prompt_2, prompt_3], [negative_prompt, negative_prompt_2, negative_prompt_3], embeddings,
            guidance_scale, true_cfg_scale, guidance_interval, per_prompt,
        )
        call = Call(guidance_scale=request.distilled if request.negative is None else request.scale)
        held = self.weights.reading() if self.weights is not None else nullcontext()
        with held, self.on_threads(), plain(inference=True), self._calls.one(call):
            draws = self._draws(request.texts.count, generator, latents, noise, anchors)
            results = self._chunks(call, request, draws, output_type, callback_on_step_end, names)
        with plain():  # ordinary tensors go out
            images = self.to_images(torch.cat(results), output_type)
        return PipelineOutput(images) if return_dict else (images,)

    def _chunks(
        self,
        call: Call,
        request: _Request,
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

                def on_step(i: int, sigma: float, latents: Callable[[], Tensor]) -> Tensor | None:
                    progress.advance(task)
                    watch.look()
                    if callback is None:
                        return None
                    return self._callback(callback, names, i, latents, embeddings)  # noqa: B023 - called at once

                at_once = self.at_once(guided) and callback is None and not call.interrupted
                healthy: list[Tensor] | None = None if at_once else []
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
        healthy: list[Tensor] | None,
        latents: Tensor,
        guided: Guided | None,
    ) -> NumericalError:
        """Where the numbers of a chunk ceased to be finite. A graph's steps are run once more, one after the other."""

        def fine(*tensors: Tensor) -> bool:
            return all(bool(t.isfinite().all()) for t in tensors)

        conditions = [condition] if guided is None else [condition, guided.negative]
        if healthy is None:
            healthy = []
            self.denoise(condition, draws, lambda *_: None, healthy=healthy, guided=guided)
        first = next((i for i, step in enumerate(healthy) if not step), None)
        if not fine(*embeddings):
            where = "engine text"
        elif not all(fine(*c.per_step.values(), *c.static.values()) for c in conditions):
            where = "engine condition"
        elif first is not None:
            stage = next(stage for stage, steps in self.schedule if first in [step.index for step in steps])
            where = f"engine {stage.name} at step {first + 1} of {self.schedule.nfe}"
        elif not fine(latents):
            where = f"the sampler, after {len(healthy)} steps of finite velocities"
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
        latents: Callable[[], Tensor],
        embeddings: Sequence[Tensor],
    ) -> Tensor | None:
        """Run a callback outside of inference mode, on tensors that it may keep; the latents that it asks for."""
        y = latents()
        with plain():
            given = {"latents": y.clone()}
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

    def _built_in(self) -> BuiltIn:
        geometry, schedule = self.geometry, self.schedule
        return BuiltIn(
            geometry.height, geometry.width, schedule.nfe, schedule.sigmas[:-1], self.defaults.max_sequence_length,
            geometry.frames,
        )

    def _embedding_arguments(self) -> list[str]:
        """The arguments by which a call gives what the text encoders would, for both passes."""
        own = [self._argument(spec.name) for spec in self.engines["text"].spec.outputs]
        return [*own, *(f"negative_{name}" for name in own)]

    @staticmethod
    def _argument(output: str) -> str:
        return "pooled_prompt_embeds" if output == "pooled" else output

    def _request(
        self,
        prompts: Sequence[Any],
        negative: Sequence[Any],
        embeddings: Mapping[str, Any],
        guidance_scale: float | None,
        true_cfg_scale: float | None,
        interval: tuple[float, float],
        per_prompt: int,
    ) -> _Request:
        """The arguments of a call, checked."""
        distilled, scale = self._scales(guidance_scale, true_cfg_scale)
        own = {name: value for name, value in embeddings.items() if not name.startswith("negative_")}
        others = {name.removeprefix("negative_"): v for name, v in embeddings.items() if name.startswith("negative_")}
        texts = self._texts("prompt", prompts, own, per_prompt)
        second = self._negative(negative, others, scale, texts.count, per_prompt)
        if second is None and true_cfg_scale is not None and scale > 1:
            logger.warning("true_cfg_scale=%g without a negative prompt: there is no classifier-free guidance", scale)
        return _Request(texts, second, distilled, scale, self._guided_steps(interval))

    def _scales(self, guidance_scale: float | None, true_cfg_scale: float | None) -> tuple[float | None, float]:
        """The distilled guidance, and the scale of the second pass."""
        guidance = self.defaults.guidance
        given = {"guidance_scale": guidance_scale, "true_cfg_scale": true_cfg_scale}
        given = {name: check_number(name, v, least=0) for name, v in given.items() if v is not None}
        distilled = given.pop("guidance_scale", guidance.distilled) if guidance.distilled is not None else None
        if guidance.true is None:
            scale = 1.0
        else:
            scale = given.pop(guidance.argument, guidance.true)
        for name, value in given.items():
            # What says nothing: no guidance of a distilled model, and for a second pass a scale of up to 1.
            nothing = 1 if name in (guidance.argument, "true_cfg_scale") else 0
            if value > nothing:
                raise InputError(
                    f"this model takes no {name}" if name == "true_cfg_scale" else "this model takes no guidance",
                    found=value, expected="at most 1" if nothing else 0, remedy=f"leave {name} out",
                )
        return distilled, scale

    def _negative(
        self, prompts: Sequence[Any], embeddings: Mapping[str, Any], scale: float, count: int, per_prompt: int
    ) -> _Texts | None:
        """What the second pass reads; None where there is none."""
        guidance = self.defaults.guidance
        given = [p for p in prompts if not _says_nothing(p)] or [v for v in embeddings.values() if v is not None]
        if guidance.true is None or scale <= 1:
            if given:
                raise InputError(
                    "a negative prompt needs classifier-free guidance", found=f"a scale of {scale:g}",
                    expected="a model that can be guided so" if guidance.true is None else "a scale above 1",
                    remedy=f"{guidance.argument}=4.0, say; or leave the negative prompt out",
                )
            return None
        if all(v is None for v in (*prompts, *embeddings.values())):
            if guidance.negative is None:
                return None
            prompts = [guidance.negative, None, None]
        if not any(v is not None for v in embeddings.values()):
            n = count // per_prompt
            first, *others = prompts
            prompts = [[p] * n if isinstance(p, str) else p for p in ("" if first is None else first, *others)]
        texts = self._texts("negative_prompt", prompts, embeddings, per_prompt)
        if texts.count != count:
            raise InputError("one negative prompt per prompt is needed", found=texts.count, expected=count)
        return texts

    def _guided_steps(self, interval: tuple[float, float]) -> range:
        """The steps that have a second pass."""
        fine = isinstance(interval, tuple | list) and len(interval) == 2 and all(map(is_number, interval))
        if not fine or not 0 <= interval[0] <= interval[1] <= 1:
            raise InputError(
                "guidance_interval must be two shares of the steps", found=shown(interval),
                expected="(from, up to), with 0 <= from <= up to <= 1",
            )
        return range(*(round(share * self.schedule.nfe) for share in interval))

    def prepare(self, prompts: Sequence[str]) -> tuple[Condition, Guided | None]:
        """What the loop reads for exactly `batch_size` prompts, with the model's usual guidance."""
        none = [None, None]
        request = self._request([list(prompts), *none], [None, *none], {}, None, None, (0.0, 1.0), 1)
        rows = range(self.batch_size)
        return self.condition(request.texts.embeddings(self, rows), request.distilled), self._guided(request, rows)

    def _guided(self, request: _Request, rows: Sequence[int]) -> Guided | None:
        """Guidance of a chunk of images."""
        if request.negative is None or not request.steps:
            return None
        negative = self.condition(request.negative.embeddings(self, rows), request.distilled)
        scale = torch.full((self.batch_size,), request.scale, dtype=torch.float32, device=self.device)
        return Guided(negative, scale, request.steps)

    def _texts(
        self, name: str, prompts: Sequence[Any], embeddings: Mapping[str, Any], per_prompt: int
    ) -> _Texts:
        """What the images show, one after the other.

        Args:
            name: of the first prompt's argument; the others have _2 and _3 behind it.
            embeddings: what the text encoders give, by argument.
        """
        prefix = name.removesuffix("prompt")
        first, *others = prompts
        if all(value is None for value in embeddings.values()):
            lists = [check_prompts(name, first)]
            for i, other in enumerate(others, start=2):
                if other is not None and i > len(self.readers):
                    raise InputError(f"this model has no text encoder for {name}_{i}", remedy=f"leave {name}_{i} out")
                lists.append(lists[0] if other is None else check_prompts(f"{name}_{i}", other))
                if len(lists[-1]) != len(lists[0]):
                    raise InputError(
                        f"one {name}_{i} per {name} is needed", found=len(lists[-1]), expected=len(lists[0])
                    )
            rows = [i for i in range(len(lists[0])) for _ in range(per_prompt)]
            return _Texts(len(rows), prompts=[[texts[i] for i in rows] for texts in lists])
        if any(prompt is not None for prompt in prompts):
            raise InputError(f"give {name}s or {prefix}prompt_embeds, not both")
        embeds = []
        main = embeddings.get("prompt_embeds")
        n = len(main) if is_tensor(main) and main.ndim else 0
        for spec in self.engines["text"].spec.outputs:
            value, argument = embeddings.get(self._argument(spec.name)), f"{prefix}{self._argument(spec.name)}"
            if not is_tensor(value) or tuple(value.shape) != (n, *spec.shape[1:]) or not n:
                found = tuple(value.shape) if is_tensor(value) else type(value).__name__
                raise InputError(
                    f"{argument} do not fit", found=found,
                    expected=f"a tensor {('n', *spec.shape[1:])}, and as many of the other",
                )
            if not value.is_floating_point() and not argument.endswith("_mask"):  # diffusers' are of whole numbers
                raise InputError(f"{argument} do not fit", found=value.dtype, expected="floating-point numbers")
            require_finite(argument, value.float())
            embeds.append(value.detach().to(self.device, DTYPES[spec.dtype]).repeat_interleave(per_prompt, dim=0))
        return _Texts(len(embeds[0]), given=embeds)

    def _draws(
        self,
        n: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
        noise: Tensor | None,
        anchors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Random tensors of n images, in the order of `Draws`, the caller's own where given."""
        if generator is None:
            generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "big"))
        drawn = self.draw(check_generators(generator, n))
        for name, given, used in (("noise", noise, drawn.noise), ("anchors", anchors, drawn.anchors)):
            if given is not None and used is None:
                raise InputError(f"this bundle's method and schedule draw no {name}", remedy=f"leave {name} out")
        fields = self.method.noise_fields(self.schedule)
        return (
            drawn.latents if latents is None else self._packed("latents", latents, n),
            drawn.noise if noise is None else self._packed("noise", noise, n, fields),
            drawn.anchors if anchors is None else self._anchors(anchors, n, drawn.anchors.shape[1]),
        )

    def _packed(self, name: str, value: Tensor, n: int, fields: int = 1) -> Tensor:
        geometry = self.geometry
        packed = (n, fields * geometry.grid.tokens, geometry.channels)
        if not is_tensor(value):
            raise InputError(f"{name} do not fit", found=type(value).__name__, expected="a tensor")
        drawn, patch = geometry.drawn
        if tuple(value.shape) == (n, *drawn):
            value = pack(value, patch)
        if tuple(value.shape) != packed or not value.is_floating_point():
            raise InputError(
                f"{name} do not fit", found=f"{tuple(value.shape)}, {value.dtype}",
                expected=f"floating-point {packed} or {(n, *drawn)}",
            )
        require_finite(name, value.float())
        return value.detach().float()

    def _anchors(self, anchors: Tensor, n: int, m: int) -> Tensor:
        tokens = self.geometry.grid.tokens
        if not is_tensor(anchors):
            raise InputError("anchors do not fit", found=type(anchors).__name__, expected="a tensor")
        fits = tuple(anchors.shape) == (n, m) and anchors.dtype == torch.int64
        if not fits or anchors.min() < 0 or anchors.max() >= tokens or any(len(set(a.tolist())) != m for a in anchors):
            raise InputError(
                "anchors do not fit", found=f"{tuple(anchors.shape)}, {anchors.dtype}",
                expected=f"int64 {(n, m)} of different indices from 0 to {tokens - 1} in each row",
            )
        return anchors


def _is_terminal(stream: object) -> bool:
    """Whether a progress bar makes sense there: services have stderr closed, gone, or replaced by something small."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError):
        return False


def _is_open(stream: object) -> bool:
    return hasattr(stream, "write") and not getattr(stream, "closed", False)


def _says_nothing(prompt: object) -> bool:
    """Whether a negative prompt is as good as none."""
    return prompt is None or prompt == "" or (isinstance(prompt, list | tuple) and all(p in (None, "") for p in prompt))


def _by_name(condition: Condition, draws: Draws, guided: Guided | None) -> dict[str, Tensor]:
    """Everything that the loop reads."""
    named = {f"draws {name}": value for name, value in vars(draws).items() if value is not None}
    for kind, one in {"condition": condition, "negative": guided and guided.negative}.items():
        if one is not None:
            named |= {f"{kind} step {name}": value for name, value in one.per_step.items()}
            named |= {f"{kind} all {name}": value for name, value in one.static.items()}
    return named if guided is None else named | {"scale": guided.scale}


def _from_names(named: Mapping[str, Tensor], steps: int) -> tuple[Condition, Draws, Guided | None]:
    """The inverse of `_by_name`, for guidance at all of the steps or none."""

    def starting(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}

    condition, negative = (Condition(starting(f"{k} step "), starting(f"{k} all ")) for k in ("condition", "negative"))
    guided = Guided(negative, named["scale"], range(steps)) if "scale" in named else None
    return condition, Draws(**starting("draws ")), guided


@survives_fork
@causes.explained("loading the bundle")
@plain()
def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    verify: Verify = "full",
    model: str | os.PathLike[str] | None = None,
    trust: bool = False,
    cuda_graphs: bool = True,
    threads: int | None = None,
) -> Pipeline:
    """Open a prebuilt bundle.

    Args:
        path: the bundle's directory; with `trust` also a hub id "owner/name", downloaded at its first use.
        device: where to run; the device that the bundle was built for by default.
        verify: "full" compares the digest of every file before anything is opened, "size" only their sizes.
        model: the model's folder, for a bundle that refers to its weights; where it was built from by default.
        trust: take a bundle from a hub: its engines are native code, so this is running a program of its owner.
        cuda_graphs: run the denoising loop as one CUDA graph, on devices and backends that can; see `jitexport.graphs`.
        threads: that a call computes on, on a CPU. By default as many as torch is set to (`torch.set_num_threads`,
            OMP_NUM_THREADS), but no more than the processors that affinity and cgroups leave to this process. Torch's
            setting is changed for the calling thread while a call runs, and is afterwards what it was.

    Raises:
        BundleError: no bundle, or one that fails its checks; see `jitexport.errors`.
        BackendError: the backend cannot run here.
        InputError: arguments that are no paths, or no such device.
    """
    path = check_path("a bundle", path) if not trust else path
    model = None if model is None else check_path("model", model)
    if trust:
        from jitexport import hub  # only for those who ask for it

        path = hub.local(path)
    from jitexport.bundle import EngineBundle

    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise InputError("threads must be a number of at least 1", found=threads, remedy="leave it out")
    bundle = EngineBundle.open(path, verify, model)
    manifest = bundle.manifest
    engines = EngineOpener(bundle, device)
    geometry = manifest.model_geometry
    with _declared("acceleration method"):
        method = registry.method(manifest.method.name)(geometry.grid, manifest.method.options, geometry.patch)
    if method.previews and not any(entry.name == "preview" for entry in manifest.engines):
        raise ManifestError(
            "the bundle lacks an engine", found=f"no preview, which the method {method.name} needs",
            remedy="build the bundle again",
        )
    with _declared("tokenizers"):
        tokenizers = [t.tokenizer((bundle.path / t.path).read_text(encoding="utf-8")) for t in manifest.tokenizers]
        for tokenizer in tokenizers:
            tokenizer.reader()
    with machine.threads(threads or machine.default_threads()):  # some backends' engines keep the number
        opened = {entry.name: engines.open(entry) for entry in manifest.engines}
    pipeline = Pipeline(
        engines=opened,
        method=method,
        schedule=manifest.schedule.schedule(),
        geometry=geometry,
        defaults=manifest.defaults,
        tokenizers=tokenizers,
        batch_size=manifest.batch,
        passes=manifest.passes,
        constants=engines.constants(),
        dtype=DTYPES[manifest.dtype],
        device=engines.device,
        weights=engines.weights if engines.backend.live_weights else None,
        read_checkpoint=engines.read_checkpoint,
        naming=manifest.model.adapter().naming,
        cuda_graphs=cuda_graphs and engines.backend.capturable,
        threads=threads,
        forkable=engines.backend.forkable,
    )
    bundle.check_unchanged()
    return pipeline


class EngineOpener:
    """Opens the engines of a checked bundle, all on one copy of its weights.

    Args:
        device: where to run; the device that the bundle was built for by default.

    Raises:
        BackendUnavailableError: this machine lacks what the backend needs.
        HostMismatchError: the bundle was built for another machine.
        InputError: no such device.
    """

    def __init__(self, bundle: EngineBundle, device: str | torch.device | None = None) -> None:
        from jitexport.bundle.host import check_host, fingerprint

        manifest = bundle.manifest
        try:
            self.device = torch.device(device or manifest.host.device)
        except (RuntimeError, TypeError) as error:
            raise InputError("unknown device", found=shown(device), expected="cpu or cuda") from error
        self.bundle = bundle
        self.backend = registry.backend(manifest.backend)
        if reason := self.backend.missing(self.device):
            raise BackendUnavailableError(
                f"backend {self.backend.name} cannot run on {self.device}", found=reason,
                expected=f"the GPU that the bundle was built for, {manifest.host.gpu}" if manifest.host.gpu else None,
            )
        check_host(manifest.host, fingerprint(self.device), self.backend.host_fields)
        kind = manifest.model.settings.get("quantization")
        if slow := machine.emulation(manifest.dtype, kind, self.device, kernels=self.backend.kernels):
            logger.warning("the bundle is %s, but %s; build it in fp32 for this machine", manifest.precision, slow)
        self.weights = SharedWeights(bundle.weights(self.device))
        self._adapter: ModelAdapter | None = None

    def open(self, entry: EngineEntry) -> Engine:
        """One engine.

        Raises:
            BackendError: it cannot be opened.
            ManifestError: the model's configuration, which some backends need, makes no model.
            MissingDependencyError: so does its code, which is not installed.
        """
        spec, directory = entry.spec(), self.bundle.path / entry.directory
        raw = self.backend.load(spec, directory, self.weights.tensors, partial(self._module, entry.name), self.device)
        return Engine(spec, raw, self.device)

    def constants(self) -> dict[str, Tensor]:
        """What stages read that depends on the noise levels only, [S, ...], among the bundle's tensors.

        Raises:
            ManifestError: one is missing, or is another one than was declared.
        """
        found = {}
        for entry in self.bundle.manifest.constants:
            value = self.weights.tensors.get(f"{CONSTANTS}.{entry.name}")
            if value is None or (tuple(value.shape), value.dtype) != (entry.shape, DTYPES[entry.dtype]):
                raise ManifestError(
                    f"the constant {entry.name} is not as declared", found="nothing" if value is None else value.shape,
                    expected=entry.spec(), remedy="build the bundle again",
                )
            found[entry.name] = value
        return found

    def read_checkpoint(self, path: Path, base: Path | None = None) -> dict[str, Tensor]:
        """All tensors of another checkpoint of the bundle's model, by full name, in the bundle's dtype.

        Args:
            path, base: see `Pipeline.load_checkpoint`.

        Raises:
            InputError: a checkpoint of another model.
            ModelError: it cannot be read.
        """
        from jitexport.checkpoints import check_same_model, read_model

        manifest = self.bundle.manifest
        with _declared("model family"):
            adapter = read_model(manifest.model.adapter(), path, base, manifest)
        check_same_model(self.bundle, adapter)
        sigmas = torch.tensor(manifest.schedule.sigmas[:-1], dtype=torch.float32)
        constants = {f"{CONSTANTS}.{name}": value for name, value in adapter.constants(sigmas).items()}
        return dict(adapter.tensors()) | constants

    def _module(self, name: str) -> torch.nn.Module:
        """An engine's module without weights; imports the model's code at the first need."""
        if self._adapter is None:
            manifest = self.bundle.manifest
            model = manifest.model
            with _declared("model configuration"), imports_that_ask_for_a_temporary_folder():
                self._adapter = model.adapter().from_configs(
                    model.configs, model.settings, DTYPES[manifest.dtype]
                )
        return self._adapter.module(name)


@contextmanager
def _declared(what: str) -> Iterator[None]:
    """Turn whatever other libraries raise on what a manifest declares into this package's errors."""
    try:
        yield
    except (JitExportError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise MissingDependencyError(
            "this bundle runs the model's own code", found=error, remedy="pip install 'jitexport[build]'"
        ) from error
    except Exception as error:
        raise ManifestError(
            f"the bundle's {what} cannot be used", found=f"{type(error).__name__}: {error}",
            remedy="build the bundle again",
        ) from error
