"""The host fingerprint: what an engine was compiled for, and whether this machine can run it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

import torch

from jitexport.bundle.entries import HostEntry
from jitexport.errors import HostMismatchError


def fingerprint(
    device: torch.device, target: str | None = None, libraries: Mapping[str, str] | None = None
) -> HostEntry:
    """This machine and its versions, with another machine's GPU where `target` names one.

    Args:
        libraries: versions of a backend's own libraries, see `Backend.libraries`.
    """
    cuda = device.type == "cuda"
    gpu = target
    if target is None and cuda and torch.cuda.is_available():
        gpu = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return HostEntry(
        system=platform.system(),
        machine=platform.machine(),
        cpu=torch.backends.cpu.get_cpu_capability(),
        cpu_features=tuple(sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True)),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        device=device.type,  # type: ignore[arg-type]  # the schema checks it
        cuda=torch.version.cuda if cuda else None,
        gpu=gpu,
        libraries=dict(libraries or {}),
    )


def check_host(built: HostEntry, here: HostEntry, fields: Sequence[str]) -> None:
    """Compare the fields of the fingerprint that a backend's engines depend on.

    For `cpu` this machine must have every instruction set of the machine that built: compilers use what they find.

    Raises:
        HostMismatchError: naming every field that differs.
    """
    wrong = [f for f in fields if f != "cpu" and getattr(built, f) != getattr(here, f)]
    found = [f"{f} {getattr(here, f)}" for f in wrong]
    expected = [f"{f} {getattr(built, f)}" for f in wrong]
    if "cpu" in fields and (lacking := sorted(set(built.cpu_features) - set(here.cpu_features))):
        found.append(f"a CPU ({here.cpu}) without {', '.join(lacking)}")
        expected.append(f"a CPU ({built.cpu}) with them")
    if found:
        raise HostMismatchError(
            "the bundle's engines were built for another machine", found="; ".join(found),
            expected="; ".join(expected),
            remedy="build the bundle on this machine, or install the versions it was built with",
        )
