"""Kernels in C++ as operators that Inductor compiles into an engine's own code.

A kernel is a header and a few lines of Python: an operator with a plain implementation, and a call of the header's
function for Inductor to render. Engines need nothing beside themselves to run it.

Whoever compiles with Inductor asks for the kernels (`with native_kernels()`); whatever else traces, exports or runs a
model gets PyTorch's operators.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Heads and layers come in multiples of so many channels.
GROUP = 64


class Instructions(NamedTuple):
    """A set of a CPU's instructions that the headers are written in (lanes.h), and what gains by it."""

    name: str
    features: Sequence[str]  # as torch.cpu.get_capabilities calls them
    dtypes: Sequence[torch.dtype]  # of tensors whose products are faster by the kernels, as measured


AVX512 = Instructions(
    "AVX-512", ("avx512_bw", "avx512_dq", "avx512_vl", "avx512_bf16", "avx512_vnni"), (torch.bfloat16,)
)
AVX2 = Instructions("AVX2", ("avx2", "fma3"), (torch.float32, torch.bfloat16))

#: The file beside an engine that names its kernels.
RECORD = "kernels.json"

logger = logging.getLogger(__name__)

_active: Instructions | None = None
_used: set[str] = set()


def instructions() -> tuple[Instructions | None, str]:
    """What this CPU's kernels are written in, and why there are none where it is None.

    JITEXPORT_KERNELS=0 leaves them out, and JITEXPORT_KERNELS=1 uses them on CPUs where they are not the faster way.
    """
    wanted = os.environ.get("JITEXPORT_KERNELS")
    if wanted == "0":
        return None, "JITEXPORT_KERNELS=0 is set"
    has = torch.cpu.get_capabilities()
    if has.get("amx_tile") and wanted != "1":
        return None, "the CPU has matrix units (AMX), with which plain products are faster"
    chosen = AVX512 if has.get("avx512_f") else AVX2  # a compiler that finds AVX-512 takes its registers
    if lacking := [name for name in chosen.features if not has.get(name)]:
        return None, f"the CPU lacks {', '.join(lacking)}"
    return chosen, ""


def missing() -> str | None:
    """Why this machine has no use for the kernels; None where it does."""
    return instructions()[1] or None


@contextmanager
def native_kernels() -> Iterator[set[str]]:
    """What is traced and compiled inside uses the kernels, on machines that have a use for them.

    Yields:
        The names of the kernels that Inductor put into its code so far, such as "attention".
    """
    global _active, _used
    before = _active, _used
    _active, _used = instructions()[0], set()
    if _active is not None:
        teach_inductor()
    try:
        yield _used
    finally:
        _active, _used = before


def compile_with_kernels(compiler: Callable[[], object], name: str) -> set[str]:
    """Run what compiles engine `name`, with the kernels, or without them where they do not compile.

    The kernels are templates of Inductor's private kind: another version of torch may take them otherwise.

    Returns:
        The kernels that are in the result.
    """
    with native_kernels() as used:
        try:
            compiler()
            return used
        except Exception as error:
            if not used:
                raise
            reason = str(error).strip() or type(error).__name__
    logger.warning(
        "engine %s is compiled without the kernels %s, by PyTorch's operators, which may be slower: %s",
        name, ", ".join(sorted(used)), reason.splitlines()[-1],
    )
    compiler()
    return set()


def write_record(directory: Path, used: Set[str]) -> None:
    """Note beside an engine which kernels it has, in which instructions; nothing for none."""
    chosen, _ = instructions()
    if used and chosen is not None:
        note = {"instructions": chosen.name, "kernels": sorted(used)}
        (directory / RECORD).write_text(json.dumps(note), encoding="utf-8")


def read_record(directory: Path) -> str | None:
    """What `write_record` noted, in words; None for nothing."""
    if not (directory / RECORD).is_file():
        return None
    note = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    return f"{', '.join(note['kernels'])} ({note['instructions']})"


def wanted(*inputs: Tensor) -> bool:
    """Whether a computation on these inputs is to be a kernel's: all on a CPU, and of one dtype that gains by it."""
    dtypes = {x.dtype for x in inputs}
    return (
        _active is not None and len(dtypes) == 1 and dtypes <= {*_active.dtypes}
        and all(x.device.type == "cpu" for x in inputs)
    )


def number_type(dtype: torch.dtype) -> str:
    """A dtype as the headers call it."""
    return {torch.float32: "float", torch.bfloat16: "uint16_t"}[dtype]


def kind(number: str, quantized: bool) -> str:
    """The kind of products (tiles.h) for tensors of a number type, with quantized weights or not."""
    return "Quantized" if quantized else f"Plain<{number}>"


