"""Small counts of what scripts/faults/run.py does in full."""

import random
from pathlib import Path

import pytest

from scripts import faults


def held(*outcomes: faults.Outcome) -> None:
    for outcome in outcomes:
        assert outcome.held == outcome.cases, outcome.failures[:3]
        if not outcome.cases:
            pytest.skip(outcome.note)


def test_damaged_files(bundle):
    held(faults.bit_flips(bundle, 40, random.Random(0)), faults.truncations(bundle, 10, random.Random(0)))
    held(*faults.replacements(bundle, 4, random.Random(0)))


def test_mutated_manifests(bundle):
    held(faults.manifest_mutations(bundle, 300, random.Random(0), loads=20))


@pytest.mark.slow
def test_kills(tiny_flux: Path, tmp_path: Path):
    held(faults.kills(str(tiny_flux), "eager", tmp_path, 8, random.Random(0)))


def test_full_and_read_only_disks(tiny_flux: Path, tmp_path: Path):
    held(*faults.bad_disks(str(tiny_flux), "eager", tmp_path, 2))


@pytest.mark.slow
def test_competing_builds(tiny_flux: Path, tmp_path: Path):
    held(faults.competing_builds(str(tiny_flux), "eager", tmp_path, 2))


def test_threads(built: Path):
    held(faults.concurrent_images(built, 4, 5, random.Random(0)))


def test_load_cycles(built: Path):
    held(faults.load_cycles(built, 30, growth=0.03))
