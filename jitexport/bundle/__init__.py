"""Engine bundles: a directory with a manifest, weights and engines, checked before anything is opened."""

from jitexport.bundle.manifest import Manifest
from jitexport.bundle.reading import EngineBundle
from jitexport.bundle.writing import BundleWriter

__all__ = ["BundleWriter", "EngineBundle", "Manifest"]
