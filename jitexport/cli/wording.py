"""Text that several verbs print."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jitexport.bundle.entries import GeometryEntry
    from jitexport.bundle.manifest import Manifest
    from jitexport.models.base import ModelGeometry


def tera(tflops: float) -> str:
    """TFLOPs with three significant digits: 0.0123, 74.4, 899, 3719."""
    return f"{tflops:.0f}" if tflops >= 100 else f"{tflops:.3g}"


def count(number: int, noun: str) -> str:
    """A number of things whose plural ends in s: 1 round, 3 rounds."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def frames(geometry: ModelGeometry | GeometryEntry) -> str:
    """How many frames a video has, for what follows; nothing of an image."""
    return "" if geometry.frames is None else f"{geometry.frames} frames, "


def example_prompt(manifest: Manifest) -> str:
    """A prompt that the bundle's model makes something of."""
    return "red apple on a blue background" if manifest.model.name == "demo" else "a red fox in the snow"
