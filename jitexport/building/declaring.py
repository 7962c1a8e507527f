"""What a build writes down: weights, configurations, the schedule, the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor

from jitexport._version import __version__
from jitexport.building.request import Request
from jitexport.bundle import BundleWriter, Manifest
from jitexport.bundle.entries import (
    CacheEntry,
    GeometryEntry,
    MethodEntry,
    ModelEntry,
    ScheduleEntry,
    StageEntry,
    TensorEntry,
    WeightsEntry,
)
from jitexport.bundle.host import fingerprint
from jitexport.bundle.manifest import FORMAT_VERSION
from jitexport.models.base import ModelAdapter
from jitexport.plan import Plan
from jitexport.runtime import Pipeline

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


def declare(
    request: Request, reference: Pipeline, adapter: ModelAdapter, made: Plan, reasons: Mapping[str, str], *,
    created: str, command: str, **written: Any,
) -> Manifest:
    """The manifest of a build.

    Args:
        reasons: for what was left to the machine.
        command: what the user typed.
        written: entries of what the bundle has: engines, tokenizers, weights, tied, references, reference_folder,
            files.
    """
    configs = plain_configs(adapter.configs)
    checked: dict[str, Any] = {"dtype": request.dtype, "passes": reference.passes, "chosen": reasons}  # by the schema
    return Manifest(
        format_version=FORMAT_VERSION,
        jitexport_version=__version__,
        created=created,
        command=command,
        model=ModelEntry(
            name=request.source.name,
            source=request.source.hub_id or request.source.name,
            family=adapter.family,
            configs=configs,
            settings=adapter.settings(),
            config_digest=config_digest(configs),
        ),
        geometry=GeometryEntry.of(adapter.geometry),
        method=MethodEntry(name=made.method, preset=made.preset, options=made.options),
        cache=None if made.cache is None else CacheEntry(
            name=made.cache.name, options=made.cache.options,
            evidence=request.calibration.evidence if request.calibration else None,
        ),
        schedule=schedule_entry(made),
        backend=request.backend_name,
        batch=request.batch,
        host=fingerprint(request.device, request.target, request.backend.libraries()),
        constants=tuple(map(TensorEntry.of, adapter.constant_specs(made.schedule.nfe, request.dtype))),
        **checked,
        **written,
    )
