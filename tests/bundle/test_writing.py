"""Publishing: all or nothing, whatever happens between."""

import errno
import fcntl
import os
import secrets
import shutil
import stat
from pathlib import Path

import pytest
import torch

from jitexport.bundle import BundleWriter, EngineBundle, staging, writing
from jitexport.bundle.manifest import FILE_NAME
from jitexport.bundle.reading import read_manifest
from jitexport.errors import BundleError, BundleExistsError, CompileError, InputError, ManifestError


@pytest.fixture
def publish(built: Path):
    """Publish the built bundle's files to a target, with another creation date."""

    def run(target: Path, created: str, *, replace: bool = False, before=lambda: None) -> None:
        with BundleWriter(target, replace=replace) as writer:
            for part in ("weights", "tokenizers", "golden"):
                if (built / part).is_dir():
                    shutil.copytree(built / part, writer.path / part)
            writer.directory("engines/empty")
            before()
            writer.publish(lambda files: read_manifest(built).model_copy(update={"created": created, "files": files}))

    return run


def created(bundle: Path) -> str:
    return EngineBundle.open(bundle).manifest.created


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def fail(error: Exception):
    def run(*_, **__):
        raise error

    return run


def test_published_and_complete(publish, tmp_path):
    target = tmp_path / "deep" / "bundle"
    publish(target, "now")
    assert created(target) == "now"
    assert names(target.parent) == ["bundle"]
    assert not (target / "engines").exists(), "an empty directory would not survive packing"


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o027, 0o640, 0o750), (0o022, 0o644, 0o755)])
def test_files_have_the_modes_that_the_umask_gives(tmp_path, umask, file, folder):
    old = os.umask(umask)
    try:
        with BundleWriter(tmp_path / "bundle") as writer:
            writer.write_text("tokenizers/a.json", "{}")
            writer.write_tensors("weights/a.safetensors", {"a": torch.zeros(1)})
            modes = {p.is_file(): p.stat().st_mode & 0o777 for p in [writer.path, *writer.path.rglob("*")]}
    finally:
        os.umask(old)
    assert modes == {True: file, False: folder}


def test_an_existing_bundle_is_kept_unless_it_may_be_replaced(publish, tmp_path):
    target = tmp_path / "bundle"
    publish(target, "old")
    with pytest.raises(BundleExistsError, match="--force"):
        publish(target, "new")
    assert created(target) == "old"
    publish(target, "new", replace=True)
    assert created(target) == "new" and names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("replace", [False, True])
def test_what_is_no_bundle_is_never_replaced(publish, tmp_path, replace):
    for target in (tmp_path / "folder", tmp_path / "file"):
        (target.mkdir if target.name == "folder" else target.touch)()
        with pytest.raises(BundleExistsError, match="no bundle"):
            publish(target, "new", replace=replace)
    assert names(tmp_path) == ["file", "folder"]


def test_a_link_stands_for_the_bundle_that_it_leads_to(publish, tmp_path):
    publish(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    publish(tmp_path / "link", "new", replace=True)
    assert (tmp_path / "link").is_symlink() and created(tmp_path / "real") == "new"


def test_the_working_directory_can_be_the_target(publish, tmp_path, monkeypatch):
    publish(tmp_path / "bundle", "old")
    monkeypatch.chdir(tmp_path / "bundle")
    publish(Path("."), "new", replace=True)
    assert created(tmp_path / "bundle") == "new" and names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_any_error_leaves_nothing(publish, tmp_path, error):
    with pytest.raises(type(error)):
        publish(tmp_path / "deep" / "bundle", "now", before=fail(error))
    assert names(tmp_path) == []
    publish(tmp_path / "bundle", "old")
    with pytest.raises(type(error)):
        publish(tmp_path / "bundle", "now", replace=True, before=fail(error))
    assert created(tmp_path / "bundle") == "old" and names(tmp_path) == ["bundle"]


def wrapped(cause: Exception) -> Exception:
    error = CompileError("the compiler failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error", "/somewhere"),
        wrapped(OSError(errno.ENOSPC, "No space left on device")),
        wrapped(RuntimeError("as: fatal error: x.o: No space left on device")),
        RuntimeError("I/O error: Read-only file system (os error 30)"),
    ],
    ids=repr,
)
def test_a_disks_errors_become_ours(publish, tmp_path, error):
    with pytest.raises(BundleError, match="nothing was left behind") as caught:
        publish(tmp_path / "bundle", "now", before=fail(error))
    assert caught.value.remedy and names(tmp_path) == []


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone", "/model"), PermissionError(13, "no", "/model")])
def test_errors_of_reading_a_model_are_left_alone(publish, tmp_path, error):
    with pytest.raises(type(error)):
        publish(tmp_path / "bundle", "now", before=fail(error))


def test_a_folder_that_cannot_be_made(publish, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot write to"):
        publish(tmp_path / "file" / "bundle", "now")


def test_tensors_that_do_not_fit_on_the_disk(tmp_path, monkeypatch):
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.write_tensors("weights/a.safetensors", {"x": torch.arange(4)[::2]})
        (writer.path / "weights/b.safetensors").mkdir()
        with pytest.raises(BundleError, match=r"cannot write weights/b\.safetensors"):
            writer.write_tensors("weights/b.safetensors", {"x": torch.zeros(2)})


def test_large_weights_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 40)
    with BundleWriter(tmp_path / "bundle") as writer:
        tensors = {"a": torch.zeros(8), "b": torch.zeros(2), "c": torch.zeros(100), "d": torch.zeros(1)}
        shards = writer.write_weights("unet", tensors)
    assert shards == [f"weights/unet-{i}.safetensors" for i in (1, 2, 3)]


