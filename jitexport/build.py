"""Building a bundle: adapter -> stage modules -> engines -> verification -> files -> manifest."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from dataclasses import replace as replaced
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from jitexport import causes, machine, registry
from jitexport._version import __version__
from jitexport.backends.base import Backend, Engine
from jitexport.backends.eager import as_engine
from jitexport.bundle import BundleWriter, Manifest
from jitexport.bundle.golden import write_golden
from jitexport.bundle.host import fingerprint
from jitexport.bundle.manifest import (
    FORMAT_VERSION,
    CacheEntry,
    EngineEntry,
    GeometryEntry,
    MethodEntry,
    ModelEntry,
    ScheduleEntry,
    StageEntry,
    TensorEntry,
    TokenizerEntry,
    WeightsEntry,
)
from jitexport.bundle.references import find_references
from jitexport.bundle.staging import check_text
from jitexport.calibration import read_calibration
from jitexport.choice import AUTO, choose
from jitexport.compiling import Compilers, Recipe, Task, check_jobs, default_jobs
from jitexport.errors import BackendUnavailableError, InputError, VerificationError
from jitexport.files import temporary_folder
from jitexport.kernels.native import read_record
from jitexport.methods.temporal.base import Cache
from jitexport.models.base import ModelAdapter
from jitexport.models.sources import ModelSource, download, find_source, load_adapter
from jitexport.models.stages import TAKES
from jitexport.plan import CustomSchedule, Plan, make_cache, plan
from jitexport.profile.measure import shortest
from jitexport.quant import check_kind
from jitexport.runtime import Pipeline
from jitexport.schedule import StageSchedule
from jitexport.specs import DTYPE_NAMES, DTYPES, EngineSpec
from jitexport.weights import CONSTANTS

logger = logging.getLogger(__name__)

#: Largest ||engine - eager|| / ||eager|| that a build accepts. bf16 keeps 8 bits, and compilers may keep more of them
#: between operations than eager does, so the two differ by a few rounding errors.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
#: The same for engines with 8-bit layers: kernels may round activations to other numbers than eager does.
QUANTIZED_TOLERANCE = 5e-2

PROBE_PROMPT = "a red apple on a white background"


class Progress(Protocol):
    """What a build reports to; see `jitexport.cli.progress`."""

    def begin(self, steps: Sequence[str]) -> None:
        """All steps, in order, before the first."""

    def step(self, name: str) -> None:
        """A step begins."""

    def note(self, text: str) -> None:
        """Something that the user should know, before the first step."""


class Silent:
    """Reports nothing."""

    def begin(self, steps: Sequence[str]) -> None:
        """Ignored."""

    def step(self, name: str) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""


@dataclass(frozen=True)
class BuildResult:
    """The bundle's place, its manifest and the seconds it took."""

    path: Path
    manifest: Manifest
    seconds: float


def eager_pipeline(
    adapter: ModelAdapter,
    schedule: StageSchedule,
    method: str,
    options: dict[str, Any],
    *,
    batch: int,
    dtype: str,
    device: torch.device,
    passes: int = 1,
    cache: Cache[Any] | None = None,
    further: Sequence[str] = (),
) -> Pipeline:
    """The adapter's modules as a pipeline, without compiling anything: the reference for every backend.

    Args:
        further: actions that stages have engines for beside those that the schedule's steps have.
    """
    chosen = registry.method(method)(adapter.geometry.grid, options, adapter.geometry.patch)
    specs = adapter.specs(schedule, batch, dtype, preview=chosen.previews, passes=passes, further=further)
    for component in adapter.components.values():
        component.to(device)
    return Pipeline(
        engines={s.name: Engine(s, as_engine(adapter.module(s.name)), device) for s in specs},
        method=chosen,
        schedule=schedule,
        geometry=adapter.geometry,
        defaults=adapter.defaults,
        readers=[tokenizer.reader() for tokenizer in adapter.tokenizers()],
        batch_size=batch,
        passes=passes,
        cache=cache,
        constants={name: t.to(device) for name, t in adapter.constants(noise_levels(schedule)).items()},
        dtype=DTYPES[dtype],
        device=device,
    )


