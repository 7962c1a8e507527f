"""The verb build."""

import json

from PIL import Image

from jitexport.bundle import EngineBundle
from tests import tiny


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


def test_what_was_chosen_is_printed_and_inspected(run, tiny_flux, tmp_path):
    _, out, err = run("build", "--model", tiny_flux, "--backend", "eager", "--steps", "1", "-o", tmp_path / "b")
    manifest = EngineBundle.open(tmp_path / "b").manifest
    assert manifest.chosen.keys() == {"device", "dtype"}
    shown = " ".join(run("inspect", tmp_path / "b")[1].split())
    for field, reason in manifest.chosen.items():
        assert reason in err and reason not in out
        assert f"{field}: {reason}" in shown
    assert json.loads(run("inspect", tmp_path / "b", "--json")[1])["chosen"] == manifest.chosen


def test_a_target_that_could_not_be_written_is_refused_before_the_build(run, tiny_flux, tmp_path):
    (tmp_path / "file").touch()
    for target, code in ((tmp_path / "caf\udce9", 2), (tmp_path / ("n" * 300), 5), (tmp_path / "file" / "b", 5)):
        found, out, err = run("build", "--model", tiny_flux, "--backend", "eager", "--steps", "1", "-o", target)
        assert (found, out) == (code, "") and "[1/" not in err and "Traceback" not in err


def test_build_and_generate_in_real_processes(shell, tiny_flux, tmp_path):
    """stdout is nothing but data, whatever the libraries say."""
    bundle, image = tmp_path / "bundle", tmp_path / "fox.png"
    done = shell("build", "--model", tiny_flux, "--backend", "eager", "--steps", "2", "-o", bundle, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bundle"] == str(bundle)
    done = shell("generate", bundle, "a red fox", "-o", image, "--seed", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == [str(image)] and Image.open(image).size == (tiny.WIDTH, tiny.HEIGHT)
