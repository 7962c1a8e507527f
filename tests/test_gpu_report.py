"""The GPU report, dry: the same parts on a CPU with a tiny model of FLUX.1's kind."""

import json
import sys
from pathlib import Path

import pytest
import torch

from jitexport.backends.aoti import AOTInductorBackend
from jitexport.quant import QuantizedLinear
from tests.scripting import script

gpu_report, gpu = script("gpu_report"), script("bench.gpu")


@pytest.fixture
def run(monkeypatch, capsys):
    def call(folder, *argv):
        base = ["--device", "cpu", "--config", "tiny", "--engine", "eager", "--repeats", "2", "--out", str(folder)]
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", *base, *argv])
        with pytest.raises(SystemExit) as stopped:
            gpu_report.main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return call


def report(folder):
    return json.loads((folder / "gpu.json").read_text())


def test_parts_without_time_are_left_out_and_run_again_later(run, tmp_path):
    code, out, _ = run(tmp_path, "--only", "ours-7x", "--only", "diffusers-eager", "--seconds", "0")
    assert code == 75
    assert report(tmp_path)["parts"] == {} and set(report(tmp_path)["skipped"]) == {"ours-7x", "diffusers-eager"}
    assert "needs about" in out

    code, out, _ = run(tmp_path, "--only", "ours-7x", "--only", "diffusers-eager")
    found = report(tmp_path)
    assert code == 0 and found["skipped"] == {} and "Did not run" not in out
    ours, diffusers = found["parts"]["ours-7x"], found["parts"]["diffusers-eager"]
    assert ours["median"] > 0 and diffusers["median"] > 0
    assert ours["tflops"] == pytest.approx(ours["tflop"] / ours["median"])
    assert ours["around_engines"] == pytest.approx(ours["median"] / ours["engines"] - 1)
    assert ours["predicted_speedup"] > 5 and ours["graphs"] is None
    assert "| jitexport 7x |" in out and "| diffusers, 50 steps, eager |" in out

    code, _, err = run(tmp_path, "--only", "ours-7x")
    assert code == 0 and "ours-7x:" not in err  # it has its result
    assert report(tmp_path)["parts"]["ours-7x"] == ours


def test_a_part_that_fails_does_not_cost_the_others(run, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu.Bench, "ceilings", broken)
    fine = gpu_report.Part("fine", "fine", 1, lambda bench: {"x": 1})
    every = [gpu_report.Part("ceilings", "ceilings", 1, broken), fine]
    monkeypatch.setattr(gpu_report, "parts", lambda device: iter(every))
    code, out, _ = run(tmp_path)
    assert code == 0 and "no such kernel" in out
    assert report(tmp_path)["parts"]["fine"]["x"] == 1


def test_results_of_another_machine_are_not_mixed_in(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "parts", lambda device: iter([gpu_report.Part("a", "a", 1, lambda bench: {})]))
    assert run(tmp_path)[0] == 0
    changed = report(tmp_path)
    changed["conditions"]["cpu"] = "an abacus"
    (tmp_path / "gpu.json").write_text(json.dumps(changed))
    code, _, err = run(tmp_path)
    assert code == 2 and "another machine" in err


def test_flux_dev_is_the_model():
    source = gpu.source("flux")
    assert source.configs["transformer"]["num_layers"] == 19 and source.settings["height"] == 1024
    bench = gpu.Bench("tiny", torch.device("cpu"), "eager", 1, Path("none"))
    parameters = list(bench.transformer.parameters())
    assert parameters and all(p.device.type == "cpu" and p.dtype == torch.bfloat16 for p in parameters)
    assert all(p.isfinite().all() for p in parameters)


def test_the_fp8_part_runs_on_quantized_blocks():
    bench = gpu.Bench("tiny", torch.device("cpu"), "eager", 1, Path("none"))
    assert bench.ours(7.0, graphs=False, fp8=True)["median"] > 0
    linears = {n: m for n, m in bench.transformer.named_modules() if isinstance(m, QuantizedLinear)}
    assert linears and all(m.kind == "fp8" for m in linears.values())
    assert bench.ours(4.0, graphs=False, fp8=True)["median"] > 0  # not quantized a second time


def test_engines_are_compiled_once_whatever_the_depth(tmp_path, monkeypatch):
    if reason := AOTInductorBackend().cannot_build(torch.device("cpu"), None):
        pytest.skip(reason)
    shallow = gpu.Bench("tiny", torch.device("cpu"), "aoti", 1, tmp_path)
    found = shallow.ours(1.0, graphs=False)
    assert 0 < found["stage0_error"] < 0.05
    monkeypatch.setattr(AOTInductorBackend, "compile", None)
    monkeypatch.setitem(gpu.TINY["transformer"], "num_single_layers", 4)
    deep = gpu.Bench("tiny", torch.device("cpu"), "aoti", 1, tmp_path)
    assert deep.ours(1.0, graphs=False)["stage0_error"] < 0.05