def faster_passes(one: Pipeline, both: Pipeline) -> tuple[Pipeline, str]:
    """Whether one run of all tokens at twice the batch is faster than two, measured on the modules before compiling.

    Args:
        one, both: eager pipelines whose stages run one pass, and both at once.

    Returns:
        The faster one, and why.
    """
    *_, stage = one.schedule.engines
    tokens = torch.randn((one.batch_size, stage.tokens, one.geometry.channels), device=one.device)
    where = torch.arange(stage.tokens, device=one.device).expand(one.batch_size, -1)
    embeddings = one.engines["text"](*probe_ids(one))
    condition = one.condition(embeddings, one.defaults.guidance.distilled)
    seconds = []
    for pipeline in (one, both):
        run = pipeline.engines[stage.name]
        inputs = pipeline.stage_inputs(where, condition)(run.spec, tokens, 0)
        seconds.append(shortest(lambda: run(*inputs), one.device, 1.0))  # noqa: B023 - called at once
    twice, at_once = 2e3 * seconds[0], 1e3 * seconds[1]
    reason = f"two passes take {twice:.3g} ms one after the other and {at_once:.3g} ms at once, before compiling"
    return (one if twice <= at_once else both), reason


def noise_levels(schedule: StageSchedule) -> Tensor:
    """The noise levels that a schedule's steps start from, [S], fp32."""
    return torch.tensor(schedule.sigmas[:-1], dtype=torch.float32)


def probe_ids(pipeline: Pipeline) -> list[Tensor]:
    """What the text engine takes for the probe."""
    return pipeline.tokenize([PROBE_PROMPT] * pipeline.batch_size, warn=False)


def probe_inputs(pipeline: Pipeline) -> Iterator[tuple[EngineSpec, list[Tensor]]]:
    """Inputs for every engine of a pipeline as a call would give them: a real prompt, unit-variance tokens."""
    generator = torch.Generator().manual_seed(0)
    batch, device = pipeline.batch_size, pipeline.device
    geometry = pipeline.geometry

    def noise(tokens: int) -> Tensor:
        return torch.randn((batch, tokens, geometry.channels), generator=generator).to(device)

    def ready(name: str, values: Sequence[Tensor]) -> tuple[EngineSpec, list[Tensor]]:
        return pipeline.engines[name].spec, [v.clone() for v in values]

    ids = probe_ids(pipeline)
    yield ready("text", ids)
    embeddings, guidance = pipeline.engines["text"](*ids), pipeline.defaults.guidance.distilled
    yield ready("condition", pipeline.condition_inputs(embeddings, guidance))
    condition = pipeline.condition(embeddings, guidance)
    for action, stage in pipeline.schedule.runs:
        where = torch.arange(stage.tokens, device=device).expand(batch, -1)
        step = pipeline.schedule.steps_of(stage)[0]
        spec = pipeline.engines[stage.engine(action)].spec
        inputs = pipeline.stage_inputs(where, condition)
        beside = [
            torch.randn(s.shape, generator=generator).to(device, DTYPES[s.dtype])
            for s in spec.inputs if s.name in TAKES.get(action, ())
        ]
        yield ready(spec.name, inputs(spec, noise(stage.tokens), step, *beside))
    if "preview" in pipeline.engines:
        yield ready("preview", [noise(geometry.grid.halved().tokens)])
    latents = torch.randn(pipeline.engines["decode"].spec.inputs[0].shape, generator=generator)
    yield ready("decode", [latents.to(device)])


def compare(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> tuple[float, float]:
    """Relative error ||a - b|| / ||b|| of the worst output, and the largest absolute difference.

    Each output by itself: beside a mask of hugely negative numbers, whatever another output held would be right.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(outputs, reference, strict=True)]
    # NaN is worse than any number, wherever it stands.
    relative = torch.stack([(a - b).norm() / b.norm().clamp(min=1e-15) for a, b in pairs]).max().item()
    return relative, max((a - b).abs().max().item() for a, b in pairs)


def tolerance(dtype: str, quantization: str | None) -> float:
    """Largest relative error of an engine that a build accepts."""
    return TOLERANCE[dtype] if quantization is None else QUANTIZED_TOLERANCE


def verify_engine(
    spec: EngineSpec, engine: Engine, reference: Engine, inputs: Sequence[Tensor], allowed: float,
    kernels: str | None = None,
) -> tuple[float, float]:
    """Run engine and eager module on the same inputs; relative and largest error.

    Args:
        allowed: relative error.
        kernels: those of ours that the engine has, for the error.

    Raises:
        VerificationError: the error exceeds what is allowed, or an output is not finite or of another shape.
    """
    outputs, expected = engine(*inputs), reference(*inputs)
    for tensor, wanted in zip(outputs, spec.outputs, strict=True):
        if tuple(tensor.shape) != wanted.shape or tensor.dtype != DTYPES[wanted.dtype]:
            raise VerificationError(
                f"engine {spec.name} gives another output", found=f"{tuple(tensor.shape)}, {tensor.dtype}",
                expected=wanted,
            )
    relative, largest = compare(outputs, expected)
    if not relative <= allowed:  # also catches NaN
        raise VerificationError(
            f"engine {spec.name} disagrees with the eager module",
            found=f"relative error {relative:.3g}, largest {largest:.3g}"
            + (f", with the kernels {kernels}" if kernels else ""),
            expected=f"relative error of at most {allowed:g}",
            remedy="build with JITEXPORT_KERNELS=0, which leaves the kernels out" if kernels else None,
        )
    return relative, largest


#: What libraries add to a configuration when they read it: the folder that it came from, and in no certain order the
#: entries that it lacked, which have their usual values.
_OF_THE_READER = {"_name_or_path", "_use_default_values"}


def plain_configs(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Configurations as plain JSON, the manifest's types: the same for the same model, whoever reads it from where."""

    def plain(value: Any) -> Any:
        return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)

    named = {name: {k: v for k, v in c.items() if k not in _OF_THE_READER} for name, c in configs.items()}
    return json.loads(json.dumps(named, default=plain))


