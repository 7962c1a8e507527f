"""A caller's function that is called after every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jitexport.ambient import plain
from jitexport.arguments import is_tensor, require_finite
from jitexport.errors import InputError
from jitexport.sampler import Look

if TYPE_CHECKING:
    from jitexport.runtime.pipeline import Pipeline

#: (pipeline, step index, timestep, {"latents": ...}) -> {"latents": ...} or {}; raising ends the call.
Callback = Callable[["Pipeline", int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class Watcher:
    """A callback of a call.

    Attributes:
        names: of the tensors that it is given: see `Pipeline.__call__`.
    """

    pipe: Pipeline
    callback: Callback
    names: Sequence[str]

    def after(self, step: int, look: Look, embeddings: Sequence[Tensor]) -> Tensor | None:
        """Run it outside of inference mode, on tensors that it may keep; the latents that it asks for.

        Raises:
            InputError: it returned something that the loop cannot go on with.
        """
        y = look.latents()
        watched = {name: getattr(look, name)() for name in ("clean", "places") if name in self.names}
        with plain():
            given = {"latents": y.clone()} | {name: value.clone() for name, value in watched.items()}
            if "prompt_embeds" in self.names:
                given["prompt_embeds"] = self._prompt_embeds(embeddings).clone()
            version = given["latents"]._version
            mine = {name: given[name] for name in self.names}
            answer = self.callback(self.pipe, step, self.pipe.schedule.sigmas[step] * 1000, dict(mine))
            if answer is not None and not isinstance(answer, Mapping):
                raise InputError("a callback returns a table of tensors, or None", found=type(answer).__name__)
            answer = answer or {}
            if "prompt_embeds" in mine:
                self._check_embeddings(answer.get("prompt_embeds", mine["prompt_embeds"]), embeddings)
            changed = answer.get("latents")
            if changed is None and given["latents"]._version == version:
                return None
            changed = given["latents"] if changed is None else changed  # written to in place
            _check_latents(changed, y)
        return changed.to(y)

    def _prompt_embeds(self, embeddings: Sequence[Tensor]) -> Tensor:
        names = [s.name for s in self.pipe.engines["text"].spec.outputs]
        return embeddings[names.index("prompt_embeds")]

    def _check_embeddings(self, given: Tensor, embeddings: Sequence[Tensor]) -> None:
        own = self._prompt_embeds(embeddings)
        if not is_tensor(given) or given.shape != own.shape or not torch.equal(given.to(own), own):
            raise InputError(
                "the callback returned other prompt_embeds, but what depends on them is computed before the loop",
                remedy="return the latents only",
            )


def _check_latents(changed: Tensor, own: Tensor) -> None:
    if not is_tensor(changed) or changed.shape != own.shape:
        raise InputError(
            "the callback returned latents of another shape",
            found=tuple(changed.shape) if is_tensor(changed) else type(changed).__name__,
            expected=tuple(own.shape),
        )
    require_finite("the callback's latents", changed.float())
