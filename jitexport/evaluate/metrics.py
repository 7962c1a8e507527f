"""What is measured on images, and which of it can be measured here.

Pairs are an image and the reference image of the same prompt and seed. Metrics whose weights are other people's models
are offered where these weights are on the machine, and are named with what is missing where they are not: nothing is
downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jitexport.errors import InputError, JitExportError
from jitexport.evaluate.demo import DemoData, Judge
from jitexport.evaluate.finder import scene_finder
from jitexport.evaluate.pretrained import (
    ClipIqaScorer,
    ClipScorer,
    HpsScorer,
    ImageRewardScorer,
    InceptionFeatures,
    LpipsScorer,
    NiqeScorer,
)
from jitexport.evaluate.scene_scores import score
from jitexport.evaluate.scenes import parse
from jitexport.evaluate.scoring import FeatureSpace, Picture, Scorer, Subject, require

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
    "right": Measure(
        "All right", "higher", "what was asked for is there, in its number, on its background, and nothing else",
        share=True,
    ),
    "objects": Measure("Objects found", "higher", "share of the objects asked for that the finder of objects sees"),
    "count_right": Measure("Number right", "higher", "as many objects as were asked for", share=True),
    "surroundings_right": Measure("Background as asked", "higher", "its colour and texture, if said", share=True),
    "clean": Measure("Nothing else there", "higher", "no object and no blot that was not asked for", share=True),
    "demo_psnr": Measure(
        "PSNR to prompted picture, dB", "higher", "to the picture that the prompt means, at 128 x 128", digits=2
    ),
    "sharpness": Measure(
        "Sharpness", "one", "mean gradient of the luminance over that of the prompted picture; noise raises it too",
        digits=2,
    ),
}


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
            "ssim": float(torch.as_tensor(structural_similarity_index_measure(a, b, data_range=1.0))),
        }


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

    @classmethod
    def applies(cls, subject: Subject) -> bool:
        return subject.manifest.model.name == "demo" and not DemoData().scenes

    def __init__(self, subject: Subject) -> None:
        self.data = DemoData()
        if unknown := [p.text for p in subject.prompts.prompts if self.data.parse(p.text) is None]:
            raise InputError("a prompt that is none of the demo model's captions", found=unknown[0])
        self.judge = Judge.of(self.data)

    def __call__(self, picture: Picture, reference: Picture, prompt: str) -> dict[str, float]:
        parsed = self.data.parse(prompt)
        assert parsed is not None  # see `__init__`
        name, colour = parsed
        score = self.judge.score(name, colour, picture.image)
        return {
            "name_right": float(score.name_right),
            "pair_right": float(score.pair_right),
            "background_right": float(score.background_right),
            "demo_psnr": score.psnr,
            "sharpness": score.sharpness,
        }


class SceneScorer(Scorer):
    """Scores of a demo model that draws scenes: see `jitexport.evaluate.scene_scores`."""

    names = ("right", "objects", "count_right", "surroundings_right", "clean")

    @classmethod
    def applies(cls, subject: Subject) -> bool:
        return subject.manifest.model.name == "demo" and DemoData().scenes

    def __init__(self, subject: Subject) -> None:
        if unknown := [p.text for p in subject.prompts.prompts if parse(p.text) is None]:
            raise InputError("a prompt that is no caption of a scene", found=unknown[0])
        self.finder = scene_finder()

    def __call__(self, picture: Picture, reference: Picture, prompt: str) -> dict[str, float]:
        request = parse(prompt)
        assert request is not None  # see `__init__`
        found = score(self.finder, request, picture.image)
        return {
            "right": float(found.right),
            "objects": found.objects,
            "count_right": float(found.count_right),
            "surroundings_right": float(found.background_right),
            "clean": float(found.clean),
        }


SCORERS: tuple[type[Scorer], ...] = (
    PixelScorer, VaeScorer, LpipsScorer, DemoScorer, SceneScorer,
    ClipScorer, ClipIqaScorer, NiqeScorer, ImageRewardScorer, HpsScorer,
)  # fmt: skip
FEATURES: tuple[type[FeatureSpace], ...] = (VaeFeatures, InceptionFeatures)


def available(
    subject: Subject,
    scorers: Sequence[type[Scorer]] = SCORERS,
    features: Sequence[type[FeatureSpace]] = FEATURES,
) -> tuple[list[Scorer], list[FeatureSpace], dict[str, str]]:
    """What can be measured here, and {name: what is missing and what to do} for the rest.

    What would mean nothing for the subject is left out without a word.
    """
    missing: dict[str, str] = {}

    def made(classes: Sequence[Callable[[Subject], Any]], names: Callable[[Any], tuple[str, ...]]) -> list[Any]:
        instances = []
        for cls in classes:
            try:
                instances.append(cls(subject))
            except JitExportError as error:
                reason = error.message + (f"; {error.remedy}" if error.remedy else "")
                missing.update({name: reason for name in names(cls)})
            except (ImportError, OSError, RuntimeError, ValueError) as error:  # a library that is there but broken
                reason = f"{cls.__name__} cannot be used: {type(error).__name__}: {error}"
                missing.update({name: reason for name in names(cls)})
        return instances

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    meant = [cls for cls in scorers if cls.applies(subject)]
    return made(meant, lambda cls: cls.names), made(features, lambda cls: (cls.name,)), missing