def config_digest(configs: dict[str, Any]) -> str:
    """sha256 of a model's configurations, over sorted JSON."""
    return hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode()).hexdigest()


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
        output: the bundle's directory; engines/<model>-<speed-up>x by default, with the method's name unless it is jit,
            and the quantization.
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
    chosen = choose(device, backend, dtype, target=target, quantization=quantization)
    device, backend, dtype = chosen.device, chosen.backend, chosen.dtype
    engine_backend, target_device = check_request(backend, dtype, batch, device, target, quantization)
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
    path = Path(output) if output is not None else Path("engines") / f"{source.name}-{label}"
    if chosen.reasons:
        progress.note(f"chosen for this machine: {chosen}")
    if target is None and (
        slow := machine.emulation(dtype, quantization, target_device, kernels=engine_backend.kernels)
    ):
        logger.warning("%s; leave --dtype to `auto` and --quant out for what is fast here", slow)
    on_threads = machine.threads(machine.default_threads())

    with BundleWriter(path, replace=replace) as writer, torch.inference_mode(False), torch.no_grad(), on_threads:
        progress.begin(["read the model"])
        progress.step("read the model")
        folder = source.folder or download(source)
        source = replaced(source, folder=folder)
        adapter = load_adapter(source, DTYPES[dtype], settings)
        check_quantization(adapter.settings().get("quantization"), engine_backend, target_device)  # the folder's own
        made = plan(adapter, speedup=speedup, custom=custom, method=method, preset=preset, cache=cache, dtype=dtype)
        if found is not None:
            found.check(adapter, made.schedule)
        module_device = target_device if target is None else torch.device("cpu")
        eager = partial(
            eager_pipeline, adapter, made.schedule, made.method, made.options, batch=batch, dtype=dtype,
            device=module_device, cache=made.cache,
        )
        reasons, reference = chosen.reasons, eager(passes=passes or 1)
        if passes is None and target is None and (adapter.defaults.guidance.true or 1) > 1:
            reference, reason = faster_passes(reference, eager(passes=2))
            reasons = {**reasons, "passes": reason}
        progress.begin(["read the model", "weights", *(f"engine {name}" for name in reference.engines), "digests"])
        progress.step("weights")
        tensors = dict(adapter.tensors())
        references, referenced = (), set()
        outside = {} if engine_backend.holds_weights else tensors
        if weights == "reference":
            references, referenced = find_references(folder, outside)
        stored, tied = write_weights(writer, outside, referenced)
        constants = [
            WeightsEntry(component=CONSTANTS, path=path)
            for path in (writer.write_weights(CONSTANTS, reference.constants) if reference.constants else ())
        ]
        tokenizers = [
            TokenizerEntry.of(t, writer.write_text(f"tokenizers/{t.name}.json", t.json)) for t in adapter.tokenizers()
        ]
        if jobs is None:
            size = sum(t.nbytes for t in tensors.values())
            jobs = default_jobs(engine_backend, target_device, len(reference.engines), size)
        recipe = Recipe(source, dtype, settings, backend, str(module_device), target, torch.get_num_threads())
        with temporary_folder(writer.path), Compilers(jobs, recipe, engine_backend, adapter) as compilers:
            engines = build_engines(
                writer, engine_backend, adapter, reference, tensors, target_device, compilers, progress,
                verify=target is None,
            )
        progress.step("digests")
        configs = plain_configs(adapter.configs)
        manifest = writer.publish(
            lambda files: Manifest(
                format_version=FORMAT_VERSION,
                jitexport_version=__version__,
                created=started.isoformat(timespec="seconds"),
                command=shlex.join(command).encode(errors="backslashreplace").decode(),
                model=ModelEntry(
                    name=source.name,
                    source=source.hub_id or source.name,
                    family=adapter.family,
                    configs=configs,
                    settings=adapter.settings(),
                    config_digest=config_digest(configs),
                ),
                geometry=GeometryEntry.of(adapter.geometry),
                method=MethodEntry(name=made.method, preset=made.preset, options=made.options),
                cache=None if made.cache is None else CacheEntry(
                    name=made.cache.name, options=made.cache.options, evidence=found and found.evidence
                ),
                schedule=schedule_entry(made),
                backend=backend,
                dtype=dtype,
                batch=batch,
                passes=reference.passes,
                host=fingerprint(target_device, target, registry.backend(backend).libraries()),
                chosen=reasons,
                engines=engines,
                constants=tuple(map(TensorEntry.of, adapter.constant_specs(made.schedule.nfe, dtype))),
                tokenizers=tuple(tokenizers),
                weights=(*stored, *constants),
                tied=tied,
                references=references,
                reference_folder=str(folder.resolve()) if references else None,
                files=files,
            )
        )
    return BuildResult(path, manifest, (datetime.now(UTC) - started).total_seconds())


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


