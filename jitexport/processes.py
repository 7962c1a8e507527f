"""Python processes that run this package's code and nothing from the working directory."""

from __future__ import annotations

import os
import sys

_HOME = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def working_directory() -> str:
    """Its real path; empty where it was removed."""
    try:
        return os.path.realpath(os.getcwd())
    except OSError:
        return ""


def import_paths() -> list[str]:
    """Where this process imports from, without the working directory, in which any file may have a module's name."""
    here = working_directory()
    kept = [path for path in sys.path if path and os.path.realpath(path) != here]
    return [os.path.abspath(path) if os.path.exists(path) else path for path in kept]  # some only look like paths


def python(code: str) -> list[str]:
    """The command line that runs code with this very package and this process's libraries."""
    # This package may lie in the working directory, as in a checkout: that is on the path while it is found, and what
    # its __init__ imports has been imported before.
    start = (
        f"import importlib, sys, types, typing; sys.path[:] = {[_HOME, *import_paths()]!r}; import jitexport; "
        f"sys.path[:] = {import_paths()!r}; {code}"
    )
    return [sys.executable, "-P", "-c", start]  # -P: the working directory is not put on the path


def environment(**values: str) -> dict[str, str]:
    """The environment for `python`: what that process starts in turn has no working directory on its path either.

    `site` runs before any code and imports, so PYTHONPATH must be clean as well.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    here = working_directory()
    clean = os.pathsep.join(path for path in given if path and os.path.realpath(path) != here)
    return {**os.environ, "PYTHONPATH": clean, "PYTHONSAFEPATH": "1", **values}
