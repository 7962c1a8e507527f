"""A module as a short program over regions: its repeated blocks, each kind of which is compiled once.

A module names its functions of repeated blocks in an attribute `regions` and calls them as `self.<name>(block, ...)`,
with a block (a module), then tensors; they return a tensor or a tuple of tensors. `outline` runs such a module on fake
tensors and finds the kinds of regions: calls of one function on blocks of the same make and tensors of the same layout.
A kind is compiled as a function of its tensors and of its block's weights, so that one library runs it for every block.

What lies between the regions stays as it is: a few of PyTorch's operators, run one after the other. So the whole module
is plain data: see `jitexport.programs`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from jitexport.blocks import calls_through, make_of, tensors_of
from jitexport.errors import CompileError
from jitexport.programs import Layout, Program, Region, Step


class Kind(nn.Module):
    """A region as a function of tensors: the inputs of a call, then its block's weights; the results as a tuple.

    Results lie row by row, so that it does not matter which layout a compiler would prefer.
    """

    def __init__(self, name: str, function: Callable[..., Any], block: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.name = name
        self.layouts = [Layout.of(t) for t in inputs]
        weights = tensors_of(block)
        self._names = [f"block.{name}" for name in weights]
        self._call = (Call(function, block),)  # in a tuple, so that its weights are no weights of this module
        self.weights = tuple(w.detach() for w in weights.values())

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Inputs, then weights."""
        inputs, weights = tensors[: len(self.layouts)], tensors[len(self.layouts) :]
        out = functional_call(self._call[0], dict(zip(self._names, weights, strict=True)), tuple(inputs))
        return tuple(t.contiguous() for t in (out if isinstance(out, tuple | list) else (out,)))

    def example(self) -> list[Tensor]:
        """Tensors as `forward` takes them: inputs that hold zeros, and the weights of the first block of the kind."""
        device = self.weights[0].device if self.weights else None
        return [*(layout.empty(device).zero_() for layout in self.layouts), *self.weights]


class Call(nn.Module):
    """A function of a block with the block as a submodule."""

    def __init__(self, function: Callable[..., Any], block: nn.Module) -> None:
        super().__init__()
        self.function, self.block = function, block

    def forward(self, *inputs: Tensor) -> Any:
        """What the function makes of the block and the inputs."""
        return self.function(self.block, *inputs)


@dataclass(frozen=True)
class Outline:
    """A program, and what is to be compiled for it, by the names that the program has for it."""

    program: Program
    kinds: Mapping[str, Kind]


def outline(module: nn.Module, example: Sequence[Tensor]) -> Outline | None:
    """The program of a module for the shapes of an example; None for a module that has no regions.

    Raises:
        CompileError: regions that take something other than a block and tensors, or steps between regions that are more
            than operators on tensors.
    """
    names = getattr(module, "regions", ())
    if not names:
        return None
    kinds: dict[object, Kind] = {}
    found: dict[str, Region] = {}
    steps: list[Step] = []
    full_names = {id(t): name for name, t in tensors_of(module, every_name=True).items()}

    def record(name: str, function: Callable[..., Any], block: nn.Module, *inputs: Tensor) -> Any:
        """Note a call; the first one of a kind is run, on fake tensors."""
        if not isinstance(block, nn.Module) or not all(isinstance(t, Tensor) for t in inputs):
            raise CompileError(
                f"region {name} cannot be compiled by itself", expected="a block (a module), then tensors",
                found=", ".join(type(x).__name__ for x in (block, *inputs)),
            )
        weights = tensors_of(block)
        key = kind_of(name, block, inputs)
        if key not in kinds:
            several = sum(kind.name.split("-")[0] == name for kind in kinds.values())
            kind = kinds[key] = Kind(f"{name}-{several + 1}" if several else name, function, block, inputs)
            results = kind(*inputs, *kind.weights)
            found[kind.name] = Region(
                inputs=tuple(kind.layouts), weights=tuple(map(Layout.of, kind.weights)),
                outputs=tuple(map(Layout.of, results)),
            )
        kind = kinds[key]
        steps.append(Step(region=kind.name, weights=tuple(full_names[id(w)] for w in weights.values()), outputs=()))
        return unwrapped([layout.empty(inputs[0].device) for layout in found[kind.name].outputs])

    with fake_tensors() as fake, calls_through(module, record):
        module(*map(fake.from_tensor, example))

    waiting = iter(steps)

    def mark(name: str, function: Callable[..., Any], block: nn.Module, *inputs: Tensor) -> Any:
        """Put the call into the graph as one operator."""
        step = next(waiting)
        outputs = [layout.model_dump() for layout in found[step.region or ""].outputs]
        return unwrapped(torch.ops.jitexport.region(list(inputs), step.model_dump_json(), json.dumps(outputs)))

    with calls_through(module, mark):
        exported = torch.export.export(module, tuple(example))
    return Outline(program_of(exported, found), {kind.name: kind for kind in kinds.values()})


