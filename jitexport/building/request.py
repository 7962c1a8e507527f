"""What a build was asked for, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jitexport import registry
from jitexport.backends.base import Backend
from jitexport.building.comparing import TOLERANCE
from jitexport.bundle.staging import check_text
from jitexport.calibration import Calibration, read_calibration
from jitexport.choice import Choice, choose
from jitexport.compiling import check_jobs
from jitexport.errors import BackendUnavailableError, InputError
from jitexport.models.sources import ModelSource, find_source
from jitexport.plan import CustomSchedule, make_cache
from jitexport.quant import check_kind


@dataclass(frozen=True)
class Request:
    """A build, with everything chosen that was left to the machine.

    Attributes:
        label: what the bundle is called after the model's name where nothing else is said.
        backend_name: as it was given or chosen.
        device: that the engines are for.
        settings: of the model family.
        cache: the temporal method and its options; those that a calibration found.
        choice: of what was left to the machine, with reasons.
    """

    source: ModelSource
    label: str
    backend: Backend
    backend_name: str
    dtype: str
    batch: int
    device: torch.device
    target: str | None
    settings: dict[str, Any] | None
    cache: str | None
    calibration: Calibration | None
    choice: Choice

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why, of what was left to the machine, by field."""
        return self.choice.reasons

    @property
    def module_device(self) -> torch.device:
        """Where the model's modules run: engines for another machine are compared with nothing here."""
        return self.device if self.target is None else torch.device("cpu")


def read_request(
    model: str | ModelSource, base: str | None, *, speedup: float | None, custom: CustomSchedule | None, method: str,
    cache: str | None, calibration: str | Path | None, backend: str, dtype: str, batch: int, device: str,
    target: str | None, settings: dict[str, Any] | None, quantization: str | None, weights: str, jobs: int | None,
    passes: int | None,
) -> Request:
    """What `build` was asked for.

    Raises:
        JitExportError: no build could be like that, or none here.
    """
    chosen = choose(device, backend, dtype, target=target, quantization=quantization)
    engine_backend, target_device = check_request(
        chosen.backend, chosen.dtype, batch, chosen.device, target, quantization
    )
    check_jobs(jobs, engine_backend)
    if passes not in (None, 1, 2):
        raise InputError("stage engines run one pass or two", found=passes, expected="1 or 2", remedy="leave it out")
    if weights not in ("store", "reference"):
        raise InputError("unknown weights", found=weights, expected="store or reference")
    source = model if isinstance(model, ModelSource) else find_source(str(model), base)
    if source.folder is not None:
        check_text(source.folder, "the model")
    label = f"{speedup:g}x" if custom is None else "custom"
    label = label if method == "jit" else f"{method}-{label}"
    found = None if calibration is None else read_calibration(calibration, cache)
    cache = cache if found is None else found.cache
    if cache is not None:
        temporal = make_cache(cache)
        label = f"{label}-{temporal.name}"
        settings = (settings or {}) | {"features": temporal.features}
    if quantization is not None:
        settings = (settings or {}) | {"quantization": quantization}
        label = f"{label}-{quantization}"
    return Request(
        source, label, engine_backend, chosen.backend, chosen.dtype, batch, target_device, target, settings, cache,
        found, chosen,
    )


def check_request(
    backend: str, dtype: str, batch: int, device: str, target: str | None, quantization: str | None = None
) -> tuple[Backend, torch.device]:
    """The backend and the device of a build, checked before any work.

    Raises:
        InputError: a value that no build could have.
        UnknownNameError: no such backend.
        BackendUnavailableError: the backend cannot build that here.
    """
    if dtype not in TOLERANCE:
        raise InputError("unknown dtype", found=dtype, expected=" or ".join(TOLERANCE))
    if batch < 1:
        raise InputError("batch must be at least 1", found=batch)
    try:
        target_device = torch.device(device if target is None else "cuda")
    except RuntimeError as error:
        raise InputError("unknown device", found=device, expected="cpu or cuda") from error
    engine_backend = registry.backend(backend)
    if reason := engine_backend.cannot_build(target_device, target):
        raise BackendUnavailableError(f"backend {backend} cannot build for {target or device} here", found=reason)
    if dtype not in (dtypes := engine_backend.dtypes(target_device)):
        raise BackendUnavailableError(
            f"backend {backend} has no {dtype} on {target_device}", expected=" or ".join(dtypes),
            remedy=f"--dtype {dtypes[0]}, or another --backend",
        )
    check_quantization(quantization, engine_backend, target_device)
    return engine_backend, target_device


def check_quantization(kind: str | None, backend: Backend, device: torch.device) -> None:
    """Refuse 8-bit layers that the backend cannot run on the device.

    Raises:
        InputError: there is no such kind.
        BackendUnavailableError: not by this backend, or not there.
    """
    check_kind(kind)
    if kind is not None and kind not in (kinds := backend.quantizations(device)):
        raise BackendUnavailableError(
            f"backend {backend.name} has no {kind} on {device}", expected=" or ".join(kinds) or "no quantization",
            remedy="leave --quant out (or the model's setting `quantization`), or take another --backend",
        )
