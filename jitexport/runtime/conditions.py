"""What the stage engines read beside tokens and positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jitexport.methods.base import Draws
from jitexport.specs import EngineSpec


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


def by_name(condition: Condition, draws: Draws, guided: Guided | None) -> dict[str, Tensor]:
    """Everything that the loop reads."""
    named = {f"draws {name}": value for name, value in vars(draws).items() if value is not None}
    for kind, one in {"condition": condition, "negative": None if guided is None else guided.negative}.items():
        if one is not None:
            named |= {f"{kind} step {name}": value for name, value in one.per_step.items()}
            named |= {f"{kind} all {name}": value for name, value in one.static.items()}
    return named if guided is None else named | {"scale": guided.scale}


def from_names(named: Mapping[str, Tensor], steps: int) -> tuple[Condition, Draws, Guided | None]:
    """The inverse of `by_name`, for guidance at all of the steps or none."""

    def starting(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}

    condition, negative = (Condition(starting(f"{k} step "), starting(f"{k} all ")) for k in ("condition", "negative"))
    guided = Guided(negative, named["scale"], range(steps)) if "scale" in named else None
    return condition, Draws(**starting("draws ")), guided
