"""The contract between a model family and everything else.

A family turns a diffusers pipeline into modules of fixed shape, which backends compile into engines:

    text        token ids of each tokenizer, and its mask where it has one   -> embeddings
    condition   embeddings, sigmas [S] and, where used, guidance [B]         -> per step [S, B, ...] or static [B, ...]
    stage<k>    tokens [B, m, C], positions, what `condition` gave, constants -> velocity [B, m, C]
                for temporal methods also others: see `jitexport.models.stages`
    preview     tokens [B, N / 4, C]                                         -> images [B, 3, H / 2, W / 2] in [0, 1]
    decode      tokens [B, N, C]                                             -> images [B, 3, H, W] in [0, 1]

Whatever does not change inside the denoising loop belongs to `condition`, which runs once per image and prompt; what
depends on the noise levels only is a constant of the bundle. Of per-step outputs and of constants, a stage sees the
row of its step. `stage<k>` serves all stages of as many tokens. `preview` is there for methods that look at pictures
between stages. Classifier-free guidance is done outside of the engines: see `jitexport.guidance`.

A family's file is read wherever a bundle is loaded: it imports diffusers and transformers only where it needs them.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from jitexport.errors import InputError, UnsupportedModelError
from jitexport.guidance import Guidance
from jitexport.models.geometry import ModelGeometry, image_grid
from jitexport.models.layers import Part
from jitexport.models.naming import Naming
from jitexport.models.published import Configs, Published
from jitexport.models.stages import Act, act_of, check_features, engine_spec
from jitexport.models.tokens import Cell
from jitexport.prompting import Tokenizer
from jitexport.quant import check_kind, quantize_linears
from jitexport.schedule import Stage, StageSchedule, middle_shift
from jitexport.specs import EngineSpec, TensorSpec

__all__ = [
    "Configs", "ModelAdapter", "ModelDefaults", "ModelGeometry", "Published", "check_settings", "full_config",
    "image_grid", "read_json", "refuse_others", "with_settings",
]


@dataclass(frozen=True)
class ModelDefaults:
    """How the ordinary pipeline is run: what a call uses where it says nothing, and what speed-ups refer to.

    `max_sequence_length` is what diffusers' call names so; None where it has no such argument.
    """

    guidance: Guidance
    num_inference_steps: int
    max_sequence_length: int | None = None


class ModelAdapter(ABC):
    """One model of a family: its components, and the modules made of them.

    Settings (all optional where a folder is read): height and width in pixels, frames of a video, max_sequence_length
    (text tokens), guidance_scale, num_inference_steps, quantization (of the blocks' linear layers: "int8", "fp8" or
    None), features (what stage engines hand on for a temporal method: see `jitexport.models.stages`, or None). A folder
    may carry them in a file `jitexport.json`.

    Attributes:
        family: the diffusers pipeline class that this adapter serves.
        classes: "library:Class" of each component that engines are made of.
        optional: components that a folder may lack.
        tokenizer_folders: in the order of the text engine's inputs.
        plain_configs: folders with nothing but a configuration that matters, and the file that it is in.
        naming: the names that the modules have in adapters and in other checkpoints.
        published: models with known configurations, by the name that `--model` takes.
        timesteps: noise levels in place of a method's Beta distribution, which was fitted to other models: an option of
            `jitexport.schedule.timesteps`. None: the method's own.
        components: torch modules by their name in the pipeline; parameters are known as `<component>.<name>`.
        configs: each component's configuration, from which `from_configs` rebuilds it without weights, the scheduler's,
            and under "pipeline" what model_index.json says beside components.
    """

    family: ClassVar[str]
    classes: ClassVar[Mapping[str, str]]
    optional: ClassVar[Sequence[str]] = ()
    tokenizer_folders: ClassVar[Sequence[str]] = ("tokenizer",)
    plain_configs: ClassVar[Mapping[str, str]] = {}
    naming: ClassVar[Naming]
    published: ClassVar[Mapping[str, Published]] = {}
    timesteps: ClassVar[Mapping[str, Any] | None] = None
    components: dict[str, Part]
    configs: dict[str, dict[str, Any]]
    geometry: ModelGeometry
    defaults: ModelDefaults

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        configs: Configs,
        tokenizers: Sequence[Tokenizer],
        settings: Mapping[str, Any],
    ) -> None:
        self.components = dict(components)
        self.configs = {name: dict(config) for name, config in configs.items()} | {
            name: full_config(module) for name, module in self.components.items()
        }
        self._tokenizers = list(tokenizers)
        self._settings = dict(settings)
        self.check(self.configs, self._settings)
        check_features(self._settings.get("features"), self.cells(self.configs), self.family)
        self.geometry = self.geometry_of(self.configs, self._settings)
        self.defaults = self.defaults_of(self.configs, self._settings)
        for module in self.components.values():
            module.eval().requires_grad_(False)
        self.arrange()
        if (kind := self._settings.get("quantization")) is not None:
            quantize_linears(self.components["transformer"], kind, self.quantized)

    # --- what a family says ---

    @classmethod  # noqa: B027 - there may be none
    def check(cls, configs: Configs, settings: Mapping[str, Any]) -> None:
        """Refuse models that only resemble the family's, and settings that they cannot have.

        Raises:
            UnsupportedModelError: another model, by name.
            InputError: settings.
        """

    @classmethod
    @abstractmethod
    def usual(cls, configs: Configs) -> dict[str, Any]:
        """All settings as the ordinary pipeline has them."""

    @classmethod
    @abstractmethod
    def geometry_of(cls, configs: Configs, settings: Mapping[str, Any]) -> ModelGeometry:
        """Sizes, from plain values: also where a bundle is loaded.

        Raises:
            InputError: a size that does not fit the token grid.
        """

    @classmethod
    @abstractmethod
    def defaults_of(cls, configs: Configs, settings: Mapping[str, Any]) -> ModelDefaults:
        """How the ordinary pipeline is run, from plain values."""

    def arrange(self) -> None:  # noqa: B027 - most families have nothing to do
        """Take out of the components what no engine reads, after they have been made."""

    def quantized(self, name: str) -> bool:
        """Whether a linear layer of the transformer is one of those that `quantization` is for.

        Modulation runs once per image, embedders and the last layer are small.
        """
        return "transformer_blocks." in name and "norm" not in name

    @classmethod
    def cells(cls, configs: Configs) -> tuple[Cell, ...]:
        """What each block has for a cache of tokens, in the order in which blocks run; empty for a family without."""
        return ()

    @classmethod
    @abstractmethod
    def tokenizer(cls, folder: str, configs: Configs, settings: Mapping[str, Any]) -> Tokenizer:
        """What is fed to the tokenizer in a folder: length, template, mask; its `json` is put in by the reader."""

    @abstractmethod
    def native_sigmas(self, n: int) -> tuple[float, ...]:
        """The noise levels of the ordinary pipeline with n steps, n + 1 values that end with 0."""

    def shift(self, n: int) -> float:
        """The shift h of those, sigma = h u / (1 + (h - 1) u) of even u."""
        return middle_shift(self.native_sigmas)

    @abstractmethod
    def text_spec(self, batch: int, dtype: str) -> EngineSpec:
        """The text engine."""

    @abstractmethod
    def condition_spec(self, batch: int, steps: int, dtype: str) -> EngineSpec:
        """The condition engine, its outputs marked where they are per step."""

    def constants(self, sigmas: Tensor) -> dict[str, Tensor]:
        """What stages read that depends on the noise levels [S] only: by name, [S, ...], in the model's dtype."""
        return {}

    def constant_specs(self, steps: int, dtype: str) -> tuple[TensorSpec, ...]:
        """Name and shape [S, ...] of each of `constants`, per step."""
        return ()

    @abstractmethod
    def module(self, name: str) -> nn.Module:
        """The module of an engine, its parameters named `<component>.<diffusers' name>`."""

    def act(self, engine: str) -> Act:
        """What a stage's module does in an engine.

        Raises:
            UnknownNameError: no such engine.
        """
        return act_of(engine, self._settings.get("features"), self.cells(self.configs))

    # --- what follows from it ---

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype, settings: Mapping[str, Any] | None = None) -> ModelAdapter:
        """Read a diffusers folder with its weights. Settings left out are the folder's, or the family's usual.

        Raises:
            ModelNotFoundError: files that are missing or damaged.
            UnsupportedModelError: a model that is not of the family.
            InputError: settings that it cannot have.
        """
        from jitexport.models.folders import read_model

        return read_model(cls, folder, dtype, settings)

    @classmethod
    def from_file(
        cls, path: Path, base: Path, dtype: torch.dtype, settings: Mapping[str, Any] | None = None
    ) -> ModelAdapter:
        """Read a transformer in one file, in its authors' names or diffusers', everything else from a folder."""
        from jitexport.models.folders import read_model

        return read_model(cls, base, dtype, settings, transformer=path)

    @classmethod
    def from_configs(cls, configs: Configs, settings: Mapping[str, Any], dtype: torch.dtype) -> ModelAdapter:
        """Build the components on the meta device: shapes and FLOPs without weights."""
        from jitexport.models.folders import component_class, empty_component

        made = {name: empty_component(component_class(cls, name), configs[name]) for name in cls.present(configs)}
        for module in made.values():
            nn.Module.to(module, dtype)  # diffusers' own `to` warns about layers that are not there
        return cls(made, configs, [], settings)

    @classmethod
    def present(cls, configs: Configs) -> list[str]:
        """The components that a model has: all of the family's but optional ones without a configuration."""
        return [name for name in cls.classes if name not in cls.optional or configs.get(name)]

    def settings(self) -> dict[str, Any]:
        """Plain values that `from_configs` needs beside the configurations: sizes, defaults, and `quantization`."""
        return dict(self._settings)

    def tokenizers(self) -> list[Tokenizer]:
        """Tokenizers in the order of the text engine's inputs; none of a model without weights."""
        return self._tokenizers

    def specs(
        self, schedule: StageSchedule, batch: int, dtype: str, *, preview: bool = False, passes: int = 1,
        further: Sequence[str] = (),
    ) -> list[EngineSpec]:
        """Engines that a bundle needs: text, condition, stages, preview where asked for, decode.

        Stages are one for each token count, and one for each cheaper action that steps have at it.

        Args:
            passes: 2 for stages that see a prompt and its negative prompt at once, at twice the batch.
            further: actions that there is an engine for at every token count, beside those of the steps.
        """
        geometry, rows = self.geometry, batch * passes
        condition = self.condition_spec(batch, schedule.nfe, dtype)
        given = [
            replace(s, shape=(rows, *s.shape[2 if s.per_step else 1 :]), per_step=False) for s in condition.outputs
        ]
        given += [replace(s, shape=s.shape[1:], per_step=False) for s in self.constant_specs(schedule.nfe, dtype)]

        def run(action: str, stage: Stage) -> EngineSpec:
            shape = (rows, stage.tokens, geometry.channels)
            inputs = (TensorSpec("tokens", shape, dtype), *geometry.positions.specs(rows, stage.tokens, dtype), *given)
            return engine_spec(action, stage, inputs, self._settings.get("features"), self.cells(self.configs))

        stages = [run(action, stage) for action, stage in schedule.runs]
        stages += [run(action, stage) for action in further for stage in schedule.engines]
        previews = [self.decoder_spec("preview", batch)] if preview else []
        return [self.text_spec(batch, dtype), condition, *stages, *previews, self.decoder_spec("decode", batch)]

    def decoder_spec(self, name: str, batch: int) -> EngineSpec:
        """The engine `decode`, or `preview`, which is the same at half the sides."""
        geometry = self.geometry
        small = name == "preview"
        if geometry.tiles is not None and not small:
            channels, *latent = geometry.latent_shape
            tile, pixels = geometry.tiles.sides(tuple(latent), geometry.frames)
            return EngineSpec(
                name, (TensorSpec("latents", (batch, channels, *tile), "fp32"),),
                (TensorSpec("images", (batch, 3, *pixels), "fp32"),),
            )
        grid = geometry.grid.halved() if small else geometry.grid
        sides = (geometry.height // 2, geometry.width // 2) if small else (geometry.height, geometry.width)
        frames = () if geometry.frames is None else (geometry.frames,)
        latents = TensorSpec("latents", (batch, grid.tokens, geometry.channels), "fp32")
        return EngineSpec(name, (latents,), (TensorSpec("images", (batch, 3, *frames, *sides), "fp32"),))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters and buffers by full name, tied ones under each of their names."""
        for component, module in self.components.items():
            for name, tensor in [
                *module.named_parameters(remove_duplicate=False),
                *module.named_buffers(remove_duplicate=False),
            ]:
                yield f"{component}.{name}", tensor


def full_config(module: Part) -> dict[str, Any]:
    """A component's configuration with all of its entries, as diffusers or transformers keep it."""
    config = module.config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse sizes that are no positive whole numbers, negative or no guidance scales, unknown words.

    Raises:
        InputError: naming the settings that are wrong.
    """
    check_kind(settings["quantization"])
    sizes = {k: v for k, v in settings.items() if k not in ("guidance_scale", "quantization", "features")}
    wrong = {k: v for k, v in sizes.items() if not isinstance(v, int) or isinstance(v, bool) or v < 1}
    guidance = settings["guidance_scale"]
    if not isinstance(guidance, int | float) or not 0 <= guidance < math.inf:  # also refuses NaN
        wrong["guidance_scale"] = guidance
    if wrong:
        raise InputError("settings that a model cannot have", found=wrong, expected="positive numbers, sizes whole")


def with_settings(usual: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Usual settings with those that are given, where None says nothing.

    Raises:
        InputError: a setting that there is not, or with a value that it cannot have.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    if unknown := given.keys() - usual.keys():
        raise InputError("unknown settings", found=sorted(unknown), expected=f"some of {sorted(usual)}")
    check_settings(merged := dict(usual) | given)
    return merged


def refuse_others(what: str, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a configuration that has other values than these, where it says something.

    Raises:
        UnsupportedModelError: naming them.
    """
    others = {name: config[name] for name, value in expected.items() if config.get(name, value) != value}
    if others:
        raise UnsupportedModelError(what, found=others, expected={name: expected[name] for name in others})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UnsupportedModelError: something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not JSON", found=error) from error
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{path} is no JSON object", found=type(value).__name__)
    return value