def by_parts(x: Tensor) -> bool:
    """Whether plain products and elementwise steps beat PyTorch's fused kernels: bf16 on CPUs, where the fused ones
    run no faster than in fp32 while plain products reach the bf16 rate and Inductor fuses what lies between them."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


Lowering = Callable[..., Any]
_lowerings: dict[Any, Lowering] = {}  # that Inductor does not know yet


def lowers(operator: Any) -> Callable[[Lowering], Lowering]:
    """Mark a function as what Inductor is to make of an operator; it returns a `kernel_node`."""

    def mark(lowering: Lowering) -> Lowering:
        _lowerings[operator] = lowering
        return lowering

    return mark


def teach_inductor() -> None:
    """Register all lowerings that are not registered yet: more may have been imported since the last time."""
    from torch._inductor.lowering import register_lowering

    for operator in list(_lowerings):
        register_lowering(operator, type_promotion_kind=None)(_lowerings.pop(operator))


def kernel_node(
    header: str,
    call: str,
    inputs: Mapping[str, Any],
    size: Sequence[Any],
    dtype: torch.dtype,
    values: Mapping[str, object],
) -> Any:
    """A call of a header's function as a node of Inductor's graph, on tensors that are laid out row by row.

    Args:
        call: a C++ statement as a Jinja template, which sees `values`, `threads`, and the C++ pointers of the inputs,
            by name (a list for a list, `nullptr` for None), and of the output, as `out`.
        inputs: nodes, lists of nodes, or None, by name.
        size, dtype: of the output.
    """
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    used = set()

    def given(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [given(part) for part in x]
        if x is None:
            return None
        x = ir.ExternKernel.realize_input(ir.ExternKernel.require_contiguous(x))
        if x.get_name() in used:  # arguments are found by their buffer: two views of one buffer need two
            x = ir.ExternKernel.copy_input(x)
        used.add(x.get_name())
        return x

    layout = ir.FixedLayout(torch.device("cpu"), dtype, list(size))
    template = kernel_template()(source(header), call, {n: given(x) for n, x in inputs.items()}, layout, values)
    out = template.generate().output_node()
    V.graph.no_fuse_buffer_names.add(out.get_name())
    _used.add(header.removesuffix(".h"))
    return out


@cache
def source(header: str) -> str:
    """A header of this package with those that it includes from here in their places."""
    text = (files("jitexport.kernels") / header).read_text(encoding="utf-8")
    return re.sub(r'#include "(.+?)"', lambda include: source(include[1]), text)


@cache
def kernel_template() -> Any:
    """Inductor's template class for `kernel_node`, made when Inductor is there to be imported."""
    import torch._inductor.lowering  # noqa: F401  comes first: the template's module imports it in a circle
    from torch._inductor.codegen.cpp_template import CppTemplate
    from torch._inductor.utils import parallel_num_threads

    class Kernel(CppTemplate):
        def __init__(
            self, text: str, call: str, inputs: Mapping[str, Any], layout: Any, values: Mapping[str, object]
        ) -> None:
            self.nodes: dict[str, Any] = {}  # by the names of the C++ function's arguments
            self.arguments = {name: self.arguments_of(name, x) for name, x in inputs.items()}
            super().__init__("jitexport", list(self.nodes.values()), layout, parallel_num_threads())
            self.text, self.call, self.values = text, call, values

        def arguments_of(self, name: str, x: Any) -> Any:
            """The names of an input's arguments, in the input's own form."""
            if isinstance(x, list):
                return [self.arguments_of(f"{name}_{i}", part) for i, part in enumerate(x)]
            if x is not None:
                self.nodes[name] = x
            return None if x is None else name

        def render(  # type: ignore[override]  # as torch's own templates: it is called by keyword
            self, kernel: Any, template_buffer_node: Any = None, **_: Any
        ) -> str:
            out: Any = template_buffer_node or self.output_node
            definition = kernel.def_kernel(inputs=self.nodes, outputs={"out": out})

            def pointer(argument: Any) -> Any:
                if isinstance(argument, list):
                    return [pointer(part) for part in argument]
                if argument is None:
                    return "nullptr"
                node = self.nodes[argument]
                return f"(&{kernel.index(node, [0] * len(node.get_size()))})"

            body = self._template_from_string(self.call).render(
                **self.values,
                **{name: pointer(argument) for name, argument in self.arguments.items()},
                out=f"(&{kernel.index(out, [0] * len(out.get_size()))})",
                threads="omp_get_max_threads()",  # as many as the process that runs the engine lets it have
            )
            profile = kernel.maybe_codegen_profile()
            return f"{self.header().getvalue()}\n{self.text}\nextern \"C\"\n{definition} {{\n{profile}\n{body}\n}}\n"

    return Kernel
