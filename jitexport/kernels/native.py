"""Kernels in C++ as operators that Inductor compiles into an engine's own code.

A kernel is a header and a few lines of Python: an operator with a plain implementation, and a call of the header's
function for Inductor to render. Engines need nothing beside themselves to run it.

Whoever compiles with Inductor asks for the kernels (`with native_kernels()`); whatever else traces, exports or runs a
model gets PyTorch's operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

#: What the headers are written in, besides AVX-512's foundation.
INSTRUCTIONS = ("avx512_bw", "avx512_vl", "avx512_bf16", "avx512_vnni")
#: Tiles have so many columns: see tiles.h.
GROUP = 64

_active = False


def missing() -> str | None:
    """Why this machine has no use for the kernels; None where it does."""
    has = torch.cpu.get_capabilities()
    if lacking := [name for name in INSTRUCTIONS if not has.get(name)]:
        return f"the CPU lacks {', '.join(lacking)}"
    if has.get("amx_tile"):
        return "the CPU has matrix units (AMX), with which plain products are faster"
    return None


@contextmanager
def native_kernels() -> Iterator[None]:
    """What is traced and compiled inside uses the kernels, on machines that have a use for them."""
    global _active
    before = _active
    _active = missing() is None
    if _active:
        teach_inductor()
    try:
        yield
    finally:
        _active = before


def wanted(x: Tensor) -> bool:
    """Whether a computation on x is to be a kernel's."""
    return _active and by_parts(x)


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
    return out


@cache
def source(header: str) -> str:
    """A header of this package with tiles.h in the place of its include."""
    folder = files("jitexport.kernels")
    text = (folder / header).read_text(encoding="utf-8")
    return text.replace('#include "tiles.h"', (folder / "tiles.h").read_text(encoding="utf-8"))


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

        def render(self, kernel: Any, template_buffer_node: Any = None, **_: Any) -> str:
            out = template_buffer_node or self.output_node
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
                threads=self.num_threads,
            )
            profile = kernel.maybe_codegen_profile()
            return f"{self.header().getvalue()}\n{self.text}\nextern \"C\"\n{definition} {{\n{profile}\n{body}\n}}\n"

    return Kernel
