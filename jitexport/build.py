"""Building a bundle: adapter -> stage modules -> engines -> verification -> files -> manifest."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence, Set
from dataclasses import dataclass
from dataclasses import replace as replaced
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jitexport import causes, machine
from jitexport.building.declaring import declare, write_weights
from jitexport.building.engines import Progress, Silent, build_engines
from jitexport.building.reference import eager_pipeline, faster_passes
from jitexport.building.request import Request, check_quantization, read_request
from jitexport.bundle import BundleWriter, Manifest
from jitexport.bundle.entries import EngineEntry, ReferenceEntry, TokenizerEntry, WeightsEntry
from jitexport.bundle.references import find_references
from jitexport.choice import AUTO
from jitexport.compiling import Compilers, Recipe, default_jobs
from jitexport.files import temporary_folder
from jitexport.models.base import ModelAdapter
from jitexport.models.sources import ModelSource, download, load_adapter
from jitexport.plan import CustomSchedule, Plan, plan
from jitexport.runtime import Pipeline
from jitexport.specs import DTYPES
from jitexport.weights import CONSTANTS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildResult:
    """The bundle's place, its manifest and the seconds it took."""

    path: Path
    manifest: Manifest
    seconds: float


@causes.explained("building the bundle")
def build(
    model: str | ModelSource = "demo",
    *,
    base: str | None = None,
    output: str | Path | None = None,
    speedup: float | None = 4.0,
    custom: CustomSchedule | None = None,
    method: str = "jit",
    preset: str | None = None,
    cache: str | None = None,
    calibration: str | Path | None = None,
    backend: str = AUTO,
    dtype: str = AUTO,
    batch: int = 1,
    device: str = AUTO,
    target: str | None = None,
    settings: dict[str, Any] | None = None,
    weights: Literal["store", "reference"] = "store",
    replace: bool = False,
    jobs: int | None = None,
    quantization: str | None = None,
    passes: int | None = None,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> BuildResult:
    """Turn a model into an engine bundle.

    Args:
        model: a registered name, a diffusers folder, a transformer in one file, or a hub id.
        base: for one file, what everything else comes from: any of the others.
        output: the bundle's directory; `engines/<model>-<speed-up>x` by default, with the method's name unless it is
            jit, and the quantization.
        speedup, custom, method, preset, cache: see `jitexport.plan.plan`.
        calibration: a file that `jitexport.calibration.calibrate` wrote: the cache with the steps that it found.
        backend: a registered backend, or "auto": see `jitexport.choice`, also for the next two.
        dtype: "bf16" or "fp32", of weights and engines, or "auto"; the sampler's state is fp32 in any case. What the
            device emulates is built all the same, with a warning in the log that says how slow it is.
        batch: images per engine run, 1 or more.
        device: "cpu", "cuda" or "auto".
        target: architecture of another machine's GPU, as "sm_89", for backends that can build for one. The engines
            are then not run here: the manifest has no errors for them, and golden outputs from the eager modules.
        settings: of the model family, for example height and width.
        weights: "store" copies them into the bundle; "reference" points at the model's own files by digest.
        replace: replace an existing bundle.
        jobs: processes that compile at once, each with the model in memory; by default as many as cores and memory
            allow, where the backend's engines can be compiled apart.
        quantization: "int8" or "fp8", of the transformer blocks' linear layers; see `jitexport.quant`.
        passes: 1 for stage engines that run a prompt and its negative prompt one after the other, 2 for engines that
            run both at once, at twice the batch. By default, for models whose ordinary pipeline has a second pass,
            whichever is faster here (see `faster_passes`), else 1.
        command: what the user typed, for the manifest.
        progress: told about the steps.

    Raises:
        JitExportError: see `jitexport.errors`; nothing is left at `output` then.
    """
    started = datetime.now(UTC)
    progress = progress or Silent()
    request = read_request(
        model, base, speedup=speedup, custom=custom, method=method, cache=cache, calibration=calibration,
        backend=backend, dtype=dtype, batch=batch, device=device, target=target, settings=settings,
        quantization=quantization, weights=weights, jobs=jobs, passes=passes,
    )  # fmt: skip
    path = Path(output) if output is not None else Path("engines") / f"{request.source.name}-{request.label}"
    _tell_of_choices(request, quantization, progress)
    on_threads = machine.threads(machine.default_threads())

    with BundleWriter(path, replace=replace) as writer, torch.inference_mode(False), torch.no_grad(), on_threads:
        request, adapter = _read_model(request, progress)
        made = plan(
            adapter, speedup=speedup, custom=custom, method=method, preset=preset, cache=request.cache,
            dtype=request.dtype,
        )  # fmt: skip
        if request.calibration is not None:
            request.calibration.check(adapter, made.schedule)
        reference, reasons = _reference(request, adapter, made, passes)
        progress.begin(["read the model", "weights", *(f"engine {name}" for name in reference.engines), "digests"])
        progress.step("weights")
        tensors = dict(adapter.tensors())
        written = _write_parts(writer, request, adapter, reference, tensors, weights)
        written["engines"] = _write_engines(writer, request, adapter, reference, tensors, jobs, progress)
        progress.step("digests")
        typed = shlex.join(command).encode(errors="backslashreplace").decode()
        created = started.isoformat(timespec="seconds")
        manifest = writer.publish(
            lambda files: declare(
                request, reference, adapter, made, reasons, created=created, command=typed, files=files, **written
            )
        )
    return BuildResult(path, manifest, (datetime.now(UTC) - started).total_seconds())


def _tell_of_choices(request: Request, quantization: str | None, progress: Progress) -> None:
    """What was left to the machine, and whether it only emulates what it was told to use."""
    if request.reasons:
        progress.note(f"chosen for this machine: {request.choice}")
    if request.target is None and (
        slow := machine.emulation(request.dtype, quantization, request.device, kernels=request.backend.kernels)
    ):
        logger.warning("%s; leave --dtype to `auto` and --quant out for what is fast here", slow)


def _read_model(request: Request, progress: Progress) -> tuple[Request, ModelAdapter]:
    """The model, and the request with the folder that it is in."""
    progress.begin(["read the model"])
    progress.step("read the model")
    source = replaced(request.source, folder=request.source.folder or download(request.source))
    adapter = load_adapter(source, DTYPES[request.dtype], request.settings)
    own = adapter.settings().get("quantization")  # the folder's own
    check_quantization(own, request.backend, request.device)
    return replaced(request, source=source), adapter


def _reference(
    request: Request, adapter: ModelAdapter, made: Plan, passes: int | None
) -> tuple[Pipeline, dict[str, str]]:
    """The eager pipeline, with as many passes at once as are faster, and the reasons for all that was chosen."""
    eager = partial(
        eager_pipeline, adapter, made.schedule, made.method, made.options, batch=request.batch, dtype=request.dtype,
        device=request.module_device, cache=made.cache,
    )
    reference = eager(passes=passes or 1)
    if passes is not None or request.target is not None or (adapter.defaults.guidance.true or 1) <= 1:
        return reference, dict(request.reasons)
    reference, reason = faster_passes(reference, eager(passes=2))
    return reference, {**request.reasons, "passes": reason}


def _write_engines(
    writer: BundleWriter, request: Request, adapter: ModelAdapter, reference: Pipeline, tensors: dict[str, Tensor],
    jobs: int | None, progress: Progress,
) -> tuple[EngineEntry, ...]:
    """The engines, compiled by so many processes at once, in the order of the reference's."""
    if jobs is None:
        size = sum(t.nbytes for t in tensors.values())
        jobs = default_jobs(request.backend, request.device, len(reference.engines), size)
    recipe = Recipe(
        request.source, request.dtype, request.settings, request.backend_name, str(request.module_device),
        request.target, torch.get_num_threads(),
    )
    with temporary_folder(writer.path), Compilers(jobs, recipe, request.backend, adapter) as compilers:
        return build_engines(
            writer, request.backend, adapter, reference, tensors, request.device, compilers, progress,
            verify=request.target is None,
        )


def _write_parts(
    writer: BundleWriter, request: Request, adapter: ModelAdapter, reference: Pipeline, tensors: dict[str, Tensor],
    weights: str,
) -> dict[str, Any]:
    """Weights, constants and tokenizers, in the manifest's fields."""
    references: tuple[ReferenceEntry, ...] = ()
    referenced: Set[str] = frozenset()
    source = request.source.folder
    assert source is not None  # see `_read_model`
    outside = {} if request.backend.holds_weights else tensors
    if weights == "reference":
        references, referenced = find_references(source, outside)
    stored, tied = write_weights(writer, outside, referenced)
    constants = [
        WeightsEntry(component=CONSTANTS, path=path)
        for path in (writer.write_weights(CONSTANTS, reference.constants) if reference.constants else ())
    ]
    tokenizers = [
        TokenizerEntry.of(t, writer.write_text(f"tokenizers/{t.name}.json", t.json)) for t in adapter.tokenizers()
    ]
    folder = str(source.resolve()) if references else None
    return {
        "tokenizers": tuple(tokenizers), "weights": (*stored, *constants), "tied": tied, "references": references,
        "reference_folder": folder,
    }  # fmt: skip
