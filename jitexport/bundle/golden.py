"""Golden inputs and outputs: what every engine of a bundle gave on the machine that built it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from jitexport.bundle.entries import EngineEntry
from jitexport.bundle.reading import REBUILD, read_tensors
from jitexport.bundle.writing import BundleWriter
from jitexport.errors import ManifestError
from jitexport.specs import EngineSpec


def write_golden(writer: BundleWriter, spec: EngineSpec, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    """Store an engine's inputs and its outputs for them; returns the file's name."""
    tensors = {f"input.{s.name}": t for s, t in zip(spec.inputs, inputs, strict=True)}
    tensors |= {f"output.{s.name}": t for s, t in zip(spec.outputs, outputs, strict=True)}
    return writer.write_tensors(f"golden/{spec.name}.safetensors", tensors)


def read_golden(root: Path, entry: EngineEntry) -> tuple[list[Tensor], list[Tensor]]:
    """An engine's stored inputs and outputs, on the CPU.

    Raises:
        IntegrityError: the file is no safetensors file.
        ManifestError: it does not hold what the engine takes and gives.
    """
    tensors = read_tensors(root, entry.golden)
    wanted = [*(f"input.{i.name}" for i in entry.inputs), *(f"output.{o.name}" for o in entry.outputs)]
    if sorted(wanted) != sorted(tensors):
        raise ManifestError(
            f"{entry.golden} is not of engine {entry.name}", found=sorted(tensors), expected=sorted(wanted),
            remedy=REBUILD,
        )
    values = [tensors[name] for name in wanted]
    return values[: len(entry.inputs)], values[len(entry.inputs) :]
