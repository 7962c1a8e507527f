"""The scripts, imported by the tests as running them would have it: a folder's scripts find each other by name."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parent.parent / "scripts"


def script(path: str) -> ModuleType:
    """A script by its path in scripts/, without .py; its folder stays in the path, for what it imports later.

    "bench.gpu" is bench/gpu.py as a script at the top imports it.
    """
    file = SCRIPTS / path
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    return importlib.import_module(file.name)
