"""What a metric is, and what metrics share: pictures, the model's own VAE encoder, and how absent things are named."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from jitexport.bundle.manifest import Manifest
from jitexport.bundle.reading import read_tensors
from jitexport.errors import InputError, MissingDependencyError, ModelNotFoundError
from jitexport.evaluate.prompts import PromptSet
from jitexport.evaluate.sources import described_model
from jitexport.models.layers import Part
from jitexport.profile import model_folder


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a bundle's folder and manifest, which metrics may read the model from, and the prompts."""

    bundle: Path
    manifest: Manifest
    prompts: PromptSet

    @cached_property
    def encoder(self) -> VaeEncoder:
        """The VAE encoder that several metrics share."""
        return VaeEncoder(self)


class Picture:
    """An image, and what several metrics need of it, each computed once."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image.convert("RGB")
        self._maps: list[Tensor] | None = None

    @cached_property
    def tensor(self) -> Tensor:
        """RGB in 0..1, [1, 3, H, W], fp32, where metrics run."""
        array = np.asarray(self.image, dtype=np.float32) / 255
        return torch.from_numpy(array).permute(2, 0, 1)[None].to(device())

    @property
    def bytes(self) -> Tensor:
        """RGB in 0..255, [1, 3, H, W], uint8."""
        return (self.tensor * 255).round().byte()

    def maps(self, encoder: VaeEncoder) -> list[Tensor]:
        """Feature maps by the evaluation's encoder, [1, C, H / s, W / s] each."""
        if self._maps is None:
            self._maps = encoder(self.tensor)
        return self._maps


class Scorer(ABC):
    """Scores of single images.

    Attributes:
        names: keys of MEASURES that it gives.
        pairs: whether they compare with the reference image.

    Raises:
        JitExportError: what it needs is not there; the message says what.
    """

    names: tuple[str, ...]
    pairs = False

    @classmethod
    def applies(cls, subject: Subject) -> bool:
        """Whether the scores mean anything for what is evaluated; where they do not, nobody misses them."""
        return True

    @abstractmethod
    def __init__(self, subject: Subject) -> None: ...

    @abstractmethod
    def __call__(self, picture: Picture, reference: Picture, prompt: str) -> dict[str, float]:
        """The scores of one image."""


class FeatureSpace(ABC):
    """Features of images, whose sets are compared by their Frechet distance; `name` is a key of MEASURES."""

    name: str

    @abstractmethod
    def __init__(self, subject: Subject) -> None: ...

    @abstractmethod
    def __call__(self, picture: Picture) -> np.ndarray:
        """Features of one image, [d]."""


def device() -> torch.device:
    """Where metrics run: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require(*libraries: str, remedy: str) -> None:
    """Refuse where a library is not installed.

    Raises:
        MissingDependencyError: naming it.
    """
    if absent := [name for name in libraries if importlib.util.find_spec(name) is None]:
        raise MissingDependencyError(f"{' and '.join(absent)} not installed", remedy=remedy)


def require_file(path: str | Path | None, what: str, remedy: str) -> None:
    """Refuse where a file of weights is not on this machine, rather than have a library download it.

    Raises:
        ModelNotFoundError: saying what is not there.
    """
    if path is None or not Path(path).is_file():
        raise ModelNotFoundError(f"weights of {what} not on this machine", found=path and f"no {path}", remedy=remedy)


class EncoderMaps(nn.Module):
    """What each block of a VAE's encoder gives for a picture."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.first: Part = encoder.conv_in
        self.blocks: Part = encoder.down_blocks

    @torch.inference_mode()
    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in 0..1 -> one feature map a block, [B, C, H / s, W / s]."""
        x = self.first(images * 2 - 1)
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps


class VaeEncoder(EncoderMaps):
    """Of the model's own VAE.

    Raises:
        InputError: the model has no such encoder, or the bundle does not hold its weights.
    """

    def __init__(self, subject: Subject) -> None:
        vae = described_model(subject.manifest).components.get("vae")
        encoder = getattr(vae, "encoder", None)
        if encoder is None or not hasattr(encoder, "down_blocks"):
            raise InputError("the model has no VAE encoder of blocks", found=type(vae).__name__)
        state = {name.removeprefix("encoder."): t for name, t in vae_tensors(subject) if name.startswith("encoder.")}
        encoder.load_state_dict({name: t.float() for name, t in state.items()}, assign=True)
        super().__init__(encoder)
        self.to(device())


def vae_tensors(subject: Subject) -> Iterator[tuple[str, Tensor]]:
    """The VAE's weights, from the bundle, or from the model's folder for bundles that only refer to them.

    Raises:
        InputError: neither has them.
    """
    files = [(subject.bundle, w.path) for w in subject.manifest.weights if w.component == "vae"]
    if not files:
        folder = Path(subject.manifest.reference_folder or model_folder(subject.manifest)) / "vae"
        files = [(folder, path.name) for path in sorted(folder.glob("*.safetensors"))]
    for root, name in files:
        yield from read_tensors(root, name).items()
