"""Opening a bundle: each thing that can be wrong with its files is found, named and told apart."""

import os
from pathlib import Path

import pytest
import torch

import jitexport
from jitexport import errors
from jitexport.bundle import EngineBundle
from jitexport.bundle.manifest import DIGEST_NAME, FILE_NAME
from scripts.faults import counting_loads

WEIGHTS = "weights/vae.safetensors"


def refuses(bundle: Path, error: type[Exception], match: str, verify: str = "full") -> None:
    with counting_loads("eager") as opened, pytest.raises(error, match=match) as caught:
        jitexport.load(bundle, verify=verify)
    assert not opened
    assert caught.value.found is not None and caught.value.remedy and caught.value.exit_code == 5


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_whole_bundle_opens(bundle):
    opened = EngineBundle.open(bundle)
    assert opened.path == bundle
    assert {f.path for f in opened.manifest.files} | {FILE_NAME, DIGEST_NAME} == {
        p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()
    }
    assert EngineBundle.open(str(bundle), "size").manifest == opened.manifest


def test_weights_are_the_models_own_with_tied_names(bundle):
    opened = EngineBundle.open(bundle)
    weights = opened.weights(torch.device("cpu"))
    assert opened.manifest.tied, "the tiny T5 shares its embedding"
    for alias, name in opened.manifest.tied.items():
        assert weights[alias] is weights[name]
    assert {name.split(".")[0] for name in weights} == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert all(t.data_ptr() % 16 == 0 for t in weights.values())


def test_nothing_there(tmp_path):
    refuses(tmp_path / "none", errors.BundleNotFoundError, "no directory")
    refuses(tmp_path, errors.BundleNotFoundError, "without manifest.json")
    (tmp_path / "file").touch()
    refuses(tmp_path / "file", errors.BundleNotFoundError, "no directory")


def test_an_unknown_way_of_checking(bundle):
    with pytest.raises(errors.InputError, match="unknown verify"):
        EngineBundle.open(bundle, "none")


def test_a_changed_byte_is_found_by_digest_and_not_by_size(bundle):
    flip(bundle / WEIGHTS, 5000)
    refuses(bundle, errors.DigestError, WEIGHTS)
    EngineBundle.open(bundle, "size")


def test_another_size_is_found_by_both(bundle):
    os.truncate(bundle / WEIGHTS, 100)
    refuses(bundle, errors.SizeError, r"vae.*\n.*100\n", "size")
    refuses(bundle, errors.SizeError, WEIGHTS)


def test_weights_that_are_none_are_refused_after_a_fast_start(bundle):
    path = bundle / WEIGHTS
    path.write_bytes(b"\xff" * path.stat().st_size)
    refuses(bundle, errors.IntegrityError, "cannot read weights/vae", "size")


@pytest.mark.parametrize("name", [FILE_NAME, DIGEST_NAME])
def test_a_changed_manifest_is_refused(bundle, name):
    text = (bundle / name).read_bytes()
    (bundle / name).write_bytes(text.replace(b"a", b"b", 1))
    refuses(bundle, errors.ManifestError, "not the published one", "size")


def test_missing_files(bundle):
    (bundle / WEIGHTS).unlink()
    refuses(bundle, errors.MissingFileError, WEIGHTS)


def test_a_missing_manifest_digest(bundle):
    (bundle / DIGEST_NAME).unlink()
    refuses(bundle, errors.MissingFileError, DIGEST_NAME)


def test_extra_files_and_folders(bundle):
    (bundle / "weights" / "more").touch()
    refuses(bundle, errors.UndeclaredFileError, "weights/more")
    (bundle / "weights" / "more").unlink()
    (bundle / "more").mkdir()
    refuses(bundle, errors.UndeclaredFileError, "more")


@pytest.mark.parametrize("name", [WEIGHTS, FILE_NAME, DIGEST_NAME])
def test_links_are_refused_even_to_the_right_bytes(bundle, name):
    aside = bundle.with_name("aside")
    (bundle / name).rename(aside)
    (bundle / name).symlink_to(aside)
    refuses(bundle, errors.UnsafeFileError, name)
    (bundle / name).unlink()
    (bundle / name).hardlink_to(aside)
    refuses(bundle, errors.UnsafeFileError, name)


def test_a_linked_folder_is_refused(bundle):
    (bundle / "weights").rename(bundle.with_name("aside"))
    (bundle / "weights").symlink_to(bundle.with_name("aside"))
    refuses(bundle, errors.UnsafeFileError, "weights")


def test_a_pipe_is_refused_without_waiting_for_its_other_end(bundle):
    (bundle / WEIGHTS).unlink()
    os.mkfifo(bundle / WEIGHTS)
    refuses(bundle, errors.UnsafeFileError, WEIGHTS)


def test_a_link_to_the_whole_bundle_is_the_users_own(bundle):
    link = bundle.with_name("current")
    link.symlink_to(bundle)
    assert EngineBundle.open(link).manifest
