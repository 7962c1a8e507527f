"""jitexport: training-free spatial acceleration of diffusion transformers, compiled into prebuilt engines.

    import jitexport

    jitexport.build("demo", speedup=4)
    pipe = jitexport.load("engines/demo-4x")
    image = pipe("a red fox on a white background").images[0]

Names are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jitexport._version import __version__

if TYPE_CHECKING:
    from jitexport.build import BuildResult, build
    from jitexport.bundle import EngineBundle
    from jitexport.errors import JitExportError
    from jitexport.plan import CustomSchedule
    from jitexport.runtime import Pipeline, PipelineOutput, load

_HOMES = {
    "BuildResult": "jitexport.build",
    "CustomSchedule": "jitexport.plan",
    "EngineBundle": "jitexport.bundle",
    "JitExportError": "jitexport.errors",
    "Pipeline": "jitexport.runtime",
    "PipelineOutput": "jitexport.runtime",
    "build": "jitexport.build",
    "load": "jitexport.runtime",
}

__all__ = [
    "BuildResult",
    "CustomSchedule",
    "EngineBundle",
    "JitExportError",
    "Pipeline",
    "PipelineOutput",
    "__version__",
    "build",
    "load",
]


if not TYPE_CHECKING:  # which knows the names from above, and no others

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'jitexport' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """Importing the submodule `build` must not put it in the place of the function `build`."""
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
