"""Linear layers, of weights as they are or of 8-bit ones: y = s_x s_w (x_q w_q^T) + b, with a scale for each row of x
and of w.

By PyTorch, a product between elementwise steps, which compilers fuse; or by a kernel of our own (linear.h) that
Inductor puts into its code, where no number leaves the registers between product and activation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jitexport.kernels import native
from jitexport.kernels.native import by_parts


def gelu_tanh(y: Tensor) -> Tensor:
    """GELU by the tanh approximation, with 1 + tanh(u) = 2 sigmoid(2 u): one exponential instead of a slow tanh."""
    return y * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))


#: The 8-bit types, and the largest number that each is scaled to.
KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


#: PyTorch's product of 8-bit integers on CUDA wants more than 16 rows.
LEAST_ROWS = 32

#: Of a layer with 8-bit weights: sums of more products may not fit into 32 bits (tiles.h).
MOST_INPUTS = 16384


def quantize(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rows [R, K] in 8 bits and their scales [R, 1], fp32: values = scales * rows, up to rounding."""
    dtype, largest = KINDS[kind]
    values = values.float()
    peak = values.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    scaled = values * (largest / peak)
    return (scaled.round() if kind == "int8" else scaled).to(dtype), peak / largest


def linear(
    x: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    gelu: bool = False,
    wide: bool = False,
) -> Tensor:
    """A linear layer, and where it is asked for the tanh GELU behind it.

    Args:
        x: [..., K], in parts that lie side by side, [..., K_i] each.
        weight: [N, K], of the dtype of x; int8 or float8_e4m3fn with a scale [N] for each row, fp32.
        bias: [N].
        wide: the result goes on in another elementwise step and may be fp32, where that costs nothing.

    Returns:
        [..., N], in the dtype of x or fp32. Products of fp8 numbers are rounded to bf16 before.
    """
    sizes = [weight.shape[0], *(part.shape[-1] for part in x)]
    fits = weight.dtype == (x[0].dtype if scale is None else torch.int8) and all(n % native.GROUP == 0 for n in sizes)
    fits = fits and (scale is None or weight.shape[1] <= MOST_INPUTS)
    if fits and native.wanted(*(x if bias is None else (*x, bias))):
        y = torch.ops.jitexport.linear([part.flatten(0, -2) for part in x], weight, bias, scale, gelu, wide)
        return y.unflatten(0, x[0].shape[:-1])
    joined = torch.cat(list(x), dim=-1) if len(x) > 1 else x[0]
    if scale is None and not (by_parts(joined) and (gelu or wide)):
        y = F.linear(joined, weight, bias)
        return F.gelu(y, approximate="tanh") if gelu else y
    y = by_torch(joined, weight, bias, scale, gelu)
    return y if wide else y.to(joined.dtype)


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, gelu: bool) -> Tensor:
    """The same by a product and elementwise steps in fp32, which compilers fuse."""
    if scale is None:
        y = F.linear(x, weight).float()
    else:
        y = product_8bit(x.flatten(0, -2), weight, scale).unflatten(0, x.shape[:-1])
    y = y if bias is None else y + bias
    return gelu_tanh(y) if gelu else y


def product_8bit(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [R, K] weight^T in 8 bits, fp32."""
    if weight.dtype == torch.int8:
        rows, its = quantize(x, "int8")
        count = len(rows)
        if rows.is_cuda and count < LEAST_ROWS:  # a condition's single row
            rows = F.pad(rows, (0, 0, 0, LEAST_ROWS - count))
        return torch._int_mm(rows, weight.t())[:count].float() * its * scale
    rows, its = quantize(x, "fp8")
    return torch._scaled_mm(
        rows, weight.t(), scale_a=its, scale_b=scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
    ).float()


@torch.library.custom_op("jitexport::linear", mutates_args=(), device_types="cpu")
def linear_operator(
    x: Sequence[Tensor], weight: Tensor, bias: Tensor | None, scale: Tensor | None, gelu: bool, wide: bool
) -> Tensor:
    """`linear` of rows as one operator, for graphs; inputs and outputs in multiples of 64; fp32 if `wide`."""
    return by_torch(torch.cat(list(x), dim=1), weight, bias, scale, gelu).to(torch.float32 if wide else x[0].dtype)


@linear_operator.register_fake
def _(x: Any, weight: Tensor, bias: Any, scale: Any, gelu: bool, wide: bool) -> Tensor:
    return x[0].new_empty((x[0].shape[0], weight.shape[0]), dtype=torch.float32 if wide else x[0].dtype)


CALL = """
using namespace jitexport;
using Layer = Linear<{{kind}}, {{number}}, {{gelu}}, {{result}}>;
const Part<{{number}}> x[] = {
    {% for data in x %}{(const {{number}}*){{data}}, {{widths[loop.index0]}}}, {% endfor %}
};
Layer{ {{rows}}, {{inputs}}, {{outputs}} }.run(
    x, (const Layer::Weight*){{weight}}, {{scale}}, (const {{number}}*){{bias}}, ({{result}}*){{out}}, {{threads}});
"""


@native.lowers(torch.ops.jitexport.linear.default)
def lowering(x: Any, weight: Any, bias: Any, scale: Any, gelu: bool, wide: bool) -> Any:
    """The operator for Inductor."""
    rows, widths = int(x[0].get_size()[0]), [int(part.get_size()[1]) for part in x]
    outputs = int(weight.get_size()[0])
    number = native.number_type(x[0].get_dtype())
    return native.kernel_node(
        "linear.h", CALL, {"x": x, "weight": weight, "bias": bias, "scale": scale}, [rows, outputs],
        torch.float32 if wide else x[0].get_dtype(),
        {
            "rows": rows, "inputs": sum(widths), "widths": widths, "outputs": outputs,
            "number": number, "kind": native.kind(number, scale is not None), "gelu": "true" if gelu else "false",
            "result": "float" if wide else number,
        },
    )
