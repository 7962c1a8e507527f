import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import jitexport
from jitexport import machine
from jitexport.bundle import EngineBundle
from jitexport.cli import app, main
from jitexport.kernels import native
from jitexport.plan import CustomSchedule
from tests import tiny

RUNNER = CliRunner()


@pytest.fixture
def run(capsys):
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def call(*argv):
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return call


@pytest.fixture(scope="module")
def bundle(make_bundle):
    return make_bundle(custom=CustomSchedule((2, 2), (0.5, 1.0)), command=("jitexport", "build", "--model", "tiny"))


def shell(*argv, **environment):
    return subprocess.run(
        [sys.executable, "-m", "jitexport.cli", *map(str, argv)], capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


# --- the whole ---


def test_version():
    result = RUNNER.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"jitexport {jitexport.__version__}\n")


def test_help_names_every_command():
    result = RUNNER.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("build", "plan", "generate", "inspect", "profile", "doctor"):
        assert command in result.output


@pytest.mark.parametrize("command", ["build", "plan", "generate", "inspect", "profile", "doctor"])
def test_every_command_has_help(command):
    result = RUNNER.invoke(app, [command, "--help"])
    assert result.exit_code == 0 and "--json" in result.output


@pytest.mark.parametrize(
    "argv",
    [
        ["nonesuch"],
        ["build", "--nonesuch"],
        ["build", "--speedup", "21"],
        ["build", "--speedup", "0.5"],
        ["build", "--speedup", "fast"],
        ["build", "--batch", "0"],
        ["plan", "--height", "0"],
        ["generate"],
        ["generate", "bundle"],
        ["generate", "bundle", "a fox", "--num-images", "0"],
        ["generate", "bundle", "a fox", "--seed", "-1"],
        ["generate", "bundle", "a fox", "--seed", str(2**70)],
        ["generate", "bundle", "a fox", "--guidance", "-1"],
        ["generate", "bundle", "a fox", "--guidance", "nan"],
    ],
)
def test_wrong_usage_exits_with_2(run, argv):
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and "Usage" in err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["plan", "--ratios", "0.5,1"], 2, "--ratios needs --steps"),
        (["plan", "--model", "TINY", "--steps", "1;2"], 2, "comma-separated"),
        (["plan", "--model", "TINY", "--steps", "1,2", "--ratios", "1,0.5"], 2, "rise to 1"),
        (["plan", "--model", "TINY", "--height", "33"], 2, "image size"),
        (["plan", "--model", "TINY", "--method", "nonesuch"], 2, "unknown method"),
        (["plan", "--model", "TINY", "--preset", "nonesuch"], 2, "unknown JiT preset"),
        (["plan", "--model", "nonesuch"], 3, "no such model"),
        (["plan", "--model", "nobody/nothing"], 3, "HF_HUB_OFFLINE is set"),
        (["plan", "--model", "TMP"], 3, "not a diffusers pipeline"),
        (["build", "--model", "TINY", "--dtype", "fp8", "-o", "TMP/b"], 2, "unknown dtype"),
        (["build", "--model", "TINY", "--backend", "nonesuch", "-o", "TMP/b"], 2, "unknown backend"),
        (["build", "--model", "TINY", "--device", "abacus", "-o", "TMP/b"], 2, "unknown device"),
        (["build", "--model", "TINY", "--backend", "eager", "-o", "BUNDLE"], 5, "exists already"),
        (["generate", "TMP/none", "a fox", "-o", "TMP/a.png"], 5, "no bundle"),
        (["generate", "BUNDLE", "a fox", "-o", "TMP/a.jpg"], 2, "written as PNG"),
        (["inspect", "TMP"], 5, "no bundle"),
        (["profile", "BUNDLE", "--against", "magic"], 2, "unknown peer"),
    ],
)
def test_errors_go_to_stderr_with_their_exit_code(run, argv, code, message, bundle, tiny_flux, tmp_path):
    names = {"TINY": tiny_flux, "BUNDLE": bundle, "TMP": tmp_path}
    argv = [a.replace("TMP/", f"{tmp_path}/") if a.startswith("TMP/") else str(names.get(a, a)) for a in argv]
    found, out, err = run(*argv)
    assert (found, out) == (code, "")
    assert err.startswith("error: ") or "\nerror: " in err
    assert message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# --- plan ---


@pytest.mark.parametrize(
    ("speedup", "shown", "tokens"),
    [
        (None, ("74.4", "899", "3719", "4.14x"), ("1433", "2539", "4096")),
        ("7", ("74.4", "535", "6.96x"), ("1310", "2457")),
    ],
)
def test_plan_of_flux_needs_no_weights(run, speedup, shown, tokens):
    code, out, err = run("plan", "--model", "flux", *(["--speedup", speedup] if speedup else []))
    assert code == 0
    for text in (*shown, *tokens):
        assert text in out + err
    assert "512 text tokens" in err and "1024 x 1024" in err


