"""A prebuilt bundle as a pipeline: prompts in, images out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jitexport.ambient import plain
from jitexport.arguments import OUTPUT_TYPES, BuiltIn, check_built_in, check_count, check_tensor_inputs, shown
from jitexport.calls import Call
from jitexport.errors import InputError
from jitexport.forks import survives_fork
from jitexport.runtime.callbacks import Callback, Watcher
from jitexport.runtime.chunks import make
from jitexport.runtime.phases import Phases

OutputType = Literal["pil", "np", "pt", "latent"]

#: One or several.
Prompts = str | Sequence[str]


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


class Pipeline(Phases):
    """Engines, a method and a schedule as a diffusers-like text-to-image pipeline.

    A call keeps no state on the pipeline, so calls from several threads do not disturb each other.

    What it is made of, and its attributes: see `Phases`.
    """

    _show_progress: bool | None = None

    def set_progress_bar_config(self, *, disable: bool) -> None:
        """Switch the progress bar on stderr off or on; it is on by default on a terminal."""
        self._show_progress = not disable

    @overload
    def __call__(
        self,
        prompt: Prompts | None = ...,
        *,
        prompt_2: Prompts | None = ...,
        prompt_3: Prompts | None = ...,
        negative_prompt: Prompts | None = ...,
        negative_prompt_2: Prompts | None = ...,
        negative_prompt_3: Prompts | None = ...,
        num_images_per_prompt: int = ...,
        guidance_scale: float | None = ...,
        true_cfg_scale: float | None = ...,
        guidance_interval: tuple[float, float] = ...,
        generator: torch.Generator | Sequence[torch.Generator] | None = ...,
        latents: Tensor | None = ...,
        noise: Tensor | None = ...,
        anchors: Tensor | None = ...,
        output_type: OutputType = ...,
        return_dict: Literal[True] = ...,
        callback_on_step_end: Callback | None = ...,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ...,
        **further: Any,
    ) -> PipelineOutput: ...

    @overload
    def __call__(
        self,
        prompt: Prompts | None = ...,
        *,
        prompt_2: Prompts | None = ...,
        prompt_3: Prompts | None = ...,
        negative_prompt: Prompts | None = ...,
        negative_prompt_2: Prompts | None = ...,
        negative_prompt_3: Prompts | None = ...,
        num_images_per_prompt: int = ...,
        guidance_scale: float | None = ...,
        true_cfg_scale: float | None = ...,
        guidance_interval: tuple[float, float] = ...,
        generator: torch.Generator | Sequence[torch.Generator] | None = ...,
        latents: Tensor | None = ...,
        noise: Tensor | None = ...,
        anchors: Tensor | None = ...,
        output_type: OutputType = ...,
        return_dict: Literal[False],
        callback_on_step_end: Callback | None = ...,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ...,
        **further: Any,
    ) -> tuple[Any]: ...

    @survives_fork
    def __call__(
        self,
        prompt: Prompts | None = None,
        *,
        prompt_2: Prompts | None = None,
        prompt_3: Prompts | None = None,
        negative_prompt: Prompts | None = None,
        negative_prompt_2: Prompts | None = None,
        negative_prompt_3: Prompts | None = None,
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
        watcher = None if callback_on_step_end is None else Watcher(self, callback_on_step_end, names)
        per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        request = terms.request(
            [prompt, prompt_2, prompt_3], [negative_prompt, negative_prompt_2, negative_prompt_3], embeddings,
            guidance_scale, true_cfg_scale, guidance_interval, per_prompt,
        )
        call = Call(guidance_scale=request.distilled if request.negative is None else request.scale)
        held = self.weights.reading() if self.weights is not None else nullcontext()
        with held, self.on_threads(), plain(inference=True), self._calls.one(call):
            draws = self.drawing.given(request.texts.count, generator, latents, noise, anchors)
            latents_only, show = output_type == "latent", self._show_progress
            results = make(self, call, request, draws, watcher, latents_only=latents_only, show_progress=show)
        with plain():  # ordinary tensors go out
            images = self.to_images(torch.cat(results), output_type)
        return PipelineOutput(images) if return_dict else (images,)

    def _built_in(self) -> BuiltIn:
        geometry, schedule = self.geometry, self.schedule
        return BuiltIn(
            geometry.height, geometry.width, schedule.nfe, schedule.sigmas[:-1], self.defaults.max_sequence_length,
            geometry.frames,
        )

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
