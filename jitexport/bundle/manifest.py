"""manifest.json: a strict, versioned schema of everything that a bundle holds and was built for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from jitexport.errors import ManifestError
from jitexport.grid import TokenGrid
from jitexport.models.base import ModelDefaults, ModelGeometry
from jitexport.positions import Rotary
from jitexport.schedule import Stage, StageSchedule
from jitexport.specs import EngineSpec, TensorSpec

FORMAT_VERSION = 2
FILE_NAME = "manifest.json"
DIGEST_NAME = "manifest.sha256"
#: Backends that were called otherwise when bundles of theirs were built.
FORMER_NAMES = {"auto": "fastest"}


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _safe(path: str) -> str:
    parts = PurePosixPath(path).parts
    plain = parts and not PurePosixPath(path).is_absolute() and ".." not in parts and str(PurePosixPath(path)) == path
    if not plain or "\\" in path or not path.isprintable() or path in (FILE_NAME, DIGEST_NAME):
        raise ValueError(f"{path!r} is not a plain relative path")
    return path


class FileEntry(_Entry):
    """A file of the bundle: relative path, size in bytes, sha256 in hexadecimal."""

    path: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    _path = field_validator("path")(_safe)


class TensorEntry(_Entry):
    """Name, shape and dtype of an engine's input or output."""

    name: str
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    dtype: Literal["fp32", "bf16", "int64"]


class EngineEntry(_Entry):
    """An engine: its directory in the bundle, its inputs and outputs, and how far it is from the eager module.

    `golden` is the file with an example of its inputs and of what it gave for them where it was built.
    `relative_error` is ||engine - eager|| / ||eager|| over all outputs, `max_error` the largest difference. Where the
    engine was built for another machine's GPU it could not run: both are null, and the golden outputs are eager's.
    `kernels` names those of jitexport's own that the engine has, and the instructions that they are written in.
    """

    name: str
    directory: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    golden: str
    relative_error: float | None
    max_error: float | None
    kernels: str | None = None

    _paths = field_validator("directory", "golden")(_safe)

    def spec(self) -> EngineSpec:
        """As an `EngineSpec`."""

        def specs(entries: tuple[TensorEntry, ...]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(e.name, e.shape, e.dtype) for e in entries)

        return EngineSpec(self.name, specs(self.inputs), specs(self.outputs))


class WeightsEntry(_Entry):
    """A safetensors file with tensors of one component, named without it."""

    component: str
    path: str

    _path = field_validator("path")(_safe)


class ReferenceEntry(_Entry):
    """A safetensors file of the model's own folder, outside the bundle: {tensor's name in the component: key there}."""

    component: str
    path: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tensors: dict[str, str]

    _path = field_validator("path")(_safe)


class TokenizerEntry(_Entry):
    """A tokenizer's JSON file and the length that prompts are padded to."""

    name: str
    path: str
    length: int = Field(ge=1)

    _path = field_validator("path")(_safe)


class ModelEntry(_Entry):
    """The model: where it came from, its family, and what rebuilds its modules without weights."""

    name: str
    source: str
    family: str
    configs: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    config_digest: str
    guidance_scale: float | None
    num_inference_steps: int = Field(ge=1)


class GeometryEntry(_Entry):
    """Sizes: see `jitexport.models.base.ModelGeometry`."""

    grid: tuple[int, ...]
    latent_shape: tuple[int, int, int]
    patch: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    rotary_axes: tuple[int, ...]
    rotary_theta: float
    text_tokens: int = Field(ge=0)

    @classmethod
    def of(cls, geometry: ModelGeometry) -> GeometryEntry:
        """The entry of a geometry."""
        return cls(
            grid=geometry.grid.shape, latent_shape=geometry.latent_shape, patch=geometry.patch,
            height=geometry.height, width=geometry.width, rotary_axes=geometry.rotary.axes,
            rotary_theta=geometry.rotary.theta, text_tokens=geometry.rotary.text_tokens,
        )

    def geometry(self) -> ModelGeometry:
        """As a `ModelGeometry`."""
        return ModelGeometry(
            TokenGrid(self.grid), self.latent_shape, self.patch, self.height, self.width,
            Rotary(self.rotary_axes, self.rotary_theta, self.text_tokens),
        )


class StageEntry(_Entry):
    """A stage of the schedule, in the order in which they run, and the cost of one of its steps."""

    index: int
    tokens: int
    steps: int
    step_tflops: float


class ScheduleEntry(_Entry):
    """Stages, noise levels, and the speed-up that their FLOPs predict over the reference steps.

    `sigmas` and `ends` as in `jitexport.schedule.StageSchedule`. `preview_tflops` is what a method spends on looking at
    a picture between stages; `tflops` includes it.
    """

    stages: tuple[StageEntry, ...]
    sigmas: tuple[float, ...]
    ends: tuple[float, ...]
    speedup: float | None
    predicted_speedup: float
    reference_steps: int
    preview_tflops: float
    tflops: float
    reference_tflops: float

    def schedule(self) -> StageSchedule:
        """As a `StageSchedule`."""
        return StageSchedule(tuple(Stage(s.index, s.tokens, s.steps) for s in self.stages), self.sigmas, self.ends)


class MethodEntry(_Entry):
    """The acceleration method and its settings."""

    name: str
    preset: str
    options: dict[str, Any]