def test_plan_as_json(run):
    code, out, _ = run("plan", "--model", "flux", "--json")
    plan = json.loads(out)
    assert code == 0 and [s["tokens"] for s in plan["stages"]] == [1433, 2539, 4096]
    assert plan["stages"][-1]["step_tflops"] == pytest.approx(74.38, abs=0.01)
    assert round(plan["tflops"]) == 899 and round(plan["reference_tflops"]) == 3719
    assert len(plan["sigmas"]) == 19


def test_plan_of_a_folder_with_a_custom_schedule(run, tiny_flux):
    code, out, _ = run("plan", "--model", tiny_flux, "--steps", "3,2", "--ratios", "0.25,1", "--json")
    plan = json.loads(out)
    assert code == 0 and [(s["steps"], s["tokens"]) for s in plan["stages"]] == [(3, 24), (2, 96)]
    assert plan["speedup"] is None


@pytest.mark.parametrize(
    ("method", "first"),
    [
        ("dense", [(10, 96)]),
        ("ralu", [(4, 24), (5, 36), (6, 96)]),
        ("bottleneck", [(3, 96), (12, 24)]),
        ("ras", [(4, 96), (1, 4), (1, 4)]),
    ],
)
def test_plan_of_every_method(run, tiny_flux, method, first):
    plan = json.loads(run("plan", "--model", tiny_flux, "--method", method, "--speedup", "5", "--json")[1])
    assert [(s["steps"], s["tokens"]) for s in plan["stages"]][: len(first)] == first
    assert plan["predicted_speedup"] >= 4.9 and plan["stages"][-1]["tokens"] == 96
    table = run("plan", "--model", tiny_flux, "--method", method, "--speedup", "5")[1]
    assert "predicted speed-up" in table and ("preview" in table) == (method == "ralu")


@pytest.mark.parametrize("model", ["flux-schnell", "sd3.5-large-turbo"])
def test_plan_of_models_of_four_steps(run, model):
    """RALU's published schedule, over the model's own steps and over the 50 of one that is not distilled."""
    table = run("plan", "--model", model, "--method", "ralu", "--speedup", "1.3")[1]
    own, many = re.search(r"speed-up ([\d.]+)x over 4 full steps \(\d+ TFLOP\), ([\d.]+)x over 50", table).groups()
    assert float(own) == pytest.approx(1.45, abs=0.03) and float(many) == pytest.approx(12.5 * float(own), rel=0.01)


def test_schedules_that_do_not_fit_the_method(run, tiny_flux):
    for method, steps in (("ralu", "4,5"), ("bottleneck", "4"), ("ras", "4,2"), ("dense", "4,2")):
        code, _, err = run("plan", "--model", tiny_flux, "--method", method, "--steps", steps)
        assert code == 2 and "expected:" in err


def test_plan_of_another_size(run, tiny_flux):
    out = run("plan", "--model", tiny_flux, "--height", "16", "--width", "8", "--speedup", "1", "--json")[1]
    assert [(s["steps"], s["tokens"]) for s in json.loads(out)["stages"]] == [(50, 8)]


# --- build, inspect, generate ---


def test_build_tells_what_was_built_and_what_to_type_next(run, tiny_flux, tmp_path):
    target = tmp_path / "b [bf16] [/x]"
    code, out, err = run(
        "build", "--model", tiny_flux, "--backend", "eager", "--dtype", "fp32", "--steps", "2,1", "--ratios", "0.5,1",
        "--batch", "2", "-o", target,
    )  # fmt: skip
    assert code == 0
    assert f"built {target}: 5 engines" in out and "predicted speed-up" in out
    assert f"next: jitexport generate '{target}'" in out
    assert "[1/" in err and "engine stage1" in err and "engine stage0" in err
    manifest = EngineBundle.open(target).manifest
    assert (manifest.batch, manifest.dtype, manifest.command.split()[0]) == (2, "fp32", "jitexport")


def test_build_as_json_and_force(run, tiny_flux, tmp_path):
    argv = ["build", "--model", tiny_flux, "--backend", "eager", "--steps", "1", "-o", tmp_path / "b", "--json"]
    code, out, _ = run(*argv)
    report = json.loads(out)
    assert code == 0 and report["bundle"] == str(tmp_path / "b")
    assert report["bytes"] == EngineBundle.open(tmp_path / "b").manifest.size and report["seconds"] >= 0
    assert run(*argv)[0] == 5
    assert run(*argv, "--force")[0] == 0


def test_inspect(run, bundle):
    code, out, err = run("inspect", bundle)
    assert (code, err) == (0, "") and "…" not in out
    out = " ".join(out.split())
    for text in ("tiny-flux", "48 x 32 pixels", "jit, preset default", "eager, fp32", "jitexport build --model tiny"):
        assert text in out
    for engine in ("text", "condition", "stage1", "stage0", "decode"):
        assert engine in out