def build_engines(
    writer: BundleWriter,
    backend: Backend,
    adapter: ModelAdapter,
    reference: Pipeline,
    weights: Mapping[str, Tensor],
    device: torch.device,
    compilers: Compilers,
    progress: Progress,
    *,
    verify: bool,
) -> tuple[EngineEntry, ...]:
    """Compile all engines of a pipeline into the bundle, verify each against the eager one, and store golden examples.

    Without `verify`, for engines that cannot run here, the examples come from the eager modules.

    Raises:
        CompileError: an engine cannot be compiled.
        VerificationError: an engine disagrees with the eager module.
    """
    entries = []
    allowed = tolerance(DTYPE_NAMES[reference.dtype], adapter.settings().get("quantization"))
    probes = {spec.name: inputs for spec, inputs in probe_inputs(reference)}
    begun = []
    for group in backend.groups([engine.spec for engine in reference.engines.values()]):
        name = f"engines/{group[0].name if len(group) == 1 else 'stages'}"
        directory = writer.directory(name)
        task = Task(group, [probes[spec.name] for spec in group], directory)
        begun.append((group, name, directory, compilers.submit(task)))
    for group, name, directory, finish in begun:
        progress.step(f"engine {group[0].name}")
        finish()
        kernels = read_record(directory)
        for spec in group:
            engine, inputs = reference.engines[spec.name], probes[spec.name]
            relative = largest = None
            if verify:
                raw = backend.load(spec, directory, weights, partial(adapter.module, spec.name), device)
                engine = Engine(spec, raw, device)
                relative, largest = verify_engine(
                    spec, engine, reference.engines[spec.name], inputs, allowed, kernels
                )
            entries.append(
                EngineEntry(
                    name=spec.name, directory=name,
                    inputs=tuple(map(TensorEntry.of, spec.inputs)),
                    outputs=tuple(map(TensorEntry.of, spec.outputs)),
                    golden=write_golden(writer, spec, inputs, engine(*inputs)),
                    relative_error=relative, max_error=largest, kernels=kernels,
                )
            )
    return tuple(entries)


def schedule_entry(made: Plan) -> ScheduleEntry:
    """A plan as the manifest has it."""
    return ScheduleEntry(
        stages=tuple(
            StageEntry(index=s.index, tokens=s.tokens, steps=s.steps, step_tflops=made.cost(s.tokens) / 1e12)
            for s in made.schedule.stages
        ),
        sigmas=made.schedule.sigmas,
        ends=made.schedule.ends,
        actions=made.schedule.actions,
        speedup=made.speedup,
        predicted_speedup=made.predicted_speedup,
        reference_steps=made.reference_steps,
        preview_tflops=made.preview / 1e12,
        tflops=made.tflops,
        reference_tflops=made.reference_tflops,
    )


def write_weights(
    writer: BundleWriter, weights: dict[str, Tensor], referenced: Set[str]
) -> tuple[tuple[WeightsEntry, ...], dict[str, str]]:
    """Each component's tensors as safetensors; a tensor with several names is stored once, a referenced one not at all.

    Returns:
        The files, and {alias: stored name} for the other names.
    """
    stored: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    tied: dict[str, str] = {}
    components: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(weights.items(), key=lambda item: item[0] not in referenced):
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if key in stored:
            tied[name] = stored[key]
            continue
        stored[key] = name
        if name in referenced:
            continue
        component, _, rest = name.partition(".")
        components.setdefault(component, {})[rest] = tensor
    entries = [
        WeightsEntry(component=component, path=path)
        for component, tensors in components.items()
        for path in writer.write_weights(component, tensors)
    ]
    return tuple(entries), tied