def test_a_manifest_that_could_not_be_read_is_not_published(built, tmp_path):
    with pytest.raises(ManifestError), BundleWriter(tmp_path / "bundle") as writer:
        writer.publish(lambda files: read_manifest(built).model_copy(update={"batch": 2}))
    assert names(tmp_path) == []


def test_links_among_the_files_are_refused(built, tmp_path):
    with pytest.raises(BundleError, match="plain files"), BundleWriter(tmp_path / "bundle") as writer:
        (writer.path / "link").symlink_to("/etc/passwd")
        writer.publish(lambda files: read_manifest(built))


def test_leftovers_of_dead_builds_are_removed_and_living_ones_kept(publish, tmp_path):
    dead = tmp_path / ".a[b].build-dead"
    dead.mkdir()
    (dead / FILE_NAME).touch()
    other = tmp_path / ".other.build-dead"
    other.mkdir()
    with BundleWriter(tmp_path / "a[b]") as living:
        publish(tmp_path / "a[b]", "now")
        assert not dead.exists() and living.path.exists() and other.exists()
        with pytest.raises(BundleExistsError):
            living.commit()
    assert created(tmp_path / "a[b]") == "now"


@pytest.mark.parametrize("atomic", [True, False])
def test_replacing_with_and_without_an_atomic_exchange(publish, tmp_path, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr(staging, "exchange", lambda a, b: False)
    publish(tmp_path / "bundle", "old")
    publish(tmp_path / "bundle", "new", replace=True)
    assert created(tmp_path / "bundle") == "new" and names(tmp_path) == ["bundle"]


def test_exchange_is_one_step_here(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"was-{name}").touch()
    if not staging.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange")
    assert names(tmp_path / "a") == ["was-b"] and names(tmp_path / "b") == ["was-a"]
    with pytest.raises(OSError):
        staging.exchange(tmp_path / "a", tmp_path / "none")


def test_an_interruption_between_two_renames_is_mended(publish, tmp_path):
    target = tmp_path / "bundle"
    publish(target, "old")
    target.rename(tmp_path / ".bundle.replaced")  # as a kill between the two renames leaves it
    with pytest.raises(BundleExistsError, match="--force"):
        publish(target, "new")
    assert created(target) == "old" and names(tmp_path) == ["bundle"]
    shutil.copytree(target, tmp_path / ".bundle.replaced")  # as one after them does
    publish(target, "new", replace=True)
    assert created(target) == "new" and names(tmp_path) == ["bundle"]


def test_a_failing_second_rename_puts_the_old_bundle_back(publish, tmp_path, monkeypatch):
    target = tmp_path / "bundle"
    publish(target, "old")
    monkeypatch.setattr(staging, "exchange", lambda a, b: False)
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if ".build-" in self.name:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BundleError, match="nothing was left"):
        publish(target, "new", replace=True)
    assert created(target) == "old" and names(tmp_path) == ["bundle"]


# --- file systems that lack something ---


@pytest.fixture
def no_folder_locks(monkeypatch):
    """As NFS, which locks files that are open for writing only."""
    flock = fcntl.flock

    def run(handle, how):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", run)


def test_leftovers_and_living_builds_where_folders_cannot_be_locked(publish, tmp_path, no_folder_locks):
    dead = tmp_path / ".bundle.build-dead"
    dead.mkdir()
    with BundleWriter(tmp_path / "bundle") as living:
        publish(tmp_path / "bundle", "now")
        assert not dead.exists() and living.path.exists()
    assert created(tmp_path / "bundle") == "now" and names(tmp_path) == [staging.LOCK_NAME, "bundle"]


def test_no_locks_at_all(publish, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fail(OSError(errno.ENOLCK, "No locks available")))
    publish(tmp_path / "bundle", "old")
    publish(tmp_path / "bundle", "new", replace=True)
    assert created(tmp_path / "bundle") == "new"


@pytest.mark.parametrize(("number", "warns"), [(errno.EINVAL, False), (errno.EACCES, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced(publish, tmp_path, monkeypatch, caplog, number, warns):
    """The bundle is in place by then."""
    fsync = os.fsync

    def run(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", run)
    publish(tmp_path / "bundle", "now")
    assert created(tmp_path / "bundle") == "now" and bool(caplog.records) == warns


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "a b 'c' \"d\" [e] $f"])
def test_any_name_that_the_file_system_takes(publish, tmp_path, name):
    publish(tmp_path / name, "old")
    publish(tmp_path / name, "new", replace=True)
    assert created(tmp_path / name) == "new" and names(tmp_path) == [name]


@pytest.mark.parametrize(("name", "error"), [("n" * 256, BundleError), ("caf\udce9", InputError)])
def test_names_that_cannot_be_are_refused_at_the_start(tmp_path, name, error):
    with pytest.raises(error), BundleWriter(tmp_path / "deep" / name):
        pytest.fail("began to work")
    assert names(tmp_path) == []


@pytest.mark.parametrize("at", range(1, 7))
def test_a_signal_while_the_staging_folder_is_made(tmp_path, monkeypatch, at):
    """At any call that changes the disk: nothing is left."""
    calls = iter(range(1, 100))

    def counted(function):
        def run(*args, **kwargs):
            if next(calls) == at:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return run

    for owner, name in ((Path, "mkdir"), (staging, "hold"), (Path, "iterdir"), (secrets, "token_hex")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    try:
        with BundleWriter(tmp_path / "deep" / "bundle"):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    assert names(tmp_path) == []
