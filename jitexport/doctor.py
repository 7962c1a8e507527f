"""What this machine can run."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from jitexport import machine, registry
from jitexport._version import __version__
from jitexport.backends.commands import cpp_compiler, passed_over, without_compiler
from jitexport.choice import choose
from jitexport.kernels import native
from jitexport.specs import DTYPE_NAMES

#: Releases of torch that the whole test suite has passed on.
TESTED_TORCH = ("2.13.0", "2.14.1")

#: Optional libraries and the extra that brings them.
_OPTIONAL = {
    "diffusers": "build",
    "transformers": "build",
    "huggingface_hub": "build",
    "matplotlib": "eval",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "tensorrt_rtx_cu13": "tensorrt",
}


def _installed(name: str, extra: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"missing: pip install 'jitexport[{extra}]'"


def _torch() -> str:
    """The version of torch, and whether the test suite has passed on it."""
    if ".".join(torch.__version__.split(".")[:2]) in {".".join(v.split(".")[:2]) for v in TESTED_TORCH}:
        return torch.__version__
    return f"{torch.__version__}: untested; the tests pass on {' and '.join(TESTED_TORCH)}"


def _processors() -> str:
    usable, threads = machine.cpus(), torch.get_num_threads()
    limit = "" if usable == os.cpu_count() else f", {usable} of them for this process"
    more = f", of which {usable} are used" if threads > usable else ""
    return f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores{limit}, {threads} threads{more}"


def _bf16() -> str:
    if machine.computes("bf16", machine.CPU):
        return "in hardware"
    times = machine.slowdown("bf16", machine.CPU)
    return f"emulated: a matrix product of PyTorch's takes {times:.3g} times as long as in fp32"


def _kernels() -> str:
    chosen, reason = native.instructions()
    if chosen is None:
        return f"not used: {reason}"
    dtypes = " and ".join(DTYPE_NAMES[d] for d in chosen.dtypes)
    return f"attention and linear layers, in C++ with {chosen.name}, for {dtypes}"


def examine() -> dict[str, dict[str, str]]:
    """Versions, hardware and backends, as text by section and name."""
    devices = [machine.CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    backends, chosen = {}, choose()
    for name in registry.BACKENDS:
        backend = registry.backend(name)
        reasons = {d.type: backend.missing(d) for d in devices}
        state = ", ".join(f"{kind}: {'ready' if reason is None else reason}" for kind, reason in reasons.items())
        backends[name] = f"{state} ({backend.summary})"
    return {
        "versions": {
            "jitexport": __version__,
            "python": platform.python_version(),
            "torch": _torch(),
            **{name: _installed(name, extra) for name, extra in _OPTIONAL.items()},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _processors(),
            "memory": f"{machine.memory() / 2**30:.1f} GiB free for this process",
            "bf16": _bf16(),
            "kernels": _kernels(),
            "gpu": machine.gpu_problem() or torch.cuda.get_device_name(),
            "compiler": _compiler(),
        },
        "what a build chooses": {
            field: f"{getattr(chosen, field)}: {reason}" for field, reason in chosen.reasons.items()
        },
        "backends": backends,
    }


def _compiler() -> str:
    """The C++ compiler that is used, and those that come before it and do not work."""
    if (chosen := cpp_compiler()) is None:
        return f"none that works: aoti can load bundles but not build them ({without_compiler()})"
    return f"{chosen} ({before})" if (before := passed_over()) else chosen
