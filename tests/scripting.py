"""The scripts, imported by the tests as running them would have it: a folder's scripts find each other by name."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parent.parent / "scripts"


def script(path: str) -> ModuleType:
    """A script by its path in scripts/, without .py; its folder stays in the path, for what it imports later.

    So does the top folder: "bench.gpu" is bench/gpu.py as a script there imports it, and its own imports begin there.
    """
    file = SCRIPTS / path
    for folder in (SCRIPTS, file.parent):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module(file.name)
