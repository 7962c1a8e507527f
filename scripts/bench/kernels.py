"""The C++ kernels beside PyTorch's own ways, each compiled by Inductor: times, rates and errors as a table.

    python scripts/bench/kernels.py                          # about two minutes on two cores
    python scripts/bench/kernels.py --json --tokens 1040

Attention over 4 heads of 64 channels; linear layers of the shapes of the demo model, in the first dtype that kernels
are for on this machine. Ways are timed in turns and compared by their medians; errors are relative, against fp32 on the
same numbers.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch._inductor.config
import torch.nn.functional as F
from harness import Products, facts, medians, parser, show
from torch import Tensor, nn

from jitexport.backends.inductor import compiled as compile_module
from jitexport.console import err
from jitexport.kernels.attention import Stream, attention
from jitexport.kernels.linear import linear, quantize
from jitexport.kernels.native import instructions, native_kernels
from jitexport.specs import DTYPE_NAMES, DTYPES

HEADS, CHANNELS = 4, 64
LAYERS = {"q": (256, 256, False), "mlp up, GELU": (256, 1024, True), "mlp down": (1024, 256, False)}


def compiled(function: Callable[..., Tensor], kernels: bool, *inputs: Tensor) -> Callable[[], Tensor]:
    """A function compiled for the shapes of its inputs, with or without the kernels, and called with them."""

    class Module(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return function(*inputs)

    run = compile_module(Module(), torch.device("cpu"), torch.get_num_threads())
    # Without torch's own caches: they know a kernel by its call, not by what its header says now.
    with torch._inductor.config.patch(force_disable_caches=True), native_kernels() if kernels else nullcontext():
        run(inputs)
    return lambda: run(inputs)[0]


def attentions(tokens: int, dtype: torch.dtype) -> Iterator[tuple[str, int, Tensor, dict[str, Callable[[], Tensor]]]]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, HEADS, CHANNELS).to(dtype) for _ in range(3))

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def ours(int8: bool) -> Callable[..., Tensor]:
        return lambda q, k, v: attention([Stream(q, k, v)], int8=int8)

    name = DTYPE_NAMES[dtype]
    ways = {
        f"PyTorch's fused kernel, {name}": lambda: fused(q, k, v),
        f"compiled, {name}": compiled(ours(False), False, q, k, v),
        f"kernel, {name}": compiled(ours(False), True, q, k, v),
        "kernel, int8": compiled(ours(True), True, q, k, v),
    }
    yield "attention", 4 * tokens**2 * HEADS * CHANNELS, fused(q.float(), k.float(), v.float()), ways


def layers(tokens: int, dtype: torch.dtype) -> Iterator[tuple[str, int, Tensor, dict[str, Callable[[], Tensor]]]]:
    for name, (inputs, outputs, gelu) in LAYERS.items():
        torch.manual_seed(0)
        x, w, b = (torch.randn(s).to(dtype) for s in ((tokens, inputs), (outputs, inputs), (outputs,)))
        w = w / inputs**0.5
        weight, scale = quantize(w, "int8")

        def layer(x: Tensor, w: Tensor, b: Tensor, scale: Tensor | None = None, gelu: bool = gelu) -> Tensor:
            return linear([x], w, b, scale, gelu=gelu)

        small = (x, weight, b, scale[:, 0].contiguous())
        ways = {
            f"compiled, {DTYPE_NAMES[dtype]}": compiled(layer, False, x, w, b),
            f"kernel, {DTYPE_NAMES[dtype]}": compiled(layer, True, x, w, b),
            "compiled, int8": compiled(layer, False, *small),
            "kernel, int8": compiled(layer, True, *small),
        }
        exact = layer(x.float(), w.float(), b.float())
        yield f"{name}: {inputs} to {outputs}", 2 * tokens * inputs * outputs, exact, ways


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, action="append", help="repeatable; default 374, 650, 1040 and 4112")
    arguments.add_argument("--dtype", choices=sorted(DTYPES.keys() & {"fp32", "bf16"}))
    arguments.add_argument("--repeats", type=int, default=30)
    arguments.add_argument("--json", action="store_true")
    options = arguments.parse_args()
    chosen, reason = instructions()
    if chosen is None:
        err.print(f"the kernels are not used on this machine: {reason}")
        sys.exit(4)
    dtype = chosen.dtypes[0] if options.dtype is None else DTYPES[options.dtype]
    rows = []
    with torch.no_grad(), Products(dtype) as products:
        for tokens in options.tokens or (374, 650, 1040, 4112):
            err.print(f"{tokens} tokens")
            for group in (attentions(tokens, dtype), layers(tokens, dtype)):
                for what, operations, exact, ways in group:
                    seconds = medians(ways, options.repeats)
                    for name, run in ways.items():
                        median, _ = seconds[name]
                        error = ((run().float() - exact).norm() / exact.norm()).item()
                        rows.append({
                            "what": what, "tokens": tokens, "way": name, "ms": median * 1e3,
                            "gops": operations / median / 1e9, "error": error,
                        })  # fmt: skip
    columns = {
        "what": lambda r: r["what"], "tokens": lambda r: str(r["tokens"]), "way": lambda r: r["way"],
        "median ms": lambda r: f"{r['ms']:.2f}", "Gop/s": lambda r: f"{r['gops']:.0f}",
        "error": lambda r: f"{r['error']:.1e}",
    }  # fmt: skip
    show(facts() | products.facts(), rows, columns, as_json=options.json)


if __name__ == "__main__":
    main()
