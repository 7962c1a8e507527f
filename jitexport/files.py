"""Writing files whole or not at all, and finding out before the work whether they can be written."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jitexport.errors import InputError, OutputError

#: Errors that a disk gives when it cannot be written, whatever the file.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
#: What fsync answers where there is no such promise.
_NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM}
_NAME_BYTES = 200  # of a name within the names of what stands beside it; file systems take 255 in all


def check_writable(path: Path) -> None:
    """Find out whether `write_file` can write there, before the work that makes the content.

    Raises:
        InputError: there is no such folder, or something else than a file has the name.
        OutputError: the folder cannot be written.
    """
    path = Path(os.path.realpath(path))
    if not os.path.isdir(path.parent):
        raise InputError("no such folder", found=path.parent, remedy="create it, or choose another -o")
    with _telling(path), suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else f"no plain file ({stat.filemode(mode)})"
            raise InputError(
                f"cannot write to {path}", found=what, expected="a file, or a new name", remedy="choose another -o"
            )
    with _telling(path), _unfinished(path) as part:
        part.touch()


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step: it is there whole, or as it was before.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link to a file stands for that file
    with _telling(path), _unfinished(path) as part:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        part.replace(path)


def sync(handle: int) -> None:
    """Write a file or a folder through to the disk; some network and user-space file systems cannot promise that.

    Raises:
        OSError: the disk failed.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def short_name(name: str) -> str:
    """A name, or what stands for it where names that are made of it would be too long."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _NAME_BYTES else hashlib.sha256(encoded).hexdigest()[:32]


def nearest_folder(path: Path) -> Path:
    """The folder that is there already, on the way to a path."""
    return next(parent for parent in Path(os.path.realpath(path)).parents if os.path.isdir(parent))


@contextmanager
def temporary_folder(place: Path) -> Iterator[None]:
    """Where the system has no temporary folder to write to, one in `place`, for this process and those it starts.

    Python would take the working directory then, and libraries would be made and loaded there.
    """
    try:
        working = os.path.realpath(tempfile.gettempdir()) == os.path.realpath(os.curdir)
        missing = working and not any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    except FileNotFoundError:
        missing = True
    if not missing:
        yield
        return
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    folder = ""
    with suppress(OSError):  # whoever needs to write there says so
        folder = tempfile.mkdtemp(prefix=".tmp-", dir=place)
    if not folder:
        yield
        return
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    try:
        yield
    finally:
        os.environ.pop("TMPDIR")
        if before[0] is not None:
            os.environ["TMPDIR"] = before[0]
        tempfile.tempdir = before[1]
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A name beside a file, of which nothing is left at the end."""
    part = path.with_name(f".{short_name(path.name)}.{secrets.token_hex(4)}.part")
    try:
        yield part
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}", found=error, expected="a writable folder with room",
            remedy="free space, or choose another -o",
        ) from error
