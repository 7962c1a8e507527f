"""FLOPs of a stage module, counted by PyTorch on meta tensors: linear layers and attention, 2 per multiply-add."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jitexport.blocks import calls_through, make_of
from jitexport.models.base import ModelAdapter
from jitexport.models.stages import ACTS, INDICATOR, REFRESH, kind_of
from jitexport.quant import unquantized
from jitexport.schedule import COMPUTED, FORECAST, Stage, StageSchedule
from jitexport.specs import DTYPES, EngineSpec


def count_flops(module: nn.Module, spec: EngineSpec) -> int:
    """FLOPs of one run of a module that lives on the meta device.

    Of blocks that the module names as regions, each kind is counted once and taken as often as it runs.
    """
    inputs = [torch.empty(s.shape, dtype=DTYPES[s.dtype], device="meta") for s in spec.inputs]
    counted: dict[object, tuple[int, Any]] = {}
    repeated = 0

    def once(name: str, region: Callable[..., Any], block: nn.Module, *tensors: Tensor) -> Any:
        nonlocal repeated
        key = (name, *make_of(block), *((t.shape, t.dtype) for t in (*tensors, *block.parameters())))
        if key in counted:
            flops, outputs = counted[key]
            repeated += flops
            return outputs
        before = counter.get_total_flops()
        outputs = region(block, *tensors)
        counted[key] = counter.get_total_flops() - before, outputs
        return outputs

    through = calls_through(module, once) if hasattr(module, "regions") else nullcontext()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, through:
        module(*inputs)
    return counter.get_total_flops() + repeated


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a step of one pass as a function of its tokens m: constant + linear * m + quadratic * m^2.

    Exact, because a transformer's linear layers cost in proportion to its tokens and attention to their square.
    """

    constant: float
    linear: float
    quadratic: float

    def __call__(self, tokens: int) -> float:
        """FLOPs of a step of one image at `tokens` active tokens."""
        return self.constant + tokens * (self.linear + tokens * self.quadratic)

    def times(self, passes: int) -> StepCost:
        """The cost of a step of so many passes."""
        return StepCost(passes * self.constant, passes * self.linear, passes * self.quadratic)


#: Of a forecast outside of any engine.
NOTHING = StepCost(0.0, 0.0, 0.0)


def step_cost(adapter: ModelAdapter, dtype: str, action: str = COMPUTED) -> StepCost:
    """Measure a model's cost at three token counts, on meta tensors, and take the parabola through them.

    As in the ordinary pipeline, a step counts its conditioning (time and guidance embedding, modulation, text
    projection), although an engine bundle computes that once per image: well under 1% of a step.

    Args:
        adapter: a model on the meta device: see `meta_adapter`.
        action: of the step; see `jitexport.models.stages`.
    """

    def at(tokens: int) -> int:
        stage = Stage(0, tokens, 1)
        specs = {s.name: s for s in adapter.specs(StageSchedule((stage,), (1.0, 0.0)), 1, dtype, further=(action,))}
        names = ("condition", stage.name) if action == COMPUTED else (stage.engine(action),)
        return sum(count_flops(adapter.module(name), specs[name]) for name in names)

    h = 2**16 if action == REFRESH else 64  # there, shares of tokens are rounded to whole tokens
    a, b, c = at(h), at(2 * h), at(3 * h)
    quadratic = 0.0 if action == REFRESH else (a - 2 * b + c) / (2 * h * h)
    linear = (b - a) / h - quadratic * 3 * h
    return StepCost(a - linear * h - quadratic * h**2, linear, quadratic)


def step_costs(adapter: ModelAdapter, dtype: str) -> dict[str, StepCost]:
    """The cost of every action that a step of a model can have; a forecast outside of any engine costs nothing.

    Args:
        adapter: a model on the meta device, with the features that its stage engines are to have.
    """
    actions = [action for action in ACTS[kind_of(adapter.settings()["features"])] if action != INDICATOR]
    return {FORECAST: NOTHING} | {action: step_cost(adapter, dtype, action) for action in actions}


def preview_cost(adapter: ModelAdapter, dtype: str) -> float:
    """FLOPs of decoding one image at half its sides: convolutions and attention of the autoencoder.

    Args:
        adapter: a model on the meta device.
    """
    schedule = StageSchedule((Stage(0, 1, 1),), (1.0, 0.0))
    spec = next(s for s in adapter.specs(schedule, 1, dtype, preview=True) if s.name == "preview")
    return count_flops(adapter.module("preview"), spec)


def meta_adapter(adapter: ModelAdapter, dtype: str, features: str | None = None) -> ModelAdapter:
    """The same model without weights, on the meta device, before any quantization, which leaves FLOPs alone.

    Args:
        features: that its stage engines are to have.
    """
    settings = unquantized(adapter.settings()) | {"features": features}
    return type(adapter).from_configs(adapter.configs, settings, DTYPES[dtype])
