"""Metrics whose weights are other people's models, offered where these are on the machine: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from jitexport.evaluate.scoring import FeatureSpace, Picture, Scorer, Subject, device, require, require_file


def _cached(repo: str, file: str = "config.json") -> str | None:
    """A hub file's place in the local cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file)
    return found if isinstance(found, str) else None


def _checkpoint(name: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / name


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
    model: Literal["openai/clip-vit-large-patch14"] = "openai/clip-vit-large-patch14"

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
