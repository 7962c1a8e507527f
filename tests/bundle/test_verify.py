"""Golden replay: a whole bundle gives the stored bits again, a wrong engine is told by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from jitexport import errors
from jitexport.building.comparing import TOLERANCE
from jitexport.bundle.golden import read_golden
from jitexport.bundle.manifest import DIGEST_NAME, FILE_NAME
from jitexport.bundle.reading import read_manifest
from jitexport.bundle.writing import BundleWriter
from jitexport.cli import app
from jitexport.verify import verify


@pytest.fixture
def republished(bundle: Path):
    """The bundle with a changed file, published anew, as a build with another result would do it."""

    def run(name: str, change) -> Path:
        manifest = read_manifest(bundle)
        with BundleWriter(bundle.with_name("changed")) as writer:
            shutil.copytree(bundle, writer.path, dirs_exist_ok=True)
            for own in (FILE_NAME, DIGEST_NAME):
                (writer.path / own).unlink()
            tensors = load_file(writer.path / name)
            change(tensors)
            save_file(tensors, writer.path / name)
            writer.publish(lambda files: manifest.model_copy(update={"files": files}))
        return bundle.with_name("changed")

    return run


def test_every_engine_gives_the_stored_result_again(built):
    heard = []
    result = verify(built, on_engine=heard.append)
    assert result.passed and result.files == len(read_manifest(built).files)
    assert heard == [r.name for r in result.engines] == [e.name for e in read_manifest(built).engines]
    for replay in result.engines:  # sums of fp32 products depend on where their operands lie in memory
        assert replay.problem is None and replay.relative_error < 1e-6
        assert replay.exact == (replay.max_error == 0)
    assert sum(replay.exact for replay in result.engines) >= len(result.engines) / 2


def test_golden_inputs_are_what_the_engines_take(built):
    for entry in read_manifest(built).engines:
        inputs, outputs = read_golden(built, entry)
        assert [tuple(t.shape) for t in inputs] == [i.shape for i in entry.inputs]
        assert [tuple(t.shape) for t in outputs] == [o.shape for o in entry.outputs]
        assert all(t.isfinite().all() for t in outputs)


def test_digests_come_first(bundle):
    (bundle / "golden" / "stage0.safetensors").write_bytes(b"")
    with pytest.raises(errors.SizeError):
        verify(bundle)


def test_another_output_within_the_tolerance_is_close(bundle, republished):
    def change(tensors):
        tensors["output.velocity"] *= 1 + tolerance / 5

    tolerance = TOLERANCE[read_manifest(bundle).dtype]
    replay = next(r for r in verify(republished("golden/stage1.safetensors", change)).engines if r.name == "stage1")
    assert replay.passed and not replay.exact
    assert replay.relative_error == pytest.approx(tolerance / 5, rel=0.1)


@pytest.mark.parametrize("value", [100.0, float("nan"), float("inf")])
def test_another_output_outside_the_tolerance_fails(republished, value):
    def change(tensors):
        tensors["output.velocity"][0, 0, 0] = value

    result = verify(republished("golden/stage1.safetensors", change))
    assert not result.passed
    assert [r.name for r in result.engines if not r.passed] == ["stage1"]


def test_changed_weights_show_in_the_engines_that_use_them(republished):
    def change(tensors):
        tensors["proj_out.weight"] *= 2

    result = verify(republished("weights/transformer.safetensors", change))
    assert [r.name for r in result.engines if not r.passed] == ["stage2", "stage1", "stage0"]


def test_an_engine_that_cannot_run_is_a_result_and_no_crash(republished):
    def lose(tensors):
        del tensors["output.velocity"]

    replay = next(r for r in verify(republished("golden/stage0.safetensors", lose)).engines if r.name == "stage0")
    assert not replay.passed and "stage0" in replay.problem
    assert replay.report()["relative_error"] is None and replay.report()["passed"] is False


def test_golden_inputs_of_another_shape_are_a_result_too(republished):
    def cut(tensors):
        tensors["input.tokens"] = torch.zeros(1, 2, 3)

    replay = next(r for r in verify(republished("golden/stage2.safetensors", cut)).engines if r.name == "stage2")
    assert not replay.passed and "another input" in replay.problem


def test_command_line(built, republished):
    done = CliRunner().invoke(app, ["verify", str(built)])
    assert done.exit_code == 0
    assert "stage0" in done.stdout and "same bits" in done.stdout

    def change(tensors):
        tensors["output.images"].zero_()

    changed = republished("golden/decode.safetensors", change)
    done = CliRunner().invoke(app, ["verify", str(changed), "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == errors.BundleError.exit_code
    assert report["passed"] is False
    assert [e["name"] for e in report["engines"] if not e["passed"]] == ["decode"]
