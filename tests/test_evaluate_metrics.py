"""Metrics and intervals, where the right answer is known."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom

from jitexport.bundle.reading import read_manifest
from jitexport.errors import JitExportError
from jitexport.evaluate import metrics, pretrained, scoring, statistics
from jitexport.evaluate.demo import DemoData, Judge
from jitexport.evaluate.evaluation import demo_prompts
from jitexport.evaluate.metrics import MEASURES, available
from jitexport.evaluate.prompts import prompt_set
from jitexport.evaluate.scenes import parse
from jitexport.evaluate.scoring import Subject
from jitexport.plan import CustomSchedule

RNG = np.random.default_rng(0)


def picture(array):
    return scoring.Picture(Image.fromarray(np.asarray(array, dtype=np.uint8)))


@pytest.fixture(scope="module")
def subject(make_bundle):
    bundle = make_bundle(custom=CustomSchedule((2,), (1.0,)))
    return Subject(bundle, read_manifest(bundle), prompt_set("test", ["a fox"]))


# --- images ---


def test_psnr_of_a_known_error():
    a = np.full((32, 48, 3), 100)
    score = metrics.PixelScorer(None)(picture(a), picture(a + 10), "")
    assert score["psnr"] == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)


def test_equal_images():
    a = picture(RNG.integers(0, 256, (32, 48, 3)))
    assert metrics.PixelScorer(None)(a, a, "") == {"psnr": metrics.MAX_PSNR, "ssim": pytest.approx(1)}


def test_vae_distance_is_zero_for_equal_images_and_grows_with_noise(subject):
    scorer = metrics.VaeScorer(subject)
    base = RNG.integers(60, 196, (48, 32, 3))
    noise = RNG.normal(size=base.shape)
    distances = [scorer(picture(base + s * noise), picture(base), "")["vae_distance"] for s in (0, 5, 40)]
    assert distances[0] == pytest.approx(0, abs=1e-6) and 1e-5 < distances[1] < distances[2]


def test_unit_distance_follows_lpips():
    a, b = torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)
    a[0], b[1] = 5.0, 0.1  # orthogonal at every place, whatever the lengths: |e1 - e2|^2 = 2
    assert metrics.unit_distance(a, b).item() == pytest.approx(2)


def test_vae_features_use_the_bundles_own_weights(subject):
    """The encoder's maps are those of diffusers' encoder on the weights that the bundle was built from."""
    from tests import tiny

    image = torch.rand(1, 3, 48, 32)
    encoder = tiny.flux(guidance=True).vae.encoder
    maps = []
    for block in encoder.down_blocks:
        block.register_forward_hook(lambda module, args, out: maps.append(out))
    with torch.no_grad():
        encoder(image * 2 - 1)
    for ours, theirs in zip(scoring.VaeEncoder(subject)(image), maps, strict=True):
        torch.testing.assert_close(ours, theirs)


# --- sets ---


def test_frechet_distance_of_known_gaussians():
    """Same covariance, shifted by 2 in one of 3 dimensions: 4. Scaled by 3 in all: the sum of (3 s - s)^2."""
    a = RNG.normal(size=(500, 3)) * (1, 2, 0.5)
    assert statistics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert statistics.frechet(a, a + np.array([2, 0, 0])) == pytest.approx(4)
    centred = a - a.mean(0)
    assert statistics.frechet(centred, 3 * centred) == pytest.approx(4 * centred.var(0, ddof=1).sum())


@pytest.mark.parametrize("n", [6, 200])  # fewer and more images than features
def test_frechet_distance_agrees_with_torchmetrics(n):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Module):
        num_features = 16

        def forward(self, x):
            return x

    a, b = RNG.normal(size=(n, 16)), RNG.normal(0.3, 1.5, size=(n, 16))
    fid = FrechetInceptionDistance(feature=Given())
    fid.update(torch.from_numpy(a), real=True)
    fid.update(torch.from_numpy(b), real=False)
    assert statistics.frechet(a, b) == pytest.approx(fid.compute().item(), rel=1e-3)


# --- intervals ---


def test_bootstrap_intervals_cover_the_mean_about_as_often_as_they_say():
    """95% intervals over 40 prompts: of 200 experiments, binomially many cover; seeds of a prompt are alike."""
    covered = 0
    for _ in range(200):
        prompts = RNG.normal(10, 2, (40, 1))
        score = statistics.mean(prompts + RNG.normal(0, 0.1, (40, 3)))
        covered += score.low <= 10 <= score.high
    low, high = binom.ppf((0.001, 0.999), 200, 0.93)  # the percentile bootstrap is a little narrow for 40
    assert low <= covered <= high


def test_seeds_of_a_prompt_are_not_independent_samples():
    """Three copies of every image say no more than one."""
    one = RNG.normal(size=(30, 1))
    bits = (one > 0).astype(float)
    for score, values in ((statistics.mean, one), (statistics.share, bits)):
        repeated, single = score(np.repeat(values, 3, axis=1)), score(values)
        assert vars(repeated) == pytest.approx(vars(single))


def test_one_prompt_has_no_interval():
    assert statistics.mean(np.array([[1.0, 2.0]])) == statistics.Score(1.5, None, None)


def test_wilson_interval():
    low, high = statistics.wilson(10, 10)
    assert high == pytest.approx(1) and low == pytest.approx(0.7225, abs=1e-3)  # tabulated: 72.2% to 100%


def test_distance_interval_holds_the_value():
    a = RNG.normal(size=(20, 1, 4))
    score = statistics.distance(a, a + 1, statistics.frechet, resamples=20)
    assert 0 <= score.low <= score.value <= score.high and score.value == pytest.approx(4)


# --- what is there and what is not ---


def test_missing_metrics_are_named_with_a_remedy(subject):
    class Absent(scoring.Scorer):
        names = ("lpips", "niqe")

        def __init__(self, subject):
            scoring.require("no_such_library", remedy="pip install it")

        def __call__(self, image, reference, prompt):
            raise AssertionError

    scorers, features, missing = available(subject, [metrics.PixelScorer, Absent], [])
    assert [type(s) for s in scorers] == [metrics.PixelScorer] and features == []
    assert missing == dict.fromkeys(("lpips", "niqe"), "no_such_library not installed; pip install it")


def test_a_library_that_breaks_costs_its_own_metric_only(subject):
    class Broken(metrics.PixelScorer):
        names = ("lpips",)

        def __init__(self, subject):
            raise ImportError("libsomething.so is not there")

    scorers, _, missing = available(subject, [Broken, metrics.PixelScorer], [])
    assert len(scorers) == 1 and "libsomething.so" in missing["lpips"]


def test_weights_that_are_not_there_are_missing_and_not_downloaded(tmp_path):
    with pytest.raises(JitExportError, match="weights of LPIPS not on this machine"):
        scoring.require_file(tmp_path / "alexnet.pth", "LPIPS", "get them")
    (tmp_path / "alexnet.pth").touch()
    scoring.require_file(tmp_path / "alexnet.pth", "LPIPS", "get them")


def test_every_metric_has_a_measure():
    names = {name for cls in metrics.SCORERS for name in cls.names} | {cls.name for cls in metrics.FEATURES}
    assert names == set(MEASURES)


def test_niqe_is_taken_where_pyiqa_and_its_weights_are(subject, tmp_path, monkeypatch):
    """pyiqa itself needs torchvision, which cannot be had everywhere: its interface is stood in for."""
    asked = []

    def create_metric(name, device):
        asked.append(name)
        return lambda image: image.mean()

    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=create_metric, __spec__=object()))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    _, _, missing = available(subject, [pretrained.NiqeScorer], [])
    assert "weights of NIQE" in missing["niqe"] and not asked
    (tmp_path / "pyiqa").mkdir()
    (tmp_path / "pyiqa" / "niqe_modelparameters.mat").touch()
    [scorer], _, missing = available(subject, [pretrained.NiqeScorer], [])
    grey = picture(np.full((8, 8, 3), 51))
    assert not missing and asked == ["niqe"] and scorer(grey, grey, "")["niqe"] == pytest.approx(0.2)


# --- the demo model's scores ---


def test_the_judge_knows_the_datas_own_pictures():
    data = DemoData()
    judge = Judge.of(data)
    score = judge.score("owl", "red", data.pictures["owl", "red"].resize((256, 256)))
    assert score.name_right and score.pair_right and score.background_right and score.nearest == "owl, red"
    assert score.psnr > 35 and score.sharpness == pytest.approx(1, abs=0.1)
    wrong = judge.score("frog", "blue", data.pictures["owl", "red"].resize((256, 256)))
    assert not (wrong.name_right or wrong.pair_right or wrong.background_right) and wrong.psnr < 20


def test_captions_are_read_back():
    data = DemoData()
    for prompt in data.prompts(20):
        assert data.parse(prompt.text) == (prompt.name, prompt.colour)
    assert data.parse("a photo of an owl") is None and data.parse("dragon king on a red background") is None
    assert sum(p.held_out for p in data.prompts(20)) == 10


def demo_subject(*prompts: str) -> Subject:
    manifest = SimpleNamespace(model=SimpleNamespace(name="demo"))
    return Subject(None, manifest, prompt_set("test", list(prompts)))


def test_a_demo_model_of_scenes_has_the_scores_of_scenes(monkeypatch):
    scorers = [metrics.DemoScorer, metrics.SceneScorer]
    asked = "owl on a yellow background"
    [found], _, missing = available(demo_subject(asked), scorers, [])
    assert isinstance(found, metrics.DemoScorer) and not missing
    monkeypatch.setattr(DemoData, "scenes", True)
    [found], _, missing = available(demo_subject(asked), scorers, [])
    assert isinstance(found, metrics.SceneScorer) and not missing
    owl = DemoData().pictures["owl", "yellow"].resize((256, 256))
    right = found(scoring.Picture(owl), scoring.Picture(owl), asked)
    assert right == dict.fromkeys(metrics.SceneScorer.names, 1.0)
    wrong = found(scoring.Picture(owl), scoring.Picture(owl), "two foxes on a red background")
    assert wrong == dict.fromkeys(metrics.SceneScorer.names, 0.0)
    found, _, missing = available(demo_subject(asked, "a dragon"), scorers, [])
    assert not found and set(missing) == set(metrics.SceneScorer.names)
    assert all("no caption of a scene" in reason for reason in missing.values())


def test_a_demo_model_of_scenes_is_asked_for_scenes(monkeypatch):
    monkeypatch.setattr(DemoData, "scenes", True)
    prompts = demo_prompts(12, seeds=2).prompts
    assert prompts == demo_prompts(12, seeds=2).prompts and all(parse(prompt.text) for prompt in prompts)
    assert len({seed for prompt in prompts for seed in prompt.seeds}) == 24
