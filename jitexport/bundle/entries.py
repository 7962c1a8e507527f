"""The entries of a manifest: see `jitexport.bundle.manifest.Manifest`."""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from jitexport import registry
from jitexport.methods.temporal.base import Cache
from jitexport.models.base import ModelAdapter, ModelGeometry
from jitexport.prompting import Tokenizer
from jitexport.schedule import Stage, StageSchedule
from jitexport.specs import EngineSpec, TensorSpec

FILE_NAME = "manifest.json"
DIGEST_NAME = "manifest.sha256"


class Entry(BaseModel):
    """Fields of exactly these names and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _safe(path: str) -> str:
    parts = PurePosixPath(path).parts
    plain = parts and not PurePosixPath(path).is_absolute() and ".." not in parts and str(PurePosixPath(path)) == path
    if not plain or "\\" in path or not path.isprintable() or path in (FILE_NAME, DIGEST_NAME):
        raise ValueError(f"{path!r} is not a plain relative path")
    return path


class FileEntry(Entry):
    """A file of the bundle: relative path, size in bytes, sha256 in hexadecimal."""

    path: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    _path = field_validator("path")(_safe)


class TensorEntry(Entry):
    """Name, shape and dtype of an engine's input or output; see `jitexport.specs.TensorSpec`."""

    name: str
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    dtype: Literal["fp32", "bf16", "int64"]
    per_step: bool

    @classmethod
    def of(cls, spec: TensorSpec) -> TensorEntry:
        """The entry of a specification."""
        return cls(**vars(spec))

    def spec(self) -> TensorSpec:
        """As a `TensorSpec`."""
        return TensorSpec(**self.model_dump())


class EngineEntry(Entry):
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

        return EngineSpec(self.name, tuple(i.spec() for i in self.inputs), tuple(o.spec() for o in self.outputs))


class WeightsEntry(Entry):
    """A safetensors file with tensors of one component, named without it."""

    component: str
    path: str

    _path = field_validator("path")(_safe)


class ReferenceEntry(Entry):
    """A safetensors file of the model's own folder, outside the bundle: {tensor's name in the component: key there}."""

    component: str
    path: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tensors: dict[str, str]

    _path = field_validator("path")(_safe)


class TokenizerEntry(Entry):
    """A tokenizer's JSON file, and what it is given: see `jitexport.prompting.Tokenizer`."""

    name: str
    path: str
    length: int = Field(ge=1)
    template: str
    empty: str
    quoted: bool
    mask: bool

    _path = field_validator("path")(_safe)

    @classmethod
    def of(cls, tokenizer: Tokenizer, path: str) -> TokenizerEntry:
        """The entry of a tokenizer whose JSON is in a file of the bundle."""
        return cls(path=path, **{name: value for name, value in vars(tokenizer).items() if name != "json"})

    def tokenizer(self, text: str) -> Tokenizer:
        """As a `Tokenizer`, with the file's JSON."""
        return Tokenizer(json=text, **self.model_dump(exclude={"path"}))


class ModelEntry(Entry):
    """The model: where it came from, its family, and what rebuilds its modules without weights."""

    name: str
    source: str
    family: str
    configs: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    config_digest: str

    def adapter(self) -> type[ModelAdapter]:
        """The family's adapter class.

        Raises:
            UnknownNameError: this version knows no such family.
        """
        return registry.family(self.family)


class GeometryEntry(Entry):
    """Sizes, which follow from the model's configuration and settings: see `jitexport.models.base.ModelGeometry`."""

    grid: tuple[int, ...]
    latent_shape: tuple[int, ...]
    patch: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    frames: int | None
    text_tokens: int = Field(ge=0)

    @classmethod
    def of(cls, geometry: ModelGeometry) -> GeometryEntry:
        """The entry of a geometry."""
        sizes = {name: getattr(geometry, name) for name in cls.model_fields if name != "grid"}
        return cls(grid=geometry.grid.shape, **sizes)

    @property
    def tokens(self) -> int:
        """N, the number of tokens of the grid."""
        return math.prod(self.grid)


class StageEntry(Entry):
    """A stage of the schedule, in the order in which they run, and the cost of one of its computed steps."""

    index: int
    tokens: int
    steps: int
    step_tflops: float


class ScheduleEntry(Entry):
    """Stages, noise levels, and the speed-up that their FLOPs predict over the reference steps.

    `sigmas`, `ends` and `actions` as in `jitexport.schedule.StageSchedule`. `preview_tflops` is what a method spends on
    looking at a picture between stages; `tflops` includes it.
    """

    stages: tuple[StageEntry, ...]
    sigmas: tuple[float, ...]
    ends: tuple[float, ...]
    actions: tuple[str, ...]
    speedup: float | None
    predicted_speedup: float
    reference_steps: int
    preview_tflops: float
    tflops: float
    reference_tflops: float

    def schedule(self) -> StageSchedule:
        """As a `StageSchedule`."""
        stages = tuple(Stage(s.index, s.tokens, s.steps) for s in self.stages)
        return StageSchedule(stages, self.sigmas, self.ends, self.actions)


class MethodEntry(Entry):
    """The acceleration method and its settings."""

    name: str
    preset: str
    options: dict[str, Any]


class CacheEntry(Entry):
    """The temporal method, its settings, and where a calibration found the computed steps, what it saw."""

    name: str
    options: dict[str, Any]
    evidence: dict[str, Any] | None = None

    def cache(self) -> Cache[Any]:
        """The temporal method.

        Raises:
            UnknownNameError: this version knows no such method.
            InputError: options that it does not have.
        """
        return registry.cache(self.name)(self.options)


class HostEntry(Entry):
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
