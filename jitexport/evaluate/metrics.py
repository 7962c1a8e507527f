"""What is measured on images, and which of it can be measured here.

Pairs are an image and the reference image of the same prompt and seed. Metrics whose weights are other people's models
are offered where these weights are on the machine, and are named with what is missing where they are not: nothing is
downloaded.
"""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from jitexport.bundle.manifest import Manifest
from jitexport.bundle.reading import read_tensors
from jitexport.errors import InputError, JitExportError, MissingDependencyError, ModelNotFoundError
from jitexport.evaluate.demo import DemoData, Judge
from jitexport.evaluate.prompts import PromptSet
from jitexport.evaluate.sources import described_model
from jitexport.profile import model_folder

#: PSNR of images that are equal, which is infinite.
MAX_PSNR = 100.0


@dataclass(frozen=True)
class Measure:
    """A number in the report.

    Attributes:
        title: for people.
        better: "higher", "lower", or "one" for ratios that should be 1.
        definition: a sentence on how it is computed.
        share: whether single values are 0 or 1.
        digits: after the point.
    """

    title: str
    better: str
    definition: str
    share: bool = False
    digits: int = 3


MEASURES = {
    "psnr": Measure(
        "PSNR to reference, dB", "higher", f"peak signal-to-noise ratio in RGB; equal images count as {MAX_PSNR:g} dB",
        digits=2,
    ),
    "ssim": Measure("SSIM to reference", "higher", "structural similarity, Gaussian window of 11 pixels"),
    "vae_distance": Measure(
        "VAE feature distance", "lower",
        "LPIPS's formula on the blocks of the model's own VAE encoder, without learned weights: squared distance of "
        "unit feature vectors, averaged over space and summed over blocks. No substitute for LPIPS's human ratings",
        digits=4,
    ),
    "vae_frechet": Measure(
        "Frechet distance, VAE features", "lower",
        "between the set's and the reference set's Gaussians; features are the channel means of the last block of the "
        "model's own VAE encoder. Not comparable with FID, nor between numbers of images",
    ),
    "lpips": Measure("LPIPS", "lower", "learned perceptual distance, AlexNet (torchmetrics)"),
    "fid": Measure(
        "FID to reference set", "lower", "Frechet distance of Inception features (torchmetrics); biased for few images",
        digits=1,
    ),
    "clip_score": Measure("CLIP score", "higher", "cosine of image and prompt, times 100, ViT-L/14 (torchmetrics)"),
    "clip_iqa": Measure("CLIP-IQA", "higher", "probability of a good against a bad photo (torchmetrics, piq)"),
    "niqe": Measure("NIQE", "lower", "natural image quality evaluator (pyiqa)", digits=2),
    "image_reward": Measure("ImageReward", "higher", "ImageReward-v1.0 (image-reward)"),
    "hpsv21": Measure("HPSv2.1", "higher", "human preference score v2.1, times 100 (hpsv2)", digits=2),
    "name_right": Measure(
        "Object right", "higher", "the nearest of the demo model's 1000 pictures has the prompted object", share=True
    ),
    "pair_right": Measure("Object and colour right", "higher", "and the prompted colour", share=True),
    "background_right": Measure(
        "Background right", "higher", "the border's median colour is nearest to the prompted one", share=True
    ),
    "demo_psnr": Measure(
        "PSNR to prompted picture, dB", "higher", "to the picture that the prompt means, at 128 x 128", digits=2
    ),
    "sharpness": Measure(
        "Sharpness", "one", "mean gradient of the luminance over that of the prompted picture; noise raises it too",
        digits=2,
    ),
}


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


def _cached(repo: str, file: str = "config.json") -> str | None:
    """A hub file's place in the local cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file)
    return found if isinstance(found, str) else None


def _checkpoint(name: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / name


# --- always there -----------------------------------------------------------------------------------------------------


class PixelScorer(Scorer):
    """PSNR and SSIM by torchmetrics."""

    names = ("psnr", "ssim")
    pairs = True

    def __init__(self, subject: Subject) -> None:
        require("torchmetrics", remedy="pip install 'jitexport[eval]'")

    def __call__(self, picture: Picture, reference: Picture, prompt: str) -> dict[str, float]:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

        a, b = picture.tensor, reference.tensor
        return {
            "psnr": min(float(peak_signal_noise_ratio(a, b, data_range=1.0)), MAX_PSNR),
            "ssim": float(structural_similarity_index_measure(a, b, data_range=1.0)),
        }


class EncoderMaps(nn.Module):
    """What each block of a VAE's encoder gives for a picture."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks = encoder.conv_in, encoder.down_blocks

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


