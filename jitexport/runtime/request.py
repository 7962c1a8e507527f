"""What a call asks for: prompts, negative prompts and guidance, checked against what its model can do."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jitexport.arguments import check_number, check_prompts, is_number, is_tensor, require_finite, shown
from jitexport.errors import InputError
from jitexport.guidance import Guidance
from jitexport.specs import DTYPES, TensorSpec

if TYPE_CHECKING:
    from jitexport.runtime.phases import Phases

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """What n images show: a list of prompts for each text encoder, or the encoders' outputs [n, ...]."""

    count: int
    prompts: Sequence[Sequence[str]] = ()
    given: Sequence[Tensor] | None = None

    def embeddings(self, pipe: Phases, rows: Sequence[int]) -> Sequence[Tensor]:
        """The text engine's outputs for a chunk of images."""
        if self.given is not None:
            return [t[list(rows)] for t in self.given]
        return pipe.engines["text"](*pipe.tokenize(*([prompts[i] for i in rows] for prompts in self.prompts)))


@dataclass(frozen=True)
class Request:
    """What a call asks for, checked.

    Attributes:
        texts, negative: of the images, and of their second pass; None for none.
        distilled: the guidance that is an input.
        scale, steps: of the second pass.
    """

    texts: Texts
    negative: Texts | None
    distilled: float | None
    scale: float
    steps: range


@dataclass(frozen=True)
class Terms:
    """What calls of a pipeline may ask for.

    Attributes:
        guidance: of the model's ordinary pipeline.
        outputs: of the text engine.
        readers: number of tokenizers.
        steps: of a call.
        device: where embeddings go.
    """

    guidance: Guidance
    outputs: Sequence[TensorSpec]
    readers: int
    steps: int
    device: torch.device

    def embedding_arguments(self) -> list[str]:
        """The arguments by which a call gives what the text encoders would, for both passes."""
        own = [self._argument(spec.name) for spec in self.outputs]
        return [*own, *(f"negative_{name}" for name in own)]

    @staticmethod
    def _argument(output: str) -> str:
        return "pooled_prompt_embeds" if output == "pooled" else output

    def request(
        self,
        prompts: Sequence[Any],
        negative: Sequence[Any],
        embeddings: Mapping[str, Any],
        guidance_scale: float | None,
        true_cfg_scale: float | None,
        interval: tuple[float, float],
        per_prompt: int,
    ) -> Request:
        """The arguments of a call, checked.

        Args:
            prompts, negative: for the first text encoder and for those after it, as the call was given them.
            embeddings: what was given in their place, by the names of `embedding_arguments`.
            interval: shares of the steps.
            per_prompt: images of each prompt.

        Raises:
            InputError: what the model cannot do, or what does not fit together.
        """
        distilled, scale = self._scales(guidance_scale, true_cfg_scale)
        own = {name: value for name, value in embeddings.items() if not name.startswith("negative_")}
        others = {name.removeprefix("negative_"): v for name, v in embeddings.items() if name.startswith("negative_")}
        texts = self._texts("prompt", prompts, own, per_prompt)
        second = self._negative(negative, others, scale, texts.count, per_prompt)
        if second is None and true_cfg_scale is not None and scale > 1:
            logger.warning("true_cfg_scale=%g without a negative prompt: there is no classifier-free guidance", scale)
        return Request(texts, second, distilled, scale, self._guided_steps(interval))

    def _scales(self, guidance_scale: float | None, true_cfg_scale: float | None) -> tuple[float | None, float]:
        """The distilled guidance, and the scale of the second pass."""
        guidance = self.guidance
        both = {"guidance_scale": guidance_scale, "true_cfg_scale": true_cfg_scale}
        given = {name: check_number(name, v, least=0) for name, v in both.items() if v is not None}
        distilled = given.pop("guidance_scale", guidance.distilled) if guidance.distilled is not None else None
        scale = 1.0 if guidance.true is None else given.pop(guidance.argument, guidance.true)
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
    ) -> Texts | None:
        """What the second pass reads; None where there is none."""
        guidance = self.guidance
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
        return range(*(round(share * self.steps) for share in interval))

    def _texts(
        self, name: str, prompts: Sequence[Any], embeddings: Mapping[str, Any], per_prompt: int
    ) -> Texts:
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
                if other is not None and i > self.readers:
                    raise InputError(f"this model has no text encoder for {name}_{i}", remedy=f"leave {name}_{i} out")
                lists.append(lists[0] if other is None else check_prompts(f"{name}_{i}", other))
                if len(lists[-1]) != len(lists[0]):
                    raise InputError(
                        f"one {name}_{i} per {name} is needed", found=len(lists[-1]), expected=len(lists[0])
                    )
            rows = [i for i in range(len(lists[0])) for _ in range(per_prompt)]
            return Texts(len(rows), prompts=[[texts[i] for i in rows] for texts in lists])
        if any(prompt is not None for prompt in prompts):
            raise InputError(f"give {name}s or {prefix}prompt_embeds, not both")
        embeds = []
        main = embeddings.get("prompt_embeds")
        n = len(main) if is_tensor(main) and main.ndim else 0
        for spec in self.outputs:
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
        return Texts(len(embeds[0]), given=embeds)


def _says_nothing(prompt: object) -> bool:
    """Whether a negative prompt is as good as none."""
    return prompt is None or prompt == "" or (isinstance(prompt, list | tuple) and all(p in (None, "") for p in prompt))
