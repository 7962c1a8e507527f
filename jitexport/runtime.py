"""A prebuilt bundle as a pipeline: prompts in, images out. No compiling, no model code.

Importing this module imports torch and little else; in particular neither torch.export nor diffusers.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from jitexport import machine, registry
from jitexport.backends.base import Engine
from jitexport.crowding import watch
from jitexport.errors import (
    BackendUnavailableError,
    InputError,
    JitExportError,
    ManifestError,
    MissingDependencyError,
)
from jitexport.graphs import CUDARecorder, LoopGraph, Recorder
from jitexport.grid import pack
from jitexport.lora import LowRank, read_lora
from jitexport.methods.base import Draws, Method
from jitexport.models.base import ModelAdapter, ModelDefaults, ModelGeometry
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
        read_checkpoint: Callable[[Path], Mapping[str, Tensor]] | None = None,
        cuda_graphs: bool = True,
        threads: int | None = None,
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
        self._adapters: list[tuple[dict[str, LowRank], float]] = []
        self._show_progress = sys.stderr.isatty()
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

    def load_lora(self, adapter: str | Path | Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Merge a LoRA adapter into the weights, beside those already merged; no engine is built again.

        Waits for running calls to end. The originals of the weights that it touches are kept in memory.

        Args:
            adapter: a safetensors file, a folder with one, or a state dict, in diffusers' PEFT format or one that
                diffusers converts to it.
            scale: strength of the adapter.

        Raises:
            InputError: the adapter does not fit the model, or this backend's engines hold copies of the weights.
            ModelNotFoundError: the file cannot be read.
        """
        weights = self._changeable()
        if not np.isfinite(scale):
            raise InputError("scale must be a finite number", found=scale)
        changes = read_lora(adapter)
        weights.check({name: change.shape for name, change in changes.items()})
        with weights.changing():
            self._adapters.append((changes, float(scale)))
            self._merge(changes)

    def unload_lora(self) -> None:
        """Take all adapters out again: the weights are what they were, bit by bit."""
        weights = self._changeable()
        with weights.changing():
            self._adapters.clear()
            weights.restore()

    def load_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Replace the weights by those of another checkpoint of the same architecture; adapters are taken out.

        Args:
            folder: the pipeline in diffusers' format. Reading it needs the `build` extra.

        Raises:
            InputError: another architecture, or engines that hold copies of the weights.
            ModelError: the folder cannot be read.
        """
        weights = self._changeable()
        if self._read_checkpoint is None:
            raise InputError("this pipeline has no bundle to read checkpoints for")
        values = self._read_checkpoint(Path(folder))
        weights.check({name: tuple(value.shape) for name, value in values.items()})
        with weights.changing():
            self._adapters.clear()
            weights.replace(values)

    def _changeable(self) -> SharedWeights:
        if self.weights is None:
            raise InputError(
                "this bundle's engines hold copies of the weights, which cannot be changed",
                remedy="build with a backend that shares weights (eager, inductor, aoti, onnx), "
                "or build from the changed model",
            )
        return self.weights

    def _merge(self, names: Iterable[str]) -> None:
        """W + the sum of all adapters' changes, from the original and rounded once (quantized weights: again)."""
        for name in names:
            scales = f"{name}_scale"
            quantized = scales in self.weights.tensors
            merged = self.weights.original(name).float()
            if quantized:
                merged = merged * self.weights.original(scales)[:, None]
            for changes, scale in self._adapters:
                if name in changes:
                    merged = merged + changes[name].delta(scale, merged.device)
            if quantized:
                merged, rows = quantize(merged, kind_of(self.weights.tensors[name]))
                self.weights.set(scales, rows[:, 0])
            self.weights.set(name, merged)

    # --- the phases of a call ---

    def tokenize(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids for each tokenizer, [B, L]; a prompt that is too long is cut, with a warning in the log."""
        ids = []
        for tokenizer in self.tokenizers:
            encodings = tokenizer.encode_batch(list(prompts))
            for prompt, encoding in zip(prompts, encodings, strict=True):
                if encoding.overflowing:
                    logger.warning("prompt cut to %d tokens: %r", len(encoding.ids), prompt)
            ids.append(torch.tensor([e.ids for e in encodings], device=self.device))
        return ids

    def draw(self, generators: Sequence[torch.Generator]) -> Draws:
        """Everything random, for one image per generator."""
        geometry = self.geometry
        return draw(self.method, self.schedule, geometry.latent_shape, geometry.patch, generators)

    def encode(self, prompts: Sequence[str], guidance_scale: float | None) -> Condition:
        """Text and condition engines: everything that the loop reads but does not change.

        Args:
            prompts: exactly `batch_size` of them.
        """
        embeddings = self.engines["text"](*self.tokenize(prompts))
        condition = self.engines["condition"]
        modulation, *static = condition(*self.condition_inputs(embeddings, guidance_scale))
        return Condition(
            modulation, {s.name: v for s, v in zip(condition.spec.outputs[1:], static, strict=True)}
        )

    def condition_inputs(self, embeddings: Sequence[Tensor], guidance_scale: float | None) -> list[Tensor]:
        """What the condition engine takes, in its order, from the text engine's outputs."""
        available = {s.name: value for s, value in zip(self.engines["text"].spec.outputs, embeddings, strict=True)}
        available["sigmas"] = torch.tensor(self.schedule.sigmas[:-1], device=self.device)
        if guidance_scale is not None:
            available["guidance"] = torch.full((self.batch_size,), float(guidance_scale), device=self.device)
        return [available[spec.name] for spec in self.engines["condition"].spec.inputs]

    def denoise(self, condition: Condition, draws: Draws, on_step: OnStep | None = None) -> Tensor:
        """The stage loop: clean latents [B, N, C], fp32. As one CUDA graph where there is one and no `on_step`."""
        if self.graph is not None and on_step is None:
            return self.graph(_by_name(condition, draws))

        def begin_stage(stage: Stage, where: Tensor) -> Velocity:
            engine = self.engines[stage.name]
            cos, sin = self.geometry.rotary.gather(self._rotary, where)
            fixed = {"cos": cos, "sin": sin, **condition.static}

            def velocity(tokens: Tensor, step: int) -> Tensor:
                inputs = {**fixed, "tokens": tokens.to(self.dtype), "modulation": condition.modulation[step]}
                return engine(*(inputs[spec.name] for spec in engine.spec.inputs))[0]

            return velocity

        return sample(self.method, self.schedule, draws, begin_stage, on_step, self.preview)

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

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        noise: Tensor | None = None,
        anchors: Tensor | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> PipelineOutput:
        """Make images.

        Args:
            prompt: one or several.
            num_images_per_prompt: images of each prompt, next to each other in the result.
            guidance_scale: for guidance-distilled models; the model's usual value by default.
            generator: one per image, or one that goes on from image to image; a fresh seed for each call by default.
                All randomness comes from here: the image of a seed is the same whatever runs beside it.
            latents: initial noise instead of drawn one, packed [n, N, C] or [n, C, H, W].
            noise: noise for later, likewise: of the micro-flow (JiT), or of each change of resolution, one field after
                the other, [n, F * N, C] (RALU, Bottleneck).
            anchors: first active tokens (JiT), [n, m], int64.
            output_type: "pil", "np" ([n, H, W, 3]), "pt" ([n, 3, H, W]) or "latent" (packed, [n, N, C]).
            callback_on_step_end: called after every step of every chunk as callback(pipeline, step, timestep,
                {"latents": packed latents [B, N, C]}); may return {"latents": others}; raising ends the call.

        Raises:
            InputError: an argument that does not fit the bundle.
        """
        prompts = self._prompts(prompt, num_images_per_prompt)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError("unknown output_type", found=output_type, expected="pil, np, pt or latent")
        guidance_scale = self._guidance(guidance_scale)
        draws = self._draws(len(prompts), generator, latents, noise, anchors)

        results = []
        size = self.batch_size
        total = -(-len(prompts) // size) * self.schedule.nfe
        held = self.weights.reading() if self.weights is not None else nullcontext()
        bar = Progress(console=Console(stderr=True), transient=True, disable=not self._show_progress)
        with held, self.on_threads(), bar as progress:
            task = progress.add_task("denoising", total=total)
            if self.device.type == "cpu":
                watch.begin()
            for start in range(0, len(prompts), size):
                count = min(size, len(prompts) - start)
                rows = [start + min(i, count - 1) for i in range(size)]  # the last chunk repeats its last image
                chunk = Draws(*(None if t is None else t[rows].to(self.device) for t in draws))
                condition = self.encode([prompts[i] for i in rows], guidance_scale)

                def on_step(i: int, sigma: float, latents: Callable[[], Tensor]) -> Tensor | None:
                    progress.advance(task)
                    watch.look()
                    return self._callback(callback_on_step_end, i, latents)

                at_once = self.graph is not None and callback_on_step_end is None
                y = self.denoise(condition, chunk, None if at_once else on_step)
                progress.advance(task, self.schedule.nfe if at_once else 0)
                results.append((y if output_type == "latent" else self.decode(y))[:count])
        return PipelineOutput(self.to_images(torch.cat(results), output_type))

    def _callback(self, callback: Callback | None, step: int, latents: Callable[[], Tensor]) -> Tensor | None:
        if callback is None:
            return None
        y = latents()
        changed = (callback(self, step, self.schedule.sigmas[step] * 1000, {"latents": y}) or {}).get("latents")
        if changed is not None and changed.shape != y.shape:
            raise InputError(
                "the callback returned latents of another shape", found=tuple(changed.shape), expected=tuple(y.shape)
            )
        return changed

    def _prompts(self, prompt: str | Sequence[str], per_prompt: int) -> list[str]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise InputError("a prompt must be a string or a list of strings", found=repr(prompt)[:200])
        if not isinstance(per_prompt, int) or per_prompt < 1:
            raise InputError("num_images_per_prompt must be at least 1", found=per_prompt)
        return [p for p in prompts for _ in range(per_prompt)]

    def _guidance(self, guidance_scale: float | None) -> float | None:
        distilled = any(spec.name == "guidance" for spec in self.engines["condition"].spec.inputs)
        if guidance_scale is None:
            return self.defaults.guidance_scale
        if not distilled:
            raise InputError("this model takes no guidance", found=guidance_scale, remedy="leave guidance_scale out")
        if not np.isfinite(guidance_scale) or guidance_scale < 0:
            raise InputError("guidance_scale must be a number of at least 0", found=guidance_scale)
        return guidance_scale

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
        generators = generator if isinstance(generator, list | tuple) else [generator] * n
        if not all(isinstance(g, torch.Generator) for g in generators):
            raise InputError("generator must be a torch.Generator, or a list of them", found=repr(generator)[:200])
        if len(generators) != n:
            raise InputError("one generator per image is needed", found=len(generators), expected=n)
        drawn = self.draw(generators)
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
        if not isinstance(value, Tensor):
            raise InputError(f"{name} do not fit", found=type(value).__name__, expected="a tensor")
        if tuple(value.shape) == (n, *geometry.latent_shape):
            value = pack(value, geometry.patch)
        if tuple(value.shape) != packed or not value.is_floating_point():
            raise InputError(
                f"{name} do not fit", found=f"{tuple(value.shape)}, {value.dtype}",
                expected=f"floating-point {packed} or {(n, *geometry.latent_shape)}",
            )
        return value.float()

    def _anchors(self, anchors: Tensor, n: int, m: int) -> Tensor:
        tokens = self.geometry.grid.tokens
        if not isinstance(anchors, Tensor):
            raise InputError("anchors do not fit", found=type(anchors).__name__, expected="a tensor")
        fits = tuple(anchors.shape) == (n, m) and anchors.dtype == torch.int64
        if not fits or anchors.min() < 0 or anchors.max() >= tokens or any(len(set(a.tolist())) != m for a in anchors):
            raise InputError(
                "anchors do not fit", found=f"{tuple(anchors.shape)}, {anchors.dtype}",
                expected=f"int64 {(n, m)} of different indices from 0 to {tokens - 1} in each row",
            )
        return anchors


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
    """
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
    return Pipeline(
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
        cuda_graphs=cuda_graphs and engines.backend.capturable,
        threads=threads,
    )


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
        except RuntimeError as error:
            raise InputError("unknown device", found=device, expected="cpu or cuda") from error
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

    def read_checkpoint(self, folder: Path) -> dict[str, Tensor]:
        """All tensors of another checkpoint of the bundle's model, by full name, in the bundle's dtype."""
        manifest = self.bundle.manifest
        with _declared("model family"):
            adapter_class = registry.family(manifest.model.family)
        adapter = adapter_class.from_folder(folder, DTYPES[manifest.dtype], manifest.model.settings)
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