class HostEntry(_Entry):
    """The machine and the versions that the engines were built with.

    `cpu` is torch's name for the vector extensions, `cpu_features` all instruction sets that a compiler may have used,
    `threads` what torch had (engines run on what is there), `libraries` the versions of what beside torch built them.
    """

    system: str
    machine: str
    cpu: str
    cpu_features: tuple[str, ...]
    torch: str
    threads: int | None = Field(default=None, ge=1)
    python: str
    device: Literal["cpu", "cuda"]
    cuda: str | None
    gpu: str | None
    libraries: dict[str, str] = {}


class Manifest(_Entry):
    """Everything a bundle declares. Unknown and missing fields are errors.

    `chosen` has the reasons for what was left to the machine that built, by field.
    `tied` names tensors that are other names of a stored one: {alias: stored name}. `references` are weights that are
    read from the model's folder, by default `reference_folder`; a bundle that stores all of its weights has none.
    """

    format_version: Literal[2]
    jitexport_version: str
    created: str
    command: str
    model: ModelEntry
    geometry: GeometryEntry
    method: MethodEntry
    schedule: ScheduleEntry
    backend: str
    dtype: Literal["fp32", "bf16"]
    batch: int = Field(ge=1)
    host: HostEntry
    chosen: dict[Literal["device", "backend", "dtype"], str] = {}
    engines: tuple[EngineEntry, ...]
    tokenizers: tuple[TokenizerEntry, ...]
    weights: tuple[WeightsEntry, ...]
    tied: dict[str, str]
    references: tuple[ReferenceEntry, ...]
    reference_folder: str | None
    files: tuple[FileEntry, ...]

    @field_validator("backend")
    @classmethod
    def _present_name(cls, backend: str) -> str:
        return FORMER_NAMES.get(backend, backend)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        declared = [f.path for f in self.files]
        if len(set(declared)) != len(declared):
            raise ValueError("a file is declared twice")
        used = {*(w.path for w in self.weights), *(t.path for t in self.tokenizers), *(e.golden for e in self.engines)}
        if missing := used - set(declared):
            raise ValueError(f"files that are used but not declared: {sorted(missing)}")
        names = [e.name for e in self.engines]
        wanted = ["text", "condition", *(s.name for s in self.schedule.schedule().engines), "decode"]
        if sorted(n for n in names if n != "preview") != sorted(wanted) or names.count("preview") > 1:
            raise ValueError(f"engines are {names}, the schedule needs {wanted}")
        for problem in self._contradictions():
            raise ValueError(problem)
        return self

    def _contradictions(self) -> Iterator[str]:
        """Where engines, schedule, tokenizers and geometry do not fit each other: a call would fail halfway."""
        geometry = self.geometry.geometry()
        schedule = self.schedule.schedule()
        axes, text = geometry.rotary.axes, geometry.rotary.text_tokens
        if geometry.grid.tokens != schedule.stages[-1].tokens:
            yield f"the grid has {geometry.grid.tokens} tokens, the last stage {schedule.stages[-1].tokens}"
        if len(axes) < len(self.geometry.grid) or any(a < 2 or a % 2 for a in axes):
            yield f"rotary axes {axes} do not fit a grid of {len(self.geometry.grid)} axes"

        specs = {e.name: e.spec() for e in self.engines}
        condition, decode = specs["condition"], specs["decode"]
        found = [(i.shape, i.dtype) for i in specs["text"].inputs]
        if found != [((self.batch, t.length), "int64") for t in self.tokenizers]:
            yield f"the text engine's inputs are {found}, which is not what the tokenizers give"
        known: dict[str, tuple[tuple[int, ...], str]] = {o.name: (o.shape, o.dtype) for o in specs["text"].outputs}
        known |= {"sigmas": ((schedule.nfe,), "fp32"), "guidance": ((self.batch,), "fp32")}
        yield from _unlike(condition, known)
        if not condition.outputs or condition.outputs[0].shape[:2] != (schedule.nfe, self.batch):
            yield "the condition engine's first output is not one modulation per step and image"
            return
        static = {o.name: (o.shape, o.dtype) for o in condition.outputs[1:]}
        modulation = (condition.outputs[0].shape[1:], condition.outputs[0].dtype)
        for stage in schedule.engines:
            tokens = ((self.batch, stage.tokens, geometry.channels), self.dtype)
            angles = ((self.batch, text + stage.tokens, sum(axes) // 2), "fp32")
            spec = specs[stage.name]
            yield from _unlike(
                spec, static | {"tokens": tokens, "cos": angles, "sin": angles, "modulation": modulation}
            )
            if [(o.shape, o.dtype) for o in spec.outputs] != [tokens]:
                yield f"{stage.name} does not give one velocity per token"
        latents = ((self.batch, geometry.grid.tokens, geometry.channels), "fp32")
        if [(i.shape, i.dtype) for i in decode.inputs] != [latents] or len(decode.outputs) != 1:
            yield "the decode engine does not take the latents of the grid and give pictures"
        if preview := specs.get("preview"):
            latents = ((self.batch, geometry.grid.halved().tokens, geometry.channels), "fp32")
            if [(i.shape, i.dtype) for i in preview.inputs] != [latents] or len(preview.outputs) != 1:
                yield "the preview engine does not take latents of half the sides and give pictures"

    @property
    def defaults(self) -> ModelDefaults:
        """How the ordinary pipeline is run."""
        return ModelDefaults(self.model.guidance_scale, self.model.num_inference_steps)

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
