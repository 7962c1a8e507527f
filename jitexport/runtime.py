"""A prebuilt bundle as a pipeline: prompts in, images out. No compiling, no model code.

Importing this module imports torch and little else; in particular neither torch.export nor diffusers.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from jitexport import registry
from jitexport.backends.base import Engine
from jitexport.bundle import EngineBundle
from jitexport.bundle.host import check_host, fingerprint
from jitexport.bundle.reading import Verify
from jitexport.errors import BackendUnavailableError, InputError
from jitexport.grid import pack
from jitexport.methods.base import Draws, Method
from jitexport.models.base import ModelDefaults, ModelGeometry
from jitexport.sampler import OnStep, Velocity, draw, sample
from jitexport.schedule import Stage, StageSchedule
from jitexport.specs import DTYPES

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
        engines: by name: text, condition, stage<k>, decode; each for exactly `batch_size` images.
        batch_size: images per engine run; longer lists are run in chunks, the last one padded.
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
    ) -> None:
        self.engines = engines
        self.method = method
        self.schedule = schedule
        self.geometry = geometry
        self.defaults = defaults
        self.tokenizers = list(tokenizers)
        self.batch_size = batch_size
        self.dtype = dtype
        self.device = device
        self._show_progress = sys.stderr.isatty()

    def set_progress_bar_config(self, *, disable: bool) -> None:
        """Switch the progress bar on stderr off or on; it is on by default on a terminal."""
        self._show_progress = not disable

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
        text = self.engines["text"]
        embeddings = text(*self.tokenize(prompts))
        available = {spec.name: value for spec, value in zip(text.spec.outputs, embeddings, strict=True)}
        available["sigmas"] = torch.tensor(self.schedule.sigmas[:-1], device=self.device)
        if guidance_scale is not None:
            available["guidance"] = torch.full((self.batch_size,), float(guidance_scale), device=self.device)
        condition = self.engines["condition"]
        modulation, *static = condition(*(available[spec.name] for spec in condition.spec.inputs))
        return Condition(
            modulation, {s.name: v for s, v in zip(condition.spec.outputs[1:], static, strict=True)}
        )

    def denoise(self, condition: Condition, draws: Draws, on_step: OnStep | None = None) -> Tensor:
        """The stage loop: clean latents [B, N, C], fp32."""

        def begin_stage(stage: Stage, positions: Tensor) -> Velocity:
            engine = self.engines[stage.name]
            cos, sin = self.geometry.rotary.tables(positions)
            fixed = {"cos": cos, "sin": sin, **condition.static}

            def velocity(tokens: Tensor, step: int) -> Tensor:
                inputs = {**fixed, "tokens": tokens.to(self.dtype), "modulation": condition.modulation[step]}
                return engine(*(inputs[spec.name] for spec in engine.spec.inputs))[0]

            return velocity

        return sample(self.method, self.schedule, draws, begin_stage, on_step)

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
            noise: noise field of the micro-flow (JiT), likewise.
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
        with Progress(console=Console(stderr=True), transient=True, disable=not self._show_progress) as progress:
            task = progress.add_task("denoising", total=total)
            for start in range(0, len(prompts), size):
                count = min(size, len(prompts) - start)
                rows = [start + min(i, count - 1) for i in range(size)]  # the last chunk repeats its last image
                chunk = Draws(*(None if t is None else t[rows].to(self.device) for t in draws))
                condition = self.encode([prompts[i] for i in rows], guidance_scale)

                def on_step(i: int, sigma: float, y: Tensor) -> Tensor | None:
                    progress.advance(task)
                    return self._callback(callback_on_step_end, i, y)

                y = self.denoise(condition, chunk, on_step)
                results.append((y if output_type == "latent" else self.decode(y))[:count])
        return PipelineOutput(self.to_images(torch.cat(results), output_type))

    def _callback(self, callback: Callback | None, step: int, y: Tensor) -> Tensor | None:
        if callback is None:
            return None
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
        generators = [generator] * n if isinstance(generator, torch.Generator) else list(generator)
        if len(generators) != n:
            raise InputError("one generator per image is needed", found=len(generators), expected=n)
        drawn = self.draw(generators)
        first = self.schedule.stages[0]
        return (
            drawn.latents if latents is None else self._packed("latents", latents, n),
            drawn.noise if noise is None else self._packed("noise", noise, n),
            drawn.anchors if anchors is None else self._anchors(anchors, n, first.tokens),
        )

    def _packed(self, name: str, value: Tensor, n: int) -> Tensor:
        geometry = self.geometry
        packed = (n, geometry.grid.tokens, geometry.channels)
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
        fits = tuple(anchors.shape) == (n, m) and anchors.dtype == torch.int64
        if not fits or anchors.min() < 0 or anchors.max() >= tokens or any(len(set(a.tolist())) != m for a in anchors):
            raise InputError(
                "anchors do not fit", found=f"{tuple(anchors.shape)}, {anchors.dtype}",
                expected=f"int64 {(n, m)} of different indices from 0 to {tokens - 1} in each row",
            )
        return anchors


def load(
    path: str | os.PathLike[str], *, device: str | torch.device | None = None, verify: Verify = "full"
) -> Pipeline:
    """Open a prebuilt bundle.

    Args:
        path: the bundle's directory.
        device: where to run; the device that the bundle was built for by default.
        verify: "full" compares the digest of every file before anything is opened, "size" only their sizes.

    Raises:
        BundleError: no bundle, or one that fails its checks; see `jitexport.errors`.
        BackendError: the backend cannot run here.
    """
    bundle = EngineBundle.open(path, verify)
    manifest = bundle.manifest
    device = torch.device(device or manifest.host.device)
    backend = registry.backend(manifest.backend)
    if reason := backend.missing(device):
        raise BackendUnavailableError(f"backend {backend.name} cannot run on {device}", found=reason)
    check_host(manifest.host, fingerprint(device), backend.host_fields)

    weights = bundle.weights(device)
    modules = _ModuleMaker(manifest.model.family, manifest.model.configs, manifest.model.settings, manifest.dtype)
    engines = {
        entry.name: Engine(
            entry.spec(),
            backend.load(
                entry.spec(), bundle.path / entry.directory, weights, partial(modules, entry.name), device
            ),
            device,
        )
        for entry in manifest.engines
    }
    geometry = manifest.geometry.geometry()
    return Pipeline(
        engines=engines,
        method=registry.method(manifest.method.name)(geometry.grid, manifest.method.options),
        schedule=manifest.schedule.schedule(),
        geometry=geometry,
        defaults=manifest.defaults,
        tokenizers=[FastTokenizer.from_file(str(bundle.path / t.path)) for t in manifest.tokenizers],
        batch_size=manifest.batch,
        dtype=DTYPES[manifest.dtype],
        device=device,
    )


class _ModuleMaker:
    """Makes modules without weights from a bundle's configurations, importing the model's code at the first need."""

    def __init__(self, family: str, configs: dict[str, Any], settings: dict[str, Any], dtype: str) -> None:
        self._arguments = family, configs, settings, dtype
        self._adapter = None

    def __call__(self, name: str) -> torch.nn.Module:
        if self._adapter is None:
            family, configs, settings, dtype = self._arguments
            self._adapter = registry.family(family).from_configs(configs, settings, DTYPES[dtype])
        return self._adapter.module(name)
