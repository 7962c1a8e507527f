"""Tiny random models, made once a session. Nothing here depends on a network or on a model's quality."""

from __future__ import annotations

import os

# Before torch is imported: idle OpenMP threads must not spin on machines that run other things too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from pathlib import Path

import pytest
import torch
from hypothesis import settings

# No deadline: machines are shared. Derandomised: a run fails for a change, not by luck.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FLUX pipeline in diffusers' format, with guidance; 48 x 32 pixels, 12 x 8 tokens."""
    from tests import tiny  # diffusers: only where it is needed

    return tiny.save_flux(tmp_path_factory.mktemp("models") / "tiny-flux", guidance=True)


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without guidance, with dynamic shifting; 4 steps as schnell."""
    from tests import tiny

    return tiny.save_flux(tmp_path_factory.mktemp("models") / "tiny-schnell", guidance=False)
