"""The contract between the sampling loop and a temporal method.

A schedule says of each step whether it is computed or by which cheaper action it gets its velocity; both are decided
when a bundle is built, so that the loop has fixed shapes and no decision in it. A temporal method, a cache by the
field's name, places those actions, and gives every step its velocity: at a computed step it has the transformer run and
takes note, at another it forecasts, outside of any engine or with an engine that does less.

What it remembers is a value that the loop hands from step to step, so a cache object itself has no state and serves
calls from several threads. It is in fp32, but for ToCa's gigabytes. With classifier-free guidance the velocity is the
combined one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from torch import Tensor

from jitexport.arguments import is_number, is_whole
from jitexport.errors import InputError
from jitexport.methods.temporal.placing import at_steps, by_interval, within
from jitexport.schedule import COMPUTED, FORECAST, StageSchedule, Step

History = TypeVar("History")

#: run(action, tokens [B, m, C], number of a step, *tensors that the engine takes beside) -> velocity [B, m, C], and
#: what the engine hands on. Rows of those are the batch's, and behind them the second pass's where there is one.
Run = Callable[..., Sequence[Tensor]]

#: What was known of a stage's tokens, [B, m, C], as that of the tokens of the stage that begins, [B, m', C].
Carry = Callable[[Tensor], Tensor]

#: FLOPs of an action at a token count.
Price = Callable[[str, int], float]


@dataclass(frozen=True)
class CacheOptions:
    """Settings that all temporal methods have.

    Attributes:
        every: a computed step after every `every` - 1 others in a stage, behind the warm-up. None: as a speed-up asks.
        warmup: steps that are computed at the start of a stage.
        computed: numbers of the computed steps by hand, from 0, beside those that always are; empty for none given.
        spatial: of a speed-up s that is asked for, s ** spatial is the spatial method's part, where it can be.

    Raises:
        InputError: a value that has no meaning.
    """

    every: int | None = None
    warmup: int = 1
    computed: tuple[int, ...] = ()
    spatial: float = 0.65

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):  # as a manifest has it
                object.__setattr__(self, name, tuple(value))
        fine = self.meaningful()
        if wrong := [name for name, good in fine.items() if not good]:
            said = ", ".join(f"{name}={getattr(self, name)}" for name in wrong)
            raise InputError("cache option without a meaning", found=said)

    def meaningful(self) -> dict[str, bool]:
        """Whether each setting has a meaning."""
        return {
            "every": self.every is None or whole(self.every, 1),
            "warmup": whole(self.warmup, 1),
            "computed": list(self.computed) == sorted(set(self.computed)) and all(whole(i, 0) for i in self.computed),
            "spatial": share(self.spatial),
        }


def whole(value: object, least: int, most: float = math.inf) -> bool:
    """Whether an option is a whole number within these limits."""
    return is_whole(value) and least <= value <= most


def share(value: object) -> bool:
    """Whether an option is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


class Cache(ABC, Generic[History]):
    """A temporal method.

    Args:
        options: settings by name; those left out have their usual value.

    Raises:
        InputError: options that are not the method's.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[CacheOptions]] = CacheOptions
    #: What the stage engines hand on beside velocities, by the name that the model families know it by; None for
    #: nothing, and then no engine is made for this method.
    features: str | None = None

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        try:
            self.settings = self.settings_class(**(options or {}))
        except TypeError:
            known = [f.name for f in fields(self.settings_class)]
            raise InputError(
                f"unknown option of the cache {self.name}",
                found=", ".join(sorted({*(options or {})} - {*known})) or options,
                expected=f"some of: {', '.join(known)}",
            ) from None

    @property
    def options(self) -> dict[str, Any]:
        """All settings as plain JSON values, for a manifest."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.settings).items()}

    # --- which steps are computed ---

    def action(self, schedule: StageSchedule, step: int) -> str:
        """The cheaper action of a step."""
        return FORECAST

    @property
    def placed(self) -> bool:
        """Whether the settings say which steps are computed; else a speed-up does."""
        return self.settings.every is not None or bool(self.settings.computed)

    def place(self, schedule: StageSchedule) -> StageSchedule:
        """A spatial method's schedule with the actions that the settings give its steps.

        Raises:
            ScheduleError: steps that the schedule does not have.
        """
        if self.settings.computed:
            computed = at_steps(schedule, self.settings.computed)
        else:
            computed = by_interval(schedule, self.settings.every or 1, self.settings.warmup)
        return self._with(schedule, computed)

    def solve(self, schedule: StageSchedule, price: Price, budget: float) -> StageSchedule | None:
        """The schedule with as many computed steps as a budget of FLOPs pays for; None if it is too small."""
        computed = within(
            schedule, self.settings.warmup, budget, lambda i, m: price(COMPUTED, m),
            lambda i, m: price(self.action(schedule, i), m),
        )
        return None if computed is None else self._with(schedule, computed)

    def _with(self, schedule: StageSchedule, computed: Iterable[int]) -> StageSchedule:
        chosen = set(computed)
        actions = (COMPUTED if i in chosen else self.action(schedule, i) for i in range(schedule.nfe))
        return replace(schedule, actions=tuple(actions))

    # --- in the loop ---

    def begin(self) -> History | None:
        """What is remembered before the first step: nothing, unless a method says otherwise."""
        return None

    def carried(self, history: History, carry: Carry | None) -> History | None:
        """What is remembered at the start of a later stage: nothing, unless a method says otherwise.

        Args:
            carry: for what is known of each token; None where the stages' tokens have nothing to do with each other.
        """
        return None

    @abstractmethod
    def velocity(self, run: Run, tokens: Tensor, step: Step, history: History) -> tuple[Tensor, History]:
        """The velocity of a step, [B, m, C], and what is remembered after it."""


