"""Small counts of what scripts/faults does in full."""

import random
from pathlib import Path

import pytest

from tests.scripting import script

builds, damage, running = (script(f"faults/{part}") for part in ("builds", "damage", "running"))
Outcome = script("faults/outcomes").Outcome


def held(*outcomes: Outcome) -> None:
    for outcome in outcomes:
        assert outcome.held == outcome.cases, outcome.failures[:3]
        if not outcome.cases:
            pytest.skip(outcome.note)


def test_damaged_files(bundle):
    held(damage.bit_flips(bundle, 40, random.Random(0)), damage.truncations(bundle, 10, random.Random(0)))
    held(*damage.replacements(bundle, 4, random.Random(0)))


def test_mutated_manifests(bundle):
    held(damage.manifest_mutations(bundle, 300, random.Random(0), loads=20))


@pytest.mark.slow
def test_kills(tiny_flux: Path, tmp_path: Path):
    held(builds.kills(str(tiny_flux), "eager", tmp_path, 8, random.Random(0)))


def test_full_and_read_only_disks(tiny_flux: Path, tmp_path: Path):
    held(*builds.bad_disks(str(tiny_flux), "eager", tmp_path, 2))


@pytest.mark.slow
def test_competing_builds(tiny_flux: Path, tmp_path: Path):
    held(builds.competing_builds(str(tiny_flux), "eager", tmp_path, 2))


def test_threads(built: Path):
    held(running.concurrent_images(built, 4, 5, random.Random(0)))


def test_load_cycles(built: Path):
    held(running.load_cycles(built, 30, growth=0.03))
