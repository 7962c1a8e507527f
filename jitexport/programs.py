"""Programs: what is between a module's regions as plain data, checked before it is opened.

A `Program` runs regions, which are compiled apart (see `jitexport.regions`), and a few of PyTorch's operators, one
after the other. `check` finds out whether values are there before they are used, and whether every region gets tensors
of the layouts that it was compiled for, which native code would not check; `open_program` makes a function of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
#: By name; what nobody uses has none.
Values = dict[str | None, Tensor]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Layout(_Entry):
    """How a tensor lies in memory; the dtype by torch's name."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """Of a tensor."""
        return cls(shape=tuple(tensor.shape), stride=tuple(tensor.stride()), dtype=str(tensor.dtype)[len("torch.") :])

    def empty(self, device: torch.device | None = None) -> Tensor:
        """A tensor with this layout."""
        return torch.empty_strided(self.shape, self.stride, dtype=getattr(torch, self.dtype), device=device)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}, strides {list(self.stride)}"


class Region(_Entry):
    """Layouts of a kind's tensors: what the program hands it, the weights of its block, and what it gives."""

    inputs: tuple[Layout, ...]
    weights: tuple[Layout, ...]
    outputs: tuple[Layout, ...]


class Step(_Entry):
    """A region run on values and weights, or one of PyTorch's operators run on arguments; gives values their names.

    Attributes:
        region, inputs, weights: a kind, names of values, full names of weights.
        operator, arguments, keywords: "aten.linear.default"; numbers, strings and lists of them, {"value": name} for a
            tensor, {"dtype": name} for a dtype, {"device": null} for the engine's device.
        outputs: names of the values that it gives, null for what nobody uses.
    """

    region: str | None = None
    inputs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    operator: str | None = None
    arguments: list[Any] = []
    keywords: dict[str, Any] = {}
    outputs: tuple[str | None, ...]


class Program(_Entry):
    """Steps in order, which make the outputs from the inputs; `weights` are values from the start, by full name."""

    inputs: tuple[str, ...]
    weights: dict[str, str]
    layouts: dict[str, Layout]
    regions: dict[str, Region]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]

    @property
    def calls(self) -> int:
        """How often regions run."""
        return sum(step.region is not None for step in self.steps)


def open_program(
    program: Program, libraries: Mapping[str, Run], weights: Mapping[str, Tensor], device: torch.device
) -> Run:
    """A program that `check` let pass as a function of its inputs, on weights that it reads where they are.

    Args:
        libraries: runs each kind of region on its inputs and a block's weights; may use up the list that it gets.
        weights: by full name.
    """
    bound: Values = {value: weights[name].detach() for value, name in program.weights.items()}
    runs = [opened(step, libraries, weights, device) for step in program.steps]
    steps = [(run, tuple(dead)) for run, dead in zip(runs, last_uses(program), strict=True)]
    inputs, outputs = program.inputs, program.outputs

    def run(given: Sequence[Tensor]) -> list[Tensor]:
        values: Values = {**bound, **dict(zip(inputs, given, strict=True))}
        for step, dead in steps:
            step(values)
            for name in dead:  # its memory is free for what comes next
                del values[name]
        return [values[name] for name in outputs]

    return run


def opened(
    step: Step, libraries: Mapping[str, Run], weights: Mapping[str, Tensor], device: torch.device
) -> Callable[[Values], None]:
    """A step as a function that adds its values to others."""
    if step.region is not None:
        library, its_weights, names = libraries[step.region], [weights[n].detach() for n in step.weights], step.inputs

        def call(values: Values) -> None:
            results = library([*[values[name] for name in names], *its_weights])
            values.update(zip(step.outputs, results, strict=True))

    else:
        operator = find_operator(step.operator or "")

        def call(values: Values) -> None:
            results = operator(
                *[filled(a, values, device) for a in step.arguments],
                **{name: filled(a, values, device) for name, a in step.keywords.items()},
            )
            results = (results,) if isinstance(results, Tensor) else results
            values.update(zip(step.outputs, results, strict=True))

    return call


def find_operator(name: str) -> Callable[..., Any]:
    """One of PyTorch's operators by its name in graphs.

    Raises:
        ValueError: there is no such operator.
    """
    space, _, rest = name.partition(".")
    operator, _, overload = rest.partition(".")
    try:
        if space != "aten":
            raise AttributeError(name)
        return getattr(getattr(torch.ops.aten, operator), overload)
    except AttributeError:
        raise ValueError(f"{name!r} is not one of PyTorch's operators") from None