def kind_of(name: str, block: nn.Module, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """What calls of a region have in common that are of one kind."""
    return (name, *make_of(block), *map(Layout.of, (*inputs, *tensors_of(block).values())))


def unwrapped(results: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """One tensor as it is, several as a tuple."""
    return results[0] if len(results) == 1 else tuple(results)


@contextmanager
def fake_tensors() -> Iterator[Any]:
    """Everything inside is computed for its shapes only, on fake tensors in the place of real ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        yield mode


@torch.library.custom_op("jitexport::region", mutates_args=())
def region_operator(inputs: Sequence[Tensor], step: str, outputs: str) -> list[Tensor]:
    """A place in a graph where a region is called: a `Step` without values, and the layouts of its outputs, as JSON."""
    raise NotImplementedError("a mark in graphs, which nobody runs")


@region_operator.register_fake
def _(inputs: Sequence[Tensor], step: str, outputs: str) -> list[Tensor]:
    layouts = [Layout.model_validate_json(json.dumps(layout)) for layout in json.loads(outputs)]
    return [layout.empty(inputs[0].device) for layout in layouts]


def program_of(exported: torch.export.ExportedProgram, regions: Mapping[str, Region]) -> Program:
    """An exported graph, with marks for its regions, as a program."""
    signature = exported.graph_signature
    sources = signature.inputs_to_parameters | signature.inputs_to_buffers
    weights: dict[str, str] = {}
    layouts: dict[str, Layout] = {}
    steps: list[Step] = []
    outputs: tuple[str, ...] = ()
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node.users:
            layouts[node.name] = Layout.of(value)
        if node.op == "placeholder" and node.name in sources:
            weights[node.name] = sources[node.name]
        elif node.op == "placeholder" and node.name not in signature.user_inputs:
            raise CompileError(
                "a constant tensor lies between regions", found=node.name,
                expected="parameters and buffers of the module", remedy="register it as a buffer",
            )
        elif node.op == "output":
            outputs = tuple(argument.name for argument in node.args[0])
        elif node.op == "call_function" and node.users and not is_item(node):
            steps.append(step_of(node))
    used = {node.name for node in exported.graph.nodes if node.users}
    return Program(
        inputs=tuple(signature.user_inputs), weights={name: w for name, w in weights.items() if name in used},
        layouts=layouts, regions=dict(regions), steps=tuple(steps), outputs=outputs,
    )


def is_item(node: torch.fx.Node) -> bool:
    """Whether a node takes a tensor out of an operator's list of results."""
    return getattr(node.target, "__name__", "") == "getitem"


def step_of(node: torch.fx.Node) -> Step:
    """A node that calls an operator as a step."""
    outputs: tuple[str | None, ...] = (node.name,)
    if not isinstance(node.meta["val"], Tensor):
        # What is taken out and not used, as the text of a last block, needs no name.
        items = {user.args[1]: user.name for user in node.users if user.users}
        outputs = tuple(items.get(i) for i in range(len(node.meta["val"])))
    if node.target is torch.ops.jitexport.region.default:
        called: tuple[Any, ...] = node.args
        inputs, step, _ = called
        given = {"inputs": tuple(x.name for x in inputs), "outputs": outputs}
        return Step.model_validate_json(step).model_copy(update=given)
    operator = str(node.target)
    if not isinstance(node.target, torch._ops.OpOverload) or not operator.startswith("aten."):
        raise CompileError("between regions there may be PyTorch's operators only", found=operator)
    arguments = [plain_argument(a) for a in node.args]
    keywords = {name: plain_argument(a) for name, a in node.kwargs.items()}
    return Step(operator=operator, arguments=arguments, keywords=keywords, outputs=outputs)


def plain_argument(argument: Any) -> Any:
    """An operator's argument in a graph as plain data."""
    if isinstance(argument, torch.fx.Node):
        return {"value": argument.name}
    if isinstance(argument, torch.dtype):
        return {"dtype": str(argument)[len("torch.") :]}
    if isinstance(argument, torch.device):
        return {"device": None}
    if isinstance(argument, list | tuple):
        return [plain_argument(a) for a in argument]
    if argument is None or isinstance(argument, bool | int | float | str):
        return argument
    raise CompileError("an operator between regions has an argument that is no plain data", found=repr(argument))
