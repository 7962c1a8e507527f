from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jitexport.build import build
from jitexport.bundle.manifest import DIGEST_NAME, FILE_NAME, digest_line


@pytest.fixture(scope="session")
def built(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny pipeline with the eager backend; not to be changed."""
    return build(str(tiny_flux), output=tmp_path_factory.mktemp("bundles") / "tiny", backend="eager").path


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy of it, free to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def resign(bundle: Path, text: bytes) -> None:
    """Write a manifest with the digest that belongs to it, as someone who builds a bad bundle would."""
    (bundle / FILE_NAME).write_bytes(text)
    (bundle / DIGEST_NAME).write_bytes(digest_line(text))
