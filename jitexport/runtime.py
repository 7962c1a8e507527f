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
from tokenizers import Tokenizer as FastTokenizer
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
from jitexport.forks import survives_fork
from jitexport.graphs import CUDARecorder, LoopGraph, Recorder
from jitexport.grid import pack
from jitexport.lora import Change, read_lora
from jitexport.methods.base import Draws, Method
from jitexport.models.base import ModelAdapter, ModelDefaults, ModelGeometry
from jitexport.models.naming import Naming
from jitexport.quant import kind_of, quantize
from jitexport.sampler import OnStep, Velocity, draw, sample
from jitexport.schedule import Stage, StageSchedule
from jitexport.specs import DTYPES
from jitexport.weights import SharedWeights

if TYPE_CHECKING:  # a pipeline can be made of engines alone; bundles are read in `load`
    from jitexport.bundle import EngineBundle
    from jitexport.bundle.manifest import EngineEntry
    from jitexport.bundle.reading import Verify

logger = logging.getLogger(__name__)

OutputType = Literal["pil", "np", "pt", "latent"]

#: (pipeline, step index, timestep, {"latents": ...}) -> {"latents": ...} or {}; raising ends the call.
Callback = Callable[["Pipeline", int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: PIL images, or an array [n, H, W, 3], or tensors [n, 3, H, W] or latents [n, N, C]."""

    images: Any


@dataclass(frozen=True)
class Condition:
    """What all steps of a batch share.

    Attributes:
        modulation: vectors of every step, [S, B, M].
        static: further inputs of the stage engines, by name.
    """

    modulation: Tensor
    static: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Texts:
    """What n images show: prompts for the first and the other text encoders, or the encoders' outputs [n, ...]."""

    count: int
    prompts: Sequence[str] = ()
    prompts_2: Sequence[str] = ()
    given: Sequence[Tensor] | None = None

    def embeddings(self, pipe: Pipeline, rows: Sequence[int]) -> Sequence[Tensor]:
        """The text engine's outputs for a chunk of images."""
        if self.given is not None:
            return [t[list(rows)] for t in self.given]
        return pipe.engines["text"](
            *pipe.tokenize([self.prompts[i] for i in rows], [self.prompts_2[i] for i in rows])
        )


class Pipeline:
    """Engines, a method and a schedule as a diffusers-like text-to-image pipeline.

    A call keeps no state on the pipeline, so calls from several threads do not disturb each other.

    Attributes:
        engines: by name: text, condition, stage<k>, decode, and preview where the method looks at pictures between
            stages; each for exactly `batch_size` images.
        batch_size: images per engine run; longer lists are run in chunks, the last one padded.
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
        tokenizers: Sequence[FastTokenizer],
        batch_size: int,
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
        self.tokenizers = list(tokenizers)
        self.batch_size = batch_size
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
        self._rotary = self.geometry.rotary.tables(method.places(self.device)[None])

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
                    require_finite(f"the checkpoint's {name}", value.float())
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

    def tokenize(self, prompts: Sequence[str], prompts_2: Sequence[str] | None = None) -> list[Tensor]:
        """Token ids for each tokenizer, [B, L]; a prompt that is too long is cut, with a warning in the log.

        Args:
            prompts_2: other prompts for the tokenizers after the first.
        """
        ids = []
        cut: dict[str, list[str]] = {}
        for i, tokenizer in enumerate(self.tokenizers):
            texts = list(prompts if i == 0 or prompts_2 is None else prompts_2)
            encodings = tokenizer.encode_batch(texts)
            for text, encoding in dict(zip(texts, encodings, strict=True)).items():
                if encoding.overflowing:
                    cut.setdefault(text, []).append(str(len(encoding.ids)))
            ids.append(torch.tensor([e.ids for e in encodings], dtype=torch.int64, device=self.device))
        self._warn_of_cuts(cut)
        return ids

    def _warn_of_cuts(self, cut: Mapping[str, Sequence[str]]) -> None:
        """Once for a prompt in a call, and of a long one its beginning."""
        seen = call.cut if (call := self._calls.current) else set()
        for prompt in cut.keys() - seen:
            lengths = " and ".join(cut[prompt])
            logger.warning("prompt of %d characters cut to %s tokens: %s", len(prompt), lengths, shown(prompt))
            seen.add(prompt)

    def draw(self, generators: Sequence[torch.Generator]) -> Draws:
        """Everything random, for one image per generator."""
        geometry = self.geometry
        return draw(self.method, self.schedule, geometry.latent_shape, geometry.patch, generators)

    def encode(self, prompts: Sequence[str], guidance_scale: float | None) -> Condition:
        """Text and condition engines: everything that the loop reads but does not change.

        Args:
            prompts: exactly `batch_size` of them.
        """
        return self.condition(self.engines["text"](*self.tokenize(prompts)), guidance_scale)

    def condition(self, embeddings: Sequence[Tensor], guidance_scale: float | None) -> Condition:
        """What the loop reads, from the text engine's outputs."""
        condition = self.engines["condition"]
        modulation, *static = condition(*self.condition_inputs(embeddings, guidance_scale))
        return Condition(
            modulation, {s.name: v for s, v in zip(condition.spec.outputs[1:], static, strict=True)}
        )

    def condition_inputs(self, embeddings: Sequence[Tensor], guidance_scale: float | None) -> list[Tensor]:
        """What the condition engine takes, in its order, from the text engine's outputs."""
        available = {s.name: value for s, value in zip(self.engines["text"].spec.outputs, embeddings, strict=True)}
        available["sigmas"] = torch.tensor(self.schedule.sigmas[:-1], dtype=torch.float32, device=self.device)
        if guidance_scale is not None:
            available["guidance"] = torch.full(
                (self.batch_size,), float(guidance_scale), dtype=torch.float32, device=self.device
            )
        return [available[spec.name] for spec in self.engines["condition"].spec.inputs]

    def denoise(
        self,
        condition: Condition,
        draws: Draws,
        on_step: OnStep | None = None,
        stop: Callable[[], bool] = lambda: False,
        healthy: list[Tensor] | None = None,
    ) -> Tensor:
        """The stage loop: clean latents [B, N, C], fp32. As one CUDA graph where there is one and no `on_step`.

        Args:
            on_step, stop: see `sampler.sample`.
            healthy: is given a truth value for each step, on the device: whether its velocity is finite.
        """
        if self.graph is not None and on_step is None:
            return self.graph(_by_name(condition, draws))

        def begin_stage(stage: Stage, where: Tensor) -> Velocity:
            engine = self.engines[stage.name]
            cos, sin = self.geometry.rotary.gather(self._rotary, where)
            fixed = {"cos": cos, "sin": sin, **condition.static}

            def velocity(tokens: Tensor, step: int) -> Tensor:
                inputs = {**fixed, "tokens": tokens.to(self.dtype), "modulation": condition.modulation[step]}
                u = engine(*(inputs[spec.name] for spec in engine.spec.inputs))[0]
                if healthy is not None:
                    healthy.append(u.isfinite().all())
                return u

            return velocity

        return sample(self.method, self.schedule, draws, begin_stage, on_step, self.preview, stop)

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
            return pipe.denoise(*_from_names(inputs))

        return LoopGraph(loop, {s.name: self.engines[s.name] for s in self.schedule.stages}, recorder)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, N, C] -> pictures [B, 3, H, W] in [0, 1], fp32."""
        return self.engines["decode"](latents)[0]

    @staticmethod
    def to_images(images: Tensor, output_type: OutputType) -> Any:
        """Pictures [n, 3, H, W] in [0, 1], or latents, in the form that a caller asked for."""
        if output_type in ("pt", "latent"):
            return images
        array = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "np":
            return array
        return [Image.fromarray(a) for a in (array * 255).round().astype(np.uint8)]

    # --- the call ---

    @survives_fork
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_2: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        noise: Tensor | None = None,
        anchors: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        **built_in: Any,
    ) -> PipelineOutput | tuple[Any]:
        """Make images.

        Args:
            prompt: one or several.
            prompt_2: others for the second text encoder.
            num_images_per_prompt: images of each prompt, next to each other in the result.
            guidance_scale: for guidance-distilled models; the model's usual value by default.
            generator: one per image, or one that goes on from image to image; a fresh seed for each call by default.
                All randomness comes from here: the image of a seed is the same whatever runs beside it.
            latents: initial noise instead of drawn one, packed [n, N, C] or [n, C, H, W].
            noise: noise for later, likewise: of the micro-flow (JiT), or of each change of resolution, one field after
                the other, [n, F * N, C] (RALU, Bottleneck).
            anchors: first active tokens (JiT), [n, m], int64.
            prompt_embeds, pooled_prompt_embeds: what the text encoders give, [n, T, E] and [n, P], instead of prompts.
            output_type: "pil", "np" ([n, H, W, 3]), "pt" ([n, 3, H, W]) or "latent" (packed, [n, N, C]).
            return_dict: False returns (images,).
            callback_on_step_end: called after every step of every chunk as callback(pipeline, step, timestep,
                {"latents": packed latents [B, N, C]}); may return {"latents": others}; raising ends the call, and
                setting `pipeline._interrupt` skips the steps that are left of it. diffusers' callback objects work.
            callback_on_step_end_tensor_inputs: what the callback is given: "latents", "prompt_embeds" or both.
            built_in: the other arguments of diffusers' call (height, num_inference_steps, max_sequence_length,
                negative_prompt, ...): the bundle's own values or the ones that say nothing.

        Raises:
            InputError: an argument that does not fit the bundle.
            NumericalError: an image that would not be finite numbers.
        """
        self._check_process()
        if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
            raise InputError("unknown output_type", found=shown(output_type), expected="pil, np, pt or latent")
        if not isinstance(return_dict, bool | np.bool_):
            raise InputError("return_dict must be True or False", found=shown(return_dict))
        check_built_in(built_in, self._built_in())
        names = check_tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        call = Call(guidance_scale=self._guidance(guidance_scale))
        held = self.weights.reading() if self.weights is not None else nullcontext()
        with held, self.on_threads(), plain(inference=True), self._calls.one(call):
            texts = self._texts(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds, per_prompt)
            draws = self._draws(texts.count, generator, latents, noise, anchors)
            results = self._chunks(call, texts, draws, output_type, callback_on_step_end, names)
        with plain():  # ordinary tensors go out
            images = self.to_images(torch.cat(results), output_type)
        return PipelineOutput(images) if return_dict else (images,)

    def _chunks(
        self,
        call: Call,
        texts: _Texts,
        draws: tuple[Tensor | None, ...],
        output_type: OutputType,
        callback: Callback | None,
        names: Sequence[str],
    ) -> list[Tensor]:
        """The images of a call, or its latents, `batch_size` at a time; the last chunk repeats its last image."""
        results, size = [], self.batch_size
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
                condition = self.condition(embeddings, call.guidance_scale)

                def on_step(i: int, sigma: float, latents: Callable[[], Tensor]) -> Tensor | None:
                    progress.advance(task)
                    watch.look()
                    if callback is None:
                        return None
                    return self._callback(callback, names, i, latents, embeddings)  # noqa: B023 - called at once

                at_once = self.graph is not None and callback is None and not call.interrupted
                healthy: list[Tensor] | None = None if at_once else []
                y = self.denoise(
                    condition, chunk, None if at_once else on_step, lambda: call.interrupted, healthy
                )
                progress.advance(task, self.schedule.nfe if at_once else 0)
                pictures = y if output_type == "latent" else self.decode(y)
                if not all(torch.stack([t.isfinite().all() for t in (y, pictures)]).tolist()):  # waits once a chunk
                    raise self._not_finite(embeddings, condition, chunk, healthy, y)
                results.append(pictures[:count])
        return results

    def _not_finite(
        self,
        embeddings: Sequence[Tensor],
        condition: Condition,
        draws: Draws,
        healthy: list[Tensor] | None,
        latents: Tensor,
    ) -> NumericalError:
        """Where the numbers of a chunk ceased to be finite. A graph's steps are run once more, one after the other."""

        def fine(*tensors: Tensor) -> bool:
            return all(bool(t.isfinite().all()) for t in tensors)

        if healthy is None:
            healthy = []
            self.denoise(condition, draws, lambda *_: None, healthy=healthy)
        first = next((i for i, step in enumerate(healthy) if not step), None)
        if not fine(*embeddings):
            where = "engine text"
        elif not fine(condition.modulation, *condition.static.values()):
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
        return self.defaults.guidance_scale if call is None else call.guidance_scale

    # --- its arguments ---

    def _built_in(self) -> BuiltIn:
        geometry = self.geometry
        return BuiltIn(
            geometry.height, geometry.width, self.schedule.nfe, geometry.rotary.text_tokens, self.schedule.sigmas[:-1]
        )

    def _guidance(self, guidance_scale: float | None) -> float | None:
        distilled = any(spec.name == "guidance" for spec in self.engines["condition"].spec.inputs)
        if guidance_scale is None:
            return self.defaults.guidance_scale
        guidance_scale = check_number("guidance_scale", guidance_scale, least=0)
        if not distilled and guidance_scale:
            raise InputError(
                "this model takes no guidance", found=guidance_scale, expected=0, remedy="leave guidance_scale out"
            )
        return guidance_scale if distilled else None

    def _texts(
        self,
        prompt: str | Sequence[str] | None,
        prompt_2: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        pooled: Tensor | None,
        per_prompt: int,
    ) -> _Texts:
        """What the images show, one after the other."""
        if prompt_embeds is None and pooled is None:
            prompts = check_prompts("prompt", prompt)
            others = prompts if prompt_2 is None else check_prompts("prompt_2", prompt_2)
            if len(others) != len(prompts):
                raise InputError("one prompt_2 per prompt is needed", found=len(others), expected=len(prompts))
            rows = [i for i in range(len(prompts)) for _ in range(per_prompt)]
            return _Texts(len(rows), prompts=[prompts[i] for i in rows], prompts_2=[others[i] for i in rows])
        if prompt is not None or prompt_2 is not None:
            raise InputError("give prompts or prompt_embeds, not both")
        given = {"prompt_embeds": prompt_embeds, "pooled": pooled}
        embeds = []
        for spec in self.engines["text"].spec.outputs:
            value = given.get(spec.name)
            n = len(prompt_embeds) if is_tensor(prompt_embeds) and prompt_embeds.ndim else 0
            if not is_tensor(value) or tuple(value.shape) != (n, *spec.shape[1:]) or not n:
                found = tuple(value.shape) if is_tensor(value) else type(value).__name__
                raise InputError(
                    f"{'pooled_prompt_embeds' if spec.name == 'pooled' else spec.name} do not fit", found=found,
                    expected=f"a tensor {('n', *spec.shape[1:])}, and as many of the other",
                )
            if not value.is_floating_point():
                raise InputError(f"{spec.name} do not fit", found=value.dtype, expected="floating-point numbers")
            require_finite(spec.name, value.float())
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
        if tuple(value.shape) == (n, *geometry.latent_shape):
            value = pack(value, geometry.patch)
        if tuple(value.shape) != packed or not value.is_floating_point():
            raise InputError(
                f"{name} do not fit", found=f"{tuple(value.shape)}, {value.dtype}",
                expected=f"floating-point {packed} or {(n, *geometry.latent_shape)}",
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


def _by_name(condition: Condition, draws: Draws) -> dict[str, Tensor]:
    """Everything that the loop reads."""
    named = {f"condition {name}": value for name, value in condition.static.items()}
    named |= {f"draws {name}": value for name, value in vars(draws).items() if value is not None}
    return {"modulation": condition.modulation, **named}


def _from_names(named: Mapping[str, Tensor]) -> tuple[Condition, Draws]:
    """The inverse of `_by_name`."""

    def starting(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}

    return Condition(named["modulation"], starting("condition ")), Draws(**starting("draws "))


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
    geometry = manifest.geometry.geometry()
    with _declared("acceleration method"):
        method = registry.method(manifest.method.name)(geometry.grid, manifest.method.options, geometry.patch)
    if method.previews and not any(entry.name == "preview" for entry in manifest.engines):
        raise ManifestError(
            "the bundle lacks an engine", found=f"no preview, which the method {method.name} needs",
            remedy="build the bundle again",
        )
    with _declared("tokenizers"):
        tokenizers = [FastTokenizer.from_file(str(bundle.path / t.path)) for t in manifest.tokenizers]
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
        dtype=DTYPES[manifest.dtype],
        device=engines.device,
        weights=engines.weights if engines.backend.live_weights else None,
        read_checkpoint=engines.read_checkpoint,
        naming=registry.naming(manifest.model.family),
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

    def read_checkpoint(self, path: Path, base: Path | None = None) -> dict[str, Tensor]:
        """All tensors of another checkpoint of the bundle's model, by full name, in the bundle's dtype.

        Args:
            path, base: see `Pipeline.load_checkpoint`.

        Raises:
            InputError: a checkpoint of another model.
            ModelError: it cannot be read.
        """
        from jitexport.checkpoints import check_same_model, read_model

        with _declared("model family"):
            adapter_class = registry.family(self.bundle.manifest.model.family)
        adapter = read_model(adapter_class, path, base, self.bundle.manifest)
        check_same_model(self.bundle, adapter)
        return dict(adapter.tensors())

    def _module(self, name: str) -> torch.nn.Module:
        """An engine's module without weights; imports the model's code at the first need."""
        if self._adapter is None:
            manifest = self.bundle.manifest
            model = manifest.model
            with _declared("model configuration"):
                self._adapter = registry.family(model.family).from_configs(
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
