"""What this machine can run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

import torch

from jitexport import registry
from jitexport._version import __version__
from jitexport.kernels import native
from jitexport.specs import DTYPE_NAMES

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


def _kernels() -> str:
    chosen, reason = native.instructions()
    if chosen is None:
        return f"not used: {reason}"
    dtypes = " and ".join(DTYPE_NAMES[d] for d in chosen.dtypes)
    return f"attention and linear layers, in C++ with {chosen.name}, for {dtypes}"


def examine() -> dict[str, dict[str, str]]:
    """Versions, hardware and backends, as text by section and name."""
    cuda, threads = torch.cuda.is_available(), torch.get_num_threads()
    devices = [torch.device("cpu"), *([torch.device("cuda")] if cuda else [])]
    backends = {}
    for name in registry.BACKENDS:
        backend = registry.backend(name)
        reasons = {d.type: backend.missing(d) for d in devices}
        state = ", ".join(f"{kind}: {'ready' if reason is None else reason}" for kind, reason in reasons.items())
        backends[name] = f"{state} ({backend.summary})"
    return {
        "versions": {
            "jitexport": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _installed(name, extra) for name, extra in _OPTIONAL.items()},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {threads} threads",
            "bf16": "in hardware" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "emulated: fp32 may be faster",
            "kernels": _kernels(),
            "gpu": torch.cuda.get_device_name() if cuda else "none that torch can use",
            "compiler": shutil.which("g++")
            or shutil.which("clang++")
            or "none: aoti can load bundles but not build them",
        },
        "backends": backends,
    }