def test_inspect_as_json_is_the_manifest(run, bundle):
    code, out, err = run("inspect", bundle, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((bundle / "manifest.json").read_text())


def test_generate_writes_the_image_of_the_seed(run, bundle, tmp_path):
    code, out, err = run("generate", bundle, "a red fox", "-o", tmp_path / "fox.png", "--seed", "5")
    assert (code, out) == (0, f"{tmp_path / 'fox.png'}\n") and "seed 5" in err
    image = Image.open(tmp_path / "fox.png")
    assert image.format == "PNG" and image.size == (tiny.WIDTH, tiny.HEIGHT)
    import torch

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


def test_doctor(run):
    code, out, _ = run("doctor")
    assert code == 0
    for text in ("torch", "diffusers", "eager", "aoti", "cpu", "gpu"):
        assert text in out
    report = json.loads(run("doctor", "--json")[1])
    assert report["versions"]["jitexport"] == jitexport.__version__
    assert report["backends"]["eager"].startswith("cpu: ready")


def test_doctor_says_what_a_build_chooses_and_what_this_process_may_have(run, monkeypatch):
    monkeypatch.setattr(machine, "cpus", lambda: 1)
    monkeypatch.setattr(machine, "memory", lambda: 3 * 2**30)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    monkeypatch.setattr(machine, "slowdown", lambda *_: 17.0)
    report = json.loads(run("doctor", "--json")[1])
    chosen = report["what a build chooses"]
    assert chosen.keys() == {"device", "backend", "dtype"} and chosen["dtype"].startswith("fp32: ")
    assert "8 cores, 1 of them for this process" in report["machine"]["cpu"]
    assert report["machine"]["memory"].startswith("3.0 GiB") and "17 times" in report["machine"]["bf16"]


@pytest.mark.parametrize(
    ("version", "untested"), [("2.13.1+cpu", False), ("2.14.1", True), ("2.15.0", True), ("2.1.3", True)]
)
def test_doctor_says_which_torch_is_untested(run, monkeypatch, version, untested):
    monkeypatch.setattr(torch, "__version__", version)
    said = json.loads(run("doctor", "--json")[1])["versions"]["torch"]
    assert said.startswith(version) and ("untested" in said) == untested


def test_the_versions_that_are_tested_are_those_that_can_be_installed():
    from pathlib import Path

    from packaging.specifiers import SpecifierSet

    from jitexport.doctor import TESTED_TORCH

    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    allowed = SpecifierSet(text.split('"torch')[1].split('"')[0])
    assert all(version in allowed for version in TESTED_TORCH)
    assert "2.12.1" not in allowed and "2.15.0" not in allowed


def test_what_was_chosen_is_printed_and_inspected(run, tiny_flux, tmp_path):
    _, out, err = run("build", "--model", tiny_flux, "--backend", "eager", "--steps", "1", "-o", tmp_path / "b")
    manifest = EngineBundle.open(tmp_path / "b").manifest
    assert manifest.chosen.keys() == {"device", "dtype"}
    shown = " ".join(run("inspect", tmp_path / "b")[1].split())
    for field, reason in manifest.chosen.items():
        assert reason in err and reason not in out
        assert f"{field}: {reason}" in shown
    assert json.loads(run("inspect", tmp_path / "b", "--json")[1])["chosen"] == manifest.chosen


def test_doctor_says_whether_the_kernels_are_used(run, monkeypatch):
    for has, expected in [({}, "the CPU lacks"), (dict.fromkeys(native.AVX2.features, True), "attention")]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert expected in json.loads(run("doctor", "--json")[1])["machine"]["kernels"]


def test_doctor_names_the_extra_that_brings_what_is_missing(run, monkeypatch):
    from importlib.metadata import PackageNotFoundError, version

    def absent(name):
        if name == "diffusers":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    assert "missing: pip install 'jitexport[build]'" in json.loads(run("doctor", "--json")[1])["versions"]["diffusers"]
    assert "missing: pip install 'jitexport[build]'" in run("doctor")[1]  # brackets are no markup


def test_a_target_that_could_not_be_written_is_refused_before_the_build(run, tiny_flux, tmp_path):
    (tmp_path / "file").touch()
    for target, code in ((tmp_path / "caf\udce9", 2), (tmp_path / ("n" * 300), 5), (tmp_path / "file" / "b", 5)):
        found, out, err = run("build", "--model", tiny_flux, "--backend", "eager", "--steps", "1", "-o", target)
        assert (found, out) == (code, "") and "[1/" not in err and "Traceback" not in err


# --- real processes ---


def test_errors_in_a_real_process(tmp_path):
    done = shell("inspect", tmp_path / "none")
    assert (done.returncode, done.stdout) == (5, "") and done.stderr.startswith("error: ")
    done = shell("plan", "--model", "flux", "--speedup", "21")
    assert (done.returncode, done.stdout) == (2, "")


def test_build_and_generate_in_real_processes(tiny_flux, tmp_path):
    """stdout is nothing but data, whatever the libraries say."""
    bundle, image = tmp_path / "bundle", tmp_path / "fox.png"
    done = shell("build", "--model", tiny_flux, "--backend", "eager", "--steps", "2", "-o", bundle, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bundle"] == str(bundle)
    done = shell("generate", bundle, "a red fox", "-o", image, "--seed", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == [str(image)] and Image.open(image).size == (tiny.WIDTH, tiny.HEIGHT)
