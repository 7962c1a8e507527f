"""The verb generate."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import jitexport
from tests import tiny


def test_generate_writes_the_image_of_the_seed(run, bundle, tmp_path):
    code, out, err = run("generate", bundle, "a red fox", "-o", tmp_path / "fox.png", "--seed", "5")
    assert (code, out) == (0, f"{tmp_path / 'fox.png'}\n") and "seed 5" in err
    image = Image.open(tmp_path / "fox.png")
    assert image.format == "PNG" and image.size == (tiny.WIDTH, tiny.HEIGHT)
    expected = jitexport.load(bundle)("a red fox", generator=torch.Generator().manual_seed(5)).images[0]
    assert np.abs(np.array(image).astype(int) - np.array(expected)).max() <= 1


def test_generate_numbers_several_images(run, bundle, tmp_path):
    argv = ["generate", bundle, "a red fox", "-o", tmp_path / "fox.png", "--seed", "5", "--num-images", "3", "--json"]
    code, out, _ = run(*argv)
    report = json.loads(out)
    assert code == 0 and report["seed"] == 5
    assert report["images"] == [str(tmp_path / f"fox-{i}.png") for i in range(3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fox-0.png", "fox-1.png", "fox-2.png"]
    run("generate", bundle, "a red fox", "-o", tmp_path / "six.png", "--seed", "6")  # image i has seed + i
    assert np.abs(pixels(tmp_path / "six.png") - pixels(tmp_path / "fox-1.png")).max() <= 1
    assert np.abs(pixels(tmp_path / "six.png") - pixels(tmp_path / "fox-0.png")).max() > 5


def pixels(path):
    return np.array(Image.open(path)).astype(int)


def test_generate_without_a_seed_tells_the_one_it_took(run, bundle, tmp_path):
    seeds = set()
    for _ in range(2):
        code, out, _ = run("generate", bundle, "a fox", "-o", tmp_path / "a.png", "--json")
        seeds.add(json.loads(out)["seed"])
    assert code == 0 and len(seeds) == 2
    before = pixels(tmp_path / "a.png")
    run("generate", bundle, "a fox", "-o", tmp_path / "b.png", "--seed", json.loads(out)["seed"])
    assert np.abs(pixels(tmp_path / "b.png") - before).max() <= 1


def test_generate_takes_guidance(run, bundle, tmp_path):
    for name, guidance in (("a", "1"), ("b", "9")):
        run("generate", bundle, "a fox", "-o", tmp_path / f"{name}.png", "--seed", "0", "--guidance", guidance)
    assert np.abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).max() > 0


def test_generate_looks_at_the_target_before_it_loads_anything(run, tmp_path, monkeypatch):
    monkeypatch.setattr(jitexport, "load", lambda *a: pytest.fail("loaded"))
    code, out, err = run("generate", tmp_path, "a fox", "-o", tmp_path / "none" / "fox.png")
    assert (code, out) == (2, "") and "no such folder" in err and "create it" in err