def filled(argument: Any, values: Values, device: torch.device) -> Any:
    """A step's argument as an operator takes it."""
    if isinstance(argument, list):
        return [filled(a, values, device) for a in argument]
    if not isinstance(argument, dict):
        return argument
    [(kind, name)] = argument.items()
    return device if kind == "device" else values[name] if kind == "value" else getattr(torch, name)


def arguments_of(argument: Any) -> Iterator[tuple[str, Any]]:
    """What is no plain number, string or list in an operator's argument: ("value", name) and the like.

    Raises:
        ValueError: something that no argument is.
    """
    if isinstance(argument, list):
        for a in argument:
            yield from arguments_of(a)
    elif isinstance(argument, dict):
        match list(argument.items()):
            case [("value", str(name))]:
                yield "value", name
            case [("dtype", str(name))] if isinstance(getattr(torch, name, None), torch.dtype):
                yield "dtype", name
            case [("device", None)]:
                yield "device", None
            case _:
                raise ValueError(f"{argument!r} is no argument of an operator")


def uses(step: Step) -> list[str]:
    """Names of the values that a step reads."""
    given = [*step.arguments, *step.keywords.values()]
    return [*step.inputs, *(name for a in given for kind, name in arguments_of(a) if kind == "value")]


def last_uses(program: Program) -> list[set[str | None]]:
    """For each step, the values that nobody needs after it. Inputs and weights are others' and stay."""
    keep: set[str | None] = {*program.outputs, *program.inputs, *program.weights}
    dead: list[set[str | None]] = []
    for step in reversed(program.steps):
        names = {*uses(step), *step.outputs} - keep
        dead.append(names)
        keep |= names
    return dead[::-1]


def check(program: Program, weights: Mapping[str, Tensor]) -> None:
    """Compare what a program's steps take with what there is.

    Raises:
        ValueError: the first thing that does not fit, and the step that it is in.
    """
    known = {*program.inputs, *program.weights}
    if missing := [name for name in program.weights.values() if name not in weights]:
        raise ValueError(f"no weight {missing[0]}")
    for i, step in enumerate(program.steps):
        where = f"step {i} ({step.region or step.operator})"
        if (step.region is None) == (step.operator is None):
            raise ValueError(f"{where} must run a region or an operator")
        if unknown := [name for name in uses(step) if name not in known]:
            raise ValueError(f"{where} uses {unknown[0]!r}, which no earlier step gives")
        if step.region is None:
            find_operator(step.operator or "")
        else:
            check_call(program, step, weights, where)
        known |= {name for name in step.outputs if name is not None}
    if unknown := [name for name in program.outputs if name not in known]:
        raise ValueError(f"no step gives the output {unknown[0]!r}")


def check_call(program: Program, step: Step, weights: Mapping[str, Tensor], where: str) -> None:
    """The same for a step that runs a region."""
    region = program.regions.get(step.region or "")
    if region is None:
        raise ValueError(f"{where} runs a region that is not there")
    if missing := [name for name in step.weights if name not in weights]:
        raise ValueError(f"{where}: no weight {missing[0]}")
    layouts = program.layouts
    pairs = [
        *zip_named("input", step.inputs, [layouts.get(n) for n in step.inputs], region.inputs, where),
        *zip_named("weight", step.weights, [Layout.of(weights[n]) for n in step.weights], region.weights, where),
        *zip_named("output", step.outputs, [layouts.get(n or "") for n in step.outputs], region.outputs, where),
    ]
    for what, name, found, expected in pairs:
        if name is not None and found != expected:
            raise ValueError(f"{where}: {what} {name} is {found}, the region was compiled for {expected}")


def zip_named(
    what: str, names: Sequence[str | None], found: Sequence[Layout | None], expected: Sequence[Layout], where: str
) -> Iterator[tuple[str, str | None, Layout | None, Layout]]:
    """Found and expected layouts side by side."""
    if len(names) != len(expected):
        raise ValueError(f"{where} has {len(names)} {what}s, the region was compiled for {len(expected)}")
    return ((what, *row) for row in zip(names, found, expected, strict=True))
