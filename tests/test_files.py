"""Files are written whole or not at all, and what cannot be written is found out before the work."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jitexport import files
from jitexport.errors import InputError, OutputError
from jitexport.files import check_writable, imports_that_ask_for_a_temporary_folder, sync, temporary_folder, write_file


def in_namespace(setup: str, command: str) -> subprocess.CompletedProcess:
    """Run a shell command with mounts of its own; skips where that is not allowed."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounts of its own need root and unshare")
    script = f"set -e\n{setup}\n{command}"
    return subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True)


def test_a_file_is_written_over_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["a.png"]

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_file(path, b"newer")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_link_stands_for_its_file(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["a" * 251 + ".png", "é" * 120 + ".png"])
def test_names_as_long_as_the_file_system_takes(tmp_path, name):
    write_file(tmp_path / name, b"x")
    assert (tmp_path / name).read_bytes() == b"x"
    with pytest.raises(OutputError, match="too long"):
        check_writable(tmp_path / ("a" * 256)) or write_file(tmp_path / ("a" * 256), b"x")


def test_what_is_no_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="a folder"):
        check_writable(tmp_path / "folder.png")
    with pytest.raises(InputError, match="no plain file"):
        check_writable(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="no such folder"):
        check_writable(tmp_path / "none" / "a.png")
    check_writable(tmp_path / "a.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.png", "pipe.png"]


@pytest.mark.parametrize("number", [22, 9, 95])
def test_file_systems_without_fsync(monkeypatch, number):
    def refuse(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    sync(0)


def test_a_disk_that_fails_is_no_such_file_system(monkeypatch):
    def fail(handle):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        sync(0)


def test_a_temporary_folder_where_the_system_has_none(tmp_path, monkeypatch):
    import tempfile

    def none():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "gettempdir", none)
        with temporary_folder(tmp_path):
            assert Path(os.environ["TMPDIR"]).parent == tmp_path and tempfile.tempdir == os.environ["TMPDIR"]
    assert list(tmp_path.iterdir()) == [] and tempfile.tempdir != str(tmp_path)
    before = os.environ.get("TMPDIR")
    with temporary_folder(tmp_path):
        assert os.environ.get("TMPDIR") == before


def test_imports_where_there_is_no_temporary_folder(monkeypatch):
    import tempfile

    def none():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    before = tempfile.gettempdir()
    with imports_that_ask_for_a_temporary_folder():
        assert tempfile.gettempdir() == before
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", none)
    with imports_that_ask_for_a_temporary_folder():
        assert tempfile.gettempdir() == "/tmp"
    with pytest.raises(FileNotFoundError):
        tempfile.gettempdir()


def test_the_nearest_folder(tmp_path):
    assert files.nearest_folder(tmp_path / "a" / "b") == tmp_path and files.nearest_folder(tmp_path / "a") == tmp_path


def generate(bundle, target) -> str:
    return f"{sys.executable} -m jitexport generate '{bundle}' 'a fox' --seed 1 -o '{target}'"


def test_images_onto_a_read_only_file_system(make_bundle, tmp_path):
    """Refused before anything is loaded."""
    place, damaged = tmp_path / "ro", tmp_path / "no weights"
    place.mkdir()
    shutil.copytree(make_bundle(), damaged, ignore=shutil.ignore_patterns("weights"))
    done = in_namespace(
        f"mount -t tmpfs none '{place}'\nmount -o remount,ro '{place}'", generate(damaged, place / "a.png")
    )
    assert done.returncode == OutputError.exit_code, done.stderr
    assert "Read-only file system" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("keep", [0, 1])
def test_images_onto_a_full_disk(make_bundle, tmp_path, keep):
    """Nothing but a whole image is ever there, be it the one of before."""
    place = tmp_path / "full"
    place.mkdir()
    setup = f"mount -t tmpfs -o size=16k none '{place}'\n"
    if keep:
        setup += f"printf old > '{place}/a.png'\n"
    setup += f"head -c 1M /dev/zero > '{place}/filler' || true"
    done = in_namespace(setup, f"{generate(make_bundle(), place / 'a.png')} || echo code $?; ls -A '{place}'")
    assert f"code {OutputError.exit_code}" in done.stdout, done.stderr
    assert "No space left" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.split()[2:] == (["a.png", "filler"] if keep else ["filler"])


def test_a_bundle_on_a_read_only_root_without_a_temporary_folder(make_bundle, tmp_path):
    """All of it read-only, and none of the places that Python tries for temporary files can be written."""
    out = tmp_path / "out"
    out.mkdir()
    done = in_namespace(
        "for d in /tmp /var/tmp /dev/shm; do mount --bind $d $d; mount -o remount,ro,bind $d; done\n"
        f"mount -t tmpfs none '{out}'\nmount -o remount,ro,bind /\ncd /\n"
        "unset TMPDIR TORCHINDUCTOR_CACHE_DIR\n! touch /tmp/x 2>/dev/null",  # torch notes its folder in the latter
        generate(make_bundle(), out / "a.png") + f"; ls '{out}'",
    )
    if done.stderr.startswith("mount:"):
        pytest.skip(f"the root cannot be made read-only here: {done.stderr}")
    assert done.returncode == 0 and done.stdout.split()[-1] == "a.png", done.stderr


@contextlib.contextmanager
def unchangeable(folder: Path):
    """A folder that even root cannot write to, where the file system can."""
    if subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
        pytest.skip("this file system has no immutable folders, or this is not root")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)


def test_a_folder_without_the_right_to_write(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    with unchangeable(folder), pytest.raises(OutputError, match="not permitted"):
        check_writable(folder / "a.png")
