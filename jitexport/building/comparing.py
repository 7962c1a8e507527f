"""An engine beside the eager module that it was made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jitexport.backends.base import Engine
from jitexport.errors import VerificationError
from jitexport.specs import DTYPES, EngineSpec

#: Largest ||engine - eager|| / ||eager|| that a build accepts. bf16 keeps 8 bits, and compilers may keep more of them
#: between operations than eager does, so the two differ by a few rounding errors.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
#: The same for fp32 on CUDA, where PyTorch's convolutions take TF32 unless they are told otherwise: it keeps 10 bits,
#: and engine and eager module need not choose the same kernels (1.7e-4 and 3.2e-4 in tiny decoders on an H100).
TF32_TOLERANCE = 5e-3
#: The same for engines with 8-bit layers: kernels may round activations to other numbers than eager does.
QUANTIZED_TOLERANCE = 5e-2


def compare(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> tuple[float, float]:
    """Relative error ||a - b|| / ||b|| of the worst output, and the largest absolute difference.

    Each output by itself: beside a mask of hugely negative numbers, whatever another output held would be right.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(outputs, reference, strict=True)]
    # NaN is worse than any number, wherever it stands.
    relative = torch.stack([(a - b).norm() / b.norm().clamp(min=1e-15) for a, b in pairs]).max().item()
    return relative, max((a - b).abs().max().item() for a, b in pairs)


def tolerance(dtype: str, device: torch.device, quantization: str | None = None) -> float:
    """Largest relative error of an engine that a build accepts."""
    if quantization is not None:
        return QUANTIZED_TOLERANCE
    return TF32_TOLERANCE if dtype == "fp32" and device.type == "cuda" else TOLERANCE[dtype]


def verify_engine(
    spec: EngineSpec, engine: Engine, reference: Engine, inputs: Sequence[Tensor], allowed: float,
    kernels: str | None = None,
) -> tuple[float, float]:
    """Run engine and eager module on the same inputs; relative and largest error.

    Args:
        allowed: relative error.
        kernels: those of ours that the engine has, for the error.

    Raises:
        VerificationError: the error exceeds what is allowed, or an output is not finite or of another shape.
    """
    outputs, expected = engine(*inputs), reference(*inputs)
    for tensor, wanted in zip(outputs, spec.outputs, strict=True):
        if tuple(tensor.shape) != wanted.shape or tensor.dtype != DTYPES[wanted.dtype]:
            raise VerificationError(
                f"engine {spec.name} gives another output", found=f"{tuple(tensor.shape)}, {tensor.dtype}",
                expected=wanted,
            )
    relative, largest = compare(outputs, expected)
    if not relative <= allowed:  # also catches NaN
        raise VerificationError(
            f"engine {spec.name} disagrees with the eager module",
            found=f"relative error {relative:.3g}, largest {largest:.3g}"
            + (f", with the kernels {kernels}" if kernels else ""),
            expected=f"relative error of at most {allowed:g}",
            remedy="build with JITEXPORT_KERNELS=0, which leaves the kernels out" if kernels else None,
        )
    return relative, largest
