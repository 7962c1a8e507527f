"""Linear layers in 8 bits: weights with a scale for each output channel, activations with one for each token.

Activations are quantized as they come, so nothing has to be calibrated, and a product of 8-bit numbers is exact up to
its scales: y = s_x s_w (x_q w_q^T) + b.

The arithmetic is in `jitexport.kernels.linear`. It is ours and not torchao's, whose int8 layers made the demo model's
stages slower on CPUs than bf16 ones (docs/speed.md), and whose weights are tensor subclasses, which engines on shared
weights cannot read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jitexport.errors import InputError
from jitexport.kernels.linear import KINDS, linear, quantize


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

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        super().__init__()
        self.kind = kind
        weight, scale = quantize(layer.weight.detach(), kind)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale[:, 0], requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return linear([x], self.weight, self.bias, self.weight_scale)


def quantize_linears(module: nn.Module, kind: str, chosen: Callable[[str], bool]) -> None:
    """Put a `QuantizedLinear` in the place of every linear layer whose name is chosen."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and chosen(name):
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, QuantizedLinear(layer, kind))
