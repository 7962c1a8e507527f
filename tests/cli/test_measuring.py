"""The verb profile with several bundles."""

import json

import pytest

from jitexport.plan import CustomSchedule


@pytest.fixture(scope="module")
def other(make_bundle):
    return make_bundle(custom=CustomSchedule((1, 1), (0.35, 1.0)))


@pytest.fixture
def model_at_hand(tiny_flux, monkeypatch):
    monkeypatch.setattr("jitexport.profile.peers.model_folder", lambda manifest: tiny_flux)


@pytest.fixture
def quick(monkeypatch):
    """The machine's ceiling, which takes seconds, is not measured."""
    monkeypatch.setattr("jitexport.profile.rounds.matmul_rate", lambda *a: 1e12)


def test_every_bundle_is_shown(run, bundle, other, model_at_hand, quick, tmp_path):
    paths = [bundle, other]
    argv = ("profile", *paths, "--repeats", "1", "--prompt", "a red fox", "--against", "few-step")
    code, out, err = run(*argv, "--timeline", tmp_path / "t.png", "--trace", tmp_path / "t.json")
    assert code == 0, err
    assert "times faster" in out and "least to most" in out and "1 round;" in out and "few-step" not in out
    assert "phases, 1 image " in out
    for path in paths:
        assert out.count(f"{path.name}: jit, eager fp32") == 2  # among the totals, and above its phases
    assert out.count("of denoising") == out.count("realised") == 2
    assert out.count("of memory in the process") == 1  # the first bundle's, which was there alone
    assert (tmp_path / "t.png").is_file() and json.loads((tmp_path / "t.json").read_text())


def test_bundles_as_json(shell, bundle, other):
    done = shell("profile", bundle, other, "--repeats", "2", "--prompt", "a red fox", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["bundles"] == [str(bundle), str(other)] and report["bundle"] == str(bundle)
    first, second = report["profiles"]
    assert first["ratio"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    ratios = [a / b for a, b in zip(first["seconds"], second["seconds"], strict=True)]
    assert [second["ratio"][k] for k in ("least", "most")] == pytest.approx([min(ratios), max(ratios)])
    assert first["products"] and first["peak_memory"] and not second["peak_memory"]
    assert {"date", "commit", "cpu", "cpu_class", "threads", "torch", "python"} <= report["conditions"].keys()


def test_bundles_that_cannot_be_compared_are_refused(run, bundle, make_bundle, quick):
    code, out, err = run("profile", bundle, make_bundle(batch=2), "--repeats", "1")
    assert code == 2 and not out and "differ in batch" in err and "profile them one by one" in err
    code, out, err = run("profile", bundle, bundle)
    assert code == 2 and not out and "named twice" in err
    code, out, err = run("profile", bundle, bundle.parent / "none")
    assert code == 5 and not out and "no bundle" in err