class VaeScorer(Scorer):
    """LPIPS's formula on the model's own VAE encoder."""

    names = ("vae_distance",)
    pairs = True

    def __init__(self, subject: Subject) -> None:
        self.encoder = subject.encoder

    def __call__(self, picture: Picture, reference: Picture, prompt: str) -> dict[str, float]:
        pairs = zip(picture.maps(self.encoder), reference.maps(self.encoder), strict=True)
        return {"vae_distance": sum(float(unit_distance(a[0], b[0])) for a, b in pairs)}


def unit_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over space of the squared distance of unit feature vectors; maps [C, H, W]."""
    return (F.normalize(a, dim=0) - F.normalize(b, dim=0)).square().sum(0).mean()


class VaeFeatures(FeatureSpace):
    """Channel means of the VAE encoder's last block."""

    name = "vae_frechet"

    def __init__(self, subject: Subject) -> None:
        self.encoder = subject.encoder

    def __call__(self, picture: Picture) -> np.ndarray:
        return picture.maps(self.encoder)[-1].mean((2, 3))[0].double().cpu().numpy()


class DemoScorer(Scorer):
    """Scores of the demo model: see `jitexport.evaluate.demo`."""

    names = ("name_right", "pair_right", "background_right", "demo_psnr", "sharpness")

    def __init__(self, subject: Subject) -> None:
        self.data = DemoData()
        if subject.manifest.model.name != "demo":
            raise InputError("only for the demo model", found=subject.manifest.model.name)
        if unknown := [p.text for p in subject.prompts.prompts if self.data.parse(p.text) is None]:
            raise InputError("a prompt that is none of the demo model's captions", found=unknown[0])
        self.judge = Judge.of(self.data)

    def __call__(self, picture: Picture, reference: Picture, prompt: str) -> dict[str, float]:
        score = self.judge.score(*self.data.parse(prompt), picture.image)
        return {
            "name_right": float(score.name_right),
            "pair_right": float(score.pair_right),
            "background_right": float(score.background_right),
            "demo_psnr": score.psnr,
            "sharpness": score.sharpness,
        }


# --- where their weights are present ----------------------------------------------------------------------------------


class LpipsScorer(Scorer):
    """LPIPS by torchmetrics, on torchvision's AlexNet."""

    names = ("lpips",)
    pairs = True

    def __init__(self, subject: Subject) -> None:
        require("torchmetrics", remedy="pip install 'jitexport[eval]'")
        require("torchvision", remedy="pip install torchvision, of the release that fits your torch")
        get = "torchvision.models.alexnet(weights='DEFAULT')"
        require_file(_checkpoint("alexnet-owt-7be5be79.pth"), "LPIPS's AlexNet", f"where a network is: `{get}` once")
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device())

    def __call__(self, picture: Picture, reference: Picture, prompt: str) -> dict[str, float]:
        with torch.inference_mode():
            return {"lpips": float(self.metric(picture.tensor, reference.tensor))}


class InceptionFeatures(FeatureSpace):
    """Inception features of FID, by torchmetrics and torch-fidelity."""

    name = "fid"

    def __init__(self, subject: Subject) -> None:
        require("torchmetrics", "torch_fidelity", remedy="pip install torchmetrics torch-fidelity --no-deps")
        file = "weights-inception-2015-12-05-6726825d.pth"
        require_file(_checkpoint(file), "FID's Inception", "where a network is: run torch_fidelity once")
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.network = FrechetInceptionDistance(feature=2048).inception.to(device())

    def __call__(self, picture: Picture) -> np.ndarray:
        with torch.inference_mode():
            return self.network(picture.bytes)[0].double().cpu().numpy()


class ClipScorer(Scorer):
    """CLIP score by torchmetrics, with transformers' CLIP."""

    names = ("clip_score",)
    model = "openai/clip-vit-large-patch14"

    def __init__(self, subject: Subject) -> None:
        require("torchmetrics", "transformers", remedy="pip install 'jitexport[eval]'")
        require_file(_cached(self.model), f"CLIP ({self.model})", f"where a network is: `hf download {self.model}`")
        from torchmetrics.multimodal import CLIPScore

        self.metric = CLIPScore(self.model).to(device())

    def __call__(self, picture: Picture, reference: Picture, prompt: str) -> dict[str, float]:
        with torch.inference_mode():
            return {"clip_score": float(self.metric(picture.bytes[0], prompt))}


