"""The verbs plan and doctor."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

import jitexport
from jitexport import machine
from jitexport.kernels import native


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


def test_plan_counts_all_steps(run, tiny_flux):
    """Of a cache with how many are computed."""
    argv = ("plan", "--model", tiny_flux, "--speedup", "5")
    for more in ((), ("--cache", "taylor")):
        plan = json.loads(run(*argv, *more, "--json")[1])
        total = re.search(r"all +\W+(\d+)( \(\d+\))?", run(*argv, *more)[1])
        assert int(total[1]) == sum(s["steps"] for s in plan["stages"]) > 0 and bool(total[2]) == bool(more)


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
    ("version", "untested"), [("2.13.1+cpu", False), ("2.14.1", False), ("2.15.0", True), ("2.1.3", True)]
)
def test_doctor_says_which_torch_is_untested(run, monkeypatch, version, untested):
    monkeypatch.setattr(torch, "__version__", version)
    said = json.loads(run("doctor", "--json")[1])["versions"]["torch"]
    assert said.startswith(version) and ("untested" in said) == untested


def test_the_versions_that_are_tested_are_those_that_can_be_installed():
    from packaging.specifiers import SpecifierSet

    from jitexport.doctor import TESTED_TORCH

    text = (Path(__file__).parent.parent.parent / "pyproject.toml").read_text()
    allowed = SpecifierSet(text.split('"torch')[1].split('"')[0])
    assert all(version in allowed for version in TESTED_TORCH)
    assert "2.12.1" not in allowed and "2.15.0" not in allowed


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
