"""Calibration: what a cache that decides at run time decides, as a file, a list of steps, and a bundle."""

import json

import pytest
import torch

import jitexport
from jitexport.bundle.reading import read_manifest
from jitexport.calibration import Calibration, calibrate, read_calibration
from jitexport.errors import InputError, ScheduleError
from jitexport.models.sources import find_source, load_adapter
from jitexport.plan import CustomSchedule
from tests.parity import seeded

PROMPTS = ["a red fox", "the blue house", "a green tree"]
STEPS = CustomSchedule((12,), (1.0,))


@pytest.fixture(scope="module")
def adapter(tiny_flux):
    return load_adapter(find_source(str(tiny_flux)), torch.float32, {"features": "residual"})


def found(adapter, threshold, **options):
    return calibrate(adapter, PROMPTS, f"teacache:threshold={threshold}", custom=STEPS, **options)


def test_a_higher_threshold_computes_fewer_steps(adapter):
    seen = []
    counts = [len(found(adapter, t, progress=seen.append).computed) for t in (1e-6, 1.0, 1e9)]
    assert counts[0] == 12 and counts[0] > counts[1] > counts[2] == 2
    assert seen == [1, 2, 3] * 3


def test_the_majority_is_the_list(adapter):
    one = found(adapter, 1.0)
    assert one.prompts == 3 and sum(one.lists.values()) == 3
    lists = [[int(i) for i in text.split("+")] for text, count in one.lists.items() for _ in range(count)]
    assert one.shares == tuple(sum(i in chosen for chosen in lists) / 3 for i in range(12))
    assert one.computed == tuple(i for i in range(12) if one.shares[i] >= 0.5)
    assert one.cache == f"teacache:threshold=1.0,computed={'+'.join(map(str, one.computed))}"


def test_a_file_holds_it_all(adapter, tmp_path):
    one = found(adapter, 1.0)
    one.write(tmp_path / "c.json")
    assert read_calibration(tmp_path / "c.json") == one
    assert read_calibration(tmp_path / "c.json", "teacache") == one
    with pytest.raises(InputError, match="brings its cache"):
        read_calibration(tmp_path / "c.json", "taylor")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cache": 1}', "\x00", '{"sigmas": 1, "shares": 2}'])
def test_files_that_are_none(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match="is no calibration"):
        read_calibration(tmp_path / "c.json")
    with pytest.raises(InputError, match="is no calibration"):
        read_calibration(tmp_path / "none.json")


def test_a_bundle_has_the_steps_and_the_evidence(adapter, make_bundle, tmp_path):
    one = found(adapter, 1.0)
    one.write(tmp_path / "c.json")
    path = make_bundle(method="dense", custom=STEPS, calibration=tmp_path / "c.json")
    manifest = read_manifest(path)
    assert manifest.schedule.schedule().computed == one.computed
    assert manifest.cache.name == "teacache" and manifest.cache.evidence == json.loads(json.dumps(one.evidence))
    image = jitexport.load(path)(PROMPTS[0], generator=seeded(0), output_type="pt").images
    assert image.isfinite().all()


def test_a_calibration_is_for_its_own_schedule(adapter, make_bundle, tmp_path):
    found(adapter, 1.0).write(tmp_path / "c.json")
    with pytest.raises(ScheduleError, match="another list of noise levels"):
        make_bundle(method="dense", custom=CustomSchedule((13,), (1.0,)), calibration=tmp_path / "c.json")


def test_what_cannot_be_calibrated(adapter):
    with pytest.raises(InputError, match="decides nothing"):
        calibrate(adapter, PROMPTS, "taylor", custom=STEPS)
    with pytest.raises(InputError, match="needs prompts"):
        calibrate(adapter, [], "teacache", custom=STEPS)


def test_a_build_needs_a_list(make_bundle):
    with pytest.raises(ScheduleError, match="jitexport calibrate"):
        make_bundle(cache="teacache", speedup=4.0)


def test_majority_counts_half():
    one = Calibration("teacache", "F", (1.0, 0.0), 2, (1.0, 0.5, 0.49), {})
    assert one.computed == (0, 1)
