"""Linear layers of 8-bit weights: y = s_x s_w (x_q w_q^T) + b, with a scale for each row of x and of w.

By PyTorch, a product of 8-bit numbers between elementwise steps, which compilers fuse; or by a kernel of our own
(linear.h) that Inductor puts into its code, where no number leaves the registers between product and activation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jitexport.kernels import native


def gelu_tanh(y: Tensor) -> Tensor:
    """GELU by the tanh approximation, with 1 + tanh(u) = 2 sigmoid(2 u): one exponential instead of a slow tanh."""
    return y * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))


#: The 8-bit types, and the largest number that each is scaled to.
KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def quantize(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rows [R, K] in 8 bits and their scales [R, 1], fp32: values = scales * rows, up to rounding."""
    dtype, largest = KINDS[kind]
    values = values.float()
    peak = values.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    scaled = values * (largest / peak)
    return (scaled.round() if kind == "int8" else scaled).to(dtype), peak / largest


def linear_8bit(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *, gelu: bool = False, dtype: torch.dtype
) -> Tensor:
    """A linear layer on 8-bit numbers, and where it is asked for the tanh GELU behind it.

    Args:
        x: [R, K].
        weight: [N, K], int8 or float8_e4m3fn, with a scale [N] for each row, fp32.
        bias: [N].
        dtype: of the result [R, N]; torch.float32 for what goes on in another elementwise step. Products of fp8 numbers
            are rounded to bf16 before.
    """
    fits = weight.dtype == torch.int8 and all(n % native.GROUP == 0 for n in weight.shape)
    if native.wanted(x) and fits and (bias is None or bias.dtype == x.dtype):
        return torch.ops.jitexport.linear_int8(x, weight, scale, bias, gelu, dtype == torch.float32)
    return by_torch(x, weight, scale, bias, gelu).to(dtype)


def by_torch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """The same in PyTorch's operators, in fp32."""
    if weight.dtype == torch.int8:
        rows, its = quantize(x, "int8")
        y = torch._int_mm(rows, weight.t()).float() * its * scale
    else:
        rows, its = quantize(x, "fp8")
        y = torch._scaled_mm(
            rows, weight.t(), scale_a=its, scale_b=scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
        ).float()
    y = y if bias is None else y + bias
    return gelu_tanh(y) if gelu else y


@torch.library.custom_op("jitexport::linear_int8", mutates_args=(), device_types="cpu")
def linear_operator(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, gelu: bool, wide: bool) -> Tensor:
    """`linear_8bit` in int8 as one operator, for graphs; bf16, inputs and outputs in multiples of 64."""
    return by_torch(x, weight, scale, bias, gelu).to(torch.float32 if wide else x.dtype)


@linear_operator.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, gelu: bool, wide: bool) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32 if wide else x.dtype)


CALL = """
using namespace jitexport;
using Out = {{number}};
Linear<{{gelu}}, Out>{ {{rows}}, {{inputs}}, {{outputs}} }.run(
    (const uint16_t*){{x}}, {{weight}}, {{scale}}, (const uint16_t*){{bias}},
    (Out*){{out}}, {{threads}});
"""


@native.lowers(torch.ops.jitexport.linear_int8.default)
def lowering(x: Any, weight: Any, scale: Any, bias: Any, gelu: bool, wide: bool) -> Any:
    """The operator for Inductor."""
    rows, inputs = map(int, x.get_size())
    outputs = int(weight.get_size()[0])
    return native.kernel_node(
        "linear.h", CALL, {"x": x, "weight": weight, "scale": scale, "bias": bias}, [rows, outputs],
        torch.float32 if wide else x.get_dtype(),
        {
            "rows": rows, "inputs": inputs, "outputs": outputs, "gelu": "true" if gelu else "false",
            "number": "float" if wide else "uint16_t",
        },
    )
