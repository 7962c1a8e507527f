"""Linear layers in 8 bits: weights with a scale for each output channel, activations with one for each token.

Activations are quantized as they come, so nothing has to be calibrated, and a product of 8-bit numbers is exact up to
its scales: y = s_x s_w (x_q w_q^T) + b.

Written here and not taken from torchao, whose int8 layers made the demo model's stages slower on CPUs than bf16 ones
(docs/speed.md), and whose weights are tensor subclasses, which engines on shared weights cannot read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jitexport.errors import InputError

#: The 8-bit types, and the largest number that each is scaled to.
KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def check_kind(kind: str | None) -> None:
    """Refuse what is neither None nor one of `KINDS`.

    Raises:
        InputError: something else.
    """
    if kind is not None and kind not in KINDS:
        raise InputError("unknown quantization", found=kind, expected=" or ".join(KINDS))


def available(device: torch.device) -> tuple[str, ...]:
    """The kinds whose products PyTorch has on a device: fp8 on GPUs from compute capability 8.9 (Ada, Hopper)."""
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 9):
        return ("int8",)
    return tuple(KINDS)


def quantize(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rows [R, K] in 8 bits and their scales [R, 1], fp32: values = scales * rows, up to rounding."""
    dtype, largest = KINDS[kind]
    values = values.float()
    peak = values.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    scaled = values * (largest / peak)
    return (scaled.round() if kind == "int8" else scaled).to(dtype), peak / largest


def unquantized(settings: dict[str, Any]) -> dict[str, Any]:
    """A model's settings without quantization: its FLOPs are the same, and references are measured without."""
    return settings | {"quantization": None}


def kind_of(weight: Tensor) -> str:
    """The kind of a quantized weight, by its dtype."""
    return next(kind for kind, (dtype, _) in KINDS.items() if weight.dtype == dtype)


class QuantizedLinear(nn.Module):
    """A linear layer whose product runs in 8 bits.

    Its parameters keep the layer's names, `weight` [N, K] in 8 bits and `bias`, beside `weight_scale` [N], fp32.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.kind = kind
        weight, scale = quantize(linear.weight.detach(), kind)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale[:, 0], requires_grad=False)
        self.bias = linear.bias

    def wide(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in fp32 (fp8 products round to bf16)."""
        rows, scale = quantize(x.flatten(0, -2), self.kind)
        if self.kind == "int8":
            y = torch._int_mm(rows, self.weight.t()).float() * scale * self.weight_scale
        else:
            y = torch._scaled_mm(
                rows, self.weight.t(), scale_a=scale, scale_b=self.weight_scale[None], out_dtype=torch.bfloat16,
                use_fast_accum=True,
            ).float()
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(0, x.shape[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in the dtype of x."""
        return self.wide(x).to(x.dtype)


def quantize_linears(module: nn.Module, kind: str, chosen: Callable[[str], bool]) -> None:
    """Put a `QuantizedLinear` in the place of every linear layer whose name is chosen."""
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear) and chosen(name):
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, QuantizedLinear(linear, kind))
