"""The contract between a model family and everything else.

A family turns a diffusers pipeline into modules of fixed shape, which backends compile into engines:

    text        token ids of each tokenizer                         -> embeddings
    condition   embeddings, sigmas [S] and, where used, guidance    -> modulation [S, B, M], then static inputs
    stage<k>    tokens [B, m, C], rotary tables, modulation [B, M], static inputs -> velocity [B, m, C]
    preview     tokens [B, N / 4, C]                                -> images [B, 3, H / 2, W / 2] in [0, 1]
    decode      tokens [B, N, C]                                    -> images [B, 3, H, W] in [0, 1]

Whatever does not change inside the denoising loop belongs to `condition`, which runs once per image. `stage<k>` serves
all stages of as many tokens. `preview` is there for methods that look at pictures between stages.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jitexport.errors import UnsupportedModelError
from jitexport.grid import TokenGrid
from jitexport.positions import Rotary
from jitexport.schedule import StageSchedule
from jitexport.specs import EngineSpec


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as its `tokenizers` JSON, and the length that prompts are padded and cut to."""

    name: str
    json: str
    length: int


@dataclass(frozen=True)
class ModelGeometry:
    """The sizes of one image that a runtime needs to know.

    Attributes:
        grid: the full token grid.
        latent_shape: (C, H, W) of one image's latents before packing.
        patch: side of a token's patch in latent pixels.
        height, width: of the image in pixels.
        rotary: position tables of the stage engines.
    """

    grid: TokenGrid
    latent_shape: tuple[int, int, int]
    patch: int
    height: int
    width: int
    rotary: Rotary

    @property
    def channels(self) -> int:
        """C, channels of a token."""
        return self.latent_shape[0] * self.patch**2


@dataclass(frozen=True)
class ModelDefaults:
    """How the ordinary pipeline is run: what a call uses where it says nothing, and what speed-ups refer to."""

    guidance_scale: float | None
    num_inference_steps: int


class ModelAdapter(ABC):
    """One model of a family: its components, and the modules made of them.

    Attributes:
        family: the diffusers pipeline class that this adapter serves.
        components: torch modules by their name in the pipeline; parameters are known as "<component>.<name>".
        configs: each component's configuration, from which `from_configs` rebuilds it without weights.
    """

    family: str
    components: dict[str, nn.Module]
    configs: dict[str, dict[str, Any]]
    geometry: ModelGeometry
    defaults: ModelDefaults

    @classmethod
    @abstractmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype, settings: dict[str, Any] | None = None) -> ModelAdapter:
        """Read a diffusers folder with its weights. Settings left out are the folder's, or the family's usual."""

    @classmethod
    def from_file(
        cls, path: Path, base: Path, dtype: torch.dtype, settings: dict[str, Any] | None = None
    ) -> ModelAdapter:
        """Read a transformer in one file, everything else from a diffusers folder.

        Raises:
            UnsupportedModelError: the family has no such files.
        """
        raise UnsupportedModelError(f"{cls.family} is not read from one file", found=path, expected="a folder")

    @classmethod
    @abstractmethod
    def from_configs(
        cls, configs: dict[str, dict[str, Any]], settings: dict[str, Any], dtype: torch.dtype
    ) -> ModelAdapter:
        """Build the components on the meta device: shapes and FLOPs without weights."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain values that `from_configs` needs beside the configurations: sizes, defaults, and `quantization`."""

    @abstractmethod
    def tokenizers(self) -> list[Tokenizer]:
        """Tokenizers in the order of the text engine's inputs."""

    @abstractmethod
    def native_sigmas(self, n: int) -> tuple[float, ...]:
        """The noise levels of the ordinary pipeline with n steps, n + 1 values that end with 0."""

    @abstractmethod
    def specs(self, schedule: StageSchedule, batch: int, dtype: str, *, preview: bool = False) -> list[EngineSpec]:
        """Engines that a bundle needs: text, condition, one per token count, preview where asked for, decode."""

    @abstractmethod
    def module(self, name: str) -> nn.Module:
        """The module of an engine, its parameters named "<component>.<diffusers' name>"."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters and buffers by full name, tied ones under each of their names."""
        for component, module in self.components.items():
            for name, tensor in [
                *module.named_parameters(remove_duplicate=False),
                *module.named_buffers(remove_duplicate=False),
            ]:
                yield f"{component}.{name}", tensor


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
