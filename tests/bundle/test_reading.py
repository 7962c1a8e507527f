"""Opening a bundle: each thing that can be wrong with its files is found, named and told apart."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import jitexport
from jitexport import errors
from jitexport.bundle import EngineBundle
from jitexport.bundle.manifest import DIGEST_NAME, FILE_NAME
from tests.scripting import script

damage = script("faults/damage")
WEIGHTS = "weights/vae.safetensors"


def refuses(bundle: Path, error: type[Exception], match: str, verify: str = "full") -> None:
    with damage.counting_loads("eager") as opened, pytest.raises(error, match=match) as caught:
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


def as_link(path: Path, kind: str, to: Path) -> None:
    """Put a link in a file's place; the file is `to` from now on, unless that is there already."""
    path.rename(to) if not to.exists() else path.unlink()
    (path.symlink_to if kind == "symlink" else path.hardlink_to)(to)


def image(bundle: Path):
    return jitexport.load(bundle)("a fox", generator=torch.Generator().manual_seed(0), output_type="np").images


def test_a_bundle_of_links_as_in_a_hubs_cache(bundle):
    """Snapshots are folders of links to files that are named by their content."""
    expected, blobs = image(bundle), bundle.with_name("blobs")
    blobs.mkdir()
    for i, path in enumerate(sorted(p for p in bundle.rglob("*") if p.is_file())):
        as_link(path, "symlink", blobs / str(i))
    opened = EngineBundle.open(bundle)
    assert set(opened.linked) == {f.path for f in opened.manifest.files}
    assert (image(bundle) == expected).all()


def test_a_bundle_that_was_copied_with_hard_links(bundle):
    copy = bundle.with_name("copy")
    shutil.copytree(bundle, copy, copy_function=os.link)
    assert (image(copy) == image(bundle)).all()


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_links_are_refused_where_no_digests_are_compared(bundle, kind):
    as_link(bundle / WEIGHTS, kind, bundle.with_name("aside"))
    refuses(bundle, errors.UnsafeFileError, 'verify="full"', "size")


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
@pytest.mark.parametrize("name", [WEIGHTS, FILE_NAME])
def test_a_link_to_other_bytes(bundle, kind, name):
    other = bundle.with_name("other")
    other.write_bytes((bundle / name).read_bytes())
    flip(other, 500)
    as_link(bundle / name, kind, other)
    refuses(bundle, errors.BundleError, name)


def test_a_link_to_nothing_or_to_a_device(bundle):
    (bundle / WEIGHTS).unlink()
    (bundle / WEIGHTS).symlink_to("/nowhere/at/all")
    refuses(bundle, errors.MissingFileError, "-> /nowhere/at/all")
    for target in ("/dev/zero", bundle.with_name("pipe")):
        if not os.path.exists(target):
            os.mkfifo(target)
        (bundle / WEIGHTS).unlink()
        (bundle / WEIGHTS).symlink_to(target)
        refuses(bundle, errors.UnsafeFileError, WEIGHTS)


def test_what_is_checked_is_what_is_opened(bundle, monkeypatch):
    """A link that is turned to another file between the check and the end of loading."""
    kept, other = bundle.with_name("kept"), bundle.with_name("other")
    as_link(bundle / WEIGHTS, "symlink", kept)
    other.write_bytes(kept.read_bytes())
    read = EngineBundle.weights

    def turn_and_read(self, device):
        (bundle / WEIGHTS).unlink()
        (bundle / WEIGHTS).symlink_to(other)
        return read(self, device)

    monkeypatch.setattr(EngineBundle, "weights", turn_and_read)
    with pytest.raises(errors.DigestError, match="another file than the one that was checked"):
        jitexport.load(bundle)


@pytest.mark.parametrize("name", [".gitattributes", "README.md", ".git/config", "lost+found/x", ".cache/huggingface/x"])
def test_what_hubs_and_file_systems_put_beside_a_bundle(bundle, name):
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).touch()
    for verify in ("full", "size"):
        EngineBundle.open(bundle, verify)


def test_only_beside_it_and_not_within(bundle):
    (bundle / "weights" / ".gitattributes").touch()
    refuses(bundle, errors.UndeclaredFileError, "weights/.gitattributes")


def test_a_linked_folder_is_refused(bundle):
    (bundle / "weights").rename(bundle.with_name("aside"))
    (bundle / "weights").symlink_to(bundle.with_name("aside"))
    refuses(bundle, errors.UnsafeFileError, "weights")


def test_a_pipe_is_refused_without_waiting_for_its_other_end(bundle):
    (bundle / WEIGHTS).unlink()
    os.mkfifo(bundle / WEIGHTS)
    refuses(bundle, errors.UnsafeFileError, WEIGHTS)


@pytest.mark.parametrize("name", ["n" * 300, "caf\udce9"])
def test_paths_that_nothing_can_have(tmp_path, name):
    with pytest.raises(errors.JitExportError):
        EngineBundle.open(tmp_path / name)


def test_a_link_to_the_whole_bundle_is_the_users_own(bundle):
    link = bundle.with_name("current")
    link.symlink_to(bundle)
    assert EngineBundle.open(link).manifest
