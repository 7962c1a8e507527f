"""manifest.json: a strict, versioned schema of everything that a bundle holds and was built for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from jitexport.bundle.entries import (
    DIGEST_NAME,
    FILE_NAME,
    CacheEntry,
    EngineEntry,
    Entry,
    FileEntry,
    GeometryEntry,
    HostEntry,
    MethodEntry,
    ModelEntry,
    ReferenceEntry,
    ScheduleEntry,
    TensorEntry,
    TokenizerEntry,
    WeightsEntry,
)
from jitexport.errors import JitExportError, ManifestError
from jitexport.methods.temporal.base import Cache
from jitexport.models.base import ModelDefaults, ModelGeometry
from jitexport.models.stages import ACTS, engine_spec, kind_of
from jitexport.schedule import COMPUTED, FORECAST, StageSchedule
from jitexport.specs import EngineSpec, TensorSpec

__all__ = ["DIGEST_NAME", "FILE_NAME", "FORMAT_VERSION", "Manifest", "digest_line", "parse_manifest"]

FORMAT_VERSION: Literal[4] = 4


class Manifest(Entry):
    """Everything a bundle declares. Unknown and missing fields are errors.

    `chosen` has the reasons for what was left to the machine that built, by field.
    `tied` names tensors that are other names of a stored one: {alias: stored name}. `references` are weights that are
    read from the model's folder, by default `reference_folder`; a bundle that stores all of its weights has none.
    `constants` are what stages read that depends on the noise levels only, stored as the component "constants".
    `passes` is 2 where a stage engine runs a prompt and its negative prompt at once, at twice the batch.
    """

    format_version: Literal[4]
    jitexport_version: str
    created: str
    command: str
    model: ModelEntry
    geometry: GeometryEntry
    method: MethodEntry
    cache: CacheEntry | None
    schedule: ScheduleEntry
    backend: str
    dtype: Literal["fp32", "bf16"]
    batch: int = Field(ge=1)
    passes: Literal[1, 2]
    host: HostEntry
    chosen: dict[Literal["device", "backend", "dtype", "passes"], str] = Field(default_factory=dict)
    engines: tuple[EngineEntry, ...]
    constants: tuple[TensorEntry, ...]
    tokenizers: tuple[TokenizerEntry, ...]
    weights: tuple[WeightsEntry, ...]
    tied: dict[str, str]
    references: tuple[ReferenceEntry, ...]
    reference_folder: str | None
    files: tuple[FileEntry, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        declared = [f.path for f in self.files]
        if len(set(declared)) != len(declared):
            raise ValueError("a file is declared twice")
        used = {*(w.path for w in self.weights), *(t.path for t in self.tokenizers), *(e.golden for e in self.engines)}
        if missing := used - set(declared):
            raise ValueError(f"files that are used but not declared: {sorted(missing)}")
        names = [e.name for e in self.engines]
        stages = [stage.engine(action) for action, stage in self.schedule.schedule().runs]
        wanted = ["text", "condition", *stages, "decode"]
        if sorted(n for n in names if n != "preview") != sorted(wanted) or names.count("preview") > 1:
            raise ValueError(f"engines are {names}, the schedule needs {wanted}")
        for problem in self._contradictions():
            raise ValueError(problem)
        return self

    def _contradictions(self) -> Iterator[str]:
        """Where engines, schedule, tokenizers and geometry do not fit each other: a call would fail halfway."""
        try:
            geometry, _ = self.model_geometry, self.defaults
            cells = self.model.adapter().cells(self.model.configs)
        except Exception as error:  # whatever a family raises on configurations that are not its own
            yield f"no {self.model.family} has these configurations and settings ({type(error).__name__}: {error})"
            return
        if GeometryEntry.of(geometry) != self.geometry:
            yield f"the geometry is {self.geometry}, that of the model's configuration {GeometryEntry.of(geometry)}"
            return
        schedule = self.schedule.schedule()
        if geometry.grid.tokens != schedule.stages[-1].tokens:
            yield f"the grid has {geometry.grid.tokens} tokens, the last stage {schedule.stages[-1].tokens}"

        specs = {e.name: e.spec() for e in self.engines}
        condition, decode = specs["condition"], specs["decode"]
        found = [(i.shape, i.dtype) for i in specs["text"].inputs]
        given = [((self.batch, t.length), "int64") for t in self.tokenizers for _ in range(1 + t.mask)]
        if found != given:
            yield f"the text engine's inputs are {found}, which is not what the tokenizers give"
        known = {o.name: (o.shape, o.dtype) for o in specs["text"].outputs}
        known |= {"sigmas": ((schedule.nfe,), "fp32"), "guidance": ((self.batch,), "fp32")}
        yield from _unlike(condition, known)
        for output in condition.outputs:
            begin = (schedule.nfe, self.batch) if output.per_step else (self.batch,)
            if output.shape[: len(begin)] != begin:
                yield f"the condition engine's {output} is not one value per {'step and ' * output.per_step}image"
                return
        rows = self.batch * self.passes
        shared = {o.name: ((rows, *o.shape[2 if o.per_step else 1 :]), o.dtype) for o in condition.outputs}
        shared |= {c.name: (c.shape[1:], c.dtype) for c in self.constants}
        if any(c.shape[0] != schedule.nfe for c in self.constants):
            yield f"constants are not one value per step: {[(c.name, c.shape) for c in self.constants]}"
        yield from self._temporal_contradictions(schedule)
        if "context" not in shared:
            yield "neither the condition engine nor a constant gives the stages a context"
            return
        context = TensorSpec("context", *shared["context"])
        for action, stage in schedule.runs:
            tokens = TensorSpec("tokens", (rows, stage.tokens, geometry.channels), self.dtype)
            wanted = engine_spec(action, stage, (tokens, context), self.model.settings.get("features"), cells)
            read = (*geometry.positions.specs(rows, stage.tokens, self.dtype), *wanted.inputs)
            spec = specs[stage.engine(action)]
            yield from _unlike(spec, shared | {r.name: (r.shape, r.dtype) for r in read})
            if [(o.shape, o.dtype) for o in spec.outputs] != [(o.shape, o.dtype) for o in wanted.outputs]:
                yield f"{spec.name} does not give one velocity per token, and what the cache remembers"
        shape: tuple[int, ...] = (geometry.grid.tokens, geometry.channels)
        if geometry.tiles is not None:
            channels, *size = geometry.latent_shape
            shape = (channels, *geometry.tiles.sides(tuple(size), geometry.frames)[0])
        latents = ((self.batch, *shape), "fp32")
        if [(i.shape, i.dtype) for i in decode.inputs] != [latents] or len(decode.outputs) != 1:
            yield "the decode engine does not take the latents of the grid and give pictures"
        if preview := specs.get("preview"):
            latents = ((self.batch, geometry.grid.halved().tokens, geometry.channels), "fp32")
            if [(i.shape, i.dtype) for i in preview.inputs] != [latents] or len(preview.outputs) != 1:
                yield "the preview engine does not take latents of half the sides and give pictures"

    def _temporal_contradictions(self, schedule: StageSchedule) -> Iterator[str]:
        """Where the actions of the steps, the temporal method and what the engines hand on do not fit each other."""
        features = self.model.settings.get("features")
        known = {*ACTS.get(kind_of(features), {}), FORECAST}
        if wrong := {*schedule.actions} - known:
            yield f"steps have actions {sorted(wrong)}, engines with features {features} have {sorted(known)}"
        if self.cache is None:
            if features is not None or {*schedule.actions} - {COMPUTED}:
                yield f"there is no cache for features {features} and actions {sorted({*schedule.actions})}"
            return
        try:
            cache = self.cache.cache()
        except JitExportError as error:
            yield f"no such cache: {error}"
            return
        if cache.features != features:
            yield f"the cache {cache.name} needs features {cache.features}, engines have {features}"
        wanted = {cache.action(schedule, i) for i in range(schedule.nfe)} | {COMPUTED}
        if wrong := {*schedule.actions} - wanted:
            yield f"the cache {cache.name} has no actions {sorted(wrong)}"

    @cached_property
    def model_geometry(self) -> ModelGeometry:
        """The sizes by the model's family, with the positions of its tokens."""
        return self.model.adapter().geometry_of(self.model.configs, self.model.settings)

    @property
    def defaults(self) -> ModelDefaults:
        """How the ordinary pipeline is run."""
        return self.model.adapter().defaults_of(self.model.configs, self.model.settings)

    @property
    def temporal(self) -> Cache[Any] | None:
        """The temporal method, if there is one."""
        return None if self.cache is None else self.cache.cache()

    @property
    def precision(self) -> str:
        """The dtype, and the 8-bit type of the linear layers where they have one: "bf16", "bf16 + int8"."""
        kind = self.model.settings.get("quantization")
        return self.dtype if kind is None else f"{self.dtype} + {kind}"

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest itself."""
        return sum(f.size for f in self.files)

    def to_json(self) -> str:
        """Indented JSON text."""
        return self.model_dump_json(indent=1)


def _unlike(spec: EngineSpec, known: dict[str, tuple[tuple[int, ...], str]]) -> Iterator[str]:
    """Inputs of an engine that the pipeline cannot give, or not in that shape."""
    for entry in spec.inputs:
        if known.get(entry.name) != (entry.shape, entry.dtype):
            yield f"engine {spec.name} takes {entry}, the pipeline gives {known.get(entry.name, 'no such thing')}"


def digest_line(text: bytes) -> bytes:
    """The content of manifest.sha256 for a manifest, as `sha256sum` writes it."""
    return f"{hashlib.sha256(text).hexdigest()}  {FILE_NAME}\n".encode()


def parse_manifest(text: str | bytes, where: object) -> Manifest:
    """A manifest from its JSON text.

    Raises:
        ManifestError: not JSON, another format version, or a field that does not fit the schema.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where} is not JSON", found=error, remedy="build the bundle again") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ManifestError(
            f"{where} has another format", found=f"format_version {version!r}", expected=FORMAT_VERSION,
            remedy="build the bundle again with this version of jitexport",
        )
    try:
        return Manifest.model_validate_json(text)
    except (ValidationError, ValueError) as error:  # ValueError: the schedule's and grid's own checks
        problems = error.errors() if isinstance(error, ValidationError) else [{"loc": (), "msg": str(error)}]
        first = problems[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ManifestError(
            f"{where} does not fit the schema", found=f"{place}: {first['msg']} ({len(problems)} problem(s))",
            expected=f"format version {FORMAT_VERSION}", remedy="build the bundle again",
        ) from None
