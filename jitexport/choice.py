"""Device, backend and dtype of a build, chosen for the machine where the user leaves them to it.

What is said by name is kept, and narrows the rest: a backend without bf16 makes the dtype fp32, one that runs on CPUs
only the device a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jitexport import machine, registry
from jitexport.backends.base import Backend

AUTO = "auto"

#: What is taken for a device, the first that can. The others are asked for by name: they measure while they build,
#: compile or copy weights when a bundle is loaded, or are for one maker's GPUs.
PREFERRED = {"cpu": ("aoti", "onnx", "eager"), "cuda": ("aoti", "eager")}
#: What builds for another machine's GPU.
FOR_TARGETS = ("tensorrt",)


@dataclass(frozen=True)
class Choice:
    """What a build uses, and the reasons for what was left to the machine, by "device", "backend" and "dtype"."""

    device: str
    backend: str
    dtype: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        return "; ".join(f"{field} {getattr(self, field)}: {reason}" for field, reason in self.reasons.items())


def choose(
    device: str = AUTO,
    backend: str = AUTO,
    dtype: str = AUTO,
    *,
    target: str | None = None,
    quantization: str | None = None,
) -> Choice:
    """Resolve what is "auto": a GPU before the CPU, then the backend, then the dtype that the processor computes in.

    Where nothing fits what was said by name, the first candidate is taken, which then is refused with its reason by
    `jitexport.building.request.check_request`. Other values are passed on as they are.

    Raises:
        UnknownNameError: no such backend.
    """
    asked = {"device": device, "backend": backend, "dtype": dtype}
    tried: dict[str, str] = {}
    first: Choice | None = None
    for place, why in _devices(device, target):
        for name in _backends(backend, place, target):
            engines = registry.backend(name)
            refusal = _refusal(engines, place, target, quantization)
            found, reason = _dtype(dtype, engines, place, target)
            reasons = {
                "device": "; ".join([why, *_of_devices(tried, place)]),
                "backend": "; ".join([engines.summary, *_of_backends(tried, place)]),
                "dtype": reason,
            }
            left = {f: r for f, r in reasons.items() if asked[f] == AUTO}
            candidate = Choice(place, name, found or _order(dtype, place, target)[0], left)
            if refusal is None and found is not None:
                return candidate
            first = first or candidate
            tried[f"{name} on {place}"] = refusal or f"no {dtype}"
    assert first is not None
    return first


def _of_devices(tried: dict[str, str], place: str) -> list[str]:
    """Why no other device was taken."""
    return [f"not {way}: {reason}" for way, reason in tried.items() if not way.endswith(f" on {place}")]


def _of_backends(tried: dict[str, str], place: str) -> list[str]:
    """Why no other backend was taken on the same device."""
    ways = ((way.removesuffix(f" on {place}"), reason) for way, reason in tried.items() if way.endswith(f" on {place}"))
    return [f"not {name}: {reason}" for name, reason in ways]


def _devices(device: str, target: str | None) -> list[tuple[str, str]]:
    """Candidates and why they are."""
    if target is not None:
        return [("cuda", f"for the GPU {target}")]
    if device != AUTO:
        return [(device, "")]
    if problem := machine.gpu_problem():
        return [("cpu", problem)]
    return [("cuda", torch.cuda.get_device_name()), ("cpu", machine.processor(machine.CPU))]


def _backends(backend: str, device: str, target: str | None) -> Sequence[str]:
    if backend != AUTO:
        return [backend]
    return FOR_TARGETS if target is not None else PREFERRED.get(_device(device).type, PREFERRED["cpu"])


def _refusal(backend: Backend, device: str, target: str | None, quantization: str | None) -> str | None:
    """Why a backend cannot build that."""
    place = _device(device)
    if reason := backend.cannot_build(place, target):
        return reason
    if quantization is not None and quantization not in backend.quantizations(place):
        return f"no {quantization} layers"
    return None


def _dtype(dtype: str, backend: Backend, device: str, target: str | None) -> tuple[str | None, str]:
    """The first dtype in `_order` that the backend has, or None; and why."""
    place = _device(device)
    order, has = _order(dtype, device, target), backend.dtypes(place)
    found = next((d for d in order if d in has), None)
    who = machine.processor(place, target)
    if found != order[0]:
        return found, f"{backend.name} has no {order[0]} on {place.type}"
    return found, f"{who} computes in it" if found == "bf16" else f"{who} does not compute in bf16"


def _order(dtype: str, device: str, target: str | None) -> tuple[str, ...]:
    """Dtypes to try. fp16 is none of them: FLUX's activations overflow in it."""
    if dtype != AUTO:
        return (dtype,)
    return ("bf16", "fp32") if machine.computes("bf16", _device(device), target) else ("fp32", "bf16")


def _device(name: str) -> torch.device:
    """As torch has it; a CPU for what is no device, which the build refuses."""
    try:
        return torch.device(name)
    except RuntimeError:
        return machine.CPU