class ClipIqaScorer(Scorer):
    """CLIP-IQA by torchmetrics, with piq's CLIP."""

    names = ("clip_iqa",)
    tokens = "openai/clip-vit-base-patch16"

    def __init__(self, subject: Subject) -> None:
        require("torchmetrics", "piq", remedy="pip install torchmetrics piq")
        require_file(Path("~/.cache/clip/RN50.pt").expanduser(), "CLIP-IQA", "where a network is: `piq.CLIPIQA()` once")
        found = _cached(self.tokens, "preprocessor_config.json")
        require_file(found, f"CLIP-IQA's tokenizer ({self.tokens})", f"where a network is: `hf download {self.tokens}`")
        from torchmetrics.multimodal import CLIPImageQualityAssessment

        self.metric = CLIPImageQualityAssessment(model_name_or_path="clip_iqa", data_range=1.0).to(device())

    def __call__(self, picture: Picture, reference: Picture, prompt: str) -> dict[str, float]:
        with torch.inference_mode():
            return {"clip_iqa": float(self.metric(picture.tensor))}


class NiqeScorer(Scorer):
    """NIQE by pyiqa, whose licence (PolyForm Noncommercial) is why it is in no extra."""

    names = ("niqe",)

    def __init__(self, subject: Subject) -> None:
        require("pyiqa", remedy="pip install pyiqa (licence: PolyForm Noncommercial)")
        file = Path(torch.hub.get_dir()) / "pyiqa" / "niqe_modelparameters.mat"
        require_file(file, "NIQE", "where a network is: `pyiqa.create_metric('niqe')` once")
        import pyiqa

        self.metric = pyiqa.create_metric("niqe", device=device())

    def __call__(self, picture: Picture, reference: Picture, prompt: str) -> dict[str, float]:
        return {"niqe": float(self.metric(picture.tensor))}


class ImageRewardScorer(Scorer):
    """ImageReward by its own package."""

    names = ("image_reward",)

    def __init__(self, subject: Subject) -> None:
        require("ImageReward", remedy="pip install image-reward")
        file = Path("~/.cache/ImageReward/ImageReward.pt").expanduser()
        require_file(file, "ImageReward-v1.0", "where a network is: `ImageReward.load('ImageReward-v1.0')` once")
        import ImageReward

        self.model = ImageReward.load("ImageReward-v1.0")

    def __call__(self, picture: Picture, reference: Picture, prompt: str) -> dict[str, float]:
        with torch.inference_mode():
            return {"image_reward": float(self.model.score(prompt, picture.image))}


class HpsScorer(Scorer):
    """HPSv2.1 by its own package, which reads its checkpoint anew for every image: slow for many."""

    names = ("hpsv21",)
    file = "HPS_v2.1_compressed.pt"

    def __init__(self, subject: Subject) -> None:
        require("hpsv2", remedy="pip install hpsv2")
        found = _cached("xswu/HPSv2", self.file)
        require_file(found, "HPSv2.1", f"where a network is: `hf download xswu/HPSv2 {self.file}`")

    def __call__(self, picture: Picture, reference: Picture, prompt: str) -> dict[str, float]:
        import hpsv2

        return {"hpsv21": 100 * float(hpsv2.score(picture.image, prompt, hps_version="v2.1")[0])}


SCORERS: tuple[type[Scorer], ...] = (
    PixelScorer, VaeScorer, LpipsScorer, DemoScorer,
    ClipScorer, ClipIqaScorer, NiqeScorer, ImageRewardScorer, HpsScorer,
)  # fmt: skip
FEATURES: tuple[type[FeatureSpace], ...] = (VaeFeatures, InceptionFeatures)


def available(
    subject: Subject,
    scorers: Sequence[type[Scorer]] = SCORERS,
    features: Sequence[type[FeatureSpace]] = FEATURES,
) -> tuple[list[Scorer], list[FeatureSpace], dict[str, str]]:
    """What can be measured here, and {name: what is missing and what to do} for the rest.

    Demo scores are left out without a word for other models, as they would have no meaning.
    """
    missing: dict[str, str] = {}

    def made(classes: Sequence[Callable[[Subject], Any]], names: Callable[[Any], tuple[str, ...]]) -> list[Any]:
        instances = []
        for cls in classes:
            try:
                instances.append(cls(subject))
            except JitExportError as error:
                if cls is not DemoScorer or subject.manifest.model.name == "demo":
                    reason = error.message + (f"; {error.remedy}" if error.remedy else "")
                    missing.update({name: reason for name in names(cls)})
            except (ImportError, OSError, RuntimeError, ValueError) as error:  # a library that is there but broken
                reason = f"{cls.__name__} cannot be used: {type(error).__name__}: {error}"
                missing.update({name: reason for name in names(cls)})
        return instances

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return made(scorers, lambda cls: cls.names), made(features, lambda cls: (cls.name,)), missing
