"""The host fingerprint: what an engine was compiled for, and whether this machine can run it."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch

from jitexport.bundle.manifest import HostEntry
from jitexport.errors import HostMismatchError

# Vector extensions that include one another, poorest first; names as torch.backends.cpu gives them.
_CPU_LEVELS = ("DEFAULT", "AVX2", "AVX512")


def fingerprint(device: torch.device) -> HostEntry:
    """This machine and its versions."""
    cuda = device.type == "cuda"
    return HostEntry(
        system=platform.system(),
        machine=platform.machine(),
        cpu=torch.backends.cpu.get_cpu_capability(),
        torch=torch.__version__,
        python=platform.python_version(),
        device=device.type,
        cuda=torch.version.cuda if cuda else None,
        gpu="sm_{}{}".format(*torch.cuda.get_device_capability(device)) if cuda else None,
    )


def _fits(field: str, built: str | None, here: str | None) -> bool:
    if field == "cpu" and built in _CPU_LEVELS and here in _CPU_LEVELS:
        return _CPU_LEVELS.index(here) >= _CPU_LEVELS.index(built)
    return built == here


def check_host(built: HostEntry, here: HostEntry, fields: Sequence[str]) -> None:
    """Compare the fields of the fingerprint that a backend's engines depend on.

    Raises:
        HostMismatchError: naming every field that differs.
    """
    wrong = [f for f in fields if not _fits(f, getattr(built, f), getattr(here, f))]
    if wrong:
        raise HostMismatchError(
            "the bundle's engines were built for another machine",
            found=", ".join(f"{f} {getattr(here, f)}" for f in wrong),
            expected=", ".join(f"{f} {getattr(built, f)}" for f in wrong),
            remedy="build the bundle on this machine, or install the versions it was built with",
        )