class EveryStep(Cache[None]):
    """No temporal method: all steps are computed."""

    name = "none"

    def velocity(self, run: Run, tokens: Tensor, step: Step, history: None) -> tuple[Tensor, None]:
        return run(COMPUTED, tokens, step.index)[0], None


class Record(NamedTuple):
    """A step and what is remembered of it, in fp32: its velocity [B, m, C], or what an engine handed on."""

    step: Step
    value: Tensor


Past = tuple[Record, ...]


class Forecast(Cache[Past]):
    """A temporal method that forecasts a value of a step as a combination of past ones.

    Weights depend on noise levels and numbers of steps only, which are known when a bundle is built; so a forecast is
    a sum of a few tensors, and a CUDA graph holds it.

    Attributes:
        computed_kept, recent_kept: of how many last computed steps, and of how many last steps of any kind, values are
            remembered.
        most_amplified: largest sum of the weights' magnitudes, by which an error of the past values may grow.
    """

    @property
    @abstractmethod
    def computed_kept(self) -> int:
        """See above; a plain attribute will do."""

    @property
    def recent_kept(self) -> int:
        """See above."""
        return 0

    @property
    def most_amplified(self) -> float:
        """See above."""
        return 4.0

    @abstractmethod
    def weights(self, past: Sequence[Step], step: Step) -> list[float]:
        """The weight of the value of each remembered step, oldest first, in the forecast of another's."""

    def begin(self) -> Past:
        return ()

    def carried(self, history: Past, carry: Carry | None) -> Past:
        return () if carry is None else tuple(Record(step, carry(value)) for step, value in history)

    def forecast(self, step: Step, past: Past) -> Tensor:
        """The value of a step, from as many of the last ones as keep the forecast tame."""
        weights = self.tame_weights([r.step for r in past], step)
        return combine(weights, [r.value for r in past[-len(weights) :]])

    def tame_weights(self, past: Sequence[Step], step: Step) -> list[float]:
        """Weights of the last of the past steps: of all, or without the oldest as long as they amplify too much.

        Noise levels that lie close together say little of one far away: three at the beginning of JiT's schedules give
        a parabola that multiplies every error by 18 two steps later.
        """
        last = max(i for i, s in enumerate(past) if s.action == COMPUTED)
        tried = (self.weights(past[first:], step) for first in range(last + 1))
        weights = next(tried)
        while sum(map(abs, weights)) > self.most_amplified and (fewer := next(tried, None)) is not None:
            weights = fewer
        return weights

    def remember(self, past: Past, step: Step, value: Tensor) -> Past:
        """The past with one step more, and without what no forecast will read."""
        past = (*past, Record(step, value))
        computed = [i for i, record in enumerate(past) if record.step.action == COMPUTED][-self.computed_kept :]
        recent = range(max(0, len(past) - self.recent_kept), len(past))
        return tuple(past[i] for i in sorted({*computed, *recent}))


class VelocityForecast(Forecast):
    """Forecasts of velocities, for which no engine is made."""

    def velocity(self, run: Run, tokens: Tensor, step: Step, history: Past) -> tuple[Tensor, Past]:
        if step.action == COMPUTED:
            u = run(COMPUTED, tokens, step.index)[0].float()
        else:
            u = self.forecast(step, history)
        return u, self.remember(history, step, u)


class ResidualForecast(Forecast):
    """Forecasts of what the transformer's blocks add to the image, [R, m, D]: the engine `skip` adds it.

    So the velocity is made by the output layer, modulated for its own step.
    """

    features = "residual"

    def action(self, schedule: StageSchedule, step: int) -> str:
        return "skip"

    def velocity(self, run: Run, tokens: Tensor, step: Step, history: Past) -> tuple[Tensor, Past]:
        if step.action != COMPUTED:
            return run(step.action, tokens, step.index, self.forecast(step, history))[0], history
        u, residual = run(COMPUTED, tokens, step.index)
        return u, self.remember(history, step, residual.float())


class LastValue(Forecast):
    """The last computed value again."""

    computed_kept = 1

    def weights(self, past: Sequence[Step], step: Step) -> list[float]:
        """All on the last one."""
        return [0.0] * (len(past) - 1) + [1.0]


def combine(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape with weights that sum to 1; weights of 0 cost nothing."""
    (weight, tensor), *others = [pair for pair in zip(weights, tensors, strict=True) if pair[0]]
    total = tensor * weight
    for weight, tensor in others:
        total = total.add(tensor, alpha=weight)
    return total


def polynomial_weights(points: Sequence[float], x: float) -> list[float]:
    """Weights of values at distinct points in the value at x of the polynomial through them (Lagrange)."""
    weights = []
    for i, own in enumerate(points):
        weight = 1.0
        for j, other in enumerate(points):
            if i != j:
                weight *= (x - other) / (own - other)
        weights.append(weight)
    return weights


_LISTS = ("computed", "coefficients")


def parse_cache(text: str) -> tuple[str, dict[str, Any]]:
    """A temporal method and its options from text: "taylor", or "taylor:order=2,every=3,computed=0+1+4".

    Raises:
        InputError: text that says something else.
    """
    name, colon, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in rest.split(",") if colon else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value or key in options:
            raise InputError(
                "a cache's options must be name=value pairs", found=repr(text),
                expected="for example taylor, or taylor:order=2,every=3, or reuse:computed=0+1+4",
            )
        options[key] = tuple(_value(v) for v in value.split("+")) if key in _LISTS else _value(value)
    return name.strip(), options


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
